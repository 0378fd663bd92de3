// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Network is a layer-2 network that is the same on every node.
type Network = Object[NetworkSpec, NetworkStatus]

// NetworkType is how the network's frames travel between nodes.
type NetworkType string

// The types. A vlan network leaves the node tagged through its uplink, a vxlan
// network in tunnels between the nodes (RFC 7348), an isolated one not at all.
const (
	NetworkVLAN     NetworkType = "vlan"
	NetworkVXLAN    NetworkType = "vxlan"
	NetworkIsolated NetworkType = "isolated"
)

// Ranges of the tags.
const (
	MaxVLAN = 4094
	MaxVNI  = 1<<24 - 1
	MaxNICs = 8
	// VXLANMTU is the MTU of guests on vxlan networks: what the tunnel's headers
	// leave of 1500 bytes.
	VXLANMTU = 1450
)

// MTU of the guests' network cards, 0 for the usual 1500.
func (s *NetworkSpec) MTU() int {
	if s.Type == NetworkVXLAN {
		return VXLANMTU
	}
	return 0
}

// NetworkSpec is the definition; type and tag cannot be changed.
type NetworkSpec struct {
	Type NetworkType `json:"type" enum:"vlan,vxlan,isolated"`
	// VLAN is the IEEE 802.1Q tag, 1-4094, of a vlan network.
	VLAN int `json:"vlan,omitempty" minimum:"0" maximum:"4094"`
	// VNI is the network identifier, 1-16777215, of a vxlan network.
	VNI int `json:"vni,omitempty" minimum:"0" maximum:"16777215"`
}

// SetDefaults implements Spec.
func (s *NetworkSpec) SetDefaults() {
	if s.Type == "" {
		s.Type = NetworkIsolated
	}
}

// Validate implements Spec.
func (s *NetworkSpec) Validate() error {
	switch s.Type {
	case NetworkVLAN:
		if s.VLAN < 1 || s.VLAN > MaxVLAN {
			return Invalid("spec.vlan", "is %d; a vlan network needs a tag of 1 to %d", s.VLAN, MaxVLAN)
		}
	case NetworkVXLAN:
		if s.VNI < 1 || s.VNI > MaxVNI {
			return Invalid("spec.vni", "is %d; a vxlan network needs an identifier of 1 to %d", s.VNI, MaxVNI)
		}
	case NetworkIsolated:
	default:
		return Invalid("spec.type", "is %q; give vlan, vxlan or isolated", clip(string(s.Type)))
	}
	if s.Type != NetworkVLAN && s.VLAN != 0 {
		return Invalid("spec.vlan", "has a meaning for type vlan only")
	}
	if s.Type != NetworkVXLAN && s.VNI != 0 {
		return Invalid("spec.vni", "has a meaning for type vxlan only")
	}
	return nil
}

// NetworkStatus is composed when a network is read, from each node's report.
type NetworkStatus struct {
	Nodes []NetworkNode `json:"nodes,omitempty"`
}

// NetworkNode says whether a network is realised on a node.
type NetworkNode struct {
	Node   string `json:"node"`
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"`
}

// SwitchState is one node's report about its virtual switch; its ID is the
// node's. It is written by the switch module of the node.
type SwitchState = Object[SwitchStateSpec, SwitchStateStatus]

// SwitchStateSpec names the node.
type SwitchStateSpec struct {
	NodeID string `json:"nodeID"`
}

// SwitchStateStatus is the report.
type SwitchStateStatus struct {
	Node string `json:"node"`
	// Ready is whether Open vSwitch answers and the integration bridge stands.
	Ready bool `json:"ready"`
	// Reason says why not and what to do.
	Reason string `json:"reason,omitempty"`
	// Version of Open vSwitch, Datapath "system" or "netdev".
	Version  string `json:"version,omitempty"`
	Datapath string `json:"datapath,omitempty"`
	// Uplink is the NIC bridged in, empty without one; UplinkUp its link state.
	Uplink   string `json:"uplink,omitempty"`
	UplinkUp bool   `json:"uplinkUp,omitempty"`
	// Networks that are realised here, by name, in order.
	Networks []string `json:"networks,omitempty"`
	// Problems says by name which networks are not, and why.
	Problems map[string]string `json:"problems,omitempty"`
	// LimitsProblem says why limits of network cards are not in force.
	LimitsProblem string `json:"limitsProblem,omitempty"`
}

