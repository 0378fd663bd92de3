// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostnet

import (
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunDevice is where tap devices are opened, tunMode what udev gives it
// (50-udev-default.rules): the kernel lets a user without CAP_NET_ADMIN open only
// the devices that are his.
const (
	tunDevice = "/dev/net/tun"
	tunMode   = 0o666
)

// OwnTap lets one user open a tap device that no process has open.
func (h *Host) OwnTap(name string, uid int) error {
	l, err := h.nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("give tap device %s to user %d: %w", name, uid, err)
	}
	if t, ok := l.(*netlink.Tuntap); ok && t.Owner == uint32(uid) {
		return openTunDevice()
	}
	err = h.in(func() error { return setTap(name, unix.TUNSETOWNER, uid) })
	if err != nil {
		return fmt.Errorf("give tap device %s to user %d: %w", name, uid, err)
	}
	return openTunDevice()
}

// openTunDevice gives the device of tap devices the mode that udev gives it, on a
// host without udev.
func openTunDevice() error {
	st, err := os.Stat(tunDevice)
	if err == nil && st.Mode().Perm()&tunMode != tunMode {
		err = os.Chmod(tunDevice, tunMode)
	}
	if err != nil {
		return fmt.Errorf("open %s to the users of VMs: %w", tunDevice, err)
	}
	return nil
}
