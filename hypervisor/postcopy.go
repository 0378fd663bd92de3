// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/greeting"
)

// Times and limits of post-copy; DESIGN.md has the steps.
const (
	// PostCopyPasses is after how many passes over the memory a guest that does not
	// come to an end is switched over with the rest of its memory behind it.
	PostCopyPasses = 3
	// RecoverTime is how long a broken line is tried anew while the memory is
	// divided between two nodes, recoverPause the pause between two tries.
	RecoverTime  = 2 * time.Minute
	recoverPause = time.Second
	// RestIdleTime is how long nothing may flow while the memory is divided: then the
	// line is taken for broken, of which no connection may tell for a quarter of an hour.
	RestIdleTime = 20 * time.Second
	// restAsk is the pause between two questions whether the target has everything.
	restAsk = 10 * time.Second
	// hangUpTime is how long QEMU at the target may take to see that its line was cut.
	hangUpTime = 2 * time.Second
)

// QEMU's MigrationStatus while the memory is divided.
const (
	migPostActive  = "postcopy-active"
	migPostPaused  = "postcopy-paused"
	migPostRecover = "postcopy-recover"
	capPostCopy    = "postcopy-ram"
)

// divided reports that the guest's memory is partly at the source.
func (m *migrateInfo) divided() bool {
	return m.Status == migPostActive || m.Status == migPostPaused || m.Status == migPostRecover
}

// postCopyDue reports that a guest has to be switched over although its memory
// does not come to an end.
func postCopyDue(op *api.Operation, m *migrateInfo) bool {
	return op.Spec.Migration.PostCopy && (op.Status.PostCopying || m.RAM.DirtySyncs > PostCopyPasses)
}

// bandwidthOf adds the bound of a migration to QEMU's parameters.
func bandwidthOf(op *api.Operation, limit int64, parameters map[string]any) map[string]any {
	parameters["max-bandwidth"] = limit
	if op.Spec.Migration.PostCopy {
		parameters["max-postcopy-bandwidth"] = limit
	}
	return parameters
}

// beginPostCopy halts the guest, so that QEMU never lets it go on by itself, and
// has QEMU come to the switch.
func (s *step) beginPostCopy(ctx context.Context, op *api.Operation, out *departure, state string) error {
	s.result.After = switchLook
	if !op.Status.PostCopying { // first the word: the target has to know what it waits for
		return s.updateOperation(ctx, op, func(st *api.OperationStatus) {
			st.PostCopying, st.Message = true, "the rest of the memory follows the guest to node "+op.Spec.Migration.Node
		})
	}
	if out.postCopy {
		out.stalled(op, out.stoodAt, s.now)
		return nil
	}
	if state == runRunning {
		if err := s.in.command(ctx, "stop", nil); err != nil {
			return err
		}
	}
	out.stoodAt, out.postCopy = s.now, true
	return s.in.command(ctx, "migrate-start-postcopy", nil)
}

// switchToPostCopy commits while QEMU can still go back: behind migrate-continue
// only the target can have the guest.
func (s *step) switchToPostCopy(ctx context.Context, op *api.Operation, out *departure) error {
	s.result.After = switchLook
	_, _, lease := s.h.cfg.Lease.Current()
	if out.reason == "" && !out.committing {
		out.stalled(op, out.stoodAt, s.now)
		switch {
		case out.reason != "":
		case !out.started:
			out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "the daemon of node "+s.h.cfg.NodeName+" was restarted meanwhile"
		case !lease:
			out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "this node lost its lease meanwhile"
		}
	}
	switch {
	case out.reason != "" && out.started && !out.committing:
		return s.in.command(ctx, "migrate_cancel", nil)
	case out.reason != "": // an earlier commit may be on its way: this excludes it
		return s.endOperation(ctx, op, out.phase, out.code, out.reason)
	case !lease:
		s.result.After = lookSoon
		return nil
	}
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	committed, err := s.commitHandOver(ctx, op, out, arr)
	if !committed || err != nil {
		return err
	}
	return s.in.execute(ctx, "migrate-continue", map[string]any{"state": migPreSwitch}, nil)
}