// Realised reports whether a network, by name, is usable on the node, and if
// not, why.
func (s *SwitchStateStatus) Realised(network string) (ok bool, reason string) {
	switch {
	case !s.Ready:
		return false, s.Reason
	case slices.Contains(s.Networks, network):
		return true, ""
	case s.Problems[network] != "":
		return false, s.Problems[network]
	}
	return false, NotMadeYet
}

// NotMadeYet is the reason of a node that will have the network in a moment.
const NotMadeYet = "the node has not made it yet"

// Uplink bridges a physical NIC of a node into its virtual switch. There is at
// most one per node.
type Uplink = Object[UplinkSpec, UplinkStatus]

// UplinkSpec is the wish.
type UplinkSpec struct {
	// Node is the name of the node.
	Node string `json:"node"`
	// NIC is the name of the interface, at most 15 characters.
	NIC string `json:"nic" maxLength:"15"`
}

// Validate implements Spec.
func (s *UplinkSpec) Validate() error {
	if err := ValidName("spec.node", s.Node); err != nil {
		return err
	}
	return validInterface("spec.nic", s.NIC)
}

// SetDefaults implements Spec.
func (s *UplinkSpec) SetDefaults() {}

// UplinkStatus is written by the switch module of the node.
type UplinkStatus struct {
	ObservedGeneration uint64 `json:"observedGeneration,omitempty"`
	Ready              bool   `json:"ready"`
	Message            string `json:"message,omitempty"`
}

func validInterface(field, name string) error {
	if name == "" || len(name) > 15 || name == "." || name == ".." {
		return Invalid(field, "%q is not the name of an interface; give 1 to 15 characters", clip(name))
	}
	for _, c := range name {
		if c <= ' ' || c > '~' || c == '/' || c == ':' {
			return Invalid(field, "%q is not the name of an interface", clip(name))
		}
	}
	return nil
}

// IPPool is a range of IPv4 addresses of one network, handed out to NICs and
// answered for by the DHCP responder of each VM's own node.
type IPPool = Object[IPPoolSpec, IPPoolStatus]

// IPPoolSpec is the definition.
type IPPoolSpec struct {
	// Network is the name of the network; at most one pool per network.
	Network string `json:"network"`
	// CIDR is the subnet, such as 10.20.0.0/24: a prefix of /8 to /30.
	CIDR string `json:"cidr"`
	// Gateway is the router's address, not handed out; none when empty.
	Gateway string `json:"gateway,omitempty"`
	// Start and End bound what is handed out; by default all host addresses
	// but the gateway.
	Start string `json:"start,omitempty"`
	End   string `json:"end,omitempty"`
	// DNS servers for the guests, at most 4.
	DNS []string `json:"dns,omitempty" maxItems:"4"`
	// Domain for the guests.
	Domain string `json:"domain,omitempty" maxLength:"253"`
}

// IPPoolStatus is composed when a pool is read.
type IPPoolStatus struct {
	Total int `json:"total"`
	Used  int `json:"used"`
}

// SetDefaults implements Spec.
func (s *IPPoolSpec) SetDefaults() {}

// Validate implements Spec.
func (s *IPPoolSpec) Validate() error {
	if err := ValidName("spec.network", s.Network); err != nil {
		return err
	}
	p, err := netip.ParsePrefix(s.CIDR)
	if err != nil || !p.Addr().Is4() || p.Masked() != p || p.Bits() < 8 || p.Bits() > 30 {
		return Invalid("spec.cidr", "%q is not an IPv4 subnet of /8 to /30 such as 10.20.0.0/24", clip(s.CIDR))
	}
	for _, f := range []struct{ name, value string }{{"gateway", s.Gateway}, {"start", s.Start}, {"end", s.End}} {
		if f.value == "" {
			continue
		}
		if a, err := netip.ParseAddr(f.value); err != nil || !p.Contains(a) {
			return Invalid("spec."+f.name, "%q is not an address of %s", clip(f.value), s.CIDR)
		}
	}
	if len(s.DNS) > 4 {
		return Invalid("spec.dns", "has %d servers; at most 4 are allowed", len(s.DNS))
	}
	for i, d := range s.DNS {
		if a, err := netip.ParseAddr(d); err != nil || !a.Is4() {
			return Invalid(fmt.Sprintf("spec.dns[%d]", i), "%q is not an IPv4 address", clip(d))
		}
	}
	if s.Gateway != "" && !s.Host(netip.MustParseAddr(s.Gateway)) {
		return Invalid("spec.gateway", "%s is the address of the subnet or of all its hosts, not of one host", s.Gateway)
	}
	first, last := s.Range()
	if last.Less(first) {
		return Invalid("spec.end", "%s is before %s", last, first)
	}
	if s.Total() == 0 {
		return Invalid("spec.start", "leaves no address to hand out: %s is the gateway", s.Gateway)
	}
	if len(s.Domain) > 253 || strings.ContainsFunc(s.Domain, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return Invalid("spec.domain", "%q is not a domain name", clip(s.Domain))
	}
	return nil
}

