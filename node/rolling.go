// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/hostboot"
	"github.com/muster-vm/muster/rest"
)

// Times of rolling reboots.
const (
	rollingEvery = time.Second
	// settleWithin is how long all may take to be well again after a node.
	settleWithin = 10 * time.Minute
	roller       = "rolling reboot"
)

// rolling reboots nodes one after the other while this node leads. All that it knows is
// in the database. The failure cases are in docs/maintenance.md.
type rolling struct {
	db       configdb.DB
	log      *slog.Logger
	term     uint64
	self     string // this node, which leads
	voters   func() ([]string, error)
	silence  func(nodeID string) time.Duration
	replicas func(context.Context) (map[string]string, error) // what is wrong with those of members
	forecast func(ctx context.Context, v *configdb.View, nodes []api.Node, in api.EvacuateRequest, noEvacuate bool) ([]api.PlannedReboot, error)
	now      func() time.Time
	clock    func() time.Duration // CLOCK_BOOTTIME
	// waits is when this leader saw first that it waits, for the wait which began at of.
	waits struct {
		of    time.Time
		since time.Duration
	}
}

func (m *member) rollingReboot(ctx context.Context, term uint64) error {
	r := &rolling{
		db: m.store, log: m.log.With("module", "rolling"), term: term, self: m.info.NodeID, voters: m.voterIDs, silence: m.ha.Silence, replicas: m.replicas,
		forecast: forecaster{restPlacer{}}.Forecast, now: time.Now, clock: hostboot.Clock,
	}
	return m.again(ctx, rollingEvery, r.look, "a rolling reboot makes no progress for now")
}

// replicas asks all members how theirs are.
func (m *member) replicas(ctx context.Context) (map[string]string, error) {
	members, err := m.store.Members()
	if err != nil {
		return nil, err
	}
	k := &voterKeeper{m: m}
	k.ask(ctx, members)
	ill := map[string]string{}
	for id, p := range k.pulses {
		if !p.healthy {
			ill[id] = first(p.message, p.later, "it does not answer")
		}
	}
	return ill, nil
}

// look takes one step.
func (r *rolling) look(ctx context.Context) error {
	v := r.db.Local()
	all, err := configdb.RollingReboots.List(v)
	for i := range all {
		if !all[i].Status.Phase.Final() {
			err = errors.Join(err, r.step(ctx, v, &all[i]))
		}
	}
	return err
}

