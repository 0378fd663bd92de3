// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package dhcp

import (
	"encoding/binary"
	"errors"
	"net"

	"golang.org/x/sys/unix"
)

// Sizes and offsets of Ethernet, IPv4 (RFC 791) and UDP (RFC 768) headers.
const (
	etherHeader = 14
	ipHeader    = 20
	udpHeader   = 8
	etherIPv4   = 0x0800
	protocolUDP = 17
	serverPort  = 67
	clientPort  = 68
	timeToLive  = 64
)

// responderMAC is the sender of all answers: locally administered, and the same
// on every node, so that a guest that moved sees no difference.
var responderMAC = net.HardwareAddr{0x02, 'm', 'u', 's', 't', 'r'}

// Filter takes frames to UDP port 67 over IPv4 that are no fragments.
func Filter() []unix.SockFilter {
	const (
		load2    = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		load1    = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		equal    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		anyBit   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ipLength = unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH
		loadAtX  = unix.BPF_LD | unix.BPF_H | unix.BPF_IND
		give     = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: load2, K: 12},
		{Code: equal, K: etherIPv4, Jf: 8},
		{Code: load1, K: etherHeader + 9},
		{Code: equal, K: protocolUDP, Jf: 6},
		{Code: load2, K: etherHeader + 6},
		{Code: anyBit, K: 0x1fff, Jt: 4},
		{Code: ipLength, K: etherHeader},
		{Code: loadAtX, K: etherHeader + 2},
		{Code: equal, K: serverPort, Jf: 1},
		{Code: give, K: 1 << 16},
		{Code: give, K: 0},
	}
}

var errNotDHCP = errors.New("not a DHCP message of a client")

// payload takes a frame apart and returns its sender and the message in it.
func payload(frame []byte) (from net.HardwareAddr, message []byte, err error) {
	if len(frame) < etherHeader+ipHeader+udpHeader || binary.BigEndian.Uint16(frame[12:]) != etherIPv4 {
		return nil, nil, errNotDHCP
	}
	ip := frame[etherHeader:]
	header, total := int(ip[0]&0x0f)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if ip[0]>>4 != 4 || header < ipHeader || total < header+udpHeader || total > len(ip) || ip[9] != protocolUDP {
		return nil, nil, errNotDHCP
	}
	udp := ip[header:total]
	length := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != serverPort || length < udpHeader || length > len(udp) {
		return nil, nil, errNotDHCP
	}
	return net.HardwareAddr(frame[6:12]), udp[udpHeader:length], nil
}

// frame wraps an answer.
func frame(toMAC net.HardwareAddr, from, to net.IP, message []byte) []byte {
	f := make([]byte, 0, etherHeader+ipHeader+udpHeader+len(message))
	f = append(f, toMAC...)
	f = append(f, responderMAC...)
	f = binary.BigEndian.AppendUint16(f, etherIPv4)

	f = append(f, 0x45, 0)
	f = binary.BigEndian.AppendUint16(f, uint16(ipHeader+udpHeader+len(message)))
	f = append(f, 0, 0, 0, 0, timeToLive, protocolUDP, 0, 0)
	f = append(f, from.To4()...)
	f = append(f, to.To4()...)
	ip := f[etherHeader:]
	binary.BigEndian.PutUint16(ip[10:], fold(sum(0, ip)))

	length := uint16(udpHeader + len(message))
	for _, v := range []uint16{serverPort, clientPort, length, 0} {
		f = binary.BigEndian.AppendUint16(f, v)
	}
	f = append(f, message...)
	udp := f[etherHeader+ipHeader:]
	check := fold(sum(sum(uint32(protocolUDP)+uint32(length), ip[12:ipHeader]), udp))
	if check == 0 {
		check = 0xffff // 0 would mean that there is none
	}
	binary.BigEndian.PutUint16(udp[6:], check)
	return f
}

// sum and fold are the checksum of RFC 1071.
func sum(s uint32, b []byte) uint32 {
	for len(b) > 1 {
		s += uint32(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
