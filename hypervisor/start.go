// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/console"
)

// settleStart makes sure that a start without an answer is over: before that
// nobody may be told that the VM is stopped.
func (s *step) settleStart(ctx context.Context) error {
	if s.proc == nil || s.proc.State == ProcessExited {
		if err := s.h.kill(ctx, s.vm.Meta.ID); err != nil {
			return fmt.Errorf("make sure that a start of vm %s, whose outcome is not known, is over: %w", s.vm.Meta.Name, err)
		}
	}
	s.in.unsure.Store(false)
	return nil
}

// down handles a VM that has no process.
func (s *step) down(ctx context.Context) error {
	lost := s.vm.Status.PID != 0 // the guard knows nothing of it any more
	s.ended()
	if err := s.h.endTPM(ctx, s.vm.Meta.ID); err != nil {
		return err
	}
	if s.vm.Spec.Power == api.PowerSuspended {
		s.atRest()
		return s.protect(ctx, false)
	}
	if s.vm.Spec.Power == api.PowerStopped {
		s.vm.Status.Awaits = nil
		s.stopWaiting()
		s.h.notStarting(s.vm.Meta.ID)
		s.vm.Status.RebootsDone = s.vm.Spec.Reboots
		if _, ok := s.disks(); !ok && s.vm.Status.Phase == api.VMCreating {
			return nil
		}
		if s.vm.Status.Phase != api.VMStopped || lost {
			s.report(api.VMStopped, "")
		}
		if err := s.protect(ctx, false); err != nil {
			return err
		}
		return nil
	}
	if lost {
		s.report(api.VMStarting, "QEMU is gone: the host or its guard was restarted; it is started again")
		s.holdBack()
	}
	return s.start(ctx)
}

// start begins QEMU, or says what it waits for.
func (s *step) start(ctx context.Context) error {
	if wait := max(s.in.notBefore.Sub(s.now), s.restartDue()); wait > 0 {
		s.result.After = wait
		return nil
	}
	session, revision, ok := s.h.cfg.Lease.Current()
	if !ok {
		s.wait(api.VMStarting, "waiting: this node has no lease, so it must not start VMs")
		return nil
	}
	if s.v.Revision() < revision {
		s.silent = true
		s.result.After = attachRetry
		return nil
	}
	if why, out := s.h.lockedOut(s.v, &s.vm); out {
		s.wait(api.VMStarting, "waiting: "+why)
		return nil
	}
	if s.heldBack() {
		return nil
	}
	if held, err := s.awaiting(ctx); held || err != nil {
		return err
	}
	if !s.makeRoom() {
		return nil
	}
	saved, ok := s.beforeStart()
	if !ok {
		return nil
	}
	user, ok := s.user()
	if !ok {
		return nil
	}
	hw := s.powerOn(saved)
	m, ok := s.machine(hw)
	if !ok || !s.board(&m) || !s.asSaved(&m, saved) || !s.grant(ctx, user) || !s.plug(ctx, &m) {
		return nil
	}
	if !s.release(ctx) {
		return nil
	}
	noteCards(hw, &m)
	args, err := argv.Build(m)
	if err != nil {
		s.fail(err.Error())
		return nil
	}
	if err := s.protect(ctx, false); err != nil {
		return err
	}
	if err := s.settlePromise(ctx); err != nil {
		return err
	}
	p := s.h.pathsOf(s.vm.Meta.ID)
	if err := errors.Join(s.prepare(p, user), s.writeKeys(m.Keys()), s.noteHardware(p, hw)); err != nil {
		s.fail(err.Error())
		return nil
	}
	r := StartRequest{
		VM: s.vm.Meta.ID, Epoch: s.b.Spec.Epoch, Session: session, Protected: s.b.Spec.Protected,
		Argv: args, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Dir: p.dir, LogPath: p.qemuLog, User: user,
	}
	if err := s.beginTry(ctx); err != nil {
		return err
	}
	if ok, err := s.startTPM(ctx, &m, r); !ok {
		return err
	}
	return s.launch(ctx, r)
}

// wait reports what a start waits for; changes of the database wake the VM, and
// so does a slow look. A VM that never got further is still being created.
func (s *step) wait(phase api.VMPhase, message string) {
	if was := s.vm.Status.Phase; phase == api.VMStarting && (was == "" || was == api.VMCreating) {
		phase = api.VMCreating
	}
	s.report(phase, message)
	s.startFailed = s.startFailed || phase == api.VMFailed
	s.result.After = waitLook
}

