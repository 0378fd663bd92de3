// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// Conditions of a running VM whose hardware is being changed.
const (
	ConditionPendingRestart = api.ConditionPendingRestart
	ConditionChanging       = api.ConditionChanging
	ConditionUnplugIgnored  = "UnplugIgnored"
	ConditionMemoryIgnored  = "MemoryIgnored"
	ConditionTrayLocked     = "TrayLocked"
	ConditionHotplugFailed  = api.ConditionHotplugFailed
)

// Times of changes to a running VM.
const (
	// UnplugInterval is the pause between two requests to the guest to let go of
	// a device, UnplugTimeout when the user is told that it does not.
	UnplugInterval = 10 * time.Second
	UnplugTimeout  = 30 * time.Second
	// HotplugRetry is the pause before QEMU is asked again for what it refused.
	HotplugRetry = 10 * time.Second
	// LinkPause is how long a cable is out when a network card changes its
	// network: long enough for the guest to see it and ask for a new address.
	LinkPause = time.Second
)

// live is one look at the hardware of a running QEMU: what it has, what is
// wished for, and one step from here to there.
type live struct {
	s    *step
	hw   *api.VMSpec // what QEMU has; the step's copy, written as status.hardware
	want *api.VMSpec
	have map[string]bool // devices in QEMU, by ID
	// nodes are QEMU's block nodes and the files of those that have one; read
	// when they matter.
	nodes   map[string]string
	locked  []string // drives whose tray the guest keeps closed
	full    bool     // status.hardware is not trusted: everything is looked at
	held    bool     // an operation wants the hardware as it is
	leaving bool     // a device that neither hw nor want knows is still there
	growing bool     // the guest's memory is on its way
	slow    string   // what about its memory the guest takes too long for
	waits   []string // what is under way, for people
	ignored []string // what the guest does not let go of
	refused []string // what QEMU did not take
}

// adapt brings the hardware of a running QEMU closer to the wish. Every part of
// it looks at QEMU before it acts and may be repeated at any point: a daemon
// that was killed between a command and the status finds the device by its ID.
func (s *step) adapt(ctx context.Context) error {
	hw := s.vm.Status.Hardware
	want := s.vm.Spec.Hardware()
	want.AssignSlots(nil)
	l := &live{s: s, hw: hw.Hardware(), want: want}
	if s.vm.Spec.Power == api.PowerStopped {
		return nil // the next start has everything
	}
	if hw.Boot == nil {
		l.pending()
		return nil
	}
	if _, err := configdb.Operations.Get(s.v, s.vm.Meta.ID); err == nil && !s.settling {
		l.held = true // a migration or a snapshot wants the hardware as it is
		l.pending()
		return nil
	}
	stale := s.in.takeStale()
	if s.in.verified && !stale && !s.in.growing && sameLive(l.hw, want) && !l.grows() {
		l.pending()
		return nil
	}
	l.full = !s.in.verified
	s.in.verified = false
	if err := l.look(ctx); err != nil {
		return err
	}
	for _, part := range []func(context.Context) error{l.disks, l.cards, l.cpus, l.memory, l.drives} {
		if err := l.try(part(ctx)); err != nil {
			return err
		}
	}
	s.in.verified, s.in.growing = !l.leaving && len(l.refused) == 0, l.growing
	s.vm.Status.Hardware = l.hw
	l.pending()
	l.report()
	return nil
}

// try takes QEMU's refusal for an answer; anything else is an error of the step.
func (l *live) try(err error) error {
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		l.refused = append(l.refused, refused.Error())
		return nil
	}
	return err
}

// sameLive compares what can be changed while QEMU runs.
func sameLive(a, b *api.VMSpec) bool {
	return a.CPUs == b.CPUs && a.Memory == b.Memory && slices.Equal(a.CDROMs, b.CDROMs) && sameSlots(a.Disks, b.Disks, func(d api.VMDisk) int { return d.Slot }) &&
		sameSlots(a.NICs, b.NICs, func(n api.VMNIC) int { return n.Slot })
}

func sameSlots[T comparable](a, b []T, slot func(T) int) bool {
	by := func(x, y T) int { return slot(x) - slot(y) }
	return slices.Equal(slices.SortedFunc(slices.Values(a), by), slices.SortedFunc(slices.Values(b), by))
}

// look asks QEMU which devices it has.
func (l *live) look(ctx context.Context) error {
	var list []struct {
		Name string `json:"name"`
	}
	if err := l.s.in.execute(ctx, "qom-list", map[string]any{"path": "/machine/peripheral"}, &list); err != nil {
		return err
	}
	l.have = map[string]bool{}
	for _, o := range list {
		l.have[o.Name] = true
	}
	return nil
}

// blockNodes reads QEMU's block nodes, once.
func (l *live) blockNodes(ctx context.Context) error {
	if l.nodes != nil {
		return nil
	}
	var list []struct {
		Node string `json:"node-name"`
		File string `json:"file"`
	}
	if err := l.s.in.execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return err
	}
	l.nodes = map[string]string{}
	for _, n := range list {
		l.nodes[n.Node] = n.File
	}
	return nil
}

