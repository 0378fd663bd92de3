// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
)

// savedMachine says what the running QEMU is beyond its hardware. What cannot be
// found out is left to the defaults of the start that loads the memory.
func (o *operation) savedMachine(ctx context.Context) (*api.SavedMachine, error) {
	m := &api.SavedMachine{Accelerator: api.Accelerator(o.in.accel)}
	if conn := o.in.openConn(); conn != nil {
		m.QEMUVersion = conn.Version().String()
	}
	if err := o.in.execute(ctx, "qom-get", map[string]any{"path": "/machine", "property": "type"}, &m.Type); err != nil {
		return nil, err
	}
	m.Type = strings.TrimSuffix(m.Type, "-machine")
	args, err := cmdline(o.in.pid)
	if err != nil {
		o.h.log.Warn("the arguments of a QEMU cannot be read; its memory will be loaded into a machine with the CPU that the spec says", "vm", o.vm.Meta.ID, "err", err)
		return m, nil
	}
	m.CPU, m.CloudInit = argv.CPUOf(args), argv.SeedOf(args)
	return m, nil
}

// beforeStart looks for what a start must respect: an unfinished revert, whose
// disks are a mixture, and saved memory, whose hardware it takes over.
func (s *step) beforeStart() (saved *api.SavedState, ok bool) {
	if name := configdb.UnfinishedRevert(s.v, s.vm.Meta.ID); name != "" {
		s.wait(api.VMFailed, fmt.Sprintf("a revert to snapshot %s was interrupted; revert again: muster vm snapshot revert %s %s", name, s.vm.Meta.Name, name))
		s.startFailed = false // it would be the same on any node
		return nil, false
	}
	st, err := configdb.SavedStates.Get(s.v, s.vm.Meta.ID)
	if err != nil {
		return nil, true
	}
	s.vm.Spec = s.vm.Spec.WithHardware(st.Spec.Hardware)
	s.keepSeed(st.Spec.Machine)
	return &st, true
}

// keepSeed makes the CD-ROM for cloud-init one that the guest's memory knows. It
// read it long ago: what counts is that the drive is there.
func (s *step) keepSeed(m *api.SavedMachine) {
	if m == nil {
		return
	}
	switch now := s.vm.Spec.CloudInit; {
	case m.CloudInit == "":
		s.vm.Spec.CloudInit = nil
	case now == nil:
		s.vm.Spec.CloudInit = &api.CloudInit{Format: m.CloudInit}
	default:
		s.vm.Spec.CloudInit.Format = m.CloudInit
	}
}

// powerOn is the hardware that a start makes. Of saved memory it is as it was;
// limits and the state of links are set when QEMU runs.
func (s *step) powerOn(saved *api.SavedState) *api.VMSpec {
	hw := s.vm.Spec.PowerOn()
	if saved != nil {
		hw = saved.Spec.Hardware.PowerOn()
		hw.Boot = saved.Spec.Hardware.Boot
	}
	return hw
}

// asSaved makes the machine the one that saved memory is of. ok is false if this
// node cannot; the status says why.
func (s *step) asSaved(m *argv.Machine, saved *api.SavedState) (ok bool) {
	if saved == nil {
		return true
	}
	m.Paused = true
	was := saved.Spec.Machine
	if was == nil {
		return true
	}
	if was.Accelerator != "" && was.Accelerator != m.Accelerator {
		s.wait(api.VMFailed, fmt.Sprintf("its memory was saved with the accelerator %s, and this node uses %s: start it on another node, or set the accelerator of this one (muster node set); with --discard-suspend it starts without that memory", was.Accelerator, m.Accelerator))
		return false
	}
	m.Version = was.Type
	if was.CPU != "" {
		m.CPU = was.CPU
	}
	return true
}

// settle makes sure, before memory is saved, that the status says what QEMU has:
// the memory can be loaded into the same machine only. It reports false as long
// as that has to be found out by the rest of the look.
func (s *step) settle(op *api.Operation) (ok bool, why error) {
	s.in.mu.Lock()
	stale := s.in.stale
	s.in.mu.Unlock()
	hw := s.vm.Status.Hardware
	known := hw != nil && s.vm.Status.PID == s.proc.PID && s.in.verified && !stale && (len(s.in.unplugging) == 0 || !s.savesMemory(op))
	if known || hw != nil && hw.Boot == nil && s.vm.Status.PID == s.proc.PID {
		s.in.settleSince, s.in.settleFor = s.now, ""
		return true, nil
	}
	if s.in.settleFor != op.Spec.TaskID {
		s.in.settleSince, s.in.settleFor = s.now, op.Spec.TaskID
	}
	if s.now.Sub(s.in.settleSince) > UnplugTimeout {
		text := "its hardware is being changed"
		if i := slices.IndexFunc(s.vm.Status.Conditions, func(c api.Condition) bool { return c.Type == ConditionHotplugFailed }); i >= 0 {
			text += ": " + s.vm.Status.Conditions[i].Message
		}
		return true, api.Errorf(api.CodeRefused, "vm %s: %s; ask again when that is over", s.vm.Meta.Name, text)
	}
	s.settling = true
	s.lookAgain(lookSoon)
	return false, nil
}

// savesMemory reports an operation after which the guest goes on in another QEMU: a
// device that it was asked to let go of would have to be there, and may be
// somebody else's by then.
func (s *step) savesMemory(op *api.Operation) bool {
	if op.Spec.Action == api.ActionVMSuspend {
		return true
	}
	snap, err := configdb.Snapshots.Get(s.v, op.Spec.SnapshotID)
	return op.Spec.Action == api.ActionVMSnapshot && err == nil && snap.Spec.Memory
}
