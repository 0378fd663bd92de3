// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// noisyImage is a qcow2 file that takes a while to be sent.
func noisyImage(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "noise.qcow2")
	b := make([]byte, size)
	_, _ = rand.Read(b)
	if err := os.WriteFile(raw, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img (install qemu-utils): %v: %s", err, out)
	}
	return path
}

// onlyAt waits until the one file of a volume is on a node, and nothing else is left.
func (f *flock) onlyAt(at *host) {
	f.t.Helper()
	f.eventually(60*time.Second, "one file of the volume, on "+at.name, func() error {
		for _, h := range f.nodes {
			files, _ := filepath.Glob(h.dataDir + "/pool/volumes/*")
			half, _ := filepath.Glob(h.dataDir + "/pool/tmp/*")
			want := 0
			if h == at {
				want = 1
			}
			if len(files) != want || len(half) != 0 {
				return fmt.Errorf("%s has %v and %v", h.name, files, half)
			}
		}
		return nil
	})
}

// A stopped VM moves between real daemons, through their one port, with its
// snapshots; a daemon that is killed on the way leaves one volume.
func TestAStoppedVMMovesBetweenDaemons(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	f.up()
	a, b := f.nodes[0], f.nodes[1]
	a.run("image", "create", "base", "--file", noisyImage(t, 24<<20))
	a.run("vm", "create", "web1", "--cpu", "1", "--memory", "128M", "--image", "base")
	at := func() *host { return f.byName(a.vm("web1").Status.Node) }
	if at() != a {
		t.Fatalf("it is on %s", at().name)
	}
	a.run("vm", "snapshot", "create", "web1", "early")
	b.refuse(4, "clone of image base", "vm", "move", "web1", "--node", b.name)
	a.run("vm", "snapshot", "rm", "web1", "early")
	b.refuse(4, "muster vm move web1", "vm", "migrate", "web1")

	b.run("vm", "move", "web1", "--node", b.name)
	if at() != b {
		t.Fatalf("it is on %s", at().name)
	}
	f.onlyAt(b)
	b.run("vm", "snapshot", "create", "web1", "kept")
	a.run("image", "create", "template", "--from-volume", "web1-disk0", "--snapshot", "kept")
	a.run("vm", "move", "web1", "--node", a.name)
	f.onlyAt(a)
	a.run("vm", "snapshot", "revert", "web1", "kept")
	b.run("image", "rm", "base") // nothing is a clone of it any more

	for _, end := range []string{"source", "target"} {
		from := at()
		to := f.others(from)[0]
		from.run("vm", "move", "web1", "--node", to.name, "--no-wait")
		victim := map[string]*host{"source": from, "target": to}[end]
		victim.kill9()
		victim.start()
		f.eventually(90*time.Second, "the move is over", func() error {
			var tasks struct{ Items []api.Task }
			f.decode(a.run("task", "ls", "-o", "json"), &tasks)
			for _, task := range tasks.Items {
				if task.Spec.Action == api.ActionVMMove && !task.Status.Phase.Final() {
					return fmt.Errorf("it is %s: %s", task.Status.Phase, task.Status.Message)
				}
			}
			return nil
		})
		f.onlyAt(at())
	}
	a.run("vm", "snapshot", "revert", "web1", "kept")
}