// release asks the guest to let go of a device, again and again, and reports
// whether QEMU has it no more.
func (l *live) release(ctx context.Context, device, what string) (gone bool, err error) {
	in := l.s.in
	if !l.have[device] {
		delete(in.unplugging, device)
		return true, nil
	}
	u := in.unplugging[device]
	if u == nil {
		u = &unplug{since: l.s.now}
		if in.unplugging == nil {
			in.unplugging = map[string]*unplug{}
		}
		in.unplugging[device] = u
	}
	if l.s.now.Sub(u.asked) >= UnplugInterval {
		err := in.execute(ctx, "device_del", map[string]any{"id": device}, nil)
		var refused *qmp.CommandError
		switch {
		case errors.As(err, &refused) && refused.Class == "DeviceNotFound":
			return true, nil
		case errors.As(err, &refused) && strings.Contains(refused.Desc, "in the process of unplug"):
		case err != nil:
			return false, err
		}
		u.asked = l.s.now
		// A guest that never ran, or a device without a driver, lets go at once.
		if err := l.look(ctx); err != nil {
			return false, err
		}
		if !l.have[device] {
			delete(in.unplugging, device)
			return true, nil
		}
	}
	l.s.lookAgain(UnplugInterval - l.s.now.Sub(u.asked))
	if l.s.now.Sub(u.since) >= UnplugTimeout {
		l.ignored = append(l.ignored, what)
	} else {
		l.s.lookAgain(UnplugTimeout - l.s.now.Sub(u.since))
	}
	l.waits = append(l.waits, "the guest to let go of "+what)
	return false, nil
}

// takenBack waits for an answer about a device that the guest was asked to let go
// of and that is wished for again: the question itself cannot be taken back. A
// guest that has not answered for a while will not.
func (l *live) takenBack(device, what string) {
	u := l.s.in.unplugging[device]
	switch {
	case u == nil:
	case l.s.now.Sub(u.asked) >= UnplugTimeout:
		delete(l.s.in.unplugging, device)
	default:
		l.waits = append(l.waits, "an answer of the guest about "+what)
		l.s.lookAgain(UnplugTimeout - l.s.now.Sub(u.asked))
	}
}

// unplug is a request to the guest that is under way.
type unplug struct{ since, asked time.Time }

// lookAgain makes the next look come no later than after d.
func (s *step) lookAgain(d time.Duration) {
	d = max(d, lookSoon)
	if s.result.After == 0 || d < s.result.After {
		s.result.After = d
	}
}

// report turns what is under way into conditions.
func (l *live) report() {
	name := l.s.vm.Meta.Name
	if len(l.waits) > 0 {
		l.s.problem(ConditionChanging, "waiting for "+strings.Join(l.waits, ", "))
	}
	if len(l.ignored) > 0 {
		l.s.problem(ConditionUnplugIgnored, fmt.Sprintf("the guest does not let go of %s; it is asked again every %v: unmount it in the guest or let its system finish booting, put it back with muster vm set, or stop the vm with muster vm stop %s, which ends it for certain",
			strings.Join(l.ignored, ", "), UnplugInterval, name))
	}
	if len(l.locked) > 0 {
		l.s.problem(ConditionTrayLocked, fmt.Sprintf("the guest has locked the tray of %s; it is asked again every %v: eject the medium in the guest, or take it out all the same with muster vm cdrom eject --force %s DRIVE (insert has --force, too)",
			strings.Join(l.locked, ", "), UnplugInterval, name))
	}
	if l.slow != "" {
		l.s.problem(ConditionMemoryIgnored, fmt.Sprintf("waiting for %s; it needs the driver virtio_mem (Linux 5.8, or Windows' virtio-win drivers) and, to give back, memory that it can move: muster vm stop %s, then start, applies it for certain", l.slow, name))
	}
	if len(l.refused) > 0 {
		l.s.problem(ConditionHotplugFailed, fmt.Sprintf("%s; it is tried again every %v, and a power cycle (muster vm stop %s, then start) applies it, too", strings.Join(l.refused, "; "), HotplugRetry, name))
		l.s.lookAgain(HotplugRetry)
	}
}

// pending says which wishes take a restart. A reboot inside the guest is none:
// it does not start a new QEMU.
func (l *live) pending() {
	fields := differences(l.hw, l.want)
	if l.held || len(l.waits) > 0 || len(l.refused) > 0 {
		// What is on its way needs no restart; the rest is told when that is over.
		fields = slices.DeleteFunc(fields, liveField)
	}
	if len(fields) == 0 {
		return
	}
	name := l.s.vm.Meta.Name
	l.s.problem(ConditionPendingRestart, fmt.Sprintf("takes effect at the next start: %s; muster vm stop %s, then muster vm start %s (a reboot of the guest is not enough)", strings.Join(fields, ", "), name, name))
}

// detached releases what QEMU has let go of: volumes, and what its machine read
// or was called. What the memory of a suspended VM will ask for again stays.
func (s *step) detached(tx *configdb.Txn) error {
	hw := s.vm.Status.Hardware
	if hw == nil && s.vm.Status.PID != 0 || hw != nil && !s.in.verified {
		return nil // QEMU may have what the status does not say yet
	}
	holders := []*api.VMSpec{hw}
	if vm, err := configdb.VMs.Get(s.v, s.vm.Meta.ID); err == nil { // the step's own copy may be of saved memory
		holders = append(holders, &vm.Spec)
	}
	if st, err := configdb.SavedStates.Get(s.v, s.vm.Meta.ID); err == nil {
		holders = append(holders, st.Spec.Hardware)
	}
	held := map[string]bool{}
	for _, spec := range holders {
		if spec == nil {
			continue
		}
		for _, d := range spec.Disks {
			held[d.Volume] = true
		}
	}
	configdb.LetGo(s.v, tx, &s.vm, holders)
	return configdb.Detached(s.v, tx, s.vm.Meta.ID, func(vol *api.Volume) bool {
		return !held[vol.Meta.Name]
	})
}
