// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// departure is what this life of the daemon remembers of a migration from here.
// Everything that must not be forgotten is in the database or in QEMU.
type departure struct {
	task    string
	since   time.Time // first seen by this life
	begun   bool      // this life wrote that it begins
	started bool      // this life told QEMU to begin
	loaded  bool      // the target has everything
	// committing: a commit was sent, whatever became of it.
	committing bool
	// reason why this life told QEMU to give up.
	phase  api.TaskPhase
	code   api.Code
	reason string

	wroteAt     time.Time // last progress
	halted      time.Time // since when the guest stands still for its memory, see api.HaltsToMigrate
	stoodAt     time.Time // the guest stands still for the switch since
	completedAt time.Time // QEMU has sent everything
	handedAt    time.Time // the binding was seen to be the target's
	info        migrateInfo
	sending     *sender
	copying     *sender // disks
	mirrored    bool    // this life told QEMU to copy the disks
	ending      bool    // and to end that
	finished    bool    // everything that the guest wrote is at the target
	limit       int64   // bytes per second that QEMU was told

	sent        int64 // bytes that have left, since sentAt no more
	sentAt      time.Time
	silentSince time.Time // QEMU has not answered since
	cut         bool      // its streams were broken for that

	postCopy bool      // this life told QEMU to switch over with memory left
	brokenAt time.Time // the line of a post-copy, and nothing has come through since
	lostAt   time.Time // its QEMU ended, and the target has not been reached since
	askedAt  time.Time // whether the target has everything, and since
	allThere time.Time // when it has
	triedAt  time.Time
	there    int // pid of the guest's QEMU at the target, seen at ranAt
	ranAt    time.Time
}

// departure returns the memory of an operation.
func (s *step) departure(op *api.Operation) *departure {
	if s.in.out == nil || s.in.out.task != op.Spec.TaskID {
		s.endDeparture()
		out := &departure{task: op.Spec.TaskID, since: s.now}
		s.in.mu.Lock()
		s.in.out = out
		s.in.mu.Unlock()
	}
	return s.in.out
}

// leaves reports that a migration of the VM away from here has begun.
func (in *instance) leaves() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.out != nil && in.out.info.Status != "" && in.out.info.Status != migNone
}

// endDeparture forgets the migration and closes its sockets.
func (s *step) endDeparture() {
	s.in.mu.Lock()
	out := s.in.out
	s.in.out = nil
	s.in.mu.Unlock()
	if out == nil {
		return
	}
	out.closeStreams()
}

// depart takes one step of a migration from here and returns QEMU's run state
// after it.
func (s *step) depart(ctx context.Context, state string) (string, error) {
	op := liveMigration(s.v, s.vm.Meta.ID)
	if op == nil || op.Spec.NodeID != s.h.cfg.NodeID || op.Spec.Epoch != s.b.Spec.Epoch {
		return s.stay(ctx, state)
	}
	if !op.Status.Begun && (state == runPostMigrate || state == runFinishMigrate) {
		return s.stay(ctx, state) // the end of the one before: the guest need not wait for this one
	}
	out := s.departure(op)
	m, err := s.in.queryMigrate(ctx)
	if err != nil {
		return state, err
	}
	s.in.mu.Lock()
	out.info = m
	s.in.mu.Unlock()
	out.silentSince = time.Time{}
	s.result.After = transferLook
	switch {
	case !op.Status.Begun:
		err = s.prepareDeparture(ctx, op, out)
	case out.begun && !out.started, m.Status == migNone && !out.started:
		err = s.sendAll(ctx, op, out)
	default:
		err = s.watchTransfer(ctx, op, out, m, state)
	}
	if err != nil {
		return state, err
	}
	if state, err = s.in.runState(ctx); state == runPaused && (op.Status.PostCopying || !out.halted.IsZero()) && s.in.out == out {
		state = runFinishMigrate // on our word, see beginPostCopy and halt: it does not go on
	}
	return state, err
}

