// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cloudinit

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func machine(c api.CloudInit) *api.VM {
	vm := &api.VM{Meta: api.Meta{ID: "0198a000-0000-7000-8000-000000000001", Name: "web1"}}
	vm.Spec.CloudInit = &c
	return vm
}

var cards = []NIC{
	{Slot: 1, MAC: "52:54:00:00:00:01", Address: "10.20.0.7/24", Gateway: "10.20.0.1", DNS: []string{"10.20.0.2"}, Domain: "lab.example", MTU: 1450},
	{Slot: 3, MAC: "52:54:00:00:00:03"},
}

// unpack reads a CD-ROM with an independent program.
func unpack(t *testing.T, image []byte) map[string]string {
	t.Helper()
	dir := t.TempDir()
	img, out := filepath.Join(dir, "seed.iso"), filepath.Join(dir, "out")
	if err := os.WriteFile(img, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("xorriso", "-osirrox", "on", "-indev", img, "-extract", "/", out).CombinedOutput(); err != nil {
		t.Fatalf("xorriso (Debian package xorriso, which scripts/test installs): %v: %s", err, b)
	}
	files := map[string]string{}
	err := filepath.WalkDir(out, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		name, _ := filepath.Rel(out, path)
		files[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestGolden(t *testing.T) {
	full := api.CloudInit{
		User: "ops", SSHKeys: []string{"ssh-ed25519 AAAA me@home"}, PasswordHash: "$6$salt$hash", Hostname: "inside.example",
		UserData: "#cloud-config\npackages: [nginx]\n", VendorData: "#cloud-config\n{}\n", Network: api.CloudInitStatic,
	}
	windows := api.CloudInit{Format: api.CloudInitConfigDrive, User: "Administrator", SSHKeys: full.SSHKeys, UserData: "#ps1_sysnative\nWrite-Host hello\n", VendorData: full.VendorData}
	for name, c := range map[string]api.CloudInit{"full": full, "empty": {Network: api.CloudInitNone}, "script": {UserData: "#!/bin/sh\necho hello\n"}, "windows": windows} {
		t.Run(name, func(t *testing.T) {
			a, err := Image(machine(c), cards)
			if err != nil {
				t.Fatal(err)
			}
			b, err := Image(machine(c), cards)
			if err != nil || !bytes.Equal(a, b) {
				t.Fatal("the same VM gives another CD-ROM")
			}
			got, err := json.MarshalIndent(unpack(t, a), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want, err := os.ReadFile(file); err != nil || string(want) != string(got)+"\n" {
				t.Errorf("differs from %s (run with -update and look at the difference): %v\n%s", file, err, got)
			}
		})
	}
}

// TestUsersOwnDataArePartOfAWellFormedMessage: also when they look like its
// boundary.
func TestUsersOwnDataArePartOfAWellFormedMessage(t *testing.T) {
	own := "#!/bin/sh\necho --" + boundary + "--\n"
	files := unpack(t, image(t, api.CloudInit{User: "ops", UserData: own}))
	m, err := mail.ReadMessage(strings.NewReader(files["user-data"]))
	if err != nil {
		t.Fatal(err)
	}
	kind, params, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/mixed" {
		t.Fatal(kind, err)
	}
	parts := multipart.NewReader(m.Body, params["boundary"])
	var types, bodies []string
	for {
		p, err := parts.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(p)
		if err != nil {
			t.Fatal(err)
		}
		kind, _, _ := mime.ParseMediaType(p.Header.Get("Content-Type"))
		types, bodies = append(types, kind), append(bodies, string(b))
	}
	if len(types) != 2 || types[0] != "text/cloud-config" || types[1] != "text/x-shellscript" || bodies[1] != own {
		t.Fatalf("%q %q", types, bodies)
	}
	var config struct {
		User struct{ Name string } `json:"user"`
	}
	if err := yaml.Unmarshal([]byte(bodies[0]), &config); err != nil || config.User.Name != "ops" {
		t.Errorf("%+v, %v", config, err)
	}
}

func image(t *testing.T, c api.CloudInit) []byte {
	t.Helper()
	b, err := Image(machine(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestIdentityIsTheVMs: a clone is another instance, a renamed VM is not.
func TestIdentityIsTheVMs(t *testing.T) {
	id := func(vm *api.VM) string {
		t.Helper()
		b, err := Image(vm, nil)
		if err != nil {
			t.Fatal(err)
		}
		var meta map[string]string
		if err := yaml.Unmarshal([]byte(unpack(t, b)["meta-data"]), &meta); err != nil {
			t.Fatal(err)
		}
		return meta["instance-id"]
	}
	vm := machine(api.CloudInit{})
	first := id(vm)
	vm.Meta.Name = "renamed"
	if id(vm) != first {
		t.Error("another name is another instance")
	}
	vm.Meta.ID = "0198a000-0000-7000-8000-000000000002"
	if id(vm) == first {
		t.Error("a clone is the same instance")
	}
}
