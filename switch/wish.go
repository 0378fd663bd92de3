// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Names. Device names have at most 15 characters.
const (
	// Bridge is the integration bridge.
	Bridge      = "muster-int"
	tapPrefix   = "mt"
	vxlanPrefix = "vx"
	// topTag is where tags for networks without one of their own begin,
	// downwards.
	topTag = api.MaxVLAN
	// MaxNetworks is what the tags of one bridge allow.
	MaxNetworks = api.MaxVLAN
	// noTag is a VLAN that no frame has: a trunk of it alone carries nothing,
	// where a trunk of none would carry everything.
	noTag = 4095
)

// wish is what the database wants of this node.
type wish struct {
	networks []api.Network
	local    netip.Addr // of this node; invalid if it is not known
	remotes  []netip.Addr
	strange  []string // nodes whose address is no IP address
	uplink   *api.Uplink
	vms      []api.VM               // bound to this node or passing it, with network cards
	machines map[string]*api.VMSpec // what runs of a VM, or is saved of it, by its ID
}

// wishFor reads the wish from a view.
func wishFor(v *configdb.View, nodeID string) (*wish, error) {
	w := &wish{}
	var err error
	if w.networks, err = configdb.Networks.List(v); err != nil {
		return nil, err
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		a, err := hostAddress(n.Spec.Address)
		switch {
		case n.Meta.ID == nodeID:
			w.local = a
		case n.Spec.Role == api.RoleWitness: // has no VMs and no switch
		case err != nil:
			w.strange = append(w.strange, n.Meta.Name)
		default:
			w.remotes = append(w.remotes, a)
		}
	}
	uplinks, err := configdb.Uplinks.List(v)
	if err != nil {
		return nil, err
	}
	if claim, ok := v.Get(configdb.UplinkKey(nodeID)); ok {
		for i := range uplinks {
			if uplinks[i].Meta.ID == string(claim.Value) {
				w.uplink = &uplinks[i]
			}
		}
	}
	return w, w.readVMs(v, nodeID)
}

// readVMs reads the VMs with network cards that are bound to a node.
func (w *wish) readVMs(v *configdb.View, nodeID string) error {
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		return err
	}
	w.machines = map[string]*api.VMSpec{}
	for _, b := range bindings {
		if b.Spec.NodeID != nodeID && !passes(v, b.Meta.ID, nodeID) {
			continue
		}
		vm, err := configdb.VMs.Get(v, b.Meta.ID)
		switch {
		case err != nil && api.CodeOf(err) == api.CodeNotFound:
			continue
		case err != nil:
			return err // without it its taps would look like left-overs
		}
		machine := machineOf(v, &vm)
		if len(vm.Spec.NICs) > 0 || machine != nil && len(machine.NICs) > 0 {
			w.vms, w.machines[vm.Meta.ID] = append(w.vms, vm), machine
		}
	}
	return nil
}

// machineOf is what runs of a VM, or what its saved memory goes on in; nil if it is at
// rest.
func machineOf(v *configdb.View, vm *api.VM) *api.VMSpec {
	if vm.Status.Hardware != nil {
		return vm.Status.Hardware
	}
	if st, err := configdb.SavedStates.Get(v, vm.Meta.ID); err == nil {
		return st.Spec.Hardware
	}
	return nil
}

// passes reports whether a migration brings a VM to a node or takes it away from
// there: its cards are plugged at both ends until that is over.
func passes(v *configdb.View, vmID, nodeID string) bool {
	op, err := configdb.Operations.Get(v, vmID)
	return err == nil && op.Spec.Migration != nil && (op.Spec.NodeID == nodeID || op.Spec.Migration.NodeID == nodeID)
}

// hostAddress returns the host of host:port.
func hostAddress(hostPort string) (netip.Addr, error) {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		host = hostPort
	}
	a, err := netip.ParseAddr(host)
	if err != nil || a.IsUnspecified() {
		return netip.Addr{}, fmt.Errorf("%q is not the IP address of one host", host)
	}
	return a.Unmap().WithZone(""), nil
}

