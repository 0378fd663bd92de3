// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// macTries bounds the search for a MAC address: with a million cards one in
// sixteen is taken.
const macTries = 32

// addNICs reserves what the network interfaces of a VM need and writes it into
// them: a MAC address, and an address where the network has a pool. Whatever
// kept names is the VM's already; a network that was given a pool meanwhile
// gives it an address.
func (c *change) addNICs(vm *api.VM, kept []api.VMNIC) error {
	for i := range vm.Spec.NICs {
		nic, field := &vm.Spec.NICs[i], fmt.Sprintf("spec.nics[%d]", i)
		n, err := configdb.Networks.Find(c.v, api.DefaultProject, nic.Network)
		if err != nil {
			return atField(err, field+".network")
		}
		nic.Network = n.Meta.Name // it may have been an ID
		c.tx.RequireRevision(configdb.Networks.SpecKey(n.Meta.ID), n.Meta.Revision)
		configdb.Networks.Refer(c.tx, n.Meta.ID, api.KindVM, vm.Meta.ID)
		if slices.Contains(kept, *nic) && nic.Address != "" {
			continue
		}
		if err := c.reserveMAC(vm, nic, field); err != nil {
			return err
		}
		if err := c.reserveAddress(vm, nic, &n, field); err != nil {
			return err
		}
	}
	return distinctNICs(vm.Spec.NICs)
}

// distinctNICs finds what two cards of one VM were given both: within one
// transaction the claims cannot tell.
func distinctNICs(nics []api.VMNIC) error {
	seen := map[string]bool{}
	for i, nic := range nics {
		for what, value := range map[string]string{"mac": nic.MAC, "address": nic.Address} {
			key := what + "/" + value
			if what == "address" {
				key += "/" + nic.Network
			}
			if value != "" && seen[key] {
				return api.Invalid(fmt.Sprintf("spec.nics[%d].%s", i, what), "%s is given to another interface of this VM, too", value)
			}
			seen[key] = true
		}
	}
	return nil
}

// claim takes a key for a VM; it fails if another has it. A key that the VM
// holds already is kept.
func (c *change) claim(key string, vm *api.VM) (by string, ok bool) {
	e, taken := c.v.Get(key)
	if taken && string(e.Value) != vm.Meta.ID {
		return c.names([]string{string(api.KindVM) + "/" + string(e.Value)}), false
	}
	c.tx.RequireRevision(key, e.Revision)
	c.tx.Put(key, []byte(vm.Meta.ID))
	return "", true
}

func (c *change) reserveMAC(vm *api.VM, nic *api.VMNIC, field string) error {
	if nic.MAC != "" {
		if by, ok := c.claim(configdb.MACKey(nic.MAC), vm); !ok {
			return &api.Error{Code: api.CodeRefused, Field: field + ".mac", Detail: fmt.Sprintf("%s belongs to %s", nic.MAC, by)}
		}
		return nil
	}
	for range macTries {
		mac := net.HardwareAddr{0x52, 0x54, 0x00, 0, 0, 0}
		_, _ = rand.Read(mac[3:]) // never fails
		if _, taken := c.v.Get(configdb.MACKey(mac.String())); taken {
			continue
		}
		nic.MAC = mac.String()
		c.claim(configdb.MACKey(nic.MAC), vm)
		return nil
	}
	return api.Errorf(api.CodeRefused, "%d random MAC addresses were all taken; give one", macTries)
}

