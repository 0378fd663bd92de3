// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// This file is the owner's part of "Drills", ha/DESIGN.md: it ends a VM on purpose and
// gives it up, so that the leader passes it on as one that could not be started.

// drillKillWithin is how long after its word an owner still ends the VM.
const drillKillWithin = 20 * time.Second

// drillAlone is how long an owner waits for a leader before it starts the VM again.
const drillAlone = 2 * time.Minute

// drill is the drill that is to end this VM under this binding, if there is one.
func (s *step) drill() (d api.Drill, ok bool, err error) {
	d, err = configdb.Drills.Get(s.v, s.vm.Meta.ID)
	if err != nil {
		return d, false, api.IgnoreNotFound(err)
	}
	return d, d.Spec.NodeID == s.h.cfg.NodeID && d.Status.Ended == nil && api.Stands(&d, &s.vm, s.b.Spec.Epoch), nil
}

// drilled ends QEMU for a drill, once that it is this process is committed: a drill
// that is over, or was cancelled, conflicts with that.
func (s *step) drilled(ctx context.Context) (done bool, err error) {
	d, ok, err := s.drill()
	if !ok || err != nil {
		return false, err
	}
	if _, _, lease := s.h.cfg.Lease.Current(); !lease {
		return false, nil // it may be over; and nothing could start the VM again
	}
	switch d.Status.PID {
	case s.proc.PID:
		if s.in.drillPID != s.proc.PID || s.now.Sub(s.in.drillAt) > drillKillWithin {
			return false, nil // another life asked, or long ago: nobody may want it any more
		}
		s.silent = true
		s.result.After = attachRetry
		s.h.log.Info("a VM is ended for a drill", "vm", s.vm.Meta.ID, "pid", s.proc.PID)
		return true, s.h.kill(ctx, s.vm.Meta.ID)
	case 0:
	default:
		return false, nil // that one is gone
	}
	if s.vm.Status.Phase != api.VMRunning || s.vm.Status.PID != s.proc.PID || s.vm.Spec.HA != api.HARestart {
		return false, nil
	}
	tx := &configdb.Txn{Actor: actor}
	d.Status.PID, d.Status.Phase, d.Status.Message = s.proc.PID, api.TaskRunning, "QEMU is ended by the guard of node "+s.b.Spec.Node
	if err := s.writeDrill(tx, &d); err != nil {
		return false, err
	}
	tx.RequireRevision(configdb.Operations.SpecKey(s.vm.Meta.ID), 0)
	tx.RequireRevision(configdb.VMs.SpecKey(s.vm.Meta.ID), s.vm.Meta.Revision)
	s.silent = true
	s.in.drillPID, s.in.drillAt = s.proc.PID, s.now
	return true, s.commit(ctx, tx)
}

// writeDrill adds the status of the drill, which must be as it was read.
func (s *step) writeDrill(tx *configdb.Txn, d *api.Drill) error {
	tx.RequireRevision(configdb.Drills.SpecKey(d.Meta.ID), d.Meta.Revision)
	return configdb.Drills.UpdateStatus(s.v, tx, d)
}

// giveUpForDrill gives the VM up if what ended is what the guard killed for a drill.
// It is committed with the status that says so.
func (s *step) giveUpForDrill(tx *configdb.Txn) (done bool, err error) {
	d, ok, err := s.drill()
	if err != nil || !ok || d.Status.PID != s.proc.PID || s.proc.Epoch != s.b.Spec.Epoch || s.proc.Reason != ReasonKill || s.proc.Signal != int(syscall.SIGKILL) || s.in.unsure.Load() || !s.counted() {
		return false, err
	}
	n, err := configdb.Nodes.Get(s.v, s.h.cfg.NodeID)
	if err != nil {
		return false, err
	}
	at := s.now.UTC()
	end := api.DrillEnd{PID: s.proc.PID, Reason: s.proc.Reason, Signal: s.proc.Signal, At: at}
	f := api.NewFailover(&n, api.CauseDrill, at)
	f.Spec.Drill = &api.FailoverDrill{VMID: s.vm.Meta.ID, VM: s.vm.Meta.Name, DrillEnd: end}
	d.Status.Ended, d.Status.Failover, d.Status.Message = &end, f.Meta.ID, "QEMU has ended; another node is chosen"
	if err := s.writeDrill(tx, &d); err != nil {
		return false, err
	}
	t := api.TriesOf(&s.vm, s.b.Spec.Epoch)
	t.GivenUp, t.Drill, t.At = true, true, &at
	s.vm.Status.Tries = &t
	s.report(api.VMStarting, "ended for a drill; another node is chosen for it")
	return true, configdb.Failovers.CreateUnnamed(tx, &f)
}
