// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package openflow

import (
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestFlowsAreEncodedAsTheSpecificationSays(t *testing.T) {
	mac := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	for name, c := range map[string]struct {
		flow Flow
		want string // match and instructions
	}{
		"everything, dropped": {Flow{}, "0001000400000000"},
		"a port, switched": {Flow{InPort: 7, Normal: true},
			"0001000c8000000400000007" + "00000000" + "0004001800000000" + "00000010fffffffa0000000000000000"},
		"a sender's IPv4 address": {Flow{InPort: 1, EthSrc: mac, EthType: EthIPv4, IPv4Src: netip.MustParseAddr("10.20.0.7")},
			"0001002480000004000000018000080652540000000180000a0208008000160" + "40a140007" + "00000000"},
		"DHCP to a server": {Flow{EthType: EthIPv4, IPProto: UDP, UDPDst: 67},
			"0001001580000a0208008000140111800020020043" + "000000"},
		"ARP": {Flow{EthType: EthARP, ARPSPA: netip.MustParseAddr("10.20.0.7")},
			"0001001280000a02080680002c040a140007" + "000000000000"},
	} {
		t.Run(name, func(t *testing.T) {
			b := flowMod(commandAdd, 1, 0, &c.flow)
			if got := hex.EncodeToString(b[40:]); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if len(b)%8 != 0 {
				t.Errorf("%d bytes, not a multiple of 8", len(b))
			}
		})
	}
}

// serve plays the switch for one session.
func serve(t *testing.T, f func(conn net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		f(conn)
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return path
}

func greet(conn net.Conn) {
	_, _, _, _ = receive(conn)
	_, _ = conn.Write(message(typeHello, 0, nil))
}

func TestASessionAnswersEchoesAndReportsRefusals(t *testing.T) {
	echoed := make(chan string, 1)
	path := serve(t, func(conn net.Conn) {
		greet(conn)
		_, _ = conn.Write(message(typeEchoAsk, 5, []byte("are you there")))
		for {
			typ, xid, body, err := receive(conn)
			switch {
			case err != nil:
				return
			case typ == typeEchoAnswer:
				echoed <- string(body)
			case typ == typeBarrier && xid == 1:
				_, _ = conn.Write(message(typeError, xid, []byte{0, 5, 0, 1}))
				_, _ = conn.Write(message(typeBarrierEnd, xid, nil))
			case typ == typeBarrier:
				_, _ = conn.Write(message(typeBarrierEnd, xid, nil))
			}
		}
	})
	s, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := <-echoed; got != "are you there" {
		t.Errorf("echoed %q", got)
	}
	if err := s.Replace(t.Context(), 1, []Flow{{}}); err == nil || !strings.Contains(err.Error(), "type 5 code 1") {
		t.Errorf("a refused flow: %v", err)
	}
	if err := s.Replace(t.Context(), 1, nil); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

func TestTheEndOfTheSwitchEndsWaits(t *testing.T) {
	for name, end := range map[string]func(conn net.Conn){
		"it goes away":        func(net.Conn) {},
		"it says rot":         func(conn net.Conn) { _, _ = conn.Write([]byte{4, 21, 0, 3, 0, 0, 0, 1}) },
		"it goes mid-message": func(conn net.Conn) { _, _ = conn.Write([]byte{4, 21, 0, 99, 0, 0}) },
	} {
		t.Run(name, func(t *testing.T) {
			path := serve(t, func(conn net.Conn) {
				greet(conn)
				_, _, _, _ = receive(conn)
				end(conn)
			})
			s, err := Dial(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.Replace(t.Context(), 1, nil); err == nil {
				t.Error("nothing failed")
			}
			select {
			case <-s.Done():
			case <-time.After(CallDeadline):
				t.Error("the session did not end")
			}
		})
	}
}

func TestNoGreetingNoSession(t *testing.T) {
	path := serve(t, func(conn net.Conn) { _, _ = io.WriteString(conn, "SSH-2.0-OpenSSH\r\n") })
	if s, err := Dial(t.Context(), path); err == nil {
		s.Close()
		t.Error("a session with a stranger")
	}
	if _, err := Dial(t.Context(), path+"x"); err == nil {
		t.Error("a session with nobody")
	}
}