func (r *rolling) step(ctx context.Context, v *configdb.View, rr *api.RollingReboot) error {
	t, err := configdb.Tasks.Get(v, rr.Spec.TaskID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	giveUp := rr.Spec.Cancel || err != nil || t.Status.Phase.Final() // its deadline may have passed
	left, err := r.left(v, rr)
	if err != nil {
		return err
	}
	switch {
	case rr.Status.Current != "":
		return r.follow(ctx, v, rr, giveUp)
	case giveUp:
		return r.end(ctx, v, rr, api.TaskCancelled, "", "given up")
	case !rr.Status.Checked:
		return r.check(ctx, v, rr, left)
	}
	why, err := r.unwell(ctx, v, rr)
	switch {
	case err != nil:
		return err
	case why != "":
		return r.wait(ctx, v, rr, why)
	case len(left) == 0:
		return r.end(ctx, v, rr, api.TaskSucceeded, "", "")
	}
	return r.begin(ctx, v, rr, left[0])
}

// left are the nodes whose turn is to come, this one last, and notes who is done.
func (r *rolling) left(v *configdb.View, rr *api.RollingReboot) (left []api.Node, err error) {
	st := &rr.Status
	st.Done, st.Left = nil, nil
	var last []api.Node
	for _, l := range rr.Spec.Nodes {
		n, err := configdb.Nodes.Get(v, l.ID)
		switch {
		case api.IgnoreNotFound(err) != nil:
			return nil, err
		case err != nil || l.ID == st.Current: // removed; or neither done nor left
		case n.Status.HostBoot != "" && n.Status.HostBoot != l.HostBoot:
			st.Done = append(st.Done, l.Node)
		case l.ID == r.self:
			last = append(last, n)
		default:
			left = append(left, n)
		}
	}
	left = append(left, last...)
	for i := range left {
		st.Left = append(st.Left, left[i].Meta.Name)
	}
	return left, nil
}

// check fails for what can be known before the first node is touched.
func (r *rolling) check(ctx context.Context, v *configdb.View, rr *api.RollingReboot, left []api.Node) error {
	voters, err := r.voters()
	if err != nil {
		return err
	}
	for i := range left {
		if err := rest.MayReboot(v, &left[i], api.RebootHost, rest.Votes{Leader: r.self, Voters: voters}, false); err != nil {
			return r.end(ctx, v, rr, api.TaskFailed, api.CodeRefused, err.Error())
		}
	}
	plan, err := r.forecast(ctx, v, left, rr.Spec.Evacuate, rr.Spec.NoEvacuate)
	if err != nil {
		return err
	}
	for i := range plan {
		if why := plan[i].Refusal; why != "" {
			return r.end(ctx, v, rr, api.TaskFailed, api.CodeRefused, "node "+plan[i].Node+" could not be emptied: "+why)
		}
	}
	rr.Status.Checked = true
	return r.say(ctx, v, rr, "every node can be emptied")
}

// unwell says what is not as it has to be before the next node, or the end.
func (r *rolling) unwell(ctx context.Context, v *configdb.View, rr *api.RollingReboot) (string, error) {
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return "", err
	}
	for i := range nodes {
		n := &nodes[i]
		if why := r.unwellNode(rr, n); why != "" {
			return "node " + n.Meta.Name + " " + why, nil
		}
	}
	if why, err := busy(v); why != "" || err != nil {
		return why, err
	}
	ill, err := r.replicas(ctx)
	if err != nil {
		return "", err
	}
	for i := range nodes {
		if why := ill[nodes[i].Meta.ID]; why != "" {
			return "node " + nodes[i].Meta.Name + ": " + why, nil
		}
	}
	return "", nil
}

// busy says what is being done that a reboot should not meet.
func busy(v *configdb.View) (string, error) {
	reboots, err := configdb.Reboots.List(v)
	if err != nil {
		return "", err
	}
	if len(reboots) > 0 {
		s := &reboots[0].Spec
		return fmt.Sprintf("node %s has a planned %s (task %s)", s.Node, s.Action, s.TaskID), nil
	}
	evacuations, err := configdb.Evacuations.List(v)
	if err != nil {
		return "", err
	}
	if len(evacuations) > 0 {
		return fmt.Sprintf("node %s is being evacuated (task %s)", evacuations[0].Spec.Node, evacuations[0].Spec.TaskID), nil
	}
	tasks, err := configdb.Tasks.List(v)
	if err != nil {
		return "", err
	}
	for i := range tasks {
		if t := &tasks[i]; t.Spec.Action == api.ActionVMRecover && !t.Status.Phase.Final() {
			return fmt.Sprintf("vm %s is being recovered (task %s)", t.Spec.Target, t.Meta.ID), nil
		}
	}
	drills, err := configdb.Drills.List(v)
	if err != nil {
		return "", err
	}
	for i := range drills {
		if d := &drills[i]; !d.Status.Phase.Final() {
			return fmt.Sprintf("vm %s is being drilled (task %s)", d.Spec.VM, d.Spec.TaskID), nil
		}
	}
	return "", nil
}

func (r *rolling) unwellNode(rr *api.RollingReboot, n *api.Node) string {
	s := &n.Status
	at := slices.IndexFunc(rr.Spec.Nodes, func(l api.RollingNode) bool { return l.ID == n.Meta.ID })
	done := at >= 0 && s.HostBoot != "" && rr.Spec.Nodes[at].HostBoot != s.HostBoot
	switch {
	case s.Phase != api.NodeReady:
		return "is " + string(s.Phase)
	case s.Fencing != "":
		return "is being switched off"
	case s.CutOff != nil:
		return "is cut off from the network"
	case s.Absence != nil:
		return "is planned to be away"
	case s.Stopping:
		return "ends its daemon"
	case r.silence(n.Meta.ID) > backWithin:
		return "is silent"
	case done && n.Spec.Maintenance && !rr.Spec.Nodes[at].Maintenance:
		return "is in maintenance: muster node maintenance off " + n.Meta.Name
	}
	return ""
}

