// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import "strconv"

// videoMemory of the standard VGA card in MiB: a 2560x1600 screen at 32 bits.
const videoMemory = 16

const vncSocket = "VNC socket"

// usbController has the tablet and USB devices of the host.
const usbController = "qemu-xhci,id=usb0,p2=4,p3=4"

// display gives the machine a screen that is reached through a unix socket.
//
// The socket is in the VM's run directory, which only root may enter, and has no
// password: who may connect is decided by tickets and tokens before anything
// reaches it. share=ignore lets several people look at once, whatever their
// viewers ask for. The tablet tells absolute positions, so that the pointer of
// the viewer and that of the guest are in one place (QEMU's -vnc, VGA, qemu-xhci,
// usb-tablet).
func display(m Machine) []string {
	if m.VNC == "" {
		return nil
	}
	return []string{
		"-vnc", "unix:" + escape(m.VNC) + ",share=ignore",
		"-device", "VGA,id=video0,vgamem_mb=" + strconv.Itoa(videoMemory),
		"-device", usbController,
		"-device", "usb-tablet,id=tablet0,bus=usb0.0",
	}
}
