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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/ha"
)

// behindLink puts a host that has not started yet into a network namespace of its own,
// and gives the others addresses at the near end of the link. It returns what takes the
// link down and up.
func (f *flock) behindLink(h *host) (link func(state string)) {
	f.t.Helper()
	ip := func(args ...string) {
		f.t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			f.t.Fatalf("ip %s (it needs root): %v: %s", strings.Join(args, " "), err, out)
		}
	}
	pid := os.Getpid()
	ns, outer, inner := fmt.Sprintf("mst%dn", pid), fmt.Sprintf("mst%dv", pid), fmt.Sprintf("mst%di", pid)
	subnet, last := fmt.Sprintf("10.99.%d.", pid/64%256), pid%64*4
	near, far := fmt.Sprint(subnet, last+1), fmt.Sprint(subnet, last+2)
	ip("netns", "add", ns)
	f.t.Cleanup(func() {
		h.end()
		_ = exec.Command("ip", "link", "del", outer).Run()
		_ = exec.Command("ip", "netns", "del", ns).Run()
	})
	ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", ns)
	ip("addr", "add", near+"/30", "dev", outer)
	ip("link", "set", outer, "up")
	ip("-n", ns, "addr", "add", far+"/30", "dev", inner)
	ip("-n", ns, "link", "set", inner, "up")
	ip("-n", ns, "link", "set", "lo", "up")
	at := func(h *host, addr string) {
		_, port, _ := net.SplitHostPort(h.addr)
		h.addr = net.JoinHostPort(addr, port)
	}
	for _, other := range f.others(h) {
		at(other, near)
	}
	at(h, far)
	h.wrap = []string{"ip", "netns", "exec", ns}
	return func(state string) { ip("-n", ns, "link", "set", inner, state) }
}

// TestAVoterCarriesTheQuestionOfANodeThatIsCutOffToAWitness: the witness, which leads,
// has no pool, so the lease of a node without a network goes on by what n1 carries alone.
// Without the storage heartbeat the same node is lost and its guest moves.
func TestAVoterCarriesTheQuestionOfANodeThatIsCutOffToAWitness(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	n1, victim, witness := f.nodes[0], f.nodes[1], f.nodes[2]
	link := f.behindLink(victim)
	f.found()
	victim.start()
	victim.run("cluster", "join", f.joinToken(n1), "--data-dir", victim.dataDir)
	witness.start()
	witness.run("cluster", "join", strings.TrimSpace(n1.run("cluster", "token", "create", "--role", "witness")), "--data-dir", witness.dataDir)
	f.voting(60*time.Second, n1, 3)
	shared := f.sharedPool(n1, 2)
	n1.run("node", "maintenance", "on", n1.name)
	n1.run("vm", "create", "kept", "--memory", "64M", "--disk", "64M", "--pool", "shared", "--ha", "restart", "--start")
	n1.run("node", "maintenance", "off", n1.name)
	n1.run("cluster", "transfer", witness.name)
	f.leads(60*time.Second, n1, func(leader string) bool { return leader == witness.name })
	id := n1.vm("kept").Meta.ID
	before := qemus(t, id)
	if on := n1.vm("kept").Status.Node; len(before) != 1 || on != victim.name {
		t.Fatalf("QEMUs %v on %s", before, on)
	}
	runsOn := func() {
		t.Helper()
		if now := qemus(t, id); !slices.Equal(now, before) {
			t.Fatalf("its QEMU was %v and is %v", before, now)
		}
	}
	ready := func() error {
		if n := n1.node(victim.name); n.Status.CutOff != nil || n.Status.Phase != api.NodeReady {
			return fmt.Errorf("%+v", n.Status)
		}
		return nil
	}
	notes := func() []string {
		paths, err := filepath.Glob(filepath.Join(shared, "notes", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return paths
	}
	f.eventually(60*time.Second, "two nodes leave their notes in the pool", func() error {
		if len(notes()) < 2 {
			return fmt.Errorf("there are %v", notes())
		}
		return nil
	})

	link("down")
	down := time.Now()
	// So long that a lease has ended, and the node is lost, several times over, all of it while
	// the witness leads: on a machine that stands still another may be elected.
	const long = 3 * ha.LostAfter
	f.eventually(10*long, "the node is cut off for long, and not lost", func() error {
		if leader := n1.members().Leader; leader != witness.name {
			down = time.Now()
			n1.try("cluster", "transfer", witness.name)
			return fmt.Errorf("%q leads", leader)
		}
		n := n1.node(victim.name)
		if n.Status.Phase != api.NodeReady {
			t.Fatalf("%s after the link went down it is %q: %+v", time.Since(down), n.Status.Phase, n.Status)
		}
		runsOn()
		switch c := n.Status.CutOff; {
		case c == nil:
			return errors.New("it is not cut off")
		case time.Since(down) < long:
			return fmt.Errorf("%s to go", long-time.Since(down))
		}
		return nil
	})
	if paths := notes(); len(paths) != 2 {
		t.Errorf("the witness has a note, and needs nobody who carries: %v", paths)
	}
	link("up")
	f.eventually(60*time.Second, "the node is connected again", ready)
	f.eventually(60*time.Second, "it follows and votes", func() error {
		if s := victim.members(); s.NoQuorum != nil || s.Leader == "" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	runsOn()
	if vm := n1.vm("kept"); vm.Status.Node != victim.name || vm.Status.Phase != api.VMRunning {
		t.Errorf("the guest is %s on %s", vm.Status.Phase, vm.Status.Node)
	}

	n1.run("ha", "set", "--storage-heartbeat", "off")
	link("down")
	f.eventually(90*time.Second, "without the heartbeat the node is lost, and the guest runs elsewhere", func() error {
		now := qemus(t, id)
		if len(now) > 1 {
			t.Fatalf("it runs twice: %v", now)
		}
		n, vm := n1.node(victim.name), n1.vm("kept")
		if n.Status.Phase != api.NodeLost || vm.Status.Node != n1.name || vm.Status.Phase != api.VMRunning || len(now) != 1 || slices.Equal(now, before) {
			return fmt.Errorf("the node is %s, the guest %s on %s, QEMUs %v", n.Status.Phase, vm.Status.Phase, vm.Status.Node, now)
		}
		return nil
	})
	link("up")
	f.eventually(60*time.Second, "the node is back", ready)
	if now := qemus(t, id); len(now) != 1 {
		t.Errorf("QEMUs %v", now)
	}
}