// wait goes on waiting, with a bound. WaitsSince is by the clock of some leader, which may
// have been wrong: how long counts from when this one saw it first.
func (r *rolling) wait(ctx context.Context, v *configdb.View, rr *api.RollingReboot, why string) error {
	now, st := r.now().UTC(), &rr.Status
	if st.WaitsSince == nil {
		st.WaitsSince = &now
	}
	if !r.waits.of.Equal(*st.WaitsSince) {
		r.waits.of, r.waits.since = *st.WaitsSince, r.clock()
	}
	if r.clock()-r.waits.since > settleWithin {
		return r.end(ctx, v, rr, api.TaskFailed, api.CodeTimeout, fmt.Sprintf("not all was well within %s: %s", settleWithin, why))
	}
	return r.say(ctx, v, rr, "waits: "+why)
}

// begin begins the reboot of the next node. A cancel at the same time conflicts.
func (r *rolling) begin(ctx context.Context, v *configdb.View, rr *api.RollingReboot, n api.Node) error {
	voters, err := r.voters()
	if err != nil {
		return err
	}
	tx := r.txn()
	s := &rr.Spec
	spec := api.RebootSpec{TaskID: s.TaskID, Action: api.RebootHost, Evacuate: s.Evacuate, NoEvacuate: s.NoEvacuate, WithinSeconds: s.WithinSeconds, Actor: s.Actor}
	// Somebody has put it into maintenance since: it stays there.
	at := slices.IndexFunc(s.Nodes, func(l api.RollingNode) bool { return l.ID == n.Meta.ID })
	keep := n.Spec.Maintenance && !s.Nodes[at].Maintenance
	if keep {
		s.Nodes = slices.Clone(s.Nodes)
		s.Nodes[at].Maintenance = true
	}
	if err := rest.BeginReboot(v, tx, &n, spec, rest.Votes{Leader: r.self, Voters: voters}, false); err != nil {
		return r.wait(ctx, v, rr, err.Error())
	}
	if keep {
		if err := configdb.RollingReboots.UpdateSpec(v, tx, rr); err != nil {
			return err
		}
	} else {
		tx.RequireRevision(configdb.RollingReboots.SpecKey(rr.Meta.ID), rr.Meta.Revision)
	}
	st := &rr.Status
	st.Current, st.WaitsSince = n.Meta.ID, nil
	st.Left = slices.DeleteFunc(st.Left, func(name string) bool { return name == n.Meta.Name })
	r.log.Info("the next node of a rolling reboot", "node", n.Meta.Name)
	return r.write(ctx, v, rr, tx, 0, "node "+n.Meta.Name+" is next")
}

// follow takes over what the reboot of the node under way says, and its end.
func (r *rolling) follow(ctx context.Context, v *configdb.View, rr *api.RollingReboot, giveUp bool) error {
	st := &rr.Status
	rb, err := configdb.Reboots.Get(v, st.Current)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	if err != nil || rb.Spec.TaskID != rr.Spec.TaskID {
		switch n, nodeErr := configdb.Nodes.Get(v, st.Current); {
		case nodeErr == nil:
			return r.end(ctx, v, rr, api.TaskFailed, api.CodeInternal, "nobody reboots node "+n.Meta.Name+" any more")
		case api.IgnoreNotFound(nodeErr) != nil:
			return nodeErr
		}
		st.Current = ""
		return r.say(ctx, v, rr, "the node under way was removed")
	}
	tx := r.txn()
	s := &rb.Status
	switch {
	case s.Step == api.RebootReturning && s.Phase.Final() && len(s.Stopped) == 0:
		tx.RequireRevision(configdb.Reboots.StatusKey(rb.Meta.ID), rb.Meta.StatusRevision)
		configdb.Reboots.DeleteUnnamed(tx, &rb)
		st.Current = ""
		if s.Phase == api.TaskSucceeded {
			st.Done = append(st.Done, rb.Spec.Node)
			return r.write(ctx, v, rr, tx, 0, "node "+rb.Spec.Node+" is back")
		}
		if s.Phase == api.TaskCancelled {
			st.Left = append([]string{rb.Spec.Node}, st.Left...)
			return r.endWith(ctx, v, rr, tx, api.TaskCancelled, "", "given up")
		}
		st.Failed = rb.Spec.Node
		return r.endWith(ctx, v, rr, tx, api.TaskFailed, s.Code, s.Message)
	case giveUp && !rb.Spec.Cancel && (s.Step == "" || s.Step == api.RebootEmptying):
		tx.RequireRevision(configdb.Reboots.StatusKey(rb.Meta.ID), rb.Meta.StatusRevision)
		rb.Spec.Cancel = true
		if err := configdb.Reboots.UpdateSpec(v, tx, &rb); err != nil {
			return err
		}
		return r.write(ctx, v, rr, tx, s.Progress, "given up with node "+rb.Spec.Node)
	case giveUp:
		return r.write(ctx, v, rr, tx, s.Progress, "given up after node "+rb.Spec.Node+": "+s.Message)
	}
	return r.write(ctx, v, rr, tx, s.Progress, "node "+rb.Spec.Node+": "+s.Message)
}

