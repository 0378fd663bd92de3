// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/qmptest"
)

// runsDivided waits until the guest runs at the target with memory at the source.
func (p *pair) runsDivided(id string) {
	p.t.Helper()
	p.until("it runs there", func() bool {
		vm := p.vm(id)
		o := p.other.fakes.qemu()
		return vm.Status.Epoch == 2 && vm.Status.PID != 0 && o != nil && o.State() == "running" && o.Migration() == "postcopy-active"
	}, nothing)
}

// Each case does harm at a step of a post-copy. anew says that the guest was
// started anew where it then is.
func TestPostCopySurvivesHarmAtEveryStep(t *testing.T) {
	source := func(p *pair) *qmptest.QEMU { return p.fakes.qemu() }
	target := func(p *pair) *qmptest.QEMU { return p.other.fakes.qemu() }
	resumed := func(p *pair) { // what is sent into a line that is about to break is nowhere
		p.until("the line is mended", func() bool { return source(p).Count("migrate") > 1 }, nothing)
	}
	for _, c := range []struct {
		name    string
		before  func(p *pair, id string) // while memory flows, before the switch
		divided func(p *pair, id string) // while it runs there with holes
		ends    string
		at      string
		anew    bool
	}{
		{name: "nothing", divided: func(p *pair, _ string) { source(p).Rest() }, ends: "succeeded", at: "node-2"},
		{name: "cancel before the switch", before: func(p *pair, id string) { p.cancel(id) }, ends: "cancelled", at: "node-1"},
		{name: "the streams break before the switch", before: func(p *pair, _ string) {
			p.flows()
			p.links.sever(false)
			p.atStep("failed") // else it might come to the switch before anybody has noticed
		}, ends: "failed", at: "node-1"},
		{name: "the target's QEMU dies before the commit", before: func(p *pair, _ string) {
			q := target(p)
			source(p).On("migrate-start-postcopy", func() { q.Exit(-1, 9) })
		}, ends: "failed"}, // whether its end was seen before the commit decides
		{name: "the target's QEMU dies after the commit", before: func(p *pair, _ string) {
			q := target(p)
			source(p).On("migrate-continue", func() { q.Exit(-1, 9) })
		}, ends: "failed: node node-2: QEMU ended there"}, // whether the source's had sent the devices by then decides
		{name: "the source loses its lease before the commit", before: func(p *pair, _ string) {
			source(p).On("migrate-start-postcopy", func() { p.guard.lease(0) })
		}, ends: "failed: this node lost its lease", at: "node-1"},
		{name: "the line breaks", divided: func(p *pair, _ string) {
			p.links.sever(false)
			resumed(p)
			source(p).Rest()
		}, ends: "succeeded", at: "node-2"},
		{name: "the source's daemon dies", divided: func(p *pair, _ string) { p.stop(); p.links.sever(false); p.begin(); resumed(p); source(p).Rest() }, ends: "succeeded", at: "node-2"},
		{name: "the target's daemon dies", divided: func(p *pair, _ string) {
			p.other.stop()
			p.links.sever(false)
			p.other.begin()
			resumed(p)
			source(p).Rest()
		}, ends: "succeeded", at: "node-2"},
		{name: "the source's QEMU dies", divided: func(p *pair, _ string) { source(p).Exit(-1, 9) }, ends: "failed: QEMU ended on node node-1 before the last of the memory", at: "node-2", anew: true},
		{name: "the target's QEMU dies, and the source sees only the next one", divided: func(p *pair, _ string) {
			p.stop()
			target(p).Exit(-1, 9)
			p.until("it is started anew", func() bool { return p.other.guard.startCount() == 2 }, nothing)
			was := source(p).Count("query-migrate")
			p.begin()
			p.until("the source looks", func() bool { return source(p).Count("query-migrate") > was }, nothing)
			p.clock.advance(restAsk)
			p.h.Wake()
		}, ends: "failed: QEMU ended on node node-2 before", at: "node-2", anew: true},
		{name: "the target's QEMU dies", divided: func(p *pair, _ string) { target(p).Exit(-1, 9) }, ends: "failed: QEMU ended on node node-2 before", at: "node-2", anew: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			source(p).Hold()
			p.migrate(id, func(m *api.MigrationSpec) { m.PostCopy = true })
			p.atStep("active")
			if n := source(p).Count("stop"); n != 0 {
				t.Fatalf("the guest was halted after its first pass, %d times", n)
			}
			if c.before != nil {
				c.before(p, id)
			}
			source(p).Passes(PostCopyPasses + 1)
			if c.divided != nil {
				p.runsDivided(id)
				c.divided(p, id)
			}
			p.over(id, c.ends)
			p.guard.lease(2)
			p.h.Wake()
			if c.at == "" {
				p.settled(id, p.binding(id).Spec.NodeID)
				return
			}
			here := map[string]*env{"node-1": p.env, "node-2": p.other}[c.at]
			if c.anew {
				p.until("it is started anew", func() bool { return here.guard.startCount() == 2 }, nothing)
			}
			p.settled(id, c.at)
			if n := here.guard.startCount(); n > 1 != c.anew {
				t.Errorf("it was started %d times on %s", n, c.at)
			}
		})
	}
}

func TestForcedStopEndsADividedGuest(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	p.fakes.qemu().Hold()
	p.migrate(id, func(m *api.MigrationSpec) { m.PostCopy = true })
	p.atStep("active")
	p.fakes.qemu().Passes(PostCopyPasses + 1)
	p.runsDivided(id)
	p.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	p.over(id, "succeeded: it moved to node node-2 and was stopped there")
	p.until("no process is left", func() bool {
		_, a := p.guard.get(id)
		_, b := p.other.guard.get(id)
		return !a && !b
	}, nothing)
}

// A copy from before a switch must not run, whoever binds the VM where it is.
func TestHaltedCopyOfAPostCopyIsNotAdopted(t *testing.T) {
	p := newPair(t, false)
	id := p.begun(api.VMSpec{})
	q := p.fakes.qemu()
	q.Hold()
	p.migrate(id, func(m *api.MigrationSpec) { m.PostCopy = true })
	p.atStep("active")
	q.Passes(PostCopyPasses + 1)
	p.runsDivided(id)
	p.stop()
	p.other.stop()
	p.other.guard.killAll() // the target's host is gone
	was := q.Count("cont")
	p.rebind(id, "node-1", 3)
	p.begin()
	p.until("started anew", func() bool {
		pr, ok := p.guard.get(id)
		return ok && pr.Epoch == 3 && pr.State == ProcessRunning
	}, nothing)
	if q.Count("cont") != was || q.State() == "running" {
		t.Errorf("the old guest is %s and was continued", q.State())
	}
}

func TestNodeSaysWhetherItsKernelAllowsPostCopy(t *testing.T) {
	for text, want := range map[string]bool{"0\n": false, "1\n": true, "": true} {
		root := t.TempDir()
		if text != "" {
			must(t, os.MkdirAll(filepath.Join(root, "proc/sys/vm"), 0o755))
			must(t, os.WriteFile(filepath.Join(root, "proc/sys/vm/unprivileged_userfaultfd"), []byte(text), 0o600))
		}
		if got := userfaults(root); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
