// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// firmware installs a UEFI firmware on a host of the kit.
func (h *host) firmware(t *testing.T, template []byte) {
	t.Helper()
	dir := t.TempDir()
	for name, b := range map[string][]byte{"code": make([]byte, 4096), "vars": template} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf(`{"interface-types":["uefi"],"mapping":{"device":"flash","executable":{"filename":"%[1]s/code","format":"raw"},"nvram-template":{"filename":"%[1]s/vars","format":"raw"}},"targets":[{"architecture":"x86_64","machines":["pc-q35-*"]}],"features":["secure-boot","enrolled-keys","requires-smm"]}`, dir)
	if err := os.WriteFile(filepath.Join(dir, "40.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h.cfg.FirmwareDirs = []string{dir}
}

func TestStateOfMachines(t *testing.T) {
	k := newKit(t, "m1")
	h := k.nodes["m1"]
	template := make([]byte, 540672) // as OVMF's, no multiple of 64 KiB
	copy(template, "the keys")
	h.firmware(t, template)
	k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.start("m1")
	vars := k.volume("web1-uefi", api.VolumeSpec{Content: api.ContentUEFISecure, Node: "m1"})
	tpm := k.volume("web1-tpm", api.VolumeSpec{Content: api.ContentTPM, Node: "m1"})

	got := k.untilVolume(vars.Meta.ID, api.StorageReady)
	path, format, err := h.Resolve(k.db.Local(), "", "web1-uefi")
	if err != nil || format != "qcow2" || got.Status.Size != api.Size(len(template)) {
		t.Fatalf("%+v: %s, %v", got.Status, format, err)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if _, err := h.img.run(t.Context(), infoDeadline, 0, "convert", "-f", "qcow2", "-O", "raw", path, raw); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(raw); err != nil || string(b) != string(template) {
		t.Errorf("the variables do not begin as the template: %d bytes, %v", len(b), err)
	}

	k.untilVolume(tpm.Meta.ID, api.StorageReady)
	path, format, err = h.Resolve(k.db.Local(), "", "web1-tpm")
	if err != nil || format != "raw" {
		t.Fatal(format, err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 0 || st.Mode().Perm() != 0o600 {
		t.Errorf("state of the TPM: %v, %v", st, err)
	}
}

func TestStateWaitsForTheFirmware(t *testing.T) {
	k := newKit(t, "m1")
	k.nodes["m1"].cfg.FirmwareDirs = []string{t.TempDir()}
	k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.start("m1")
	vars := k.volume("web1-uefi", api.VolumeSpec{Content: api.ContentUEFI, Node: "m1"})
	k.until("told what to install", func(v *configdb.View) bool {
		vol, err := configdb.Volumes.Get(v, vars.Meta.ID)
		return err == nil && vol.Status.Phase == api.StoragePending && strings.Contains(vol.Status.Message, "install the package ovmf")
	})
}