func (c *change) reserveAddress(vm *api.VM, nic *api.VMNIC, n *api.Network, field string) error {
	pool, ok := configdb.NetworkPool(c.v, n.Meta.ID)
	if !ok {
		if nic.Address != "" {
			return &api.Error{Code: api.CodeRefused, Field: field + ".address", Detail: fmt.Sprintf("network %s has no IP pool to reserve an address from; create one, or leave the address out", n.Meta.Name)}
		}
		c.tx.RequireRevision(configdb.NetworkPoolKey(n.Meta.ID), 0)
		return nil
	}
	c.tx.RequireRevision(configdb.IPPools.SpecKey(pool.Meta.ID), pool.Meta.Revision)
	if nic.Address == "" {
		return c.freeAddress(vm, nic, n, &pool)
	}
	a := netip.MustParseAddr(nic.Address) // validated
	switch {
	case !pool.Spec.Host(a):
		return api.Invalid(field+".address", "%s is not an address for a host of %s, the IP pool of network %s", a, pool.Spec.CIDR, n.Meta.Name)
	case nic.Address == pool.Spec.Gateway:
		return &api.Error{Code: api.CodeRefused, Field: field + ".address", Detail: fmt.Sprintf("%s is the gateway of network %s", a, n.Meta.Name)}
	}
	if by, ok := c.claim(configdb.AddressKey(n.Meta.ID, a), vm); !ok {
		return &api.Error{Code: api.CodeRefused, Field: field + ".address", Detail: fmt.Sprintf("%s belongs to %s", a, by)}
	}
	return nil
}

// freeAddress reserves the first free address after a random one, so that two
// VMs created at once seldom want the same.
func (c *change) freeAddress(vm *api.VM, nic *api.VMNIC, n *api.Network, pool *api.IPPool) error {
	first, last := pool.Spec.Range()
	size := pool.Spec.Total()
	if g, err := netip.ParseAddr(pool.Spec.Gateway); err == nil && !g.Less(first) && !last.Less(g) {
		size++ // it has a place among the candidates
	}
	start, err := rand.Int(rand.Reader, big.NewInt(int64(size)))
	if err != nil {
		return err
	}
	mine := map[string]bool{pool.Spec.Gateway: true}
	for _, other := range vm.Spec.NICs {
		if other.Network == nic.Network {
			mine[other.Address] = true
		}
	}
	for i := range size {
		a := pool.Spec.At((int(start.Int64()) + i) % size)
		if mine[a.String()] {
			continue
		}
		key := configdb.AddressKey(n.Meta.ID, a)
		if _, taken := c.v.Get(key); !taken {
			nic.Address = a.String()
			c.claim(key, vm)
			return nil
		}
	}
	return api.Errorf(api.CodeRefused, "the IP pool %s of network %s is exhausted: all %d addresses are reserved", pool.Meta.Name, n.Meta.Name, pool.Spec.Total())
}

// replaceNICs changes the network interfaces of a VM. One that is wished for
// without a MAC address takes over that of the first old one on its network, so
// that what stays keeps its addresses; one with the MAC address of an old one is
// that one, on another network.
func (c *change) replaceNICs(old, vm *api.VM, want []api.VMNIC) error {
	left := slices.Clone(old.Spec.NICs)
	vm.Spec.NICs = slices.Clone(want)
	for i := range vm.Spec.NICs {
		nic := &vm.Spec.NICs[i]
		at := slices.IndexFunc(left, func(o api.VMNIC) bool {
			return o.Network == nic.Network && (nic.MAC == "" || nic.MAC == o.MAC) && (nic.Address == "" || nic.Address == o.Address)
		})
		if at >= 0 {
			nic.MAC, nic.Address = left[at].MAC, left[at].Address
			left = slices.Delete(left, at, at+1)
		}
	}
	configdb.ReleaseNICs(c.v, c.tx, &api.VM{Meta: old.Meta, Spec: api.VMSpec{NICs: left}})
	kept := slices.DeleteFunc(slices.Clone(old.Spec.NICs), func(n api.VMNIC) bool { return slices.Contains(left, n) })
	return c.addNICs(vm, kept)
}

// sameNICs reports that a wish asks for nothing else than what is there.
func sameNICs(have, want []api.VMNIC) bool {
	return slices.EqualFunc(have, want, func(h, w api.VMNIC) bool {
		if w.MAC == "" {
			w.MAC = h.MAC
		}
		if w.Address == "" {
			w.Address = h.Address
		}
		if w.Slot == 0 {
			w.Slot = h.Slot
		}
		return h == w
	})
}
