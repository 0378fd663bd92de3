// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"net"
	"net/netip"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/switch/dhcp"
	"github.com/muster-vm/muster/switch/hostnet"
)

// responder answers the DHCP messages of one card.
type responder struct {
	socket *hostnet.Socket
	index  int // of the device that it listens to
	done   chan struct{}
}

func (r *responder) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// answerDHCP makes one responder for each tap that is there, and no other.
func (s *Switch) answerDHCP(p *pass) {
	keep := map[string]bool{}
	for _, t := range p.w.taps() {
		l, ok := p.links[t.name]
		if !ok {
			// Made since the devices were listed.
			l, ok, _ = s.host.Find(t.name)
		}
		if !ok || l.Alias != s.tapAlias(t) {
			continue
		}
		p.links[t.name] = l
		keep[t.name] = true
		if r := s.responders[t.name]; r != nil {
			if r.index == l.Index && !r.ended() {
				continue
			}
			s.stopResponder(t.name)
		}
		socket, err := s.host.Socket(l, dhcp.Filter())
		if err != nil {
			s.log.Warn("DHCP is not answered", "vm", t.vm.Meta.ID, "device", t.name, "err", err)
			continue
		}
		r := &responder{socket: socket, index: l.Index, done: make(chan struct{})}
		s.responders[t.name] = r
		lookup := s.leaseOf(t.vm.Meta.ID, t.nic.Slot)
		go func() { // ended by stopResponder, at the latest when Run ends
			defer close(r.done)
			if err := dhcp.Serve(socket, lookup, s.log.With("vm", t.vm.Meta.ID, "slot", t.nic.Slot), s.cfg.Now); err != nil {
				s.log.Warn("DHCP is not answered any more", "vm", t.vm.Meta.ID, "device", t.name, "err", err)
			}
		}()
	}
	s.stopResponders(keep)
}

func (s *Switch) stopResponders(keep map[string]bool) {
	for name := range s.responders {
		if !keep[name] {
			s.stopResponder(name)
		}
	}
}

func (s *Switch) stopResponder(name string) {
	if r := s.responders[name]; r != nil {
		_ = r.socket.Close()
		<-r.done
		delete(s.responders, name)
	}
}

// leaseOf looks up what is reserved for a card, anew for every message.
func (s *Switch) leaseOf(vmID string, slot int) func() (dhcp.Lease, bool) {
	return func() (dhcp.Lease, bool) {
		v := s.cfg.DB.Local()
		vm, err := configdb.VMs.Get(v, vmID)
		if err != nil {
			return dhcp.Lease{}, false
		}
		vm.Spec.AssignSlots(nil)
		nic, ok := vm.Spec.NICIn(slot)
		if !ok {
			return dhcp.Lease{}, false
		}
		return leaseFor(v, &vm, nic)
	}
}

// leaseFor is the content of the database in the words of DHCP.
func leaseFor(v *configdb.View, vm *api.VM, nic api.VMNIC) (l dhcp.Lease, ok bool) {
	n, err := configdb.Networks.Find(v, api.DefaultProject, nic.Network)
	if err != nil {
		return l, false
	}
	pool, ok := configdb.NetworkPool(v, n.Meta.ID)
	if !ok {
		return l, false
	}
	l = dhcp.Lease{Domain: pool.Spec.Domain, Host: vm.Meta.Name, MTU: n.Spec.MTU()}
	l.MAC, err = net.ParseMAC(nic.MAC)
	if err == nil {
		l.Address, err = netip.ParseAddr(nic.Address)
	}
	if err == nil {
		l.Subnet, err = netip.ParsePrefix(pool.Spec.CIDR)
	}
	if err == nil && pool.Spec.Gateway != "" {
		l.Gateway, err = netip.ParseAddr(pool.Spec.Gateway)
	}
	for _, d := range pool.Spec.DNS {
		if a, e := netip.ParseAddr(d); e == nil {
			l.DNS = append(l.DNS, a)
		}
	}
	return l, err == nil
}