// stay makes a guest go on that has no migration any more. It is called for
// every VM at every look, so it asks QEMU only when there is a reason.
func (s *step) stay(ctx context.Context, state string) (string, error) {
	stray := !s.in.strayAsked || s.in.out != nil
	s.endDeparture()
	old := !s.b.Spec.LetsGoOn(s.proc.Epoch)
	if state == runPostMigrate || state == runFinishMigrate && old {
		return s.goOn(ctx, state)
	}
	if !stray && state != runFinishMigrate {
		return state, nil
	}
	if known, err := s.partial(ctx, liveMigration(s.v, s.vm.Meta.ID)); known || err != nil {
		return state, err
	}
	m, err := s.in.queryMigrate(ctx)
	if err != nil {
		return state, err
	}
	if old && state == runPaused && m.Status != migNone && m.Status != migCompleted {
		return s.goOn(ctx, state) // halted for a post-copy that failed after it was given away
	}
	s.in.strayAsked = true
	switch m.Status {
	case migNone, migCompleted, migFailed, migCancelled:
		if done, err := s.clearMirrors(ctx); !done || err != nil {
			s.in.strayAsked = false
			s.result.After = lookSoon
			return state, err
		}
		return state, nil
	case migCancelling:
	default:
		s.h.log.Info("a migration that nobody wants any more is given up", "vm", s.vm.Meta.ID)
		if err := s.in.command(ctx, "migrate_cancel", nil); err != nil {
			return state, err
		}
	}
	s.in.strayAsked = false // until it is over
	s.result.After = lookSoon
	return s.in.runState(ctx)
}

// goOn continues a guest whose memory was sent away although it stays. Under
// another epoch than its own, and without leave, it may be an old copy.
func (s *step) goOn(ctx context.Context, state string) (string, error) {
	if !s.b.Spec.LetsGoOn(s.proc.Epoch) {
		s.h.log.Warn("a QEMU that handed its guest over is not the one that may run; it is killed", "vm", s.vm.Meta.ID, "pid", s.proc.PID, "epoch", s.proc.Epoch, "bound", s.b.Spec.Epoch)
		s.silent = true
		if err := s.h.kill(ctx, s.vm.Meta.ID); err != nil {
			return state, err
		}
		return state, qmp.ErrClosed
	}
	if s.vm.Spec.Power == api.PowerPaused {
		return state, nil
	}
	if _, _, ok := s.h.cfg.Lease.Current(); !ok {
		s.result.After = lookSoon
		return state, nil
	}
	if err := s.in.command(ctx, "cont", nil); err != nil {
		return state, err
	}
	s.h.log.Info("the guest goes on here after a migration that came to nothing", "vm", s.vm.Meta.ID)
	return s.in.runState(ctx)
}

// prepareDeparture waits for the target, then notes that it begins.
func (s *step) prepareDeparture(ctx context.Context, op *api.Operation, out *departure) error {
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	if done, err := s.refuse(ctx, op, arr); done || err != nil {
		return err
	}
	if why := waitsFor(s.v, op); why != "" {
		out.since = s.now
		s.result.After = waitLook
		return s.updateOperation(ctx, op, func(st *api.OperationStatus) { st.Phase, st.Message = api.TaskPending, why })
	}
	if op.Status.Machine == nil {
		return s.tellMachine(ctx, op, out)
	}
	if arr.Status.Phase != api.ArrivalReady {
		if s.now.Sub(out.since) > PrepareTime {
			why := fmt.Sprintf("node %s was not ready within %v", op.Spec.Migration.Node, PrepareTime)
			if arr.Status.Message != "" {
				why += ": " + arr.Status.Message
			}
			return s.endOperation(ctx, op, api.TaskFailed, api.CodeTimeout, why)
		}
		s.result.After = waitLook
		return nil
	}
	if op.Spec.Migration.PostCopy && !arr.Status.PostCopy {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeUnsupported, fmt.Sprintf("node %s is of an older version, which does not know post-copy; upgrade it, or migrate without", op.Spec.Migration.Node))
	}
	if s.h.cfg.Streams == nil {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeUnsupported, "this node has no way to send memory to another one")
	}
	out.begun = true
	return s.updateOperation(ctx, op, func(st *api.OperationStatus) {
		st.Phase, st.Begun, st.Progress = api.TaskRunning, true, 1
		st.Message = "memory goes to node " + op.Spec.Migration.Node
		if n := channelsOf(op, &arr); n > 0 {
			st.Message += fmt.Sprintf(" over %d connections", n)
		}
	})
}

// tellMachine tells the target what the guest runs in, once the status says which
// hardware it has; from then on that stays as it is.
func (s *step) tellMachine(ctx context.Context, op *api.Operation, out *departure) error {
	ok, why := s.settle(op)
	if ok && why == nil && len(s.in.unplugging) > 0 {
		if s.now.Sub(out.since) > UnplugTimeout {
			why = api.Errorf(api.CodeRefused, "vm %s: its guest was asked to let go of a device and has not answered; ask again when it has", s.vm.Meta.Name)
		}
		ok, s.settling = false, true
		s.lookAgain(lookSoon)
	}
	if why != nil {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeOf(why), why.Error())
	}
	if !ok {
		return nil
	}
	m, err := (&operation{h: s.h, in: s.in, vm: s.vm}).savedMachine(ctx)
	if err != nil {
		return err
	}
	return s.updateOperation(ctx, op, func(st *api.OperationStatus) {
		st.Machine, st.Channels, st.PostCopy = m, canSend(op), op.Spec.Migration.PostCopy
	})
}

