// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// tinyImage builds the test guest, once: it costs seconds when it is there.
func tinyImage(t *testing.T) string {
	t.Helper()
	path, err := buildTinyImage()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildTinyImage = sync.OnceValues(func() (string, error) {
	path, err := filepath.Abs("../build/guest/tiny.qcow2")
	if err != nil {
		return "", err
	}
	if out, err := exec.Command("../scripts/guest-image", "--output", path).CombinedOutput(); err != nil {
		return "", fmt.Errorf("guest image: %w\n%s", err, out)
	}
	return path, nil
})

// sharedPool makes a pool, returns its directory, and waits until so many nodes can use it:
// each makes sure first that it is the directory that the others see.
func (f *flock) sharedPool(at *host, nodes int) (path string) {
	f.t.Helper()
	path = filepath.Join(f.dir, "shared")
	if err := os.Mkdir(path, 0o700); err != nil {
		f.t.Fatal(err)
	}
	at.run("pool", "create", "shared", "--type", "shared", "--path", path)
	f.eventually(60*time.Second, "the nodes can use the pool", func() error {
		var p api.Pool
		f.decode(at.run("pool", "show", "shared", "-o", "json"), &p)
		ready := slices.DeleteFunc(p.Status.Nodes, func(s api.PoolStateStatus) bool { return !s.Ready })
		if len(ready) != nodes {
			return fmt.Errorf("%+v", p.Status.Nodes)
		}
		return nil
	})
	return path
}

// withGuest makes a shared pool, the image tiny and the running VM web1.
func (f *flock) withGuest(at *host, more ...string) {
	f.t.Helper()
	f.sharedPool(at, len(f.nodes))
	at.run("image", "create", "tiny", "--pool", "shared", "--file", tinyImage(f.t))
	at.run(append([]string{"vm", "create", "web1", "--cpu", "1", "--memory", "128M", "--image", "tiny", "--pool", "shared", "--ha", "restart", "--start"}, more...)...)
}

var counterLine = regexp.MustCompile(`muster-guest name=web1 boot=(\d+) counter=(\d+)`)

// counter returns the last line of the guest, through any node.
func (h *host) counter() (boot, count int) {
	r := h.try("vm", "console", "web1", "--log")
	all := counterLine.FindAllStringSubmatch(r.stdout, -1)
	if len(all) == 0 {
		return 0, 0
	}
	last := all[len(all)-1]
	boot, _ = strconv.Atoi(last[1])
	count, _ = strconv.Atoi(last[2])
	return boot, count
}

// bootPatience is for what a guest does, which has no processor of its own.
const bootPatience = 4 * time.Minute

// counting waits until the guest has counted on.
func (f *flock) counting(at *host, within time.Duration, boot, beyond int) (int, int) {
	f.t.Helper()
	var b, c int
	f.eventually(within, "the guest counts on", func() error {
		if b, c = at.counter(); b < boot || c <= beyond {
			return fmt.Errorf("boot %d, counter %d", b, c)
		}
		return nil
	})
	return b, c
}

func TestGuestOutlivesEveryDaemonAndSurvivesItsHost(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	f.withGuest(f.nodes[1])
	_, c := f.counting(f.nodes[2], bootPatience, 1, 0)
	vm := f.nodes[0].vm("web1")
	pid := qemus(t, vm.Meta.ID)
	if len(pid) != 1 {
		t.Fatalf("QEMU processes: %v", pid)
	}

	t.Run("kill -9 of any one daemon does not stop the counter", func(t *testing.T) {
		for _, h := range f.nodes {
			was := len(h.log())
			h.kill9()
			other := f.others(h)[0]
			if h.name == vm.Status.Node {
				h.start() // its console is served by its own daemon
			} else {
				_, c = f.counting(other, bootPatience, 1, c)
				h.start()
			}
			_, c = f.counting(h, bootPatience, 1, c)
			if now := qemus(t, vm.Meta.ID); !slices.Equal(now, pid) {
				t.Fatalf("QEMU was %v before the daemon of %s was killed and is %v", pid, h.name, now)
			}
			// What comes next needs it.
			f.eventually(60*time.Second, h.name+" can use the pool again", func() error {
				if !strings.Contains(h.log()[was:], "pool=shared ready=true") {
					return errors.New("not yet")
				}
				return nil
			})
		}
		if b, _ := f.nodes[0].counter(); b != 1 {
			t.Errorf("the guest booted %d times", b)
		}
	})

	t.Run("memory and disks are saved, copied and taken back", func(t *testing.T) { c = f.savedAndCopied(t) })
	vm = f.nodes[0].vm("web1")

	t.Run("a daemon that is stopped loses its guest, which runs elsewhere, once", func(t *testing.T) {
		old := f.byName(vm.Status.Node)
		rest := f.others(old)
		old.signal(syscall.SIGSTOP)
		twice := watchQEMUs(t, vm.Meta.ID)
		b, after := f.counting(rest[0], bootPatience, 2, c)
		old.signal(syscall.SIGCONT)
		moved := rest[1].vm("web1")
		if moved.Status.Node == old.name || b != 2 {
			t.Errorf("after the stop: node %s, boot %d", moved.Status.Node, b)
		}
		f.eventually(60*time.Second, "the stopped node is back", func() error {
			if p := rest[0].node(old.name).Status.Phase; p != api.NodeReady {
				return fmt.Errorf("phase %s", p)
			}
			return nil
		})
		_, c = f.counting(rest[1], bootPatience, 2, after)
		if n := twice(); n > 1 {
			t.Errorf("%d QEMUs of the VM ran at once", n)
		}
	})

	t.Run("a host that dies loses its guest to another", func(t *testing.T) {
		victim := f.byName(f.nodes[0].vm("web1").Status.Node)
		rest := f.others(victim)
		victim.end()
		b, _ := f.counting(rest[0], bootPatience, 3, c)
		if b != 3 {
			t.Errorf("boot %d after the loss", b)
		}
		if p := rest[1].node(victim.name).Status.Phase; p != api.NodeLost {
			t.Errorf("the dead node is %s", p)
		}
		victim.start() // switched on again, under the same leader
		f.eventually(60*time.Second, "the dead node is back", func() error {
			if p := rest[0].node(victim.name).Status.Phase; p != api.NodeReady {
				return fmt.Errorf("phase %s", p)
			}
			return nil
		})
		for range 25 { // and stays
			if p := rest[1].node(victim.name).Status.Phase; p != api.NodeReady {
				t.Fatalf("the node that came back is %s again", p)
			}
			time.Sleep(200 * time.Millisecond)
		}
	})
}

// watchQEMUs looks continuously until the returned function is called, which
// says how many QEMUs of the VM were seen at once.
func watchQEMUs(t *testing.T, vmID string) func() int {
	stop, most := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			n = max(n, len(qemus(t, vmID)))
			select {
			case <-stop:
				most <- n
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() int { close(stop); return <-most }
}

func TestLifeCycleThroughDifferentNodes(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	f.withGuest(a)
	_, n := f.counting(c, bootPatience, 1, 0)

	b.run("vm", "pause", "web1")
	if p := c.vm("web1").Status.Phase; p != api.VMPaused {
		t.Errorf("paused: %s", p)
	}
	_, still := a.counter()
	c.run("vm", "resume", "web1")
	f.counting(a, bootPatience, 1, max(n, still))
	a.run("vm", "reboot", "web1")
	f.counting(b, bootPatience, 2, n)
	c.run("vm", "stop", "web1") // the ACPI power button
	vm := b.vm("web1")
	if vm.Status.Phase != api.VMStopped || len(qemus(t, vm.Meta.ID)) != 0 {
		t.Errorf("stopped: %s, %v", vm.Status.Phase, qemus(t, vm.Meta.ID))
	}
	b.run("vm", "start", "web1")
	f.counting(c, bootPatience, 3, n)
	a.refuse(4, "stop", "vm", "rm", "web1")
	b.run("vm", "stop", "web1", "--force")
	c.run("vm", "rm", "web1")
	a.refuse(3, "web1", "vm", "show", "web1")
	if left, _ := filepath.Glob(filepath.Join(f.dir, "shared/volumes/*")); len(left) != 0 {
		t.Errorf("volumes left behind: %v", left)
	}
	b.run("image", "rm", "tiny")
	c.run("pool", "rm", "shared")
}

func TestJoinRefusesWhatItMust(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.found()
	first, second, third := f.nodes[0], f.nodes[1], f.nodes[2]
	second.start()
	third.start()
	token := f.joinToken(first)

	second.refuse(2, "join token", "cluster", "join", "nonsense", "--data-dir", second.dataDir)
	second.run("cluster", "join", token, "--data-dir", second.dataDir)
	third.refuse(4, "used already", "cluster", "join", token, "--data-dir", third.dataDir)
	second.refuse(4, "already", "cluster", "join", f.joinToken(first), "--data-dir", second.dataDir)
	second.refuse(4, "already", "cluster", "init", "--data-dir", second.dataDir)

	t.Run("another cluster's token", func(t *testing.T) {
		g := newFlock(t, 1)
		g.found()
		foreign := g.joinToken(g.nodes[0])
		second.refuse(4, "already", "cluster", "join", foreign, "--data-dir", second.dataDir)
	})
	t.Run("a revoked token", func(t *testing.T) {
		token := f.joinToken(first)
		for _, name := range strings.Fields(first.run("token", "ls", "-o", "name")) {
			if strings.Contains(name, "join-") {
				first.run("token", "rm", strings.TrimPrefix(name, "token/"))
			}
		}
		third.refuse(4, "not known", "cluster", "join", token, "--data-dir", third.dataDir)
	})
	t.Run("a name that is taken", func(t *testing.T) {
		h := f.add("n2")
		h.dataDir, h.runDir = h.dataDir+"-b", h.runDir+"-b"
		h.start()
		h.refuse(4, "--node-name", "cluster", "join", f.joinToken(first), "--data-dir", h.dataDir)
	})
	if p := first.node("n2").Status.Phase; p != api.NodeReady && p != api.NodeJoining {
		t.Errorf("n2 is %s", p)
	}
	third.run("cluster", "join", f.joinToken(second), "--data-dir", third.dataDir) // nothing was left half-made
}

func TestNodeLeavesGracefully(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	b.refuse(4, "alive", "node", "remove", "n3", "--force")
	a.run("node", "remove", "n1") // most likely the leader: it hands over first
	select {
	case <-a.exited:
		if !strings.Contains(a.log(), "was removed from cluster test") {
			t.Errorf("the removed daemon ended without saying why:\n%s", a.log())
		}
	case <-time.After(60 * time.Second):
		t.Error("the removed daemon goes on")
	}
	f.eventually(60*time.Second, "two members remain", func() error {
		out := b.run("node", "ls", "-o", "name")
		if n := len(strings.Fields(out)); n != 2 {
			return fmt.Errorf("%d nodes: %s", n, out)
		}
		return nil
	})
	// What the removed node was asked is on record.
	if es := b.events("audit.node.delete"); len(es) != 1 || es[0].Spec.Target != "n1" || es[0].Spec.Actor != "admin" {
		t.Errorf("the audit of the removal: %+v", es)
	}
	b.run("raw", "put", "left/over", "works")
	if got := c.run("raw", "get", "left/over"); got != "works" {
		t.Errorf("read %q", got)
	}
}

// refuseStart expects the daemon to end by itself and to say why.
func (h *host) refuseStart(words string) {
	h.f.t.Helper()
	h.spawn()
	select {
	case <-h.exited:
	case <-time.After(60 * time.Second):
		h.f.t.Fatalf("%s runs, want a refusal about %q", h.name, words)
	}
	if log := h.log(); !strings.Contains(log, words) {
		h.f.t.Errorf("%s: log lacks %q:\n%s", h.name, words, log)
	}
}

func TestDaemonRefusesToStart(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	f.found()
	a, b := f.nodes[0], f.nodes[1]
	t.Run("on a directory in use", func(t *testing.T) {
		h := f.add("twin")
		h.dataDir = a.dataDir
		h.refuseStart("another musterd is running")
	})
	t.Run("on a run directory in use", func(t *testing.T) {
		h := f.add("rundir")
		h.runDir = a.runDir
		h.refuseStart("another musterd uses the run directory")
	})
	t.Run("on a run directory whose guard has another node's VM", func(t *testing.T) {
		g := newFlock(t, 1)
		g.up()
		g.nodes[0].run("vm", "create", "v", "--memory", "64M", "--disk", "64M", "--start")
		g.nodes[0].kill9()
		h := f.add("heir")
		h.runDir = g.nodes[0].runDir
		h.start() // it belongs to no cluster yet, so it harms nobody
		h.refuse(1, "has the guard and VMs of node n1 of cluster test", "cluster", "join", f.joinToken(a), "--data-dir", h.dataDir)
	})
	t.Run("on a port in use", func(t *testing.T) {
		h := f.add("port")
		h.addr = a.addr
		h.refuseStart("cannot listen on " + a.addr)
	})
	t.Run("with a configuration that has an unknown field", func(t *testing.T) {
		h := f.add("conf")
		h.conf["dataDirr"] = "/x"
		h.refuseStart("dataDirr")
	})
	t.Run("with a damaged identity", func(t *testing.T) {
		b.start()
		b.run("cluster", "join", f.joinToken(a), "--data-dir", b.dataDir)
		b.stop()
		if err := os.WriteFile(filepath.Join(b.dataDir, "node.json"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		b.refuseStart("damaged")
	})
	t.Run("with the keys of another cluster", func(t *testing.T) {
		g := newFlock(t, 1)
		g.found()
		h := g.nodes[0]
		h.stop()
		for _, name := range []string{"ca.crt", "node.crt", "node.key"} {
			from, err := os.ReadFile(filepath.Join(a.dataDir, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(h.dataDir, name), from, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h.refuseStart("restore both from one backup")
	})
}

func TestHostWithoutQEMURunsNoVMAndSaysWhy(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 1)
	f.nodes[0].conf["qemu"] = "/nonexistent/qemu"
	f.found()
	h := f.nodes[0]
	f.eventually(60*time.Second, "the node is ready", func() error {
		if p := h.node("n1").Status.Phase; p != api.NodeReady {
			return fmt.Errorf("%s", p)
		}
		return nil
	})
	n := h.node("n1")
	if !slices.ContainsFunc(n.Status.Conditions, func(c api.Condition) bool {
		return !c.OK && strings.Contains(c.Message, "qemu")
	}) {
		t.Errorf("conditions do not name QEMU: %+v", n.Status.Conditions)
	}
	h.refuse(4, "QEMU", "vm", "create", "v", "--disk", "1G", "--start")
}

func TestUninitialisedDaemonSaysWhatToDo(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 1)
	h := f.nodes[0]
	h.start()
	c, err := net.Dial("tcp", h.addr)
	if err == nil {
		_ = c.Close()
		t.Error("a daemon without a cluster listens on its port")
	}
}

func TestDeadNodeWithAnUnprotectedVMCanBeRemoved(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, b, dead := f.nodes[0], f.nodes[1], f.nodes[2]
	for _, h := range []*host{a, b} {
		h.run("node", "maintenance", "on", h.name)
	}
	a.run("vm", "create", "loner", "--memory", "64M", "--disk", "64M", "--start")
	for _, h := range []*host{a, b} {
		h.run("node", "maintenance", "off", h.name)
	}
	dead.end()
	f.eventually(60*time.Second, "the dead node is lost", func() error {
		if p := a.node(dead.name).Status.Phase; p != api.NodeLost {
			return fmt.Errorf("%s", p)
		}
		return nil
	})
	f.eventually(60*time.Second, "nobody knows of its vm", func() error {
		if p := b.vm("loner").Status.Phase; p != api.VMUnknown {
			return fmt.Errorf("%s", p)
		}
		return nil
	})
	a.refuse(4, "switched off", "node", "remove", dead.name)
	a.run("node", "remove", dead.name, "--force")
	vm := b.vm("loner")
	if vm.Status.Node == dead.name || vm.Spec.Power != api.PowerStopped {
		t.Errorf("after the removal: %+v %+v", vm.Spec, vm.Status)
	}
	b.run("vm", "rm", "loner")
	a.refuse(3, "loner", "vm", "show", "loner")

	dead.spawn() // it may end before anybody sees it
	select {
	case <-dead.exited:
		if !strings.Contains(dead.log(), "was removed from cluster test") {
			t.Errorf("the removed node ended without saying why:\n%s", dead.log())
		}
	case <-time.After(60 * time.Second):
		t.Error("a node that was removed while it was away goes on")
	}
}
