// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/cloudinit"
)

// seedDevice is the CD-ROM of spec.cloudInit, nil without one.
func (s *step) seedDevice() *argv.Seed {
	c := s.vm.Spec.CloudInit
	if c == nil {
		return nil
	}
	return &argv.Seed{Path: s.h.pathsOf(s.vm.Meta.ID).seed, SATA: c.Format == api.CloudInitConfigDrive}
}

// writeSeed makes the CD-ROM before each start. Its bytes depend on the VM and
// the IP pools alone: every node makes the same.
func (s *step) writeSeed(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove the old cloud-init CD-ROM of vm %s: %w", s.vm.Meta.Name, err)
	}
	if s.vm.Spec.CloudInit == nil {
		return nil
	}
	nics, err := s.seedNICs()
	if err != nil {
		return err
	}
	b, err := cloudinit.Image(&s.vm, nics)
	if err != nil {
		return fmt.Errorf("make the cloud-init CD-ROM of vm %s: %w", s.vm.Meta.Name, err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return fmt.Errorf("write the cloud-init CD-ROM of vm %s: %w", s.vm.Meta.Name, err)
	}
	return nil
}

// seedNICs are the network cards as the guest shall use them.
func (s *step) seedNICs() ([]cloudinit.NIC, error) {
	var out []cloudinit.NIC
	for _, nic := range s.vm.Spec.NICs {
		n := cloudinit.NIC{Slot: nic.Slot, MAC: nic.MAC, MTU: s.mtu(nic.Network)}
		if s.vm.Spec.CloudInit.Network == api.CloudInitStatic {
			if err := s.static(&n, nic); err != nil {
				return nil, err
			}
		}
		out = append(out, n)
	}
	return out, nil
}

// static fills in the reserved address with what its pool says of the network. A
// card without one is left to DHCP.
func (s *step) static(n *cloudinit.NIC, nic api.VMNIC) error {
	if nic.Address == "" {
		return nil
	}
	pools, err := configdb.IPPools.List(s.v)
	if err != nil {
		return err
	}
	for _, p := range pools {
		cidr, err := netip.ParsePrefix(p.Spec.CIDR)
		if err != nil || p.Spec.Network != nic.Network {
			continue
		}
		n.Address = fmt.Sprintf("%s/%d", nic.Address, cidr.Bits())
		n.Gateway, n.DNS, n.Domain = p.Spec.Gateway, p.Spec.DNS, p.Spec.Domain
	}
	return nil
}
