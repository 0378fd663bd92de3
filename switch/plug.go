// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"fmt"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/switch/ovs"
)

// Plug makes the device of a VM's network card and its port, and returns the
// name of the device when the running switch has it. offload is whether the
// switch takes frames with offloaded checksums and segmentation, which the one
// in user space does not. It may be called again at any time.
func (s *Switch) Plug(ctx context.Context, vm api.VM, nic int) (device string, offload bool, err error) {
	if device, offload, err = s.plugInTurn(ctx, &vm, nic); err != nil {
		return "", false, fmt.Errorf("plug network card %d of vm %s: %w", nic, vm.Meta.Name, err)
	}
	return device, offload, nil
}

func (s *Switch) plugInTurn(ctx context.Context, vm *api.VM, nic int) (device string, offload bool, err error) {
	if err := s.work.enter(ctx); err != nil {
		return "", false, err
	}
	defer s.work.leave()
	ctx, cancel := context.WithTimeout(ctx, PlugDeadline) // without the time in the queue
	defer cancel()
	return s.plug(ctx, vm, nic)
}

func (s *Switch) plug(ctx context.Context, vm *api.VM, nic int) (string, bool, error) {
	if s.host == nil {
		return "", false, fmt.Errorf("the switch of this node does not work yet")
	}
	w, err := wishFor(s.cfg.DB.Local(), s.cfg.NodeID)
	if err != nil {
		return "", false, err
	}
	spec := vm.Spec.Hardware()
	spec.AssignSlots(nil)
	if nic < 0 || nic >= len(spec.NICs) {
		return "", false, fmt.Errorf("the VM has %d network cards", len(spec.NICs))
	}
	is := func(c tap) bool { return c.vm.Meta.ID == vm.Meta.ID && c.nic.Slot == spec.NICs[nic].Slot }
	t := find(w.taps(), is)
	if kept := find(w.unwanted(), is); t == nil && kept != nil && s.conn != nil {
		return s.plugNowhere(ctx, w, kept)
	}
	switch {
	case t == nil:
		return "", false, fmt.Errorf("this node does not know the card, or the VM is bound elsewhere")
	case t.network == nil:
		return "", false, errNoNetwork
	case s.conn == nil:
		return "", false, s.whyNoDatabase()
	}
	p := s.newPass(w)
	if err := s.tap(t); err != nil {
		return "", false, err
	}
	if err := p.make(ctx); err != nil {
		return "", false, err
	}
	if ok, reason := p.report.Realised(t.network.Meta.Name); !ok {
		return "", false, fmt.Errorf("network %s is not ready on this node: %s", t.network.Meta.Name, reason)
	}
	if err := s.awaitPort(ctx, p, t.name); err != nil {
		return "", false, err
	}
	if err := p.flows(ctx); err != nil {
		return "", false, err
	}
	if b, err := configdb.Bindings.Get(s.cfg.DB.Local(), vm.Meta.ID); err == nil && b.Spec.NodeID != s.cfg.NodeID {
		return t.name, p.report.Datapath != "netdev", nil // it still runs elsewhere
	}
	// The VM may have run elsewhere a moment ago.
	if err := s.flow.Inject(uint32(p.state.Ports[t.name].OFPort), announcement(t.nic.MAC, t.nic.Address)); err != nil {
		return "", false, err
	}
	return t.name, p.report.Datapath != "netdev", nil
}

func find(list []tap, is func(tap) bool) *tap {
	if i := slices.IndexFunc(list, is); i >= 0 {
		return &list[i]
	}
	return nil
}

// plugNowhere makes the device of a card that the guest has not let go of. It is a
// port of nothing: its addresses may be somebody else's by now.
func (s *Switch) plugNowhere(ctx context.Context, w *wish, t *tap) (string, bool, error) {
	if err := s.tap(t); err != nil {
		return "", false, err
	}
	p := s.newPass(w)
	if err := p.make(ctx); err != nil {
		return "", false, err
	}
	return t.name, p.report.Datapath != "netdev", nil
}

// tap makes the device of a card, for the VM's user.
func (s *Switch) tap(t *tap) error {
	size := 0
	if t.network != nil {
		size = mtu(t.network)
	}
	if err := s.host.EnsureTap(t.name, s.tapAlias(*t), size); err != nil {
		return err
	}
	if uid := s.tapOwner(t.vm.Meta.ID); uid > 0 {
		return s.host.OwnTap(t.name, uid)
	}
	return nil
}

// newPass is one look at the whole whose report is not written.
func (s *Switch) newPass(w *wish) *pass {
	p := &pass{s: s, w: w, ports: map[string]ovs.PortWish{}, keep: map[string]bool{}}
	p.report = api.SwitchStateStatus{Problems: map[string]string{}}
	return p
}

// tapOwner is the user that a VM runs as, 0 for root.
func (s *Switch) tapOwner(vmID string) int {
	if s.cfg.TapOwner == nil {
		return 0
	}
	return s.cfg.TapOwner(vmID)
}

// awaitPort waits until ovs-vswitchd has taken a port in.
func (s *Switch) awaitPort(ctx context.Context, p *pass, name string) error {
	for {
		changed := s.conn.Changed()
		st, err := s.conn.State(ctx)
		if err != nil {
			return err
		}
		have := st.Ports[name]
		switch {
		case have.OFPort > 0:
			p.state = st
			return nil
		case have.Error != "":
			return fmt.Errorf("Open vSwitch refuses it: %s", have.Error) //nolint:staticcheck // a name
		}
		if err := s.await(ctx, changed); err != nil {
			return fmt.Errorf("wait for ovs-vswitchd to take in %s: %w", name, err)
		}
	}
}

// Unplug removes the ports and devices of all network cards of a VM, whether or
// not the VM still exists. What fails is removed by the next look that finds no
// process behind the device.
func (s *Switch) Unplug(ctx context.Context, vmID string) error {
	return s.unplug(ctx, vmID, 1, api.MaxNICs)
}

// UnplugCard removes what belongs to the network card in one slot of a VM.
func (s *Switch) UnplugCard(ctx context.Context, vmID string, slot int) error {
	return s.unplug(ctx, vmID, slot, slot)
}

func (s *Switch) unplug(ctx context.Context, vmID string, first, last int) error {
	if err := s.work.enter(ctx); err != nil {
		return fmt.Errorf("unplug the network cards of vm %s: %w", vmID, err)
	}
	defer s.work.leave()
	ctx, cancel := context.WithTimeout(ctx, PlugDeadline)
	defer cancel()
	if s.host == nil {
		return fmt.Errorf("unplug the network cards of vm %s: the switch of this node does not work yet", vmID)
	}
	var st *ovs.State
	if s.conn != nil {
		var err error
		if st, err = s.conn.State(ctx); err != nil {
			return fmt.Errorf("unplug the network cards of vm %s: %w", vmID, err)
		}
	}
	for slot := first; slot <= last; slot++ {
		name := tapName(vmID, slot)
		s.stopResponder(name)
		if st != nil {
			if err := s.conn.RemovePort(ctx, st, s.cfg.ClusterID, name); err != nil {
				return fmt.Errorf("unplug the network card in slot %d of vm %s: %w", slot, vmID, err)
			}
		}
		if err := s.host.Remove(name, s.alias("vm", vmID)); err != nil {
			return fmt.Errorf("unplug the network card in slot %d of vm %s: %w", slot, vmID, err)
		}
	}
	s.loop.Enqueue(all)
	return nil
}
