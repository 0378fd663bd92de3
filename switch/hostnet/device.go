// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// VXLANPort is the UDP port of VXLAN (RFC 7348 section 5).
const VXLANPort = 4789

// EnsureTap makes a tap device for QEMU to open by its name. The device stays
// until Remove.
func (h *Host) EnsureTap(name, alias string, mtu int) error {
	l, err := h.nl.LinkByName(name)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		if err := h.in(func() error { return makeTap(name) }); err != nil {
			return fmt.Errorf("make tap device %s: %w", name, err)
		}
		if l, err = h.nl.LinkByName(name); err != nil {
			return fmt.Errorf("make tap device %s: %w", name, err)
		}
		if err := h.nl.LinkSetAlias(l, alias); err != nil {
			return errors.Join(fmt.Errorf("mark tap device %s: %w", name, err), h.nl.LinkDel(l))
		}
	case err != nil:
		return fmt.Errorf("make tap device %s: %w", name, err)
	case l.Attrs().Alias != alias:
		return fmt.Errorf("make tap device %s: a device of this name is there and is not ours", name)
	}
	return h.finish(l, mtu)
}

func makeTap(name string) error { return setTap(name, unix.TUNSETPERSIST, 1) }

// setTap makes or opens a tap device, which no process has open, and sets one
// thing of it (tun.rst of the kernel).
func setTap(name string, request uint, value int) error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s (load the kernel module tun): %w", tunDevice, err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return err
	}
	return unix.IoctlSetInt(fd, request, value)
}

// VXLAN is one VXLAN device: one network, with the nodes that it reaches.
type VXLAN struct {
	Name, Alias string
	VNI, MTU    int
	Local       netip.Addr
	Remotes     []netip.Addr
}

// EnsureVXLAN makes the device like this. Broadcasts and frames to unknown
// addresses go to every remote once; what came from a tunnel is never sent into
// one, so a full mesh has no loops.
func (h *Host) EnsureVXLAN(x VXLAN) error {
	l, err := h.nl.LinkByName(x.Name)
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return fmt.Errorf("make VXLAN device %s: %w", x.Name, err)
	}
	if err == nil {
		if l.Attrs().Alias != x.Alias {
			return fmt.Errorf("make VXLAN device %s: a device of this name is there and is not ours", x.Name)
		}
		have, ok := l.(*netlink.Vxlan)
		if !ok || have.VxlanId != x.VNI || !have.SrcAddr.Equal(net.IP(x.Local.AsSlice())) {
			if err := h.nl.LinkDel(l); err != nil { // the node has another address now
				return fmt.Errorf("make VXLAN device %s anew: %w", x.Name, err)
			}
			l = nil
		}
	} else {
		l = nil
	}
	if l == nil {
		if l, err = h.makeVXLAN(x); err != nil {
			return err
		}
	}
	if err := h.flood(l, x.Remotes); err != nil {
		return fmt.Errorf("set the other ends of %s: %w", x.Name, err)
	}
	return h.finish(l, x.MTU)
}

func (h *Host) makeVXLAN(x VXLAN) (netlink.Link, error) {
	what := fmt.Sprintf("make VXLAN device %s (VNI %d)", x.Name, x.VNI)
	err := h.nl.LinkAdd(&netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: x.Name, MTU: x.MTU},
		VxlanId:   x.VNI, SrcAddr: x.Local.AsSlice(), Port: VXLANPort, Learning: true,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	l, err := h.nl.LinkByName(x.Name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if err := h.nl.LinkSetAlias(l, x.Alias); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", what, err), h.nl.LinkDel(l))
	}
	return l, nil
}

// noMAC is the key of the flood list of a VXLAN device.
var noMAC = net.HardwareAddr{0, 0, 0, 0, 0, 0}

// flood makes the flood list exactly these addresses.
func (h *Host) flood(l netlink.Link, remotes []netip.Addr) error {
	entry := func(a netip.Addr) *netlink.Neigh {
		return &netlink.Neigh{
			LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
			Flags: netlink.NTF_SELF, HardwareAddr: noMAC, IP: a.AsSlice(),
		}
	}
	want := map[netip.Addr]bool{}
	for _, a := range remotes {
		want[a] = true
	}
	list, err := h.nl.NeighList(l.Attrs().Index, unix.AF_BRIDGE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, n := range list {
		a, ok := netip.AddrFromSlice(n.IP)
		if !ok {
			continue
		}
		a = a.Unmap()
		all := bytes.Equal(n.HardwareAddr, noMAC)
		switch {
		case all && want[a]:
			delete(want, a)
		case all:
			if err := h.nl.NeighDel(entry(a)); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	for a := range want {
		if err := h.nl.NeighAppend(entry(a)); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}
