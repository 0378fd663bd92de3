// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// vmLook is a VM with its binding and its mark, as of one view.
type vmLook struct {
	record[vmMark]
	vm      api.VM
	binding api.Binding
	// from is the node that the mark names, if it is still there.
	from *api.Node
	// drilled: it got its present binding in a drill.
	drilled bool
}

func readVM(v *configdb.View, id string) (*vmLook, error) {
	r, err := readRecord[vmMark](v, api.KindVM, id)
	if err != nil {
		return nil, err
	}
	l := &vmLook{record: r}
	if l.vm, err = configdb.VMs.Get(v, id); err != nil {
		l.gone = api.CodeOf(err) == api.CodeNotFound
		return l, api.IgnoreNotFound(err)
	}
	if l.binding, err = configdb.Bindings.Get(v, id); api.IgnoreNotFound(err) != nil {
		return nil, err
	}
	if e := l.binding.Spec.Epoch; e != l.mark.Epoch {
		d, err := configdb.Drills.Get(v, id)
		l.drilled = err == nil && d.Status.Epoch == e
	}
	if l.mark.NodeID != "" {
		if n, err := configdb.Nodes.Get(v, l.mark.NodeID); err == nil {
			l.from = &n
		}
	}
	return l, nil
}

func (s *Service) lookVM(ctx context.Context, term uint64, id string) error {
	l, err := readVM(s.db.Local(), id)
	if err != nil {
		return err
	}
	err = step(ctx, s, term, &l.record, l.advance, func() api.Event {
		return api.NewEvent("vm.deleted", api.SeverityInfo, api.KindVM, api.Meta{ID: id, Name: l.mark.Name}, "vm "+l.mark.Name+" was deleted", s.now())
	})
	if err == nil {
		s.knowVM(l)
		s.kicked()
	}
	return err
}

// advance moves the mark to what the VM is now, and says what happened.
func (l *vmLook) advance(now time.Time) []api.Event {
	was, st, b := l.mark, &l.vm.Status, &l.binding.Spec
	next := was
	next.Name, next.Phase, next.Crashes = l.vm.Meta.Name, st.Phase, st.Crashes
	next.NodeID, next.Node, next.Epoch = b.NodeID, b.Node, b.Epoch
	next.StartedAt = time.Time{}
	if st.StartedAt != nil {
		next.StartedAt = st.StartedAt.UTC()
	}
	var out []api.Event
	add := func(typ string, sev api.Severity, details map[string]string, format string, args ...any) {
		e := api.NewEvent(typ, sev, api.KindVM, l.vm.Meta, fmt.Sprintf(format, args...), now)
		e.Spec.Node, e.Spec.Details = b.Node, details
		out = append(out, e)
	}
	name := l.vm.Meta.Name
	if was.Epoch > 0 && b.Epoch > was.Epoch && b.NodeID != was.NodeID {
		details := map[string]string{"from": was.Node, "to": b.Node, "epoch": fmt.Sprint(b.Epoch)}
		if l.drilled {
			add("vm.moved", api.SeverityInfo, details, "vm %s was failed over from node %s to node %s in a drill", name, was.Node, b.Node)
		} else if loss, from := l.takenFor(was, now); from != "" {
			next.MovedFrom, next.MovedFromID, next.MovedLoss, next.Recovering = was.Node, was.NodeID, loss, true
			add("vm.recovered", api.SeverityWarning, details, "vm %s was moved from %s to node %s", name, from, b.Node)
		} else {
			add("vm.moved", api.SeverityInfo, details, "vm %s was moved from node %s to node %s", name, was.Node, b.Node)
		}
	}
	if st.Crashes > was.Crashes {
		next.CrashedAt = now.UTC()
		add("vm.crashed", api.SeverityWarning, map[string]string{"crashes": fmt.Sprint(st.Crashes)},
			"vm %s crashed on node %s: %s", name, b.Node, first(st.Message, "QEMU ended"))
	}
	l.phaseEvents(was, next, add)
	switch st.Phase {
	case api.VMRunning, api.VMPaused, api.VMStopped, api.VMSuspended:
		next.Recovering = false
	}
	l.mark = next
	return out
}

// takenFor returns the loss of the old node that the VM was taken from it for, and
// what that node is called; "" if it was not. Only ha raises an epoch away from a node
// that is lost, or locked out of the VM's disks; a user's move would find nobody there
// to hand the VM over.
func (l *vmLook) takenFor(was vmMark, now time.Time) (loss time.Time, from string) {
	lost := "the lost node " + was.Node
	if l.from != nil && l.from.Status.Phase == api.NodeLost && l.from.Status.LostAt != nil {
		return l.from.Status.LostAt.UTC(), lost
	}
	if r := l.binding.Spec.RecoveredFrom; r != nil && r.Epoch == l.binding.Spec.Epoch {
		out := "node " + was.Node + ", which was locked out of its disks,"
		if l.from != nil {
			for _, f := range l.from.Status.StorageFences {
				if f.InForceAt != nil {
					return f.InForceAt.UTC(), out
				}
			}
		}
		if r.NodeID == was.NodeID && (l.from == nil || l.from.Status.LostAt == nil) {
			return now.UTC(), out // it has taken that back already
		}
	}
	if l.from == nil || l.from.Status.LostAt == nil {
		return time.Time{}, ""
	}
	// The node is back already: the VM was moved for that loss if it was last
	// seen running there, which a stopped one was not.
	loss = l.from.Status.LostAt.UTC()
	if was.Phase != api.VMStopped && was.Phase != api.VMSuspended && l.vm.Meta.CreatedAt.Before(loss) && l.binding.Meta.CreatedAt.Before(loss) {
		return loss, lost
	}
	return time.Time{}, ""
}

func (l *vmLook) phaseEvents(was, next vmMark, add func(string, api.Severity, map[string]string, string, ...any)) {
	name, node, why := next.Name, next.Node, l.vm.Status.Message
	startedAnew := !next.StartedAt.IsZero() && !next.StartedAt.Equal(was.StartedAt)
	if was.Phase == next.Phase && (next.Phase != api.VMRunning || !startedAnew) {
		return
	}
	switch next.Phase {
	case api.VMRunning:
		if was.Phase == api.VMPaused && !startedAnew {
			add("vm.resumed", api.SeverityInfo, nil, "vm %s runs again on node %s", name, node)
			return
		}
		add("vm.started", api.SeverityInfo, nil, "vm %s runs on node %s", name, node)
	case api.VMPaused:
		add("vm.paused", api.SeverityInfo, nil, "vm %s is paused on node %s", name, node)
	case api.VMStopped:
		if was.Phase != "" && was.Phase != api.VMCreating {
			add("vm.stopped", api.SeverityInfo, nil, "vm %s is stopped", name)
		}
	case api.VMSuspended:
		add("vm.suspended", api.SeverityInfo, nil, "vm %s is suspended: %s", name, why)
	case api.VMFailed:
		add("vm.failed", api.SeverityWarning, nil, "vm %s has failed on node %s: %s", name, node, why)
	case api.VMUnknown:
		add("vm.unknown", api.SeverityWarning, nil, "the state of vm %s is not known: %s", name, why)
	}
}
