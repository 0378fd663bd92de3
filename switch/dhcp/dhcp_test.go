// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package dhcp

import (
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var mac = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}

func lease() *Lease {
	return &Lease{
		MAC: mac, Address: netip.MustParseAddr("10.20.0.7"), Subnet: netip.MustParsePrefix("10.20.0.0/24"),
		Gateway: netip.MustParseAddr("10.20.0.1"), DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}, Domain: "lab.example", Host: "web1", MTU: 1450,
	}
}

func ask(t testing.TB, typ dhcpv4.MessageType, change ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithMessageType(typ), dhcpv4.WithHwAddr(mac)}, change...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func requested(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
}

func server(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(ip)))
}

func from(ip string) dhcpv4.Modifier { return dhcpv4.WithClientIP(net.ParseIP(ip)) }

// TestAnswers follows the table of RFC 2131 section 4.3.2.
func TestAnswers(t *testing.T) {
	const (
		discover = dhcpv4.MessageTypeDiscover
		request  = dhcpv4.MessageTypeRequest
		ack      = dhcpv4.MessageTypeAck
		nak      = dhcpv4.MessageTypeNak
		none     = dhcpv4.MessageTypeNone
	)
	for name, c := range map[string]struct {
		m       *dhcpv4.DHCPv4
		want    dhcpv4.MessageType
		verdict Verdict
	}{
		"discover":                   {ask(t, discover), dhcpv4.MessageTypeOffer, Offered},
		"discover asking for more":   {ask(t, discover, requested("10.20.0.99")), dhcpv4.MessageTypeOffer, Offered},
		"selecting us":               {ask(t, request, server("10.20.0.1"), requested("10.20.0.7")), ack, Acked},
		"selecting another":          {ask(t, request, server("10.20.0.2"), requested("10.20.0.7")), none, Ignored},
		"selecting a wrong address":  {ask(t, request, server("10.20.0.1"), requested("10.20.0.8")), nak, Refused},
		"init-reboot":                {ask(t, request, requested("10.20.0.7")), ack, Acked},
		"init-reboot from elsewhere": {ask(t, request, requested("192.168.1.5")), nak, Refused},
		"renewing or rebinding":      {ask(t, request, from("10.20.0.7")), ack, Acked},
		"rebinding another's":        {ask(t, request, from("10.20.0.8")), nak, Refused},
		"request for nothing":        {ask(t, request), nak, Refused},
		"inform":                     {ask(t, dhcpv4.MessageTypeInform, from("10.20.0.7")), ack, Acked},
		"inform from another's":      {ask(t, dhcpv4.MessageTypeInform, from("10.20.0.8")), none, Ignored},
		"decline":                    {ask(t, dhcpv4.MessageTypeDecline, requested("10.20.0.7")), none, Declined},
		"release":                    {ask(t, dhcpv4.MessageTypeRelease, from("10.20.0.7")), none, Ignored},
		"an offer":                   {ask(t, dhcpv4.MessageTypeOffer), none, Ignored},
		"another card":               {ask(t, discover, dhcpv4.WithHwAddr(net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2})), none, Ignored},
		"a relay":                    {ask(t, discover, dhcpv4.WithGatewayIP(net.IPv4(10, 0, 0, 1))), none, Ignored},
		"a reply":                    {ask(t, discover, func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }), none, Ignored},
	} {
		t.Run(name, func(t *testing.T) {
			r, verdict := Answer(c.m, lease())
			if verdict != c.verdict || (r == nil) != (c.want == none) {
				t.Fatalf("%s: %v", verdict, r)
			}
			if r == nil {
				return
			}
			if r.MessageType() != c.want || r.TransactionID != c.m.TransactionID || !r.ServerIdentifier().Equal(net.IPv4(10, 20, 0, 1)) {
				t.Fatal(r.Summary())
			}
			if c.want == nak && (!r.YourIPAddr.IsUnspecified() || r.SubnetMask() != nil) {
				t.Errorf("a refusal that gives something: %s", r.Summary())
			}
		})
	}
}

func TestWhatAGuestIsTold(t *testing.T) {
	r, _ := Answer(ask(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, []byte{1, 2}))), lease())
	mtu := r.Options.Get(dhcpv4.OptionInterfaceMTU)
	if !r.YourIPAddr.Equal(net.IPv4(10, 20, 0, 7)) || r.SubnetMask().String() != "ffffff00" || len(r.Router()) != 1 || len(r.DNS()) != 1 ||
		r.HostName() != "web1" || r.DomainName() != "lab.example" || r.IPAddressLeaseTime(0) != LeaseTime || binary.BigEndian.Uint16(mtu) != 1450 ||
		string(r.Options.Get(dhcpv4.OptionClientIdentifier)) != "\x01\x02" {
		t.Error(r.Summary())
	}
	l := lease()
	l.Gateway, l.DNS, l.MTU = netip.Addr{}, nil, 0
	r, _ = Answer(ask(t, dhcpv4.MessageTypeDiscover), l)
	if !r.ServerIdentifier().Equal(ServerID.AsSlice()) || r.Router() != nil || r.DNS() != nil || r.Options.Get(dhcpv4.OptionInterfaceMTU) != nil {
		t.Error(r.Summary())
	}
	inform, _ := Answer(ask(t, dhcpv4.MessageTypeInform, from("10.20.0.7")), lease())
	if !inform.YourIPAddr.IsUnspecified() || inform.Options.Get(dhcpv4.OptionIPAddressLeaseTime) != nil {
		t.Errorf("a lease for who only asks: %s", inform.Summary())
	}
}