// follow handles a VM that was given away with a part of its memory still here.
// done is false when that is as after any other migration.
func (s *step) follow(ctx context.Context, op *api.Operation, out *departure, arr *api.Arrival) (done bool, err error) {
	if s.proc == nil || s.proc.State != ProcessRunning || s.proc.PID == 0 {
		return s.endedHere(ctx, op, out)
	}
	s.result.After = lookSoon
	runs := s.runsThere()
	if runs && out.there == 0 {
		out.there, out.ranAt = s.vm.Status.PID, s.now
	}
	var refused *refusedStream
	switch {
	case runs && out.there != s.vm.Status.PID:
		return s.lostHere(ctx, op, "QEMU ended on node "+op.Spec.Migration.Node)
	case !runs && (s.vm.Status.Epoch == s.b.Spec.Epoch && s.vm.Status.Phase == api.VMStopped || s.now.Sub(out.handedAt) > HandOverTime):
		return false, nil
	case runs:
		switch err := s.askRest(ctx, op, out); {
		case err == nil:
			return false, nil // whatever QEMU says here
		case errors.As(err, &refused) && refused.hasNothing(): // it began anew before this node saw it run
			return s.lostHere(ctx, op, "QEMU ended on node "+op.Spec.Migration.Node)
		}
	}
	s.meet()
	m, err := migrateInfo{}, s.h.attach(ctx, s.in)
	if err == nil {
		m, err = s.in.queryMigrate(ctx)
	}
	if err != nil {
		return s.silentHere(ctx, op, out)
	}
	s.in.mu.Lock()
	out.info = m
	s.in.mu.Unlock()
	out.silentSince = time.Time{}
	return s.sendRest(ctx, op, out, arr, &m)
}

// sendRest goes by what QEMU says of the memory that is still here.
func (s *step) sendRest(ctx context.Context, op *api.Operation, out *departure, arr *api.Arrival, m *migrateInfo) (done bool, err error) {
	runs := s.runsThere()
	switch {
	case m.Status == migPreSwitch && arr.Status.Phase == api.ArrivalFailed:
		return true, s.takeBack(ctx, op, *arr)
	case m.Status == migPreSwitch:
		s.result.After = switchLook
		return true, s.in.execute(ctx, "migrate-continue", map[string]any{"state": migPreSwitch}, nil)
	case m.divided() && arr.Status.Phase == api.ArrivalFailed:
		return false, nil // it never ran there, and QEMU does not let it go on here
	case m.Status == migDevice, m.Status == migPostActive, m.Status == migPostRecover:
		s.flowing(out, m)
		return true, nil
	case m.Status == migPostPaused:
		return s.mend(ctx, op, out)
	case m.Status == migCompleted && runs:
		if err := s.h.askLoaded(ctx, s.vm.Meta.ID, op); err != nil {
			s.h.log.Info("the target does not say that it has all of the memory", "vm", s.vm.Meta.ID, "err", err)
			return s.sentInVain(ctx, op, out, err)
		}
	case runs: // it began anew there, or QEMU here takes the end for a failure
		return s.endedHere(ctx, op, out)
	}
	return false, nil
}

// sentInVain ends a migration whose QEMU says here that it has sent everything, and
// there, for LoadTime, that it has not got it.
func (s *step) sentInVain(ctx context.Context, op *api.Operation, out *departure, err error) (bool, error) {
	if refused := (*refusedStream)(nil); !errors.As(err, &refused) {
		return true, nil // nobody has said so
	}
	if out.lostAt.IsZero() {
		out.lostAt = s.now
	}
	if s.now.Sub(out.lostAt) > LoadTime {
		return s.lostHere(ctx, op, "QEMU had sent everything on node "+s.h.cfg.NodeName)
	}
	return true, nil
}

// errRestUnknown is that it is not known yet whether the target has everything.
var errRestUnknown = errors.New("not known yet")

// askRest asks now and then whether the target has everything. No error means that it
// has had it for LoadTime, so that nothing keeps the QEMU here: neither a lost last
// word nor one that lies.
func (s *step) askRest(ctx context.Context, op *api.Operation, out *departure) error {
	if out.askedAt.IsZero() {
		out.askedAt = s.now
	}
	if s.now.Sub(out.askedAt) < restAsk {
		return errRestUnknown
	}
	out.askedAt = s.now
	if err := s.h.ask(ctx, op, streamHello{VM: s.vm.Meta.ID, Purpose: purposeLoaded, Now: true}); err != nil {
		out.allThere = time.Time{}
		return err
	}
	if out.allThere.IsZero() {
		out.allThere = s.now
	}
	if s.now.Sub(out.allThere) < LoadTime {
		return errRestUnknown
	}
	return nil
}

// flowing cuts a line through which nothing comes any more.
func (s *step) flowing(out *departure, m *migrateInfo) {
	switch {
	case m.RAM.Transferred != out.sent:
		out.sent, out.sentAt, out.brokenAt = m.RAM.Transferred, s.now, time.Time{}
	case out.sentAt.IsZero():
		out.sentAt = s.now
	case out.sending != nil && s.now.Sub(out.sentAt) > RestIdleTime:
		s.h.log.Warn("nothing of the last of a guest's memory flows any more; its line is cut, to be mended", "vm", s.vm.Meta.ID)
		out.sentAt = s.now
		out.sending.close()
	}
}

