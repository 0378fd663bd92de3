// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package openflow

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Flow is one rule of table 0. Zero fields match everything.
type Flow struct {
	Priority uint16
	InPort   uint32
	EthSrc   net.HardwareAddr
	EthType  uint16
	IPProto  uint8      // with EthType IPv4
	IPv4Src  netip.Addr // with EthType IPv4
	ARPSPA   netip.Addr // with EthType ARP: the sender's protocol address
	UDPSrc   uint16     // with IPProto UDP
	UDPDst   uint16     // with IPProto UDP
	// Normal switches what matches as if there were no flows; otherwise it is
	// dropped.
	Normal bool
	// Meter bounds what matches, with Normal; 0 is none.
	Meter uint32
}

// Ether types and protocols of flows.
const (
	EthIPv4 = 0x0800
	EthARP  = 0x0806
	EthIPv6 = 0x86dd
	UDP     = 17
)

// Numbers of OpenFlow 1.3, named as in section 7 of the specification.
const (
	oxmClassBasic = 0x8000
	oxmInPort     = 0
	oxmEthSrc     = 4
	oxmEthType    = 5
	oxmIPProto    = 10
	oxmIPv4Src    = 11
	oxmUDPSrc     = 15
	oxmUDPDst     = 16
	oxmARPSPA     = 22

	commandAdd         = 0
	commandDelete      = 3
	noBuffer           = 0xffffffff
	anyPort            = 0xffffffff
	portNormal         = 0xfffffffa
	instructionApply   = 4
	actionOutput       = 0
	actionOutputLength = 16
)

// match encodes the fields, prerequisites before what needs them.
func (f *Flow) match() []byte {
	var oxm []byte
	add := func(field byte, value []byte) {
		oxm = binary.BigEndian.AppendUint16(oxm, oxmClassBasic)
		oxm = append(oxm, field<<1, byte(len(value)))
		oxm = append(oxm, value...)
	}
	u16 := func(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
	if f.InPort != 0 {
		add(oxmInPort, binary.BigEndian.AppendUint32(nil, f.InPort))
	}
	if f.EthSrc != nil {
		add(oxmEthSrc, f.EthSrc)
	}
	if f.EthType != 0 {
		add(oxmEthType, u16(f.EthType))
	}
	if f.IPProto != 0 {
		add(oxmIPProto, []byte{f.IPProto})
	}
	if f.IPv4Src.IsValid() {
		add(oxmIPv4Src, f.IPv4Src.AsSlice())
	}
	if f.ARPSPA.IsValid() {
		add(oxmARPSPA, f.ARPSPA.AsSlice())
	}
	if f.UDPSrc != 0 {
		add(oxmUDPSrc, u16(f.UDPSrc))
	}
	if f.UDPDst != 0 {
		add(oxmUDPDst, u16(f.UDPDst))
	}
	m := binary.BigEndian.AppendUint16(nil, 1) // OFPMT_OXM
	m = binary.BigEndian.AppendUint16(m, uint16(4+len(oxm)))
	return pad(append(m, oxm...))
}

func pad(b []byte) []byte {
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

func (f *Flow) instructions() []byte {
	if !f.Normal {
		return nil
	}
	var b []byte
	if f.Meter != 0 {
		b = binary.BigEndian.AppendUint16(b, instructionMeter)
		b = binary.BigEndian.AppendUint16(b, 8)
		b = binary.BigEndian.AppendUint32(b, f.Meter)
	}
	b = binary.BigEndian.AppendUint16(b, instructionApply)
	b = binary.BigEndian.AppendUint16(b, 8+actionOutputLength)
	return append(append(b, 0, 0, 0, 0), switchNormally()...)
}

// switchNormally encodes the action of that name.
func switchNormally() []byte {
	b := binary.BigEndian.AppendUint16(nil, actionOutput)
	b = binary.BigEndian.AppendUint16(b, actionOutputLength)
	b = binary.BigEndian.AppendUint32(b, portNormal)
	return append(b, make([]byte, 8)...) // max_len, pad
}

// packetOut encodes the body of OFPT_PACKET_OUT.
func packetOut(port uint32, frame []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, noBuffer)
	b = binary.BigEndian.AppendUint32(b, port)
	b = binary.BigEndian.AppendUint16(b, actionOutputLength)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(append(b, switchNormally()...), frame...)
}

// flowMod encodes the body of OFPT_FLOW_MOD.
func flowMod(command byte, cookie, mask uint64, f *Flow) []byte {
	b := binary.BigEndian.AppendUint64(nil, cookie)
	b = binary.BigEndian.AppendUint64(b, mask)
	b = append(b, 0, command) // table 0
	b = append(b, 0, 0, 0, 0) // no time-outs
	b = binary.BigEndian.AppendUint16(b, f.Priority)
	b = binary.BigEndian.AppendUint32(b, noBuffer)
	b = binary.BigEndian.AppendUint32(b, anyPort)
	b = binary.BigEndian.AppendUint32(b, anyPort) // any group
	b = append(b, 0, 0, 0, 0)                     // flags, pad
	b = append(b, f.match()...)
	return append(b, f.instructions()...)
}