// fail reports a start that cannot work as things are; it is tried again later.
func (s *step) fail(message string) {
	s.report(api.VMFailed, message)
	s.startFailed = true
	s.backOff()
}

// backOff puts off the next start.
func (s *step) backOff() {
	d := min(MinRestart<<min(s.in.failures, 16), MaxRestart)
	s.in.failures++
	s.in.notBefore = s.now.Add(d)
	s.result.After = d
}

// machine collects what the argument vector of a machine with this hardware is
// made of; ok is false if the status says what is missing.
func (s *step) machine(hw *api.VMSpec) (m argv.Machine, ok bool) {
	want := s.h.wantedAccelerator(s.v)
	found, known := s.h.facts.forWish(want)
	if !known {
		s.h.detect(want)
		s.wait(api.VMStarting, "waiting: the node finds out whether it can use KVM")
		s.result.After = lookSoon
		return m, false
	}
	if found.Binary == "" {
		s.wait(api.VMFailed, found.Problem)
		return m, false
	}
	p := s.h.pathsOf(s.vm.Meta.ID)
	m = argv.Machine{
		QEMU: found.Binary, ID: s.vm.Meta.ID, Name: s.vm.Meta.Name, CPUs: hw.CPUs, Memory: hw.Memory, Boot: hw.Boot,
		Accelerator: found.Accelerator, Paused: s.vm.Spec.Power == api.PowerPaused,
		QMP: p.qmp, Agent: p.agent, Serial: p.serial, Log: p.serialLog,
	}
	if hw.Display.Shown() {
		m.VNC = p.vnc
	}
	m.Seed = s.seedDevice()
	m.Disks, ok = s.disks()
	return m, ok
}

// disks finds the files of all disks; ok is false while one of them, or what the
// machine keeps beside them, is not ready.
func (s *step) disks() (out []argv.Disk, ok bool) {
	s.vm.Spec.AssignSlots(nil)
	for _, d := range s.vm.Spec.Disks {
		path, format, ok := s.resolved(d.Volume)
		if !ok {
			return nil, false
		}
		out = append(out, argv.Disk{Slot: d.Slot, Path: path, Format: format, Options: d})
	}
	for _, name := range s.vm.Spec.StateVolumes() {
		if _, _, ok := s.resolved(name); !ok {
			return nil, false
		}
	}
	return out, true
}

// resolve finds the file of a volume, or the one that an arriving VM opens in its
// place.
func (s *step) resolve(volume string) (path, format string, err error) {
	if c, ok := s.copies[volume]; ok {
		return c.path, c.format, nil
	}
	return s.h.cfg.Volumes.Resolve(s.v, s.vm.Meta.Project, volume)
}

// resolved finds the file of a volume. If it is not ready, a VM that is being
// created or is to run says so.
func (s *step) resolved(volume string) (path, format string, ok bool) {
	path, format, err := s.resolve(volume)
	if err == nil {
		return path, format, true
	}
	if was := s.vm.Status.Phase; s.vm.Spec.Power != api.PowerStopped || was == "" || was == api.VMCreating {
		s.wait(api.VMStarting, fmt.Sprintf("waiting for volume %s: %v", volume, err))
	}
	return "", "", false
}

// plug gives every network card its device. If the switch cannot, the status
// says why, and the start is tried again.
func (s *step) plug(ctx context.Context, m *argv.Machine) bool {
	if len(s.vm.Spec.NICs) == 0 {
		return true
	}
	if s.h.cfg.Ports == nil {
		s.wait(api.VMFailed, "this node has no virtual switch for the VM's network cards")
		return false
	}
	for i, nic := range s.vm.Spec.NICs {
		pctx, cancel := context.WithTimeout(ctx, PortDeadline)
		device, offload, err := s.h.cfg.Ports.Plug(pctx, s.vm, i)
		cancel()
		if err != nil {
			s.wait(api.VMStarting, "waiting for the virtual switch: "+err.Error())
			return false
		}
		card := argv.NIC{Slot: nic.Slot, Device: device, MAC: nic.MAC, MTU: s.mtu(nic.Network), Offload: offload}
		if was, ok := m.Boot.CardIn(nic.Slot); ok { // the guest's memory knows it like this
			card.MTU, card.ROM = was.MTU, &was.ROM
		}
		m.NICs = append(m.NICs, card)
	}
	return true
}

