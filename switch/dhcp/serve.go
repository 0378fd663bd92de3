// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package dhcp

import (
	"bytes"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/muster-vm/muster/internal/contain"
)

// MaxPerSecond bounds how many messages of one card are answered.
const MaxPerSecond = 20

// Socket sees the guest's frames and sends to the guest.
type Socket interface {
	Receive() ([]byte, error)
	Send(frame []byte) error
}

// Serve answers until the socket is closed, which is not an error. Lookup
// returns what is reserved for the card now; ok is false for nothing.
func Serve(s Socket, lookup func() (l Lease, ok bool), log *slog.Logger, now func() time.Time) error {
	var second time.Time
	answers := 0
	for {
		f, err := s.Receive()
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if t := now().Truncate(time.Second); !t.Equal(second) {
			second, answers = t, 0
		}
		if answers == MaxPerSecond {
			continue
		}
		answers++
		// What a guest sends must not end more than its own message.
		if err := contain.Do(func() { serveOne(s, f, lookup, log) }); err != nil {
			log.Error("a guest's DHCP message met a bug", "frame", hex.EncodeToString(f), "err", err)
		}
	}
}

// serveOne answers one frame.
func serveOne(s Socket, f []byte, lookup func() (l Lease, ok bool), log *slog.Logger) {
	l, ok := lookup()
	if !ok {
		return
	}
	out, verdict, m := respond(f, &l)
	var err error
	if out != nil {
		err = s.Send(out)
	}
	switch {
	case verdict == Ignored:
	case err != nil:
		log.Warn("a guest's DHCP message was not answered", "mac", l.MAC.String(), "address", l.Address, "err", err)
	case verdict == Declined:
		log.Warn("a guest found its reserved address in use by another", "mac", l.MAC.String(), "address", l.Address)
	default:
		log.Debug("DHCP", "mac", l.MAC.String(), "address", l.Address, "message", m.MessageType().String(), "verdict", string(verdict))
	}
}

// respond turns a frame into the frame of its answer, or nil.
func respond(f []byte, l *Lease) ([]byte, Verdict, *dhcpv4.DHCPv4) {
	from, body, err := payload(f)
	if err != nil || !bytes.Equal(from, l.MAC) {
		return nil, Ignored, nil
	}
	m, err := dhcpv4.FromBytes(body)
	if err != nil {
		return nil, Ignored, nil
	}
	r, verdict := Answer(m, l)
	if r == nil {
		return nil, verdict, m
	}
	// RFC 2131 section 4.1: to ciaddr, by broadcast if asked, else to yiaddr.
	to := r.YourIPAddr
	switch {
	case !m.ClientIPAddr.IsUnspecified() && verdict != Refused:
		to = m.ClientIPAddr
	case r.IsBroadcast():
		to = net.IPv4bcast
	}
	mac := l.MAC
	if to.Equal(net.IPv4bcast) {
		mac = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	}
	return frame(mac, l.serverID().AsSlice(), to, r.ToBytes()), verdict, m
}