// waitsFor says what a migration has to wait for before it begins, by its turn at
// both nodes. The oldest never waits.
func waitsFor(v *configdb.View, op *api.Operation) string {
	all, _ := configdb.Operations.List(v) // one that cannot be read does not move
	from, to := 0, 0
	for i := range all {
		o := &all[i]
		if o.Spec.Migration == nil || o.Meta.ID == op.Meta.ID || o.Status.Phase.Final() || !o.Status.Begun && o.Spec.TaskID > op.Spec.TaskID {
			continue
		}
		if o.Spec.NodeID == op.Spec.NodeID {
			from++
		}
		if o.Spec.Migration.NodeID == op.Spec.Migration.NodeID {
			to++
		}
	}
	switch {
	case from >= MaxMigrations:
		return fmt.Sprintf("waiting: %d other VMs leave the node, at most %d do at once", from, MaxMigrations)
	case to >= MaxMigrations:
		return fmt.Sprintf("waiting: %d other VMs move to node %s, at most %d do at once", to, op.Spec.Migration.Node, MaxMigrations)
	}
	return ""
}

// bandwidth is what a migration may take, in bytes per second: its own limit, and
// its share of the node's; 0 is no bound.
func (s *step) bandwidth(op *api.Operation) int64 {
	limit := int64(op.Spec.Migration.Bandwidth)
	node, err := configdb.Nodes.Get(s.v, s.h.cfg.NodeID)
	if err != nil || node.Spec.MigrationBandwidth == 0 {
		return limit
	}
	all, _ := configdb.Operations.List(s.v) // as in waitsFor
	sharers := 0
	for i := range all {
		if o := &all[i]; o.Spec.Migration != nil && o.Spec.NodeID == s.h.cfg.NodeID && o.Status.Begun && !o.Status.Phase.Final() {
			sharers++
		}
	}
	share := int64(node.Spec.MigrationBandwidth) / int64(max(sharers, 1))
	if limit == 0 || share < limit {
		return share
	}
	return limit
}

// sendAll copies the disks that have to be copied, then sends the memory.
func (s *step) sendAll(ctx context.Context, op *api.Operation, out *departure) error {
	all, err := s.copied(op)
	if err != nil {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeRefused, err.Error())
	}
	if len(all) == 0 {
		return s.send(ctx, op, out)
	}
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	if phase, code, why := s.reasonAgainst(op, arr); why != "" && out.reason == "" {
		out.phase, out.code, out.reason = phase, code, why
	}
	if !out.begun && !out.mirrored && out.reason == "" {
		// An earlier life of the daemon copied, and its streams ended with it.
		out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "the daemon of node "+s.h.cfg.NodeName+" was restarted while the disks were copied"
	}
	if out.reason != "" {
		return s.giveUpCopy(ctx, op, out)
	}
	if done, err := s.copyDisks(ctx, op, out, all); !done || err != nil {
		return err
	}
	return s.send(ctx, op, out)
}

func (s *step) arrivalOf(op *api.Operation) (api.Arrival, error) {
	arr, err := configdb.Arrivals.Get(s.v, s.vm.Meta.ID)
	if err != nil {
		return arr, err
	}
	if arr.Spec.TaskID != op.Spec.TaskID {
		return arr, fmt.Errorf("the arrival of vm %s belongs to task %s, the operation to task %s", s.vm.Meta.Name, arr.Spec.TaskID, op.Spec.TaskID)
	}
	return arr, nil
}

// refuse ends a migration before anything was given away, if there is a reason.
func (s *step) refuse(ctx context.Context, op *api.Operation, arr api.Arrival) (bool, error) {
	phase, code, why := s.reasonAgainst(op, arr)
	if why == "" {
		return false, nil
	}
	return true, s.endOperation(ctx, op, phase, code, why)
}

