// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/internal/hostboot"
	"github.com/muster-vm/muster/rest"
)

// Times of planned reboots.
const (
	rebootEvery = time.Second
	// backWithin is how short the silence of a node that is back must be.
	backWithin = 5 * time.Second
	// leaveWithin is how long a host that is to shut down may go on answering.
	leaveWithin = 5 * time.Minute
	rebooter    = "reboot"
)

// reboots carries out planned reboots and shutdowns while this node leads. All that it
// knows is in the database, but for how long it has waited. The failure cases are in docs/maintenance.md.
type reboots struct {
	db      configdb.DB
	placer  rest.Placer
	log     *slog.Logger
	term    uint64
	self    string // this node, which leads
	voters  func() ([]string, error)
	silence func(nodeID string) time.Duration
	now     func() time.Time
	began   time.Time // of this leadership, before which nobody was heard
	// told is when this leader saw each command first, by node and time of the command.
	told map[string]time.Time
}

func (m *member) reboot(ctx context.Context, term uint64) error {
	r := &reboots{
		db: m.store, placer: restPlacer{}, log: m.log.With("module", "reboot"), term: term, self: m.info.NodeID,
		voters: m.voterIDs, silence: m.ha.Silence, now: time.Now, began: time.Now(), told: map[string]time.Time{},
	}
	return m.again(ctx, rebootEvery, r.look, "a planned reboot makes no progress for now")
}

func (m *member) voterIDs() (ids []string, err error) {
	members, err := m.store.Members()
	return voting(members), err
}

// look takes one step of every reboot.
func (r *reboots) look(ctx context.Context) error {
	v := r.db.Local()
	all, err := configdb.Reboots.List(v)
	if len(all) == 0 {
		clear(r.told)
	}
	for i := range all {
		rb := &all[i]
		n, nodeErr := configdb.Nodes.Get(v, rb.Meta.ID)
		switch {
		case nodeErr == nil:
			err = errors.Join(err, r.step(ctx, v, rb, n))
		case api.IgnoreNotFound(nodeErr) == nil:
			err = errors.Join(err, r.drop(ctx, rb)) // it was removed meanwhile
		default:
			err = errors.Join(err, nodeErr)
		}
	}
	return err
}

func (r *reboots) txn() *configdb.Txn {
	tx := &configdb.Txn{Actor: rebooter}
	tx.RequireTerm(r.term)
	return tx
}

func (r *reboots) commit(ctx context.Context, tx *configdb.Txn) error {
	if tx.Empty() {
		return nil
	}
	_, err := r.db.Txn(ctx, tx)
	if errors.Is(err, configdb.ErrConflict) {
		return nil // with the next look, on fresh state
	}
	return err
}

func (r *reboots) drop(ctx context.Context, rb *api.Reboot) error {
	tx := r.txn()
	configdb.Reboots.DeleteUnnamed(tx, rb)
	r.log.Info("the reboot is forgotten", "node", rb.Spec.Node, "phase", rb.Status.Phase)
	return r.commit(ctx, tx)
}

// write commits a status.
func (r *reboots) write(ctx context.Context, v *configdb.View, rb *api.Reboot, more ...func(tx *configdb.Txn) error) error {
	tx := r.txn()
	if err := configdb.Reboots.UpdateStatus(v, tx, rb); err != nil {
		return err
	}
	for _, f := range more {
		if err := f(tx); err != nil {
			return err
		}
	}
	return r.commit(ctx, tx)
}

func (r *reboots) say(ctx context.Context, v *configdb.View, rb *api.Reboot, progress int, message string) error {
	rb.Status.Phase, rb.Status.Progress, rb.Status.Message = api.TaskRunning, progress, message
	return r.write(ctx, v, rb)
}

