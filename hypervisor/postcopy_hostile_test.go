// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/qmptest"
)

// dividedPair has a guest at the target with memory at the source.
func dividedPair(t *testing.T) (p *pair, id string, source, target *qmptest.QEMU) {
	t.Helper()
	p = newPair(t, false)
	id = p.begun(api.VMSpec{})
	source = p.fakes.qemu()
	source.Hold()
	p.migrate(id, func(m *api.MigrationSpec) { m.PostCopy = true })
	p.atStep("active")
	source.Passes(PostCopyPasses + 1)
	p.runsDivided(id)
	return p, id, source, p.other.fakes.qemu()
}

func (p *pair) isOver(id string) func() bool {
	return func() bool { _, err := configdb.Operations.Get(p.db.Local(), id); return err != nil }
}

// The source's QEMU ended after the last of the memory had gone: the migration was
// said to have failed, and the guest to start anew, although it had lost nothing.
func TestEndOfTheSourceIsNoFailureOnceTheTargetHasEverything(t *testing.T) {
	p, id, source, target := dividedPair(t)
	source.RestUnsaid()
	p.until("the target has everything", func() bool { return target.Migration() == "completed" }, nothing)
	source.Exit(-1, 9)
	p.over(id, "succeeded: it runs on node node-2")
	p.settled(id, "node-2")
	if n := p.other.guard.startCount(); n != 1 {
		t.Errorf("the guest was started %d times", n)
	}
}

// A QEMU that was given away and says for ever that it has memory to send kept its
// process, with the disks open, and the VM closed to all other work.
func TestSourceThatNeverEndsIsNotWaitedForOnceTheTargetHasEverything(t *testing.T) {
	p, id, source, target := dividedPair(t)
	source.RestUnsaid()
	p.until("the target has everything", func() bool { return target.Migration() == "completed" }, nothing)
	p.later("it ends", p.isOver(id))
	p.over(id, "succeeded: it runs on node node-2")
	p.settled(id, "node-2")
}

// The same for one that does not answer at all; without the memory that it has the
// guest starts anew.
func TestSourceThatAnswersNothingIsGivenUp(t *testing.T) {
	p, id, source, _ := dividedPair(t)
	source.Hang(true)
	p.later("it ends", p.isOver(id))
	p.over(id, "failed: QEMU did not answer on node node-1 before the last of the memory")
	p.until("it is started anew", func() bool { return p.other.guard.startCount() == 2 }, nothing)
	p.settled(id, "node-2")
}

// A line through which nothing comes breaks by itself after a quarter of an hour, if
// at all; until then the guest stands still.
func TestLineThroughWhichNothingFlowsIsMended(t *testing.T) {
	p, id, source, target := dividedPair(t)
	p.laterWithin(RecoverTime-RestIdleTime, "it is mended", func() bool { return target.Count("migrate-recover") > 0 })
	p.until("it flows", func() bool { return source.Migration() == "postcopy-active" && target.Migration() == "postcopy-active" }, nothing)
	source.Rest()
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	if n := p.other.guard.startCount(); n != 1 {
		t.Errorf("the guest was started %d times", n)
	}
}

// Only the source may have seen the line break. The target refused to listen again
// until its own end was broken, too, and the guest was given up meanwhile.
func TestTargetListensAnewAlthoughItsLineIsWhole(t *testing.T) {
	p, id, source, target := dividedPair(t)
	must(t, p.other.h.receiveAnew(t.Context(), id))
	p.until("it is mended", func() bool {
		p.clock.advance(recoverPause / 10)
		p.env.h.Wake()
		return target.Count("migrate-recover") > 1 && source.Migration() == "postcopy-active" && target.Migration() == "postcopy-active"
	}, func() string { return source.Migration() + ", " + target.Migration() })
	source.Rest()
	p.over(id, "succeeded")
	p.settled(id, "node-2")
}

// A QEMU that sends its guest may connect to the socket for that as often as it likes.
// Each connection was carried to the other node, which takes 128 from all its peers.
func TestQEMUIsCarriedOnlyWhatItNeeds(t *testing.T) {
	p := newPair(t, false)
	p.begun(api.VMSpec{})
	dials := make(chan struct{}, 16)
	p.env.h.cfg.Streams = countedStreams{dials}
	path := filepath.Join(p.env.runDir, "out.sock")
	s, err := p.env.h.newSender(path, "node-2", 1, streamHello{VM: "x", Task: "y", Purpose: purposeMemory})
	must(t, err)
	defer s.close()
	for range 8 {
		c, err := net.Dial("unix", path)
		if err != nil {
			break // it is closed by now
		}
		must(t, c.SetDeadline(time.Now().Add(time.Minute)))
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
	if len(dials) != 1 {
		t.Errorf("%d connections were carried", len(dials))
	}
}

type countedStreams struct{ dials chan struct{} }

func (c countedStreams) Stream(context.Context, string) (net.Conn, error) {
	c.dials <- struct{}{}
	a, b := net.Pipe()
	return a, b.Close()
}

// A commit whose outcome is not known may have been carried out. To end the migration
// then would take its memory from the guest: at the target nothing waits for the rest
// any more.
func TestMigrationIsNotEndedPastACommitThatIsNotSeen(t *testing.T) {
	p, s, op := lateLook(t)
	p.rebind(s.vm.Meta.ID, "node-2", 2)
	if err := s.endOperation(t.Context(), &op, api.TaskFailed, api.CodeInternal, "cancelled"); err == nil {
		t.Error("it was ended although the vm is bound to the target")
	}
}
