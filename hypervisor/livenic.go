// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// cards brings the network cards closer to the wish, slot by slot.
func (l *live) cards(ctx context.Context) error {
	for slot := 1; slot <= api.MaxNICs; slot++ {
		if err := l.try(l.card(ctx, slot)); err != nil {
			return err
		}
	}
	return nil
}

func (l *live) card(ctx context.Context, slot int) error {
	have, known := l.hw.NICIn(slot)
	want, wanted := l.want.NICIn(slot)
	there := l.have[argv.NICDevice(slot)]
	switch {
	case known && there && wanted && l.sameCard(have, want):
		l.takenBack(argv.NICDevice(slot), nicName(slot))
		return l.changeCard(ctx, have, want)
	case slot > l.hw.Boot.NICPorts: // without a port it neither comes nor goes
		return nil
	case known:
		return l.removeCard(ctx, slot)
	case there && wanted:
		var mac string
		err := l.s.in.execute(ctx, "qom-get", map[string]any{"path": "/machine/peripheral/" + argv.NICDevice(slot), "property": "mac"}, &mac)
		if err != nil {
			return err
		}
		if mac != want.MAC {
			return l.removeCard(ctx, slot)
		}
		l.plugged(want)
		return l.setLink(ctx, want)
	case there:
		return l.removeCard(ctx, slot)
	case wanted:
		return l.addCard(ctx, slot, want)
	}
	return nil
}

// sameCard reports that the guest's device can stay: what it was told of its
// network at the start, the MTU, holds for the new one, too. Memory that was saved
// long ago may be of a card on a network that is another one by now.
func (l *live) sameCard(have, want api.VMNIC) bool {
	told := l.s.mtu(have.Network)
	if c, ok := l.hw.Boot.CardIn(have.Slot); ok {
		told = c.MTU
	} else if have.Network == want.Network {
		return have.MAC == want.MAC
	}
	return have.MAC == want.MAC && told == l.s.mtu(want.Network)
}

// plugged takes note of a card that came while the guest ran.
func (l *live) plugged(n api.VMNIC) {
	l.hw.NICs = append(l.hw.NICs, n)
	l.hw.Boot.SetCard(api.VMCard{Slot: n.Slot, MTU: l.s.mtu(n.Network)})
}

func nicName(slot int) string { return fmt.Sprintf("the network card in slot %d", slot) }

func (l *live) index(slot int) int {
	return slices.IndexFunc(l.s.vm.Spec.NICs, func(n api.VMNIC) bool { return n.Slot == slot })
}

// plugPort asks the switch for the card's device.
func (l *live) plugPort(ctx context.Context, slot int) (device string, offload, ok bool) {
	if l.s.h.cfg.Ports == nil {
		l.waits = append(l.waits, "this node has no virtual switch for "+nicName(slot))
		return "", false, false
	}
	pctx, cancel := context.WithTimeout(ctx, PortDeadline)
	defer cancel()
	device, offload, err := l.s.h.cfg.Ports.Plug(pctx, l.s.vm, l.index(slot))
	if err != nil {
		l.waits = append(l.waits, "the virtual switch: "+err.Error())
		l.s.lookAgain(waitLook)
		return "", false, false
	}
	return device, offload, true
}

func (l *live) addCard(ctx context.Context, slot int, want api.VMNIC) error {
	device, offload, ok := l.plugPort(ctx, slot)
	if !ok {
		return nil
	}
	if err := l.dropNetdev(ctx, slot); err != nil { // of an attempt that was cut off
		return err
	}
	nic := argv.NIC{Slot: slot, Device: device, MAC: want.MAC, MTU: l.s.mtu(want.Network), Offload: offload}
	err := l.s.in.execute(ctx, "netdev_add", nic.NetdevOptions().Object(), nil)
	if err == nil {
		err = l.s.in.execute(ctx, "device_add", nic.HotOptions().Object(), nil)
	}
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		if undo := l.dropNetdev(ctx, slot); undo != nil {
			return errors.Join(err, undo)
		}
		return &qmp.CommandError{Command: refused.Command, Class: refused.Class, Desc: fmt.Sprintf("%s: %s", nicName(slot), refused.Desc)}
	}
	if err != nil {
		return err
	}
	l.s.h.log.Info("network card plugged in", "vm", l.s.vm.Meta.ID, "slot", slot, "network", want.Network)
	if want.Link == api.LinkDown {
		if err := l.setLink(ctx, want); err != nil {
			return err
		}
	}
	l.plugged(want)
	return nil
}