// noteCards says in the hardware of a start what its network cards are.
func noteCards(hw *api.VMSpec, m *argv.Machine) {
	if hw.Boot == nil {
		return // of an earlier version: it began without
	}
	hw.Boot.Cards = []api.VMCard{}
	for i, c := range m.NICs {
		hw.Boot.SetCard(api.VMCard{Slot: c.Slot, MTU: c.MTU, ROM: m.HasROM(i)})
	}
}

func (s *step) mtu(network string) int {
	n, err := configdb.Networks.Find(s.v, api.DefaultProject, network)
	if err != nil {
		return 0
	}
	return n.Spec.MTU()
}

// unplug gives the network cards of a VM back that has no process any more. What
// fails is found by the switch itself.
func (h *Hypervisor) unplug(ctx context.Context, id string) {
	if h.cfg.Ports == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, PortDeadline)
	defer cancel()
	if err := h.cfg.Ports.Unplug(ctx, id); err != nil {
		h.log.Warn("network cards are left plugged for now", "vm", id, "err", err)
	}
}

// prepare makes the VM's run directory.
func (s *step) prepare(p paths, user *ProcessUser) error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("make the run directory of vm %s: %w", s.vm.Meta.Name, err)
	}
	if user != nil {
		if err := s.hand(p, user); err != nil {
			return err
		}
	}
	for _, sock := range []string{p.qmp, p.agent, p.serial, p.vnc, p.in, p.out, p.nbd, p.nbdOut} {
		if err := os.Remove(sock); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("remove an old socket of vm %s: %w", s.vm.Meta.Name, err)
		}
	}
	if err := s.writeSeed(p.seed); err != nil {
		return err
	}
	if err := s.handSeed(p, user); err != nil {
		return err
	}
	if err := console.Trim(p.serialLog); err != nil {
		s.h.log.Warn("the serial log cannot be trimmed", "vm", s.vm.Meta.ID, "err", err)
	}
	s.in.logFrom = 0
	if st, err := os.Stat(p.qemuLog); err == nil {
		s.in.logFrom = st.Size()
	}
	return nil
}

// launch asks the guard, which has the last word about the lease.
func (s *step) launch(ctx context.Context, r StartRequest) error {
	gctx, cancel := context.WithTimeout(ctx, GuardDeadline)
	defer cancel()
	s.h.procs.invalidate()
	p, err := s.guardStart(gctx, r)
	s.h.procs.invalidate()
	if err != nil {
		s.h.log.Warn("the guard refused a start", "vm", s.vm.Meta.ID, "err", err)
		s.report(api.VMStarting, fmt.Sprintf("QEMU was not started: %v", err))
		s.backOff()
		return nil
	}
	s.h.log.Info("QEMU started", "vm", s.vm.Meta.ID, "pid", p.PID, "epoch", r.Epoch, "protected", r.Protected)
	s.in.begin(p.PID, s.now)
	s.in.noteLoad(s)
	s.in.isOf(p.PID, p.UID)
	s.in.reset = s.vm.Spec.Reboots // a start is as good as any reboot asked for before
	s.silent = true                // QEMU opens its sockets in some 0.1 s; one status says it all
	s.result.After = monitorLate
	id, monitor := s.vm.Meta.ID, s.h.pathsOf(s.vm.Meta.ID).qmp
	s.h.spawn(func(ctx context.Context) {
		awaitFile(ctx, monitor, monitorLate)
		s.h.loop.Enqueue(id)
	})
	return nil
}

// guardStart has the guard start the process, unless this node is locked out of what it
// needs. Who has had the gate for itself knows of every process that was begun before.
func (s *step) guardStart(ctx context.Context, r StartRequest) (Process, error) {
	s.h.gate.RLock()
	defer s.h.gate.RUnlock()
	if why, out := s.h.lockedOut(s.h.cfg.DB.Local(), &s.vm); out {
		return Process{}, notBegun{why}
	}
	p, err := s.h.cfg.Guard.Start(ctx, r)
	var refused interface{ Refused() bool }
	s.in.unsure.Store(err != nil && (!errors.As(err, &refused) || !refused.Refused()))
	return p, err
}

// notBegun is a start that never reached the guard.
type notBegun struct{ why string }

func (e notBegun) Error() string { return e.why }
func (e notBegun) Refused() bool { return true }

// awaitFile returns when the file is there, or after the limit. Most of what a
// start takes is QEMU's own time, so the end of that should not be missed.
func awaitFile(ctx context.Context, path string, limit time.Duration) {
	tick := time.NewTicker(monitorLook)
	defer tick.Stop()
	for end := time.Now().Add(limit); time.Now().Before(end); {
		if _, err := os.Lstat(path); err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