// request is a message in a frame, as a guest sends it.
func requestFrame(m *dhcpv4.DHCPv4) []byte {
	f := frame(net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, net.IPv4zero, net.IPv4bcast, m.ToBytes())
	copy(f[6:12], m.ClientHWAddr)
	binary.BigEndian.PutUint16(f[34:], clientPort)
	binary.BigEndian.PutUint16(f[36:], serverPort)
	return f
}

func TestFrames(t *testing.T) {
	out, _, _ := respond(requestFrame(ask(t, dhcpv4.MessageTypeDiscover)), lease())
	if out == nil || net.HardwareAddr(out[:6]).String() != mac.String() || netip.AddrFrom4([4]byte(out[30:34])).String() != "10.20.0.7" {
		t.Fatalf("to a guest that takes unicast: % x", out)
	}
	if fold(sum(0, out[14:34])) != 0 {
		t.Error("the header's checksum is wrong")
	}
	if udp := out[34:]; fold(sum(sum(uint32(protocolUDP)+uint32(len(udp)), out[26:34]), udp)) != 0 {
		t.Error("the UDP checksum is wrong")
	}
	out, _, _ = respond(requestFrame(ask(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithBroadcast(true))), lease())
	if net.HardwareAddr(out[:6]).String() != "ff:ff:ff:ff:ff:ff" || netip.AddrFrom4([4]byte(out[30:34])).String() != "255.255.255.255" {
		t.Fatalf("to a guest that wants broadcasts: % x", out[:34])
	}
	out, _, _ = respond(requestFrame(ask(t, dhcpv4.MessageTypeRequest, from("10.20.0.8"))), lease())
	if netip.AddrFrom4([4]byte(out[30:34])).String() != "255.255.255.255" {
		t.Error("a refusal must reach a guest whatever address it believes in")
	}
	spoofed := requestFrame(ask(t, dhcpv4.MessageTypeDiscover))
	spoofed[11] = 9
	if out, _, _ := respond(spoofed, lease()); out != nil {
		t.Error("a frame with another sender was answered")
	}
}

// FuzzRespond: whatever a guest sends, nothing breaks, and an answer is for it.
func FuzzRespond(f *testing.F) {
	m, err := dhcpv4.NewDiscovery(mac)
	if err != nil {
		f.Fatal(err)
	}
	whole := requestFrame(m)
	f.Add(whole)
	f.Add(whole[:60])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if out, _, _ := respond(b, lease()); out != nil && len(out) < etherHeader+ipHeader+udpHeader {
			t.Errorf("% x", out)
		}
	})
}

// script is a socket with a fixed past.
type script struct {
	frames [][]byte
	sent   int
}

func (s *script) Receive() ([]byte, error) {
	if len(s.frames) == 0 {
		return nil, os.ErrClosed
	}
	f := s.frames[0]
	s.frames = s.frames[1:]
	return f, nil
}

func (s *script) Send([]byte) error { s.sent++; return nil }

func TestAFloodIsBounded(t *testing.T) {
	s := &script{}
	for range 10 * MaxPerSecond {
		s.frames = append(s.frames, requestFrame(ask(t, dhcpv4.MessageTypeDiscover)))
	}
	now := time.Now()
	err := Serve(s, func() (Lease, bool) { return *lease(), true }, slog.New(slog.NewTextHandler(io.Discard, nil)), func() time.Time { return now })
	if err != nil || s.sent != MaxPerSecond {
		t.Errorf("%d answers, %v", s.sent, err)
	}
}

func TestABugEndsOneMessageOnly(t *testing.T) {
	s := &script{frames: [][]byte{requestFrame(ask(t, dhcpv4.MessageTypeDiscover)), requestFrame(ask(t, dhcpv4.MessageTypeDiscover))}}
	asked := 0
	lookup := func() (Lease, bool) {
		if asked++; asked == 1 {
			panic("a bug")
		}
		return *lease(), true
	}
	err := Serve(s, lookup, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Now)
	if err != nil || s.sent != 1 {
		t.Errorf("%d answers, %v", s.sent, err)
	}
}