// Host reports whether a is an address of the subnet that one host can have.
func (s *IPPoolSpec) Host(a netip.Addr) bool {
	whole := IPPoolSpec{CIDR: s.CIDR}
	first, last := whole.Range()
	return !a.Less(first) && !last.Less(a)
}

// Total is how many addresses are handed out, without the gateway.
func (s *IPPoolSpec) Total() int {
	first, last := s.Range()
	n := int(number(last)) - int(number(first)) + 1
	if g, err := netip.ParseAddr(s.Gateway); err == nil && !g.Less(first) && !last.Less(g) {
		n--
	}
	return max(n, 0)
}

// At returns the n-th address that could be handed out, from 0; it may be the
// gateway.
func (s *IPPoolSpec) At(n int) netip.Addr {
	first, _ := s.Range()
	return address(number(first) + uint32(n))
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func address(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}

// Range returns the first and last address that are handed out (the gateway
// among them is passed over).
func (s *IPPoolSpec) Range() (first, last netip.Addr) {
	p := netip.MustParsePrefix(s.CIDR)
	first = p.Addr().Next()
	hosts := uint32(1)<<(32-p.Bits()) - 2 // without network and broadcast
	last = address(number(p.Addr()) + hosts)
	if a, err := netip.ParseAddr(s.Start); err == nil && first.Less(a) {
		first = a
	}
	if a, err := netip.ParseAddr(s.End); err == nil && a.Less(last) {
		last = a
	}
	return first, last
}

// VMNIC is one network interface of a VM (virtio-net).
type VMNIC struct {
	// Network is the name of the network.
	Network string `json:"network"`
	// MAC is chosen at creation when empty; unicast, unique in the cluster.
	MAC string `json:"mac,omitempty"`
	// Address is reserved from the network's IP pool when it has one; a wish
	// at creation, otherwise chosen.
	Address string `json:"address,omitempty"`
	// Slot is the card's place in the guest's hardware, 1-8. It is chosen when
	// left out and stays with the card.
	Slot int `json:"slot,omitempty" minimum:"0" maximum:"8"`
	// Link is whether the cable is plugged in, for the guest: up (default) or
	// down.
	Link LinkState `json:"link,omitempty" enum:"up,down"`
	// Limit bounds what the card does in a second.
	Limit NICLimit `json:"limit,omitzero"`
}

func (n *VMNIC) validate(field string) error {
	if err := n.Limit.validate(field + ".limit"); err != nil {
		return err
	}
	if n.Link != "" && n.Link != LinkUp && n.Link != LinkDown {
		return Invalid(field+".link", "is %q; give up or down", clip(string(n.Link)))
	}
	if err := ValidName(field+".network", n.Network); err != nil {
		return err
	}
	if n.MAC != "" {
		m, err := net.ParseMAC(n.MAC)
		if err != nil || len(m) != 6 || m[0]&1 != 0 || m.String() != n.MAC {
			return Invalid(field+".mac", "%q is not a unicast MAC address such as 52:54:00:12:34:56", clip(n.MAC))
		}
	}
	if n.Address != "" {
		if a, err := netip.ParseAddr(n.Address); err != nil || !a.Is4() || a.String() != n.Address {
			return Invalid(field+".address", "%q is not an IPv4 address", clip(n.Address))
		}
	}
	return nil
}