// silentHere waits for a QEMU that does not answer, for as long as for a line.
func (s *step) silentHere(ctx context.Context, op *api.Operation, out *departure) (bool, error) {
	if ctx.Err() != nil { // the daemon ends: that says nothing about QEMU
		return true, context.Cause(ctx)
	}
	if out.silentSince.IsZero() {
		out.silentSince = s.now
	}
	if s.now.Sub(out.silentSince) > RecoverTime {
		return s.endedHere(ctx, op, out)
	}
	return true, nil
}

// endedHere is for memory that this node has no more. The target may have got all of
// it before, so it is asked first.
func (s *step) endedHere(ctx context.Context, op *api.Operation, out *departure) (bool, error) {
	why := "QEMU ended on node " + s.h.cfg.NodeName
	switch {
	case !out.silentSince.IsZero() && s.proc != nil && s.proc.State == ProcessRunning && s.proc.PID != 0:
		why = "QEMU did not answer on node " + s.h.cfg.NodeName
	case s.proc != nil && s.proc.State == ProcessRunning && out.info.Status != "":
		why = fmt.Sprintf("QEMU on node %s said %s", s.h.cfg.NodeName, out.info.Status)
	}
	err := s.h.askLoaded(ctx, s.vm.Meta.ID, op)
	if err == nil {
		return false, nil
	}
	if out.lostAt.IsZero() {
		out.lostAt = s.now
	}
	if refused := (*refusedStream)(nil); !errors.As(err, &refused) && s.now.Sub(out.lostAt) <= LoadTime {
		s.h.log.Info("the target cannot be asked whether it has all of the memory", "vm", s.vm.Meta.ID, "err", err)
		s.result.After = lookSoon
		return true, nil
	}
	return s.lostHere(ctx, op, why)
}

// runsThere reports that the target has said that the VM runs.
func (s *step) runsThere() bool {
	return s.vm.Status.Epoch == s.b.Spec.Epoch && s.vm.Status.PID != 0
}

// lostHere ends a migration whose last memory will not come any more. The target
// starts the VM anew when it sees that.
func (s *step) lostHere(ctx context.Context, op *api.Operation, why string) (bool, error) {
	if err := s.h.sweep(ctx, s.vm.Meta.ID, s.proc); err != nil {
		return true, err
	}
	return true, s.endOperation(ctx, op, api.TaskFailed, api.CodeInternal, fmt.Sprintf(
		"%s before the last of the memory was on node %s; the vm starts anew there", why, op.Spec.Migration.Node))
}

// mend connects QEMU anew after the line broke: the memory here and that at the
// target belong together. What was broken for RecoverTime is given up. done is false
// if the target has all of it: what broke was its last word.
func (s *step) mend(ctx context.Context, op *api.Operation, out *departure) (done bool, err error) {
	if out.brokenAt.IsZero() {
		out.brokenAt = s.now
		s.h.log.Warn("the line broke with a part of a guest's memory here; it is tried anew", "vm", s.vm.Meta.ID)
	}
	if s.now.Sub(out.brokenAt) > RecoverTime {
		return s.lostHere(ctx, op, fmt.Sprintf("the line to node %s was broken for %v", op.Spec.Migration.Node, RecoverTime))
	}
	if s.now.Sub(out.triedAt) < recoverPause {
		return true, nil
	}
	out.triedAt, out.sentAt = s.now, time.Time{}
	if out.sending != nil {
		out.sending.close()
	}
	if err := s.h.ask(ctx, op, streamHello{VM: s.vm.Meta.ID, Purpose: purposeRecover}); err != nil {
		if refused := (*refusedStream)(nil); errors.As(err, &refused) && s.h.ask(ctx, op, streamHello{VM: s.vm.Meta.ID, Purpose: purposeLoaded, Now: true}) == nil {
			return false, nil
		}
		s.h.log.Info("the target does not take the rest of a guest's memory yet", "vm", s.vm.Meta.ID, "err", err)
		return true, nil
	}
	path := s.h.pathsOf(s.vm.Meta.ID).out
	if out.sending, err = s.h.newSender(path, op.Spec.Migration.NodeID, 1, streamHello{VM: s.vm.Meta.ID, Task: op.Spec.TaskID, Purpose: purposeMemory}); err != nil {
		return true, err
	}
	return true, s.in.execute(ctx, "migrate", map[string]any{"uri": "unix:" + path, "resume": true}, nil)
}

