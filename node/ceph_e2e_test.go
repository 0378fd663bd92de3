// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/cephtest"
)

// cephAddress is where this package's Ceph is; no other test is there.
const cephAddress = "127.0.77.1"

// TestGuestOnCeph is the life of a real guest whose disk is in a real Ceph: it boots,
// writes, is enlarged, gets a disk more and migrates.
func TestGuestOnCeph(t *testing.T) {
	t.Parallel()
	ceph := cephtest.Start(t, cephAddress)
	f := newFlock(t, 2)
	f.up()
	at := f.nodes[0]
	keyring := filepath.Join(t.TempDir(), "keyring")
	if err := os.WriteFile(keyring, []byte("[client."+ceph.Spec.User+"]\n\tkey = "+ceph.Spec.Key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	at.refuse(2, "spec.ceph.key", "pool", "create", "ceph", "--type", "rbd", "--ceph-pool", ceph.Spec.Pool, "--ceph-user", ceph.Spec.User, "--monitor", cephAddress)
	at.run("pool", "create", "ceph", "--type", "rbd", "--ceph-pool", ceph.Spec.Pool, "--ceph-user", "client."+ceph.Spec.User, "--monitor", cephAddress, "--key-file", keyring)
	f.eventually(60*time.Second, "the pool is ready on both nodes", func() error {
		if out := at.run("pool", "ls"); !strings.Contains(out, "2/2") || !strings.Contains(out, "ceph:"+ceph.Spec.Pool) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	at.run("image", "create", "tiny", "--pool", "ceph", "--file", tinyImage(t))
	at.run("vm", "create", "web1", "--cpu", "1", "--memory", "128M", "--image", "tiny", "--pool", "ceph", "--start")
	removedVM(f, ceph) // while the guest boots
	_, c := f.counting(f.nodes[1], bootPatience, 1, 0)
	vm := at.vm("web1")
	disk := vm.Spec.Disks[0].Volume

	at.refuse(4, "only qcow2 volumes (those in pools of type dir and shared) have snapshots", "vm", "snapshot", "create", "web1", "s1")
	at.run("vm", "disk", "resize", "web1", disk, "512M")
	at.run("volume", "create", "more", "--size", "64M", "--pool", "ceph")
	at.run("vm", "disk", "attach", "web1", "more")
	f.eventually(60*time.Second, "the disk is enlarged, and the other one plugged in", func() error {
		now := at.vm("web1")
		if size := ceph.Admin(t, "rbd", "ls", "-l", ceph.Spec.Pool); !strings.Contains(size, "512 MiB") {
			return fmt.Errorf("%s", size)
		}
		if now.Status.Hardware == nil || len(now.Status.Hardware.Disks) != 2 {
			return fmt.Errorf("%+v", now.Status)
		}
		return nil
	})
	from := vm.Status.Node
	f.nodes[1].run("vm", "migrate", "web1")
	if now := at.vm("web1").Status.Node; now == from {
		t.Fatalf("it is still on %s", from)
	}
	if boot, _ := f.counting(at, bootPatience, 1, c); boot != 1 {
		t.Fatalf("the guest booted %d times", boot)
	}
	notes := f.noteServers()
	for _, pid := range append(qemus(t, vm.Meta.ID), notes...) {
		for _, file := range []string{"cmdline", "environ"} {
			if b, err := os.ReadFile(filepath.Join("/proc", pid, file)); err != nil || strings.Contains(string(b), ceph.Spec.Key) {
				t.Errorf("the key is in %s of a process (%v)", file, err)
			}
		}
	}
	for _, said := range []string{at.run("pool", "show", "ceph", "-o", "json"), at.run("raw", "ls", "muster/"), at.log(), f.nodes[1].log()} {
		if strings.Contains(said, ceph.Spec.Key) {
			t.Error("the key is shown")
		}
	}
	// What serves the notes of a daemon that is killed ends, also if it stands still.
	pid, err := strconv.Atoi(notes[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	f.nodes[1].kill9()
	f.eventually(60*time.Second, "the server of its notes has ended", func() error {
		if left := processes(t, "qemu-nbd", f.nodes[1].runDir); len(left) > 0 {
			return fmt.Errorf("%s is left", left)
		}
		return nil
	})
}

// noteServers are the processes by which the nodes leave their notes in the pool, one for
// each.
func (f *flock) noteServers() (pids []string) {
	f.t.Helper()
	for _, h := range f.nodes {
		f.eventually(60*time.Second, h.name+" has one server of notes", func() error {
			found := processes(f.t, "qemu-nbd", h.runDir)
			if len(found) != 1 {
				return fmt.Errorf("%d: %s", len(found), found)
			}
			pids = append(pids, found...)
			return nil
		})
	}
	return pids
}

// removedVM makes a VM with UEFI variables and removes it before it ever ran: what a
// QEMU had open that was killed, Ceph keeps for half a minute.
func removedVM(f *flock, ceph *cephtest.Ceph) {
	f.t.Helper()
	at := f.nodes[1]
	at.run("vm", "create", "web2", "--cpu", "1", "--memory", "128M", "--image", "tiny", "--uefi")
	count := func() int { return strings.Count(ceph.Admin(f.t, "rbd", "ls", ceph.Spec.Pool), "volume-") }
	f.eventually(60*time.Second, "two volumes more are there", func() error {
		if n := count(); n != 3 {
			return fmt.Errorf("%d volumes", n)
		}
		return nil
	})
	at.run("vm", "rm", "web2")
	f.eventually(60*time.Second, "they are gone", func() error {
		if n := count(); n != 1 {
			return fmt.Errorf("%d volumes", n)
		}
		return nil
	})
}