// assignTags gives each network its VLAN in the bridge: a vlan network its own,
// every other one a tag that it keeps, have, as long as no vlan network needs
// that. It fails for networks that find none left.
func assignTags(have map[string]int, networks []api.Network) (tags map[string]int, left []string) {
	tags = map[string]int{}
	used := map[int]bool{}
	for _, n := range networks {
		if n.Spec.Type == api.NetworkVLAN {
			tags[n.Meta.ID], used[n.Spec.VLAN] = n.Spec.VLAN, true
		}
	}
	for _, n := range networks {
		t := have[n.Meta.ID]
		if _, done := tags[n.Meta.ID]; !done && t >= 1 && t <= topTag && !used[t] {
			tags[n.Meta.ID], used[t] = t, true
		}
	}
	next := topTag
	for _, n := range networks {
		if tags[n.Meta.ID] != 0 {
			continue
		}
		for next > 0 && used[next] {
			next--
		}
		if next == 0 {
			left = append(left, n.Meta.Name)
			continue
		}
		tags[n.Meta.ID], used[next] = next, true
	}
	return tags, left
}

// tagKey begins the keys in the bridge's external_ids that remember tags.
const tagKey = "muster-tag-"

func rememberedTags(externalIDs map[string]string) map[string]int {
	out := map[string]int{}
	for k, v := range externalIDs {
		if id, ok := strings.CutPrefix(k, tagKey); ok {
			if t, err := strconv.Atoi(v); err == nil {
				out[id] = t
			}
		}
	}
	return out
}

// tapName is the device of a VM's network card: the same wherever the VM runs,
// and whatever cards come and go beside it. It counts the slots from 0.
func tapName(vmID string, slot int) string {
	sum := sha256.Sum256([]byte(vmID))
	return tapPrefix + hex.EncodeToString(sum[:5]) + "n" + strconv.Itoa(slot-1)
}

func vxlanName(vni int) string { return fmt.Sprintf("%s%06x", vxlanPrefix, vni) }

// tap is a network card with its device.
type tap struct {
	name    string
	vm      *api.VM
	nic     api.VMNIC    // has its slot
	network *api.Network // nil: does not exist
}

// taps returns all network cards of the VMs that are bound here.
func (w *wish) taps() []tap {
	var out []tap
	for i := range w.vms {
		w.vms[i].Spec.AssignSlots(nil)
		for _, nic := range w.vms[i].Spec.NICs {
			out = append(out, tap{name: tapName(w.vms[i].Meta.ID, nic.Slot), vm: &w.vms[i], nic: nic, network: w.network(nic.Network)})
		}
	}
	return out
}

// unwanted are the network cards that a machine has and its spec has not: the guest
// keeps them until it lets go of them or is stopped, and when it moves or goes on from
// saved memory it needs a device for them. There is nothing behind that.
func (w *wish) unwanted() []tap {
	var out []tap
	for i := range w.vms {
		vm := &w.vms[i]
		machine := w.machines[vm.Meta.ID]
		if machine == nil {
			continue
		}
		vm.Spec.AssignSlots(nil)
		for _, nic := range machine.NICs {
			if _, wanted := vm.Spec.NICIn(nic.Slot); !wanted && nic.Slot > 0 {
				out = append(out, tap{name: tapName(vm.Meta.ID, nic.Slot), vm: vm, nic: nic, network: w.network(nic.Network)})
			}
		}
	}
	return out
}

func (w *wish) network(name string) *api.Network {
	i := slices.IndexFunc(w.networks, func(n api.Network) bool { return n.Meta.Name == name })
	if i < 0 {
		return nil
	}
	return &w.networks[i]
}

func (w *wish) vlans() []int {
	var out []int
	for _, n := range w.networks {
		if n.Spec.Type == api.NetworkVLAN {
			out = append(out, n.Spec.VLAN)
		}
	}
	if len(out) == 0 {
		return []int{noTag}
	}
	slices.Sort(out)
	return out
}

// mtu of the device of a network.
func mtu(n *api.Network) int {
	if m := n.Spec.MTU(); m > 0 {
		return m
	}
	return 1500
}

var errNoNetwork = errors.New("its network does not exist")
