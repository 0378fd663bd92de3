// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is the network of this host. Its methods may be called from any
// goroutine.
type Host struct {
	ns netns.NsHandle // closed: the process's own
	nl *netlink.Handle
}

// Open returns the host's network; namespace is the path of a network
// namespace, or empty for the process's own.
func Open(namespace string) (*Host, error) {
	h := &Host{ns: netns.None()}
	var err error
	if namespace == "" {
		h.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	} else {
		if h.ns, err = netns.GetFromPath(namespace); err != nil {
			return nil, fmt.Errorf("open network namespace %s: %w", namespace, err)
		}
		h.nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE)
	}
	if err != nil {
		return nil, fmt.Errorf("talk to the kernel about network devices: %w", err)
	}
	return h, nil
}

// Close releases the sockets.
func (h *Host) Close() {
	h.nl.Close()
	if h.ns.IsOpen() {
		_ = h.ns.Close()
	}
}

// in runs f in the host's namespace. A thread that cannot go back is given up:
// it ends with its goroutine, because it stays locked.
func (h *Host) in(f func() error) error {
	if !h.ns.IsOpen() {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		old, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = old.Close() }()
		if err := netns.Set(h.ns); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		err = f()
		if netns.Set(old) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Link is a network device.
type Link struct {
	Name, Alias, Kind string
	Index, MTU        int
	// Up is set by the administrator; Carrier means that somebody is at the
	// other end: for a tap, a process that has it open.
	Up, Carrier bool
	Loopback    bool
	// Master is the index of the device that this one is a part of.
	Master int
}

func linkOf(l netlink.Link) Link {
	a := l.Attrs()
	return Link{
		Name: a.Name, Alias: a.Alias, Kind: l.Type(), Index: a.Index, MTU: a.MTU, Master: a.MasterIndex,
		Up: a.Flags&net.FlagUp != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0, Loopback: a.Flags&net.FlagLoopback != 0,
	}
}

// Links returns all devices by name.
func (h *Host) Links() (map[string]Link, error) {
	all, err := h.nl.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	out := make(map[string]Link, len(all))
	for _, l := range all {
		out[l.Attrs().Name] = linkOf(l)
	}
	return out, nil
}

// Find returns one device.
func (h *Host) Find(name string) (l Link, ok bool, err error) {
	nl, err := h.nl.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return l, false, nil
	}
	if err != nil {
		return l, false, fmt.Errorf("look for network device %s: %w", name, err)
	}
	return linkOf(nl), true, nil
}

// Addresses returns the addresses of a device that others could reach, so
// without link-local ones.
func (h *Host) Addresses(l Link) ([]netip.Addr, error) {
	list, err := h.nl.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: l.Index}}, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", l.Name, err)
	}
	var out []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.Unmap().IsLinkLocalUnicast() {
			out = append(out, ip.Unmap())
		}
	}
	return out, nil
}

// Up sets a device up.
func (h *Host) Up(name string) error {
	l, err := h.nl.LinkByName(name)
	if err == nil {
		err = h.nl.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("set network device %s up: %w", name, err)
	}
	return nil
}

// Remove takes away a device whose alias begins with prefix. It is no error if
// the device is not there.
func (h *Host) Remove(name, prefix string) error {
	l, err := h.nl.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove network device %s: %w", name, err)
	}
	if prefix == "" || !strings.HasPrefix(l.Attrs().Alias, prefix) {
		return fmt.Errorf("remove network device %s: it is not ours", name)
	}
	if err := h.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove network device %s: %w", name, err)
	}
	return nil
}

// finish brings a device that is ours to its MTU and up.
func (h *Host) finish(l netlink.Link, mtu int) error {
	name := l.Attrs().Name
	if mtu > 0 && l.Attrs().MTU != mtu {
		if err := h.nl.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", name, mtu, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := h.nl.LinkSetUp(l); err != nil {
			return fmt.Errorf("set network device %s up: %w", name, err)
		}
	}
	return nil
}

// HasKernelDatapath reports whether the kernel has Open vSwitch's own datapath
// (module openvswitch): its netlink family is there.
func (h *Host) HasKernelDatapath() bool {
	return h.in(func() error {
		_, err := netlink.GenlFamilyGet("ovs_datapath")
		return err
	}) == nil
}

// Follow calls f after changes of network devices until the context ends.
func (h *Host) Follow(ctx context.Context, f func()) error {
	updates := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	defer close(done)
	opts := netlink.LinkSubscribeOptions{ErrorCallback: func(error) {}} // the channel is closed then, too
	if h.ns.IsOpen() {
		opts.Namespace = &h.ns
	}
	if err := netlink.LinkSubscribeWithOptions(updates, done, opts); err != nil {
		return fmt.Errorf("follow changes of network devices: %w", err)
	}
	defer func() { // the sender must not wait for a reader that has gone
		go func() {
			for range updates {
				continue
			}
		}()
	}()
	for {
		select {
		case _, ok := <-updates:
			if !ok {
				return errors.New("follow changes of network devices: the kernel ended it")
			}
			f()
		case <-ctx.Done():
			return nil
		}
	}
}

// ethtoolSGRO is ETHTOOL_SGRO of linux/ethtool.h.
const ethtoolSGRO = 0x2c

// NoGRO switches generic receive offload off: it would hand frames larger than
// the MTU to a switch in user space.
func (h *Host) NoGRO(name string) error {
	err := h.in(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		value := struct{ cmd, data uint32 }{ethtoolSGRO, 0}
		var req struct { // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			pad  [16]byte
		}
		copy(req.name[:unix.IFNAMSIZ-1], name)
		req.data = unsafe.Pointer(&value)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("switch receive offload of %s off: %w", name, err)
	}
	return nil
}