func (r *rolling) txn() *configdb.Txn {
	tx := &configdb.Txn{Actor: roller}
	tx.RequireTerm(r.term)
	return tx
}

func (r *rolling) say(ctx context.Context, v *configdb.View, rr *api.RollingReboot, message string) error {
	return r.write(ctx, v, rr, r.txn(), 0, message)
}

// write commits a transaction with the status; current is how far the node under way
// is, in percent.
func (r *rolling) write(ctx context.Context, v *configdb.View, rr *api.RollingReboot, tx *configdb.Txn, current int, message string) error {
	st := &rr.Status
	st.Phase, st.Progress = api.TaskRunning, (100*len(st.Done)+current)/max(1, len(rr.Spec.Nodes))
	st.Message = fmt.Sprintf("%d of %d nodes rebooted; %s", len(st.Done), len(rr.Spec.Nodes), message)
	return r.commit(ctx, v, rr, tx)
}

func (r *rolling) commit(ctx context.Context, v *configdb.View, rr *api.RollingReboot, tx *configdb.Txn) error {
	if err := configdb.RollingReboots.UpdateStatus(v, tx, rr); err != nil || tx.Empty() {
		return err
	}
	_, err := r.db.Txn(ctx, tx)
	if errors.Is(err, configdb.ErrConflict) {
		return nil // with the next look, on fresh state
	}
	return err
}

func (r *rolling) end(ctx context.Context, v *configdb.View, rr *api.RollingReboot, phase api.TaskPhase, code api.Code, why string) error {
	return r.endWith(ctx, v, rr, r.txn(), phase, code, why)
}

// endWith ends it, and says what became of which node.
func (r *rolling) endWith(ctx context.Context, v *configdb.View, rr *api.RollingReboot, tx *configdb.Txn, phase api.TaskPhase, code api.Code, why string) error {
	st := &rr.Status
	var said []string
	if why != "" {
		said = append(said, why)
	}
	said = append(said, "rebooted: "+first(strings.Join(st.Done, ", "), "none"))
	if len(st.Left) > 0 {
		said = append(said, "left: "+strings.Join(st.Left, ", "))
	}
	if phase != api.TaskSucceeded && (len(st.Left) > 0 || st.Failed != "") {
		said = append(said, "to go on: muster cluster reboot --rolling --continue")
	}
	st.Phase, st.Code, st.Message, st.WaitsSince = phase, code, strings.Join(said, "; "), nil
	severity := api.SeverityInfo
	if phase == api.TaskFailed {
		severity = api.SeverityWarning
	}
	ev := api.NewEvent("cluster.reboot-"+string(phase), severity, api.KindCluster, rr.Meta, "rolling reboot: "+st.Message, r.now())
	ev.Spec.Actor = roller
	_ = configdb.PutEvent(tx, &ev) // it can be encoded
	r.log.Info("a rolling reboot ended", "phase", phase, "reason", st.Message)
	return r.commit(ctx, v, rr, tx)
}
