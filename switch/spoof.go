// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/muster-vm/muster/switch/openflow"
)

// flowCookie marks our flows.
const flowCookie = 0x6d75737465720001

// Priorities of the flows of one card.
const (
	priorityDHCP    = 220
	priorityAllowed = 200
	priorityRest    = 190
)

// antiSpoofing returns the flows of all cards that are in the running switch.
func (p *pass) antiSpoofing() []openflow.Flow {
	var out []openflow.Flow
	for _, t := range p.w.taps() {
		have, ok := p.state.Ports[t.name]
		if _, wanted := p.ports[t.name]; !ok || !wanted || have.OFPort == 0 {
			continue
		}
		flows := cardFlows(uint32(have.OFPort), t.nic.MAC, t.nic.Address)
		if t.nic.Limit.BPSOut > 0 {
			metered(flows, uint32(have.OFPort))
		}
		out = append(out, flows...)
	}
	return append(out, p.silenced()...)
}

// silenced keeps quiet the cards that their guests have not let go of, but that
// are not theirs any more: their addresses may be somebody else's by now.
func (p *pass) silenced() (out []openflow.Flow) {
	for _, name := range slices.Sorted(maps.Keys(p.state.Ports)) {
		have := p.state.Ports[name]
		_, wanted := p.ports[name]
		if wanted || have.Bridge != Bridge || have.Owner != p.owner() || have.OFPort <= 0 || !strings.HasPrefix(name, tapPrefix) {
			continue
		}
		out = append(out, openflow.Flow{Priority: priorityRest, InPort: uint32(have.OFPort)})
	}
	return out
}

// cardFlows lets a card send as itself only. With an address it is bound to
// that, and its DHCP messages end here, where they are answered: a guest cannot
// play the server for others either. Without one (no IP pool) only the MAC
// address counts.
func cardFlows(port uint32, mac, address string) []openflow.Flow {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return []openflow.Flow{{Priority: priorityRest, InPort: port}}
	}
	rest := openflow.Flow{Priority: priorityRest, InPort: port}
	a, err := netip.ParseAddr(address)
	if err != nil {
		return []openflow.Flow{{Priority: priorityAllowed, InPort: port, EthSrc: hw, Normal: true}, rest}
	}
	mine := func(f openflow.Flow) openflow.Flow {
		f.Priority, f.InPort, f.EthSrc, f.Normal = priorityAllowed, port, hw, true
		return f
	}
	return []openflow.Flow{
		{Priority: priorityDHCP, InPort: port, EthType: openflow.EthIPv4, IPProto: openflow.UDP, UDPDst: 67},
		{Priority: priorityDHCP, InPort: port, EthType: openflow.EthIPv4, IPProto: openflow.UDP, UDPSrc: 67},
		mine(openflow.Flow{EthType: openflow.EthARP, ARPSPA: a}),
		mine(openflow.Flow{EthType: openflow.EthARP, ARPSPA: netip.IPv4Unspecified()}), // a probe (RFC 5227)
		mine(openflow.Flow{EthType: openflow.EthIPv4, IPv4Src: a}),
		mine(openflow.Flow{EthType: openflow.EthIPv6}),
		rest,
	}
}

// announcement is a frame from a card that tells every switch, also those in the
// tunnels and behind the uplink, where the card is now: a gratuitous ARP (RFC
// 5227 section 3) or, without an address, a RARP request as after a migration.
func announcement(mac, address string) []byte {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return nil
	}
	const request, rarp = 1, 3
	typ, op := uint16(openflow.EthARP), byte(request)
	ip, err := netip.ParseAddr(address)
	target := make(net.HardwareAddr, len(hw))
	if err != nil {
		typ, op, ip, target = etherRARP, rarp, netip.IPv4Unspecified(), hw
	}
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, hw...)
	f = binary.BigEndian.AppendUint16(f, typ)
	f = append(f, 0, 1, 8, 0, byte(len(hw)), net.IPv4len, 0, op)
	f = append(append(f, hw...), ip.AsSlice()...)
	f = append(append(f, target...), ip.AsSlice()...)
	return append(f, make([]byte, minFrame-len(f))...)
}

// etherRARP is the type of RARP frames (RFC 903), minFrame the shortest frame of
// Ethernet without its checksum.
const (
	etherRARP = 0x8035
	minFrame  = 60
)
