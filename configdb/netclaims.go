// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"encoding/hex"
	"net/netip"
	"strconv"

	"github.com/muster-vm/muster/api"
)

// The claims of networks. Each key exists at most once, so that what it stands
// for belongs to the one object whose ID is its value.
const (
	claimRoot    = Root + "claim/"
	macRoot      = claimRoot + "mac/"
	addressRoot  = claimRoot + "address/"
	vlanRoot     = claimRoot + "vlan/"
	vniRoot      = claimRoot + "vni/"
	netPoolRoot  = claimRoot + "ippool/"
	nodeLinkRoot = claimRoot + "uplink/"
)

// MACKey claims a MAC address, in lower case with colons, for a VM.
func MACKey(mac string) string { return macRoot + mac }

// AddressPrefix is the prefix of all claims of addresses in a network.
func AddressPrefix(networkID string) string { return addressRoot + networkID + "/" }

// AddressKey claims an address in a network for a VM. Keys sort as addresses do.
func AddressKey(networkID string, a netip.Addr) string {
	return AddressPrefix(networkID) + hex.EncodeToString(a.AsSlice())
}

// VLANKey and VNIKey claim the tags of networks, NetworkPoolKey the one IP pool
// of a network, UplinkKey the one uplink of a node.
func VLANKey(vlan int) string { return vlanRoot + strconv.Itoa(vlan) }

// VNIKey claims the identifier of a vxlan network.
func VNIKey(vni int) string { return vniRoot + strconv.Itoa(vni) }

// NetworkPoolKey claims the place of the one IP pool of a network.
func NetworkPoolKey(networkID string) string { return netPoolRoot + networkID }

// UplinkKey claims the place of the one uplink of a node.
func UplinkKey(nodeID string) string { return nodeLinkRoot + nodeID }

// NetworkPool returns the IP pool of a network, if it has one.
func NetworkPool(v *View, networkID string) (pool api.IPPool, ok bool) {
	claim, ok := v.Get(NetworkPoolKey(networkID))
	if !ok {
		return pool, false
	}
	pool, err := IPPools.Get(v, string(claim.Value))
	return pool, err == nil
}

// ReleaseNICs takes back what the network interfaces of a VM hold: their MAC
// and IP addresses and the references to their networks. Claims that meanwhile
// belong to another are left alone.
func ReleaseNICs(v *View, tx *Txn, vm *api.VM) {
	release := func(key string) {
		if e, ok := v.Get(key); ok && string(e.Value) == vm.Meta.ID {
			tx.RequireRevision(key, e.Revision)
			tx.Delete(key)
		}
	}
	for _, nic := range vm.Spec.NICs {
		if nic.MAC != "" {
			release(MACKey(nic.MAC))
		}
		n, err := Networks.Find(v, api.DefaultProject, nic.Network)
		if err != nil {
			continue
		}
		if a, err := netip.ParseAddr(nic.Address); err == nil {
			release(AddressKey(n.Meta.ID, a))
		}
		Networks.Release(tx, n.Meta.ID, api.KindVM, vm.Meta.ID)
	}
}

// ReleaseNode takes back what is kept of a node that leaves: its reports and
// its uplink.
func ReleaseNode(v *View, tx *Txn, nodeID string) {
	if st, err := SwitchStates.Get(v, nodeID); err == nil {
		SwitchStates.DeleteUnnamed(tx, &st)
	}
	if f, err := NodeFacts.Get(v, nodeID); err == nil {
		NodeFacts.DeleteUnnamed(tx, &f)
	}
	claim, ok := v.Get(UplinkKey(nodeID))
	if !ok {
		return
	}
	tx.RequireRevision(claim.Key, claim.Revision)
	tx.Delete(claim.Key)
	if up, err := Uplinks.Get(v, string(claim.Value)); err == nil {
		Uplinks.Delete(tx, &up)
	}
}
