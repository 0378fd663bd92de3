// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/access"
)

const (
	// vhostVsock is opened by QEMU for a VM with vsock.
	vhostVsock = "dev/vhost-vsock"
	// lockMargin is what is locked besides the guest's memory, for a VM with a PCI
	// device of the host.
	lockMargin = 1 << 30
)

// grantAll lets the VM's QEMU open everything that its spec names: disks, what its
// machine remembers, images, and devices of the host.
func (s *step) grantAll(ctx context.Context, u *ProcessUser) error {
	spec := &s.vm.Spec
	var volumes, images []string
	for _, d := range spec.Disks {
		volumes = append(volumes, d.Volume)
	}
	if spec.UEFI() {
		volumes = append(volumes, spec.Firmware.Volume)
	}
	if spec.TPM != nil {
		volumes = append(volumes, spec.TPM.Volume)
	}
	for _, c := range spec.CDROMs {
		images = append(images, c.Image)
	}
	if k := spec.Kernel; k != nil {
		images = append(images, k.Image, k.Initrd)
	}
	for _, name := range volumes {
		if err := s.grantVolume(ctx, name); err != nil {
			return err
		}
	}
	for _, name := range images {
		if name == "" {
			continue
		}
		if err := s.grantImage(ctx, name); err != nil {
			return err
		}
	}
	return s.grantDevices(u)
}

// grantDevices gives the devices of the host to the VM's user, who has them alone.
func (s *step) grantDevices(u *ProcessUser) error {
	root := s.h.cfg.SysRoot
	if s.vm.Spec.Vsock != nil {
		if gid, err := access.Device(filepath.Join(root, vhostVsock)); err == nil && gid != 0 {
			u.Groups = append(u.Groups, gid)
		}
	}
	devices, _ := s.vm.Spec.HostDevicesOn(s.h.cfg.NodeName)
	for _, d := range devices {
		nodes, err := deviceNodes(root, d)
		if err != nil {
			return fmt.Errorf("find the device of the host %s%s: %w", d.PCI, d.USB, err)
		}
		for _, path := range nodes {
			if err := s.h.grantFile(s.vm.Meta.ID, path); err != nil {
				return err
			}
		}
		if d.PCI != "" {
			u.Memlock = int64(s.vm.Spec.Memory) + lockMargin
		}
	}
	return nil
}

// deviceNodes are the files that QEMU opens for a device: of the IOMMU group of a
// PCI device (Linux, driver-api/vfio), or of every USB device of that product.
func deviceNodes(root string, d api.VMHostDevice) ([]string, error) {
	if d.PCI != "" {
		group, err := os.Readlink(filepath.Join(root, "sys/bus/pci/devices", d.PCI, "iommu_group"))
		if err != nil {
			return nil, err
		}
		return []string{filepath.Join(root, "dev/vfio", filepath.Base(group))}, nil
	}
	vendor, product, _ := strings.Cut(d.USB, ":")
	all, err := filepath.Glob(filepath.Join(root, "sys/bus/usb/devices", "*"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, dir := range all {
		value := func(name string) string {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				return "" // an interface, or gone
			}
			return strings.TrimSpace(string(b))
		}
		if value("idVendor") != vendor || value("idProduct") != product {
			continue
		}
		bus, err1 := strconv.Atoi(value("busnum"))
		device, err2 := strconv.Atoi(value("devnum"))
		if err1 == nil && err2 == nil {
			out = append(out, filepath.Join(root, "dev/bus/usb", fmt.Sprintf("%03d", bus), fmt.Sprintf("%03d", device)))
		}
	}
	return out, nil
}
