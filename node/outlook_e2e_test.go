// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// leave lets a node have so much memory for VMs.
func (f *flock) leave(h *host, memory api.Size) {
	f.t.Helper()
	n := f.nodes[0].node(h.name)
	f.nodes[0].run("node", "set", h.name, "--reserved-memory", fmt.Sprint(int64(n.Status.Memory-memory)/int64(api.MiB))+"M")
}

// A node that is really lost does with its VMs what was simulated just before,
// with what is shown of it by every node.
func TestARealLossDoesWhatWasSimulated(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	at := f.nodes[0]
	for i, room := range []api.Size{900, 700, 500} {
		f.leave(f.nodes[i], room*api.MiB)
	}
	create := func(name, memory, ha string) {
		at.run("vm", "create", name, "--cpu", "1", "--memory", memory, "--ha", ha, "--display", "none", "--start")
	}
	for i, memory := range []string{"96M", "64M", "128M", "72M", "80M"} {
		create(fmt.Sprintf("p%d", i), memory, "restart")
	}
	victim := f.byName(at.vm("p2").Status.Node)
	rest := f.others(victim)
	// One that is not protected there, and one that is too large for the others.
	f.leave(victim, 2000*api.MiB)
	for _, h := range rest {
		at.run("node", "maintenance", "on", h.name)
	}
	create("plain", "48M", "none")
	create("large", "800M", "restart")
	for _, h := range rest {
		at.run("node", "maintenance", "off", h.name)
	}
	r := rest[0].try("ha", "simulate", "--kill", victim.name)
	if r.code != 1 || !strings.Contains(r.stdout, "would not restart") || !strings.Contains(r.stderr, "1 VMs that ought to restart") {
		t.Errorf("simulate: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	var said api.HALoss
	f.decode(rest[0].try("ha", "simulate", "--kill", victim.name, "-o", "json").stdout, &said)
	text := rest[1].run("ha", "status")
	for _, words := range []string{"Survives:     no", "If " + victim.name + " dies", "process only", "one more may be lost"} {
		if !strings.Contains(text, words) {
			t.Errorf("status lacks %q:\n%s", words, text)
		}
	}
	if len(said.Steps) < 3 || said.Counts["refused"] != 1 || said.Counts["restarts"] == 0 || said.Counts["waits"] != 1 {
		t.Fatalf("the simulation says little: %+v", said)
	}
	victim.end()
	f.eventually(60*time.Second, "what was simulated is so", func() error {
		for _, s := range said.Steps {
			vm := rest[0].vm(s.VM)
			got := fmt.Sprintf("%s on %s", vm.Status.Phase, vm.Status.Node)
			want := map[api.HAOutcome]string{
				api.HARestarts: "running on " + s.Node, api.HARefused: "failed on " + victim.name, api.HAWaits: "unknown on " + victim.name,
			}[s.Outcome]
			if got != want {
				return fmt.Errorf("vm %s is %s, the simulation said %s: %s", s.VM, got, s.Outcome, want)
			}
		}
		return nil
	})
	if text := rest[1].run("ha", "status"); !strings.Contains(text, "VMs of nodes that are lost") {
		t.Errorf("status after the loss:\n%s", text)
	}
	// The loss left evidence, and it holds. The leader adds what it sees of the VMs.
	f.eventually(60*time.Second, "the evidence of the loss is whole", func() error {
		if r := rest[1].try("ha", "verify"); !strings.Contains(r.stdout, "of node "+victim.name+": holds") {
			return fmt.Errorf("%s%s", r.stdout, r.stderr)
		}
		id := strings.TrimPrefix(strings.TrimSpace(rest[0].run("ha", "proof", "-o", "name")), "failover/")
		proof := rest[0].run("ha", "proof", id)
		for _, words := range []string{"it had no lease for", "Readmitted:", "not yet", "p2", "running", "Checked: holds"} {
			if !strings.Contains(proof, words) {
				return fmt.Errorf("the proof lacks %q:\n%s", words, proof)
			}
		}
		return nil
	})
	rest[0].refuse(2, "lost already", "ha", "simulate", "--kill", victim.name)
	rest[0].refuse(3, "does not exist", "ha", "simulate", "--kill", "n9")
	rest[0].refuse(2, "--kill", "ha", "simulate")
	rest[0].refuse(2, "give 1 to 4", "ha", "set", "--failures", "9")
	rest[0].refuse(2, "off, warn or refuse", "ha", "set", "--admission", "maybe")
}
