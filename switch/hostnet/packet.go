// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostnet

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// maxFrame is the largest frame that a packet socket hands out; DHCP messages
// are smaller (RFC 2131 section 2: 576 bytes must do).
const maxFrame = 2048

// Filter is a program of classic BPF for frames, see socket-filter in bpf(4).
type Filter []unix.SockFilter

// Socket sees the frames that a guest sends through its tap and can send
// frames to the guest. It works whatever switch the tap is plugged into: the
// kernel shows each frame to packet sockets first.
type Socket struct {
	f   *os.File
	buf [maxFrame]byte
}

// Socket opens a packet socket on a device. Only frames that the filter takes
// are seen.
func (h *Host) Socket(l Link, filter Filter) (*Socket, error) {
	var s *Socket
	err := h.in(func() error {
		// Protocol 0: nothing arrives before filter and device are set.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: hostToNetwork(unix.ETH_P_ALL), Ifindex: l.Index})
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		s = &Socket{f: os.NewFile(uintptr(fd), "packet:"+l.Name)}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listen to the frames of %s: %w", l.Name, err)
	}
	return s, nil
}

func hostToNetwork(v uint16) uint16 { return v<<8 | v>>8 }

// Receive waits for a frame from the guest. The slice is valid until the next
// call. It fails with os.ErrClosed after Close, and when the device is gone.
func (s *Socket) Receive() ([]byte, error) {
	raw, err := s.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), s.buf[:], 0)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		switch {
		case err != nil: // the poller has one reason only
			return nil, os.ErrClosed
		case errors.Is(rerr, unix.EINTR), errors.Is(rerr, unix.ENETDOWN):
			// The device was set down and will come back, or be removed.
			continue
		case rerr != nil:
			return nil, rerr
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue // on its way to the guest
		}
		return s.buf[:n], nil
	}
}

// Send puts a frame on the device's outgoing side: the guest receives it.
func (s *Socket) Send(frame []byte) error {
	_, err := s.f.Write(frame)
	return err
}

// Close ends the socket and whoever waits in Receive.
func (s *Socket) Close() error { return s.f.Close() }