func (r *reboots) step(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node) error {
	t, err := configdb.Tasks.Get(v, rb.Spec.TaskID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	over := err != nil || t.Status.Phase.Final() // its deadline may have passed
	st := &rb.Status
	switch st.Step {
	case "", api.RebootEmptying:
		return r.empty(ctx, v, rb, n, rb.Spec.Cancel || over)
	case api.RebootLeaving:
		return r.leaving(ctx, v, rb, n)
	case api.RebootOff:
		switch {
		case r.isBack(rb, n):
			return r.comeBack(ctx, v, rb, n, "")
		case n.Status.HostBoot == st.HostBoot && r.silence(n.Meta.ID) < backWithin && r.now().Sub(r.began) > backWithin && r.since(rb) > leaveWithin:
			return r.stays(ctx, v, rb, n, "it was silent, and answers again with the boot that was to end")
		}
		return nil
	case api.RebootReturning:
		if st.Phase.Final() && len(st.Stopped) == 0 {
			if over {
				return r.drop(ctx, rb)
			}
			return nil // its task has to read it
		}
		return r.restore(ctx, v, rb)
	}
	return fmt.Errorf("the reboot of node %s is at step %q, which this version does not know", rb.Spec.Node, st.Step)
}

// empty has the node evacuated, and gives it its command when nothing runs there.
func (r *reboots) empty(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node, giveUp bool) error {
	id, st := rb.Meta.ID, &rb.Status
	ev, err := configdb.Evacuations.Get(v, id)
	switch {
	case api.IgnoreNotFound(err) != nil:
		return err
	case err == nil && ev.Status.Phase.Final():
		// What it has shut down is this one's now.
		tx := r.txn()
		tx.RequireRevision(configdb.Evacuations.StatusKey(id), ev.Meta.StatusRevision)
		configdb.Evacuations.DeleteUnnamed(tx, &ev)
		st.Stopped = ev.Status.Stopped
		st.Phase, st.Message = api.TaskRunning, ev.Status.Message
		if err := configdb.Reboots.UpdateStatus(v, tx, rb); err != nil {
			return err
		}
		return r.commit(ctx, tx)
	case err == nil && giveUp && !ev.Spec.Cancel:
		tx := r.txn()
		ev.Spec.Cancel = true
		if err := configdb.Evacuations.UpdateSpec(v, tx, &ev); err != nil {
			return err
		}
		return r.commit(ctx, tx)
	case err == nil:
		return r.say(ctx, v, rb, ev.Status.Progress/2, first(ev.Status.Message, "the node is being emptied"))
	case giveUp:
		return r.comeBack(ctx, v, rb, n, "given up", api.TaskCancelled)
	case n.Status.Phase == api.NodeLost:
		return r.comeBack(ctx, v, rb, n, "the node is lost")
	case !n.Spec.Maintenance:
		return r.comeBack(ctx, v, rb, n, "its maintenance was ended meanwhile")
	}
	if id == r.self { // when it is empty again, too: another node may have been put into maintenance
		voters, err := r.voters()
		if err != nil {
			return err
		}
		if err := rest.AnotherLeads(v, voters, id, n.Meta.Name); err != nil {
			return r.comeBack(ctx, v, rb, n, err.Error())
		}
	}
	ops, err := configdb.Operations.List(v)
	if err != nil {
		return err
	}
	for i := range ops {
		if m := ops[i].Spec.Migration; m != nil && m.NodeID == id || ops[i].Spec.NodeID == id && st.Step != "" {
			return r.say(ctx, v, rb, st.Progress, "waits for "+string(ops[i].Spec.Action)+" "+ops[i].Meta.Name)
		}
	}
	if st.Step == "" {
		e := api.Evacuation{
			Meta: api.NewMeta(api.KindEvacuation, "", n.Meta.Name),
			Spec: api.EvacuationSpec{
				TaskID: rb.Spec.TaskID, Node: n.Meta.Name, Level: rb.Spec.Evacuate.Level, Parallel: rb.Spec.Evacuate.Parallel, MoveStopped: rb.Spec.Evacuate.MoveStopped,
				ForceStopSeconds: rb.Spec.Evacuate.ForceStopSeconds, Stay: rb.Spec.NoEvacuate, LeaveStopped: true, Actor: rb.Spec.Actor,
			},
			Status: api.EvacuationStatus{Phase: api.TaskPending},
		}
		e.Meta.ID = id
		st.Step, st.Phase = api.RebootEmptying, api.TaskRunning
		return r.write(ctx, v, rb, func(tx *configdb.Txn) error { return configdb.Evacuations.CreateUnnamed(tx, &e) })
	}
	guests, err := vmsLeftOn(v, id)
	if err != nil {
		return err
	}
	if why := staying(guests); why != "" {
		return r.comeBack(ctx, v, rb, n, why+" ("+st.Message+")")
	}
	if id == r.self {
		return r.say(ctx, v, rb, 50, "waits until another node leads") // maintenance moves it
	}
	return r.command(ctx, v, rb, n)
}

func first(words ...string) string {
	i := slices.IndexFunc(words, func(s string) bool { return s != "" })
	return words[max(i, 0)]
}

// staying says which VMs keep a node from being switched off.
func staying(guests []guest) string {
	var why []string
	for i := range guests {
		g := &guests[i]
		switch s := &g.vm.Status; {
		case g.bind.Spec.Protected:
			why = append(why, "vm "+g.vm.Meta.Name+" is protected by ha and could not leave; move it (muster vm migrate or move), or muster vm set "+g.vm.Meta.Name+" --ha none")
		case s.PID != 0 || !atRest(&g.vm) && s.Phase != api.VMFailed:
			why = append(why, "vm "+g.vm.Meta.Name+" runs; --level stop shuts it down")
		}
	}
	if n := len(why); n > maxReasons {
		why = append(why[:maxReasons], fmt.Sprintf("and %d more", n-maxReasons))
	}
	return strings.Join(why, "; ")
}

// command tells the node to run its command. It conflicts with a start there.
func (r *reboots) command(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node) error {
	voters, err := r.voters()
	if err != nil {
		return err
	}
	if err := rest.MajorityWithout(v, voters, n.Meta.ID, n.Meta.Name); err != nil {
		return r.comeBack(ctx, v, rb, n, err.Error())
	}
	at, st := r.now().UTC(), &rb.Status
	if why := r.unheard(v, voters, n.Meta.ID); why != "" {
		return r.say(ctx, v, rb, st.Progress, "waits: "+why)
	}
	st.Step, st.HostBoot, st.CommandedAt = api.RebootLeaving, n.Status.HostBoot, &at
	st.Progress, st.Message = 60, "the host gets its command"
	r.since(rb) // counts from here
	n.Status.Absence = &api.Absence{Action: rb.Spec.Action, Since: at}
	if s := rb.Spec.WithinSeconds; s > 0 {
		n.Status.Absence.Until = new(at.Add(time.Duration(s) * time.Second))
	}
	r.log.Info("a node is told to leave", "node", n.Meta.Name, "action", rb.Spec.Action)
	return r.write(ctx, v, rb, func(tx *configdb.Txn) error {
		r.placer.Reserve(v, tx, n.Meta.ID)
		// Of two at once one is decided anew, on a view that has the other.
		rest.TakeTurn(v, tx)
		tx.RequireRevision(configdb.Reboots.SpecKey(rb.Meta.ID), rb.Meta.Revision) // a cancel
		tx.RequireRevision(configdb.Nodes.SpecKey(n.Meta.ID), n.Meta.Revision)
		r.event(tx, &n, "node."+string(rb.Spec.Action), api.SeverityInfo, fmt.Sprintf("node %s: planned %s", n.Meta.Name, rb.Spec.Action))
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

// unheard says which voter is silent, though not lost yet, before the majority is taken
// for granted; a new leader has to hear of all of them first.
func (r *reboots) unheard(v *configdb.View, voters []string, leaving string) string {
	if r.now().Sub(r.began) <= backWithin {
		return "it is not known yet who answers"
	}
	for _, id := range voters {
		n, err := configdb.Nodes.Get(v, id)
		if err == nil && id != leaving && id != r.self && n.Status.Phase == api.NodeReady && n.Status.Absence == nil && r.silence(id) > backWithin {
			return "node " + n.Meta.Name + ", which votes, is silent"
		}
	}
	return ""
}

func (r *reboots) event(tx *configdb.Txn, n *api.Node, typ string, severity api.Severity, text string) {
	ev := api.NewEvent(typ, severity, api.KindNode, n.Meta, text, r.now())
	ev.Spec.Node, ev.Spec.Actor = n.Meta.Name, rebooter
	_ = configdb.PutEvent(tx, &ev) // it can be encoded
}

// isBack reports that the host runs another boot and the node holds a lease. A node
// that never was away long enough to be missed counts as well.
func (r *reboots) isBack(rb *api.Reboot, n api.Node) bool {
	return n.Status.HostBoot != "" && n.Status.HostBoot != rb.Status.HostBoot && n.Status.Phase == api.NodeReady && n.Status.CutOff == nil && !n.Status.Stopping && r.silence(n.Meta.ID) < backWithin
}

// since is for how long this leader has known that a node got its command. The time in
// the record is of a clock that may have been another leader's, or set since.
func (r *reboots) since(rb *api.Reboot) time.Duration {
	key := rb.Meta.ID + " " + rb.Status.CommandedAt.Format(time.RFC3339Nano)
	if _, known := r.told[key]; !known {
		r.told[key] = r.now()
	}
	return r.now().Sub(r.told[key])
}

// leaving waits for the node to go, and to be back.
func (r *reboots) leaving(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node) error {
	st := &rb.Status
	away := r.silence(n.Meta.ID)
	old := n.Status.HostBoot == st.HostBoot
	since := r.since(rb)
	switch {
	case st.Refusal != "":
		return r.comeBack(ctx, v, rb, n, "its command failed: "+st.Refusal)
	case r.isBack(rb, n):
		return r.comeBack(ctx, v, rb, n, "")
	case rb.Spec.Action == api.ShutdownHost && old && away > ha.LostAfter:
		st.Step, st.Phase, st.Message = api.RebootOff, api.TaskSucceeded, "the node is silent"
		return r.write(ctx, v, rb)
	case rb.Spec.Action == api.ShutdownHost && since > leaveWithin && away < backWithin && r.now().Sub(r.began) > backWithin:
		return r.stays(ctx, v, rb, n, "it still answers, "+leaveWithin.String()+" after its command")
	case rb.Spec.Action == api.RebootHost && since > time.Duration(rb.Spec.WithinSeconds)*time.Second:
		why := fmt.Sprintf("it is not back after %d s", rb.Spec.WithinSeconds)
		if old && away < backWithin {
			why = fmt.Sprintf("%d s after its command it still runs the same boot", rb.Spec.WithinSeconds)
		}
		return r.stays(ctx, v, rb, n, why)
	case away > backWithin:
		return r.say(ctx, v, rb, 70, "the node is away")
	}
	return r.say(ctx, v, rb, 60, "waits until the host leaves")
}

// stays ends a reboot that did not happen as it should: the node is kept in
// maintenance, its absence is a failure from now on, and what was shut down starts when
// it can.
func (r *reboots) stays(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node, why string) error {
	rb.Spec.KeepMaintenance = true
	return r.comeBack(ctx, v, rb, n, why+"; it stays in maintenance: muster node maintenance off "+n.Meta.Name)
}

// comeBack makes all as it was before; why it failed is empty if it did not.
func (r *reboots) comeBack(ctx context.Context, v *configdb.View, rb *api.Reboot, n api.Node, why string, outcome ...api.TaskPhase) error {
	st := &rb.Status
	st.Step, st.Progress = api.RebootReturning, 90
	if !st.Phase.Final() { // that of a shutdown has ended
		st.Phase, st.Outcome, st.Message = api.TaskRunning, api.TaskSucceeded, "the node is back"
		if why != "" {
			st.Outcome, st.Code, st.Message = api.TaskFailed, api.CodeRefused, "node "+n.Meta.Name+": "+why
		}
		if len(outcome) > 0 {
			st.Outcome, st.Code = outcome[0], ""
		}
	}
	r.log.Info("a planned absence ends", "node", n.Meta.Name, "action", rb.Spec.Action, "reason", why)
	return r.write(ctx, v, rb, func(tx *configdb.Txn) error {
		if n.Spec.Maintenance && !rb.Spec.KeepMaintenance {
			n.Spec.Maintenance = false
			if err := configdb.Nodes.UpdateSpec(v, tx, &n); err != nil {
				return err
			}
		}
		if st.Outcome == api.TaskFailed {
			r.event(tx, &n, "node."+string(rb.Spec.Action)+"-failed", api.SeverityWarning, st.Message)
		}
		if n.Status.Absence == nil {
			return nil
		}
		n.Status.Absence = nil
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

// restore starts one of the VMs that were shut down, and ends the task after the last.
func (r *reboots) restore(ctx context.Context, v *configdb.View, rb *api.Reboot) error {
	st := &rb.Status
	if len(st.Stopped) == 0 {
		if st.Phase = st.Outcome; st.Outcome == api.TaskSucceeded {
			st.Message = ""
		}
		return r.write(ctx, v, rb)
	}
	id := st.Stopped[0]
	st.Stopped = slices.Clone(st.Stopped[1:])
	if _, err := configdb.Operations.Get(v, id); err == nil {
		st.Stopped = append(st.Stopped, id) // it is worked on; the next one first
		return r.write(ctx, v, rb)
	}
	return r.write(ctx, v, rb, func(tx *configdb.Txn) error {
		s, err := shutDownVM(v, tx, id)
		if err != nil || s.over {
			return err
		}
		return s.start(v, tx, r.placer)
	})
}

// hostBoot is the kernel's name of the boot that this host runs.
func (m *member) hostBoot() string {
	if m.cfg.BootIDFile == "" {
		return hostboot.ID()
	}
	b, err := os.ReadFile(m.cfg.BootIDFile)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// serveReboot runs this host's command when the leader says so, once in a life of the
// daemon: a daemon that was started again before the host went runs it again.
func (m *member) serveReboot(ctx context.Context) error {
	tick := time.NewTicker(rebootEvery)
	defer tick.Stop()
	done := ""
	for {
		if rb, err := configdb.Reboots.Get(m.store.Local(), m.info.NodeID); err == nil && rb.Status.Step == api.RebootLeaving && rb.Spec.TaskID != done {
			if ran, err := m.leave(ctx); err != nil && ctx.Err() == nil {
				m.log.Warn("the command for this host is not carried out", "err", err)
			} else if ran {
				done = rb.Spec.TaskID
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// leave runs the command if that is still wanted: this node's replica may be old.
func (m *member) leave(ctx context.Context) (ran bool, err error) {
	v, err := m.store.View(ctx)
	if err != nil {
		return false, err
	}
	rb, err := configdb.Reboots.Get(v, m.info.NodeID)
	if err != nil || rb.Status.Step != api.RebootLeaving || rb.Status.Refusal != "" || rb.Status.HostBoot != m.hostBoot() {
		return false, api.IgnoreNotFound(err)
	}
	guests, err := vmsLeftOn(v, m.info.NodeID)
	if err != nil {
		return false, err
	}
	why := staying(guests)
	if why == "" {
		// The command may be old: others may have gone since.
		voters, err := m.voterIDs()
		if err != nil {
			return false, err
		}
		if err := rest.MajorityWithout(v, voters, m.info.NodeID, m.info.Node); err != nil {
			why = err.Error()
		}
	}
	if why == "" {
		line := m.cfg.RebootCommand
		if rb.Spec.Action == api.ShutdownHost {
			line = m.cfg.ShutdownCommand
		}
		words := strings.Fields(line)
		m.log.Info("this host leaves, as planned", "command", line)
		out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput()
		if err == nil || ctx.Err() != nil {
			return true, nil
		}
		why = fmt.Sprintf("%s: %v: %.200s", line, err, strings.TrimSpace(string(out)))
	}
	tx := &configdb.Txn{Actor: "node " + m.info.Node}
	rb.Status.Refusal = why
	if err := configdb.Reboots.UpdateStatus(v, tx, &rb); err != nil {
		return false, err
	}
	_, err = m.store.Txn(ctx, tx)
	return err == nil, err
}