// dropNetdev removes the host's end of a card that is not there. QEMU has no
// list of them, so it is asked to and may say that there is none.
func (l *live) dropNetdev(ctx context.Context, slot int) error {
	err := l.s.in.execute(ctx, "netdev_del", map[string]any{"id": argv.Netdev(slot)}, nil)
	var refused *qmp.CommandError
	if errors.As(err, &refused) && (refused.Class == "DeviceNotFound" || refused.Class == "GenericError") {
		return nil
	}
	return err
}

// removeCard takes a card out. It is cut off first: its addresses may be given
// to somebody else while the guest still thinks about it.
func (l *live) removeCard(ctx context.Context, slot int) error {
	device := argv.NICDevice(slot)
	_, known := l.hw.NICIn(slot)
	l.leaving = l.leaving || !known
	if l.have[device] && l.s.in.unplugging[device] == nil {
		if err := l.setLink(ctx, api.VMNIC{Slot: slot, Link: api.LinkDown}); err != nil {
			return err
		}
		if known { // should it be wished for again
			l.hw.NICs[slices.IndexFunc(l.hw.NICs, func(n api.VMNIC) bool { return n.Slot == slot })].Link = api.LinkDown
		}
	}
	gone, err := l.release(ctx, device, nicName(slot))
	if err != nil || !gone {
		return err
	}
	if err := l.dropNetdev(ctx, slot); err != nil {
		return err
	}
	if l.s.h.cfg.Ports != nil {
		pctx, cancel := context.WithTimeout(ctx, PortDeadline)
		err := l.s.h.cfg.Ports.UnplugCard(pctx, l.s.vm.Meta.ID, slot)
		cancel()
		if err != nil {
			l.s.h.log.Warn("a network card is left plugged for now", "vm", l.s.vm.Meta.ID, "slot", slot, "err", err)
		}
	}
	l.s.h.log.Info("network card unplugged", "vm", l.s.vm.Meta.ID, "slot", slot)
	l.hw.NICs = slices.DeleteFunc(l.hw.NICs, func(n api.VMNIC) bool { return n.Slot == slot })
	l.hw.Boot.DropCard(slot)
	l.s.lookAgain(lookSoon)
	return nil
}

// changeCard changes what a card can change while the guest has it.
func (l *live) changeCard(ctx context.Context, have, want api.VMNIC) error {
	if have == want {
		if l.full && want.Link == api.LinkDown { // QEMU starts with every cable plugged in
			return l.setLink(ctx, want)
		}
		return nil
	}
	slot := want.Slot
	set := func(n api.VMNIC) {
		l.hw.NICs[slices.IndexFunc(l.hw.NICs, func(o api.VMNIC) bool { return o.Slot == slot })] = n
	}
	if have.Network != want.Network || have.Address != want.Address {
		// Another network, another address: the guest shall see the cable go out
		// and come back, as it would with a real switch.
		if _, _, ok := l.plugPort(ctx, slot); !ok {
			return nil
		}
		moved := want
		moved.Link = api.LinkDown
		if err := l.setLink(ctx, moved); err != nil {
			return err
		}
		l.s.in.linkDown = l.s.now
		set(moved)
		if want.Link != api.LinkDown {
			l.waits = append(l.waits, nicName(slot)+" to change its network")
			l.s.lookAgain(LinkPause)
		}
		return nil
	}
	if have.Link != want.Link {
		if wait := LinkPause - l.s.now.Sub(l.s.in.linkDown); want.Link != api.LinkDown && wait > 0 {
			l.waits = append(l.waits, nicName(slot)+" to change its network")
			l.s.lookAgain(wait)
			return nil
		}
		if err := l.setLink(ctx, want); err != nil {
			return err
		}
	}
	set(want)
	return nil
}

func (l *live) setLink(ctx context.Context, n api.VMNIC) error {
	return l.s.in.execute(ctx, "set_link", map[string]any{"name": argv.NICDevice(n.Slot), "up": n.Link != api.LinkDown}, nil)
}
