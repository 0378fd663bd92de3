// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bootLine is what the guest prints after each counter that is on its disk.
var bootLine = regexp.MustCompile(`muster-guest name=web1 boot=(\d+) counter=(\d+)`)

// TestGuestCountsThroughMigrations moves a real guest between real daemons on a
// shared pool and kills daemons at its way.
func TestGuestCountsThroughMigrations(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	f.withGuest(f.nodes[0])
	_, c := f.counting(f.nodes[1], bootPatience, 1, 0)
	vm := f.nodes[0].vm("web1")
	id := vm.Meta.ID

	f.nodes[0].refuse(4, "is on node "+vm.Status.Node+" already", "vm", "migrate", "web1", "--to", vm.Status.Node)
	f.nodes[0].refuse(3, "does not exist", "vm", "migrate", "web1", "--to", "nowhere")
	f.nodes[0].refuse(3, "does not exist", "vm", "migrate", "nothing")

	for i := range 3 {
		from := f.nodes[0].vm("web1").Status.Node
		out := f.nodes[i].run("vm", "migrate", "web1", "--channels", strconv.Itoa(1+2*i))
		now := f.nodes[i].vm("web1")
		if now.Status.Node == from || now.Status.PID == 0 {
			t.Fatalf("after migration %d it is on %s, was on %s: %s", i, now.Status.Node, from, out)
		}
		var boot int
		boot, c = f.counting(f.nodes[i], bootPatience, 1, c)
		if boot != 1 {
			t.Fatalf("the guest booted %d times", boot)
		}
		f.eventually(60*time.Second, "one QEMU is left", func() error {
			if q := qemus(t, id); len(q) != 1 {
				return fmt.Errorf("%v", q)
			}
			return nil
		})
	}

	t.Run("a daemon killed on the way leaves one guest", func(t *testing.T) {
		for _, end := range []string{"source", "target"} {
			from := f.byName(f.nodes[0].vm("web1").Status.Node)
			to := f.others(from)[0]
			asked := f.others(from)[1]
			f.eventually(60*time.Second, "a migration begins", func() error { // the other one may still be ending
				if r := asked.try("vm", "migrate", "web1", "--to", to.name, "--bandwidth", "1M", "--no-wait"); r.code != 0 {
					return fmt.Errorf("%s", r.stderr)
				}
				return nil
			})
			f.eventually(60*time.Second, "the memory flows", func() error {
				if q := qemus(t, id); len(q) != 2 {
					return fmt.Errorf("%d QEMUs", len(q))
				}
				if out := asked.run("task", "ls", "-o", "json"); !strings.Contains(out, "memory goes to node") {
					return fmt.Errorf("not yet")
				}
				return nil
			})
			victim := from
			if end == "target" {
				victim = to
			}
			victim.kill9()
			victim.start()
			f.eventually(60*time.Second, "one QEMU is left", func() error {
				if q := qemus(t, id); len(q) != 1 {
					return fmt.Errorf("%v", q)
				}
				return nil
			})
			var boot int
			boot, c = f.counting(asked, bootPatience, 1, c)
			if now := asked.vm("web1"); boot != 1 || now.Status.Node != from.name {
				t.Errorf("after the kill of the %s: boot %d, on %s", end, boot, now.Status.Node)
			}
		}
	})

	t.Run("cancel", func(t *testing.T) {
		from := f.nodes[0].vm("web1").Status.Node
		var out string
		f.eventually(60*time.Second, "a migration begins", func() error {
			r := f.nodes[0].try("vm", "migrate", "web1", "--bandwidth", "1M", "--no-wait", "-o", "json")
			if out = r.stdout; r.code != 0 {
				return fmt.Errorf("%s", r.stderr)
			}
			return nil
		})
		m := regexp.MustCompile(`"id": *"([0-9a-f-]{36})"`).FindStringSubmatch(out[strings.Index(out, `"task"`)+1:])
		if m == nil {
			t.Fatalf("no task in %s", out)
		}
		f.nodes[1].run("task", "cancel", m[1])
		_, c = f.counting(f.nodes[2], bootPatience, 1, c)
		if now := f.nodes[0].vm("web1").Status.Node; now != from {
			t.Errorf("it is on %s, was on %s", now, from)
		}
	})

	t.Run("an evacuated node is empty", func(t *testing.T) {
		from := f.byName(f.nodes[0].vm("web1").Status.Node)
		asked := f.others(from)[0]
		asked.run("node", "evacuate", from.name)
		if now := asked.vm("web1").Status.Node; now == from.name {
			t.Errorf("it is still on %s", now)
		}
		asked.refuse(4, "maintenance", "vm", "migrate", "web1", "--to", from.name)
		asked.run("node", "maintenance", "off", from.name)
		if boot, n := f.counting(asked, bootPatience, 1, c); boot != 1 {
			t.Errorf("the guest booted %d times", boot)
		} else {
			c = n
		}
	})

	t.Run("a disk goes along", func(t *testing.T) {
		at := f.nodes[0]
		at.run("image", "create", "own", "--pool", "local", "--file", tinyImage(t))
		at.run("vm", "create", "web2", "--cpu", "1", "--memory", "128M", "--image", "own", "--start")
		counted := func() int {
			all := regexp.MustCompile(`muster-guest name=web2 boot=1 counter=(\d+)`).FindAllStringSubmatch(at.try("vm", "console", "web2", "--log").stdout, -1)
			if len(all) == 0 {
				return 0
			}
			n, _ := strconv.Atoi(all[len(all)-1][1])
			return n
		}
		beyond := func(least int) (n int) {
			f.eventually(bootPatience, "web2 counts on", func() error {
				if n = counted(); n <= least {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
			return n
		}
		n := beyond(0)
		from := f.byName(at.vm("web2").Status.Node)
		at.refuse(4, "--with-storage", "vm", "migrate", "web2")
		at.run("vm", "migrate", "web2", "--with-storage")
		to := f.byName(at.vm("web2").Status.Node)
		if to == from {
			t.Fatal("it did not move")
		}
		beyond(n)
		f.eventually(60*time.Second, "only the target has the disk", func() error {
			old, _ := filepath.Glob(from.dataDir + "/pool/volumes/*")
			now, _ := filepath.Glob(to.dataDir + "/pool/volumes/*")
			if len(old) != 0 || len(now) != 1 {
				return fmt.Errorf("%v and %v", old, now)
			}
			return nil
		})
		f.eventually(60*time.Second, "the image is free", func() error {
			if r := at.try("image", "rm", "own"); r.code != 0 {
				return fmt.Errorf("%s", r.stderr)
			}
			return nil
		})
	})

	t.Run("no counter was lost", func(t *testing.T) {
		last := 0
		for _, m := range bootLine.FindAllStringSubmatch(f.nodes[0].run("vm", "console", "web1", "--log"), -1) {
			n, _ := strconv.Atoi(m[2])
			if m[1] != "1" || n <= last {
				t.Fatalf("boot %s, counter %d after %d", m[1], n, last)
			}
			last = n
		}
	})
}