// reasonAgainst says why a migration that has not given anything away must not
// go on.
func (s *step) reasonAgainst(op *api.Operation, arr api.Arrival) (api.TaskPhase, api.Code, string) {
	to := op.Spec.Migration
	node, err := configdb.Nodes.Get(s.v, to.NodeID)
	switch {
	case op.Spec.Cancel:
		return api.TaskCancelled, "", "cancelled as wished; the vm stays on node " + s.h.cfg.NodeName
	case arr.Status.Phase == api.ArrivalFailed:
		code := arr.Status.Code
		if code == "" {
			code = api.CodeInternal
		}
		return api.TaskFailed, code, fmt.Sprintf("node %s: %s", to.Node, arr.Status.Message)
	case err != nil:
		return api.TaskFailed, api.CodeRefused, fmt.Sprintf("node %s: %v", to.Node, err)
	case node.Meta.Deleting():
		return api.TaskFailed, api.CodeRefused, fmt.Sprintf("node %s leaves the cluster", to.Node)
	case node.Status.Phase != api.NodeReady:
		return api.TaskFailed, api.CodeRefused, fmt.Sprintf("node %s is %s", to.Node, node.Status.Phase)
	}
	return "", "", ""
}

// send tells QEMU to send its memory.
func (s *step) send(ctx context.Context, op *api.Operation, out *departure) error {
	to := op.Spec.Migration
	if out.sending != nil {
		out.sending.close()
	}
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	channels := channelsOf(op, &arr)
	path := s.h.pathsOf(s.vm.Meta.ID).out
	if out.sending, err = s.h.newSender(path, to.NodeID, channels+1, streamHello{VM: s.vm.Meta.ID, Task: op.Spec.TaskID, Purpose: purposeMemory, Channels: channels}); err != nil {
		return err
	}
	out.begun, out.started = true, true
	bandwidth, downtime := s.bandwidth(op), api.DefaultDowntimeMillis
	if out.limit = bandwidth; bandwidth == 0 {
		bandwidth = noBandwidthLimit
	}
	if to.MaxDowntimeMillis > 0 {
		downtime = to.MaxDowntimeMillis
	}
	caps := []string{"auto-converge", "events", capPauseSwitch}
	if to.PostCopy {
		caps[0] = capPostCopy // in place of slowing the guest down
	}
	err = s.in.withChannels(ctx, channels, caps...)
	if err == nil {
		err = s.in.execute(ctx, "migrate-set-parameters", bandwidthOf(op, bandwidth, map[string]any{"downtime-limit": downtime}), nil)
	}
	if err == nil {
		err = s.halt(ctx, out)
	}
	if err == nil {
		err = s.in.send(ctx, path)
	}
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		return s.endOperation(ctx, op, api.TaskFailed, api.CodeRefused, "QEMU refuses to send: "+refused.Error())
	}
	return err
}

// halt makes the guest stand still before its memory is sent, if it has to. When the
// migration has failed it goes on by the wish for it, as one that somebody paused.
func (s *step) halt(ctx context.Context, out *departure) error {
	conn := s.in.openConn()
	if conn == nil || !s.h.cfg.halts(api.Accelerator(s.in.accel), conn.Version().QEMU.Major) {
		return nil
	}
	state, err := s.in.runState(ctx)
	if err != nil || state != runRunning {
		return err
	}
	out.halted = s.h.cfg.Now()
	return s.in.command(ctx, "stop", nil)
}

// QEMU says of a transfer that it has ended a moment before it has cleared it away. Told
// to send in that moment it refuses, "duplicate yank instance", but takes itself to be
// sending from then on (migrate_prepare in its migration.c, at least 6.0 to 9.0), and
// nothing ends that. So it is asked before whether the old transfer is still known.
const (
	clearTime = 5 * time.Second
	clearLook = 20 * time.Millisecond
)

// stuckTransfer is said of a QEMU before 9.0 whose thread of an earlier transfer waits for
// connections that have ended (multifd_send_sync_main). Nothing but its end helps.
const stuckTransfer = "an earlier transfer over several connections was broken off and hangs in QEMU, a fault of QEMU before 9.0; stop and start the vm, then it can be migrated again"

