// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package dhcp

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// LeaseTime is what guests are told. They renew after half of it.
const LeaseTime = time.Hour

// ServerID identifies the responders of all nodes where a pool has no gateway.
var ServerID = netip.AddrFrom4([4]byte{169, 254, 169, 253})

// Lease is everything that a guest's network card may know.
type Lease struct {
	MAC     net.HardwareAddr
	Address netip.Addr
	Subnet  netip.Prefix
	Gateway netip.Addr // invalid: none
	DNS     []netip.Addr
	Domain  string
	Host    string
	MTU     int // 0: not told
}

func (l *Lease) serverID() netip.Addr {
	if l.Gateway.IsValid() {
		return l.Gateway
	}
	return ServerID
}

// Verdict says what a message led to, for the log.
type Verdict string

// The verdicts.
const (
	Ignored  Verdict = ""
	Offered  Verdict = "offered"
	Acked    Verdict = "acknowledged"
	Refused  Verdict = "refused"
	Declined Verdict = "declined" // the guest found the address in use
)

// Answer returns the answer to a message from the card of a lease, or nil.
func Answer(m *dhcpv4.DHCPv4, l *Lease) (*dhcpv4.DHCPv4, Verdict) {
	if m.OpCode != dhcpv4.OpcodeBootRequest || !bytes.Equal(m.ClientHWAddr, l.MAC) || !m.GatewayIPAddr.IsUnspecified() {
		return nil, Ignored
	}
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return l.reply(m, dhcpv4.MessageTypeOffer), Offered
	case dhcpv4.MessageTypeRequest:
		return l.request(m)
	case dhcpv4.MessageTypeInform:
		if !l.is(m.ClientIPAddr) {
			return nil, Ignored
		}
		return l.reply(m, dhcpv4.MessageTypeAck), Acked
	case dhcpv4.MessageTypeDecline:
		return nil, Declined
	}
	return nil, Ignored
}

// request decides by the table of RFC 2131 section 4.3.2.
func (l *Lease) request(m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, Verdict) {
	asked := m.RequestedIPAddress()
	if id := m.ServerIdentifier(); id != nil && !id.IsUnspecified() { // selecting
		if !id.Equal(l.serverID().AsSlice()) {
			return nil, Ignored
		}
	} else if asked == nil || asked.IsUnspecified() { // renewing, rebinding
		asked = m.ClientIPAddr
	}
	if !l.is(asked) {
		return l.nak(m), Refused
	}
	return l.reply(m, dhcpv4.MessageTypeAck), Acked
}

func (l *Lease) is(ip net.IP) bool {
	a, ok := netip.AddrFromSlice(ip)
	return ok && a.Unmap() == l.Address
}

func (l *Lease) nak(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	r := l.empty(m, dhcpv4.MessageTypeNak)
	r.SetBroadcast() // the client has no address that counts
	return r
}

// empty is an answer that says who answers what.
func (l *Lease) empty(m *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: m.HWType, TransactionID: m.TransactionID, Flags: m.Flags,
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero,
		ClientHWAddr: m.ClientHWAddr, Options: dhcpv4.Options{},
	}
	r.UpdateOption(dhcpv4.OptMessageType(t))
	r.UpdateOption(dhcpv4.OptServerIdentifier(l.serverID().AsSlice()))
	if id := m.Options.Get(dhcpv4.OptionClientIdentifier); id != nil { // RFC 6842
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, id))
	}
	return r
}

func (l *Lease) reply(m *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := l.empty(m, t)
	if m.MessageType() == dhcpv4.MessageTypeInform {
		r.ClientIPAddr = m.ClientIPAddr // has its address: no lease (RFC 2131 section 4.3.5)
	} else {
		r.YourIPAddr = l.Address.AsSlice()
		r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(LeaseTime))
	}
	r.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(l.Subnet.Bits(), 32)))
	if l.Gateway.IsValid() {
		r.UpdateOption(dhcpv4.OptRouter(l.Gateway.AsSlice()))
	}
	if len(l.DNS) > 0 {
		var servers []net.IP
		for _, a := range l.DNS {
			servers = append(servers, a.AsSlice())
		}
		r.UpdateOption(dhcpv4.OptDNS(servers...))
	}
	if l.Domain != "" {
		r.UpdateOption(dhcpv4.OptDomainName(l.Domain))
	}
	if l.Host != "" {
		r.UpdateOption(dhcpv4.OptHostName(l.Host))
	}
	if l.MTU > 0 {
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, uint16(l.MTU))))
	}
	return r
}
