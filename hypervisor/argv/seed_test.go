// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

func TestSeedTakesTheLastPlaceOrIsRefused(t *testing.T) {
	m := machine()
	m.Seed = &Seed{Path: "/run/seed.iso", SATA: true}
	for i := range sataPorts - 1 {
		m.CDROMs = append(m.CDROMs, CDROM{})
		if i == api.MaxCDROMs-1 {
			break
		}
	}
	a, err := Build(m)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(a, " ")
	_, at, found := strings.Cut(text, "ide-cd,id=seedcd,")
	bus, _, _ := strings.Cut(at, ",")
	if !found {
		t.Fatal(text)
	}
	if strings.Count(text, bus+",") != 1 {
		t.Errorf("the place %s of the CD-ROM is taken: %s", bus, text)
	}
	for len(m.Disks) < sataPorts-len(m.CDROMs)+1 {
		m.Disks = append(m.Disks, Disk{Path: "/d", Format: "raw", Slot: len(m.Disks) + 1})
	}
	for i := range m.Disks {
		m.Disks[i].Options.Bus, m.Disks[i].Slot = api.BusSATA, i+1
	}
	m.Disks = m.Disks[:sataPorts-len(m.CDROMs)]
	if _, err := Build(m); api.CodeOf(err) != api.CodeInvalid || !strings.Contains(err.Error(), "are taken") {
		t.Errorf("no place left: %v", err)
	}
	m = machine()
	m.Type, m.Seed = api.MachineMicroVM, &Seed{Path: "/run/seed.iso", SATA: true}
	if _, err := Build(m); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("SATA on a microvm: %v", err)
	}
	m.Seed.SATA = false
	if a, err := Build(m); err != nil || !strings.Contains(strings.Join(a, " "), "virtio-scsi-device,id=seedbus") {
		t.Errorf("%v %v", a, err)
	}
}
