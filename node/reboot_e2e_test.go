// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// rebootable gives every host a boot, and a command that is only noted.
func (f *flock) rebootable() {
	f.t.Helper()
	for _, h := range f.nodes {
		boot := filepath.Join(f.dir, h.name+".boot")
		if err := os.WriteFile(boot, []byte("first\n"), 0o600); err != nil {
			f.t.Fatal(err)
		}
		h.conf["bootIDFile"] = boot
		h.conf["rebootCommand"] = "touch " + boot + ".asked"
	}
}

// goesDown waits for the command to this host, ends its daemon and gives it its next boot.
func (h *host) goesDown(boot string) {
	h.f.t.Helper()
	h.f.eventually(120*time.Second, "host "+h.name+" gets its command", func() error {
		_, err := os.Stat(h.conf["bootIDFile"] + ".asked")
		return err
	})
	h.stop()
	if err := os.WriteFile(h.conf["bootIDFile"], []byte(boot+"\n"), 0o600); err != nil {
		h.f.t.Fatal(err)
	}
}

// led returns the host whose node leads.
func (f *flock) led(at *host) (leader *host) {
	f.t.Helper()
	f.eventually(60*time.Second, "a node leads", func() error {
		name := at.members().Leader
		if name == "" {
			return errors.New("none does")
		}
		leader = f.byName(name)
		return nil
	})
	return leader
}

// ended waits until the only task about reboots has succeeded.
func (f *flock) ended(at *host, action string) {
	f.t.Helper()
	f.eventually(90*time.Second, action+" is done", func() error {
		r := at.try("task", "ls")
		for line := range strings.Lines(r.stdout) {
			if strings.Contains(line, action) && strings.Contains(line, "succeeded") {
				return nil
			}
			if strings.Contains(line, action) && (strings.Contains(line, "failed") || strings.Contains(line, "cancelled")) {
				f.t.Fatal(r.stdout)
			}
		}
		return fmt.Errorf("%s%s", r.stdout, r.stderr)
	})
}

// TestNodeIsRebootedAsPlanned reboots the node of a real guest: its "reboot" is a
// program that ends the daemon, which is started again with another boot.
func TestNodeIsRebootedAsPlanned(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.rebootable()
	f.up()
	f.withGuest(f.nodes[0])
	_, c := f.counting(f.nodes[1], bootPatience, 1, 0)
	victim := f.byName(f.nodes[0].vm("web1").Status.Node)
	asked := f.others(victim)[0]
	if out := asked.run("node", "reboot", victim.name, "--dry-run"); !strings.Contains(out, "Voters left") || !strings.Contains(out, "migrate") {
		t.Error(out)
	}
	asked.run("node", "reboot", victim.name, "--no-wait")
	asked.refuse(4, "wait for task", "node", "reboot", victim.name)
	asked.refuse(4, "one at a time", "node", "reboot", f.others(victim)[1].name)
	victim.goesDown("second")
	// Longer than a node may be silent that nobody expects to be away.
	end := time.Now().Add(16 * time.Second)
	f.eventually(60*time.Second, "the time after which a node is lost", func() error {
		n := asked.node(victim.name)
		if n.Status.Phase != "ready" || n.Status.Absence == nil || n.Status.LostAt != nil {
			t.Fatalf("while it is away: %+v", n.Status)
		}
		if left := time.Until(end); left > 0 {
			return fmt.Errorf("%s to go", left)
		}
		return nil
	})
	if out := asked.run("node", "ls"); !strings.Contains(out, "rebooting (planned),maintenance") {
		t.Error(out)
	}
	victim.start()
	f.eventually(60*time.Second, "the node takes VMs again", func() error {
		if n := asked.node(victim.name); n.Spec.Maintenance || n.Status.Absence != nil || n.Status.LostAt != nil {
			return fmt.Errorf("%+v", n.Status)
		}
		return nil
	})
	f.eventually(60*time.Second, "the task is done", func() error {
		if out := asked.run("task", "ls"); !strings.Contains(out, "node.reboot") || strings.Contains(out, "failed") || strings.Contains(out, "running") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := asked.run("ha", "proof"); strings.Contains(out, victim.name) {
		t.Errorf("it was taken for a loss: %s", out)
	}
	if boot, _ := f.counting(asked, bootPatience, 1, c); boot != 1 || asked.vm("web1").Status.Node == victim.name {
		t.Errorf("the guest booted %d times", boot)
	}
}

// TestRebootEndsWellThoughTheLeaderIsKilled kills it before the host has its command and
// again while the host is away, which costs the quorum until it is back.
func TestRebootEndsWellThoughTheLeaderIsKilled(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.rebootable()
	f.up()
	leader := f.led(f.nodes[0])
	victim, third := f.others(leader)[0], f.others(leader)[1]
	third.run("node", "reboot", victim.name, "--no-wait")
	leader.kill9()
	leader.start()
	victim.goesDown("second")
	leader = f.led(third)
	leader.kill9()
	leader.start()
	victim.start()
	f.ended(third, "node.reboot")
	if n := third.node(victim.name); n.Spec.Maintenance || n.Status.Absence != nil || n.Status.HostBoot != "second" {
		t.Errorf("%+v %+v", n.Spec, n.Status)
	}
}

// TestAllNodesAreRebootedInTurn reboots every node of a cluster with a real guest, which
// counts on through all of it.
func TestAllNodesAreRebootedInTurn(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.rebootable()
	f.up()
	f.withGuest(f.nodes[0])
	_, c := f.counting(f.nodes[1], bootPatience, 1, 0)
	at := f.nodes[0]
	if out := at.run("cluster", "reboot", "--rolling", "--dry-run"); strings.Count(out, "Node n") != 3 || strings.Contains(out, "In the way") || strings.Contains(out, "Refused") {
		t.Fatal(out)
	}
	at.run("cluster", "reboot", "--rolling", "--no-wait")
	at.refuse(4, "a rolling reboot is under way", "cluster", "reboot", "--rolling")
	left := slices.Clone(f.nodes)
	for len(left) > 0 {
		// Whose turn it is is the cluster's choice, but the last is the one that leads then,
		// which hands over before its command.
		var next *host
		f.eventually(120*time.Second, "the next host gets its command", func() error {
			for _, h := range left {
				if _, err := os.Stat(h.conf["bootIDFile"] + ".asked"); err == nil {
					next = h
					return nil
				}
			}
			return errors.New("none has")
		})
		if len(left) > 1 && strings.Contains(next.log(), "the leader is in maintenance") {
			t.Errorf("%s led, and was not the last", next.name)
		}
		next.goesDown("second")
		for _, h := range left {
			if _, err := os.Stat(h.conf["bootIDFile"] + ".asked"); h != next && err == nil {
				t.Errorf("%s got its command beside %s", h.name, next.name)
			}
		}
		next.start()
		left = slices.DeleteFunc(left, func(h *host) bool { return h == next })
	}
	f.ended(at, "cluster.reboot")
	for _, h := range f.nodes {
		if n := at.node(h.name); n.Spec.Maintenance || n.Status.Absence != nil || n.Status.LostAt != nil || n.Status.HostBoot != "second" {
			t.Errorf("%s: %+v %+v", h.name, n.Spec, n.Status)
		}
	}
	at.refuse(4, "every node of the last rolling reboot", "cluster", "reboot", "--rolling", "--continue")
	if boot, _ := f.counting(at, bootPatience, 1, c); boot != 1 {
		t.Errorf("the guest booted %d times", boot)
	}
}