// receiveAnew has QEMU wait for another connection with the rest of the memory. What
// is left of the former one is cut: only the other end may have seen it break.
func (h *Hypervisor) receiveAnew(ctx context.Context, id string) error {
	h.mu.Lock()
	in := h.instances[id]
	h.mu.Unlock()
	if in == nil || in.openConn() == nil {
		return errors.New("its QEMU does not answer")
	}
	in.receiving.Lock()
	defer in.receiving.Unlock()
	for end := time.Now().Add(hangUpTime); ; {
		m, err := in.queryMigrate(ctx)
		if err != nil {
			return err
		}
		if m.Status == migPostPaused {
			err = in.execute(ctx, "migrate-recover", map[string]any{"uri": "unix:" + h.pathsOf(id).in}, nil)
			var refused *qmp.CommandError // the connection that an earlier request was for came in between
			if !errors.As(err, &refused) || time.Now().After(end) {
				return err
			}
		} else {
			if !m.divided() || time.Now().After(end) {
				return fmt.Errorf("its QEMU says %s", m.Status)
			}
			h.rests.cut(id)
		}
		if err := pause(ctx, switchLook); err != nil {
			return err
		}
	}
}

// rests are the connections that bring the last of a guest's memory here, by VM.
type rests struct {
	mu sync.Mutex
	of map[string]map[*restConn]struct{}
}

// restConn forgets itself when it is closed.
type restConn struct {
	net.Conn
	forget func()
}

// Close implements net.Conn.
func (c *restConn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// CloseWrite tells QEMU that nothing follows.
func (c *restConn) CloseWrite() error { return greeting.CloseWrite(c.Conn) }

func (r *rests) add(id string, conn net.Conn) net.Conn {
	c := &restConn{Conn: conn}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of == nil {
		r.of = map[string]map[*restConn]struct{}{}
	}
	if r.of[id] == nil {
		r.of[id] = map[*restConn]struct{}{}
	}
	r.of[id][c] = struct{}{}
	c.forget = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.of[id], c)
		if len(r.of[id]) == 0 {
			delete(r.of, id)
		}
	}
	return c
}

// cut breaks those of one VM.
func (r *rests) cut(id string) {
	r.mu.Lock()
	all := slices.Collect(maps.Keys(r.of[id]))
	r.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
}

// expectsRest reports that a VM runs here, or is about to, whose memory is partly
// at its source.
func expectsRest(v *configdb.View, op *api.Operation) bool {
	if !op.Status.PostCopying {
		return false
	}
	b, err := configdb.Bindings.Get(v, op.Meta.ID)
	return err == nil && gaveAway(op, &b)
}

// hasEnough reports that QEMU has what it needs to run an arriving guest; false
// without an error is not yet.
func (s *step) hasEnough(ctx context.Context, op *api.Operation) (bool, error) {
	if op != nil && op.Status.PostCopying {
		return s.awaitRest(ctx)
	}
	err := s.in.hasGuest(ctx)
	return err == nil, err
}

// awaitRest is the target's part before the guest runs: ready is true when QEMU
// has what it needs to run it.
func (s *step) awaitRest(ctx context.Context) (ready bool, err error) {
	if s.in.awaitedPID != s.proc.PID {
		s.in.awaitedPID, s.in.awaited = s.proc.PID, s.now
	}
	m, err := s.in.queryMigrate(ctx)
	state := ""
	if err == nil {
		state, err = s.in.runState(ctx)
	}
	switch {
	case err != nil && s.now.Sub(s.in.awaited) <= LoadTime: // it ended, or is busy: seen at the next look
		s.result.After = lookSoon
		return false, nil
	case err != nil:
		return false, err
	case m.Status == migFailed:
		return false, fmt.Errorf("its QEMU says %s", m.Status)
	case state != runInMigrate && (m.Status == migCompleted || m.divided()):
		return true, nil
	case s.now.Sub(s.in.awaited) > LoadTime:
		return false, fmt.Errorf("its QEMU has not got what it needs to run the guest within %v, it says %s", LoadTime, m.Status)
	}
	s.result.After = switchLook
	return false, nil
}

// partial looks after a guest that runs here while the last of its memory is at
// another node. known is false when it has all of it.
func (s *step) partial(ctx context.Context, op *api.Operation) (known bool, err error) {
	m, err := s.in.queryMigrate(ctx)
	if err != nil || !m.divided() {
		return false, err
	}
	s.in.strayAsked = false // until it is over
	s.result.After = lookSoon
	if op != nil && op.Status.PostCopying && op.Spec.Migration.NodeID == s.h.cfg.NodeID && gaveAway(op, &s.b) {
		return true, nil
	}
	s.h.log.Error("the last of a guest's memory will not come any more; it is started anew", "vm", s.vm.Meta.ID, "pid", s.proc.PID)
	s.silent = true
	if err := s.h.kill(ctx, s.vm.Meta.ID); err != nil {
		return true, err
	}
	return true, qmp.ErrClosed
}