// send tells QEMU to send the guest to a socket.
func (in *instance) send(ctx context.Context, path string) error {
	for end := time.Now().Add(clearTime); ; {
		cleared, err := in.transferCleared(ctx)
		switch {
		case err != nil:
			return err
		case cleared:
			return in.execute(ctx, "migrate", map[string]any{"uri": "unix:" + path}, nil)
		case time.Now().After(end):
			return &qmp.CommandError{Command: "migrate", Class: "GenericError", Desc: stuckTransfer}
		}
		select {
		case <-time.After(clearLook):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// transferCleared reports whether QEMU knows nothing of an earlier transfer any more.
func (in *instance) transferCleared(ctx context.Context) (bool, error) {
	var known []struct {
		Type string `json:"type"`
	}
	err := in.execute(ctx, "query-yank", nil, &known)
	var refused *qmp.CommandError
	if errors.As(err, &refused) { // before 6.0: it has no such register, and no such fault
		return true, nil
	}
	for _, k := range known {
		if k.Type == "migration" {
			return false, err
		}
	}
	return err == nil, err
}

// watchTransfer looks at a transfer that QEMU was told to begin.
func (s *step) watchTransfer(ctx context.Context, op *api.Operation, out *departure, m migrateInfo, state string) error {
	arr, err := s.arrivalOf(op)
	if err != nil {
		return err
	}
	phase, code, against := s.reasonAgainst(op, arr)
	if against != "" && out.reason == "" {
		out.phase, out.code, out.reason = phase, code, against
	}
	switch m.Status {
	case migFailed, migCancelled:
		return s.gaveUp(ctx, op, out, m)
	case migPostActive, migPostPaused, migPostRecover: // the view is older than the commit
		s.result.After = switchLook
		return nil
	case migCancelling:
		s.result.After = switchLook
		return nil
	case migCompleted:
		return s.giveAway(ctx, op, out, arr, state)
	case migDevice: // QEMU says itself how that ends, unless it waits for too long
		s.result.After = switchLook
		if out.committing { // a post-copy, and the view is older than its commit
			return nil
		}
		if out.stalled(op, out.stoodAt, s.now); out.reason != "" {
			return s.in.command(ctx, "migrate_cancel", nil)
		}
		return nil
	case migPreSwitch:
		if op.Status.PostCopying {
			return s.switchToPostCopy(ctx, op, out)
		}
		return s.switchOver(ctx, op, out)
	}
	out.moved(op, m.RAM.Transferred, s.now)
	if out.reason != "" {
		s.result.After = switchLook
		return s.in.command(ctx, "migrate_cancel", nil)
	}
	if limit := s.bandwidth(op); limit != out.limit && out.started {
		out.limit = limit
		if limit == 0 {
			limit = noBandwidthLimit
		}
		if err := s.in.execute(ctx, "migrate-set-parameters", bandwidthOf(op, limit, map[string]any{}), nil); err != nil {
			return err
		}
	}
	if postCopyDue(op, &m) {
		return s.beginPostCopy(ctx, op, out, state)
	}
	return s.progress(ctx, op, out, m)
}

// switchOver lets QEMU send the last of the memory, while the guest stands
// still, if nothing speaks against it.
func (s *step) switchOver(ctx context.Context, op *api.Operation, out *departure) error {
	s.result.After = switchLook
	if _, _, ok := s.h.cfg.Lease.Current(); !ok && out.reason == "" {
		out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "this node lost its lease meanwhile"
	}
	all, err := s.copied(op)
	if err != nil {
		return err
	}
	if out.stoodAt.IsZero() {
		out.stoodAt = s.now
	}
	out.stalled(op, out.stoodAt, s.now)
	if len(all) > 0 && out.reason == "" && !out.finished {
		done, err := s.finishMirrors(ctx, out, all)
		switch {
		case err != nil && s.in.openConn() == nil:
			return err
		case err != nil:
			out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, err.Error()
		case !done:
			s.result.After = switchLook / 4
			return nil
		}
		out.finished = done
	}
	if out.reason != "" {
		return s.in.command(ctx, "migrate_cancel", nil)
	}
	return s.in.execute(ctx, "migrate-continue", map[string]any{"state": migPreSwitch}, nil)
}

// gaveUp reports why QEMU sends no more. The guest goes on by itself.
func (s *step) gaveUp(ctx context.Context, op *api.Operation, out *departure, m migrateInfo) error {
	if out.reason != "" {
		return s.endOperation(ctx, op, out.phase, out.code, out.reason)
	}
	why := "the transfer was broken off"
	if m.Error != "" {
		why += ": " + m.Error
	}
	if out.sending != nil {
		if err := out.sending.err(); err != nil {
			why += ": " + err.Error()
		}
	}
	return s.endOperation(ctx, op, api.TaskFailed, api.CodeInternal, why+"; the vm runs on on node "+s.h.cfg.NodeName)
}

// progress writes how far the transfer is, in coarse steps.
func (s *step) progress(ctx context.Context, op *api.Operation, out *departure, m migrateInfo) error {
	if m.RAM.Total <= 0 || s.now.Sub(out.wroteAt) < progressPause {
		return nil
	}
	done := int((m.RAM.Total - m.RAM.Remaining) * 100 / m.RAM.Total)
	if len(op.Spec.Migration.Volumes) > 0 {
		done = 50 + done/2
	}
	done = min(max(done-done%progressStep, 1), 95)
	if done <= op.Status.Progress {
		return nil
	}
	out.wroteAt = s.now
	return s.updateOperation(ctx, op, func(st *api.OperationStatus) { st.Progress = done })
}
