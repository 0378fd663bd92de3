// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// Seed is the CD-ROM with a guest's settings for its first boot.
type Seed struct {
	Path string
	// SATA attaches it to the chipset's own controller, which Windows can read
	// without a driver. Kernels for clouds have no driver for that, but for virtio.
	SATA bool
}

// SeedOf finds it in an argument vector of Build: the format that it was for, or
// none.
func SeedOf(args []string) api.CloudInitFormat {
	for i := 1; i < len(args); i++ {
		if args[i-1] != "-device" {
			continue
		}
		switch {
		case strings.HasPrefix(args[i], "scsi-cd,id=seedcd,"):
			return api.CloudInitNoCloud
		case strings.HasPrefix(args[i], "ide-cd,id=seedcd,"):
			return api.CloudInitConfigDrive
		}
	}
	return ""
}

// CPUOf finds the value of -cpu in an argument vector; "" if there is none.
func CPUOf(args []string) string {
	if i := slices.Index(args, "-cpu"); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

// seed attaches the CD-ROM (QEMU's ide-cd, virtio-scsi, scsi-cd). It is the last
// to take a place, so that no other drive changes its own.
func (m *Machine) seed(p *places) ([]string, error) {
	s := m.Seed
	if s == nil {
		return nil, nil
	}
	out := []string{
		"-blockdev", "driver=file,node-name=seedfile,filename=" + escape(s.Path) + ",read-only=on",
		"-blockdev", "driver=raw,node-name=seed,file=seedfile,read-only=on",
	}
	switch {
	case !s.SATA:
		return append(out, "-device", m.virtio("virtio-scsi")+",id=seedbus,num_queues=1", "-device", "scsi-cd,id=seedcd,bus=seedbus.0,drive=seed"), nil
	case !m.pci():
		return nil, api.Invalid("spec.cloudInit.format", "is configdrive, which machine %s has no controller for; give nocloud", m.Type)
	case p.disks+p.drives >= p.ports:
		return nil, api.Invalid("spec.cloudInit.format", "is configdrive, which needs a place on the controller of SATA or IDE disks and drives, and all %d are taken", p.ports)
	}
	return append(out, "-device", "ide-cd,id=seedcd"+p.drive()+",drive=seed"), nil
}
