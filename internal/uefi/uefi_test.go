// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package uefi

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

const plain, secureFeatures = `"acpi-s3"`, `"secure-boot","enrolled-keys","requires-smm"`

// put writes a descriptor and its files.
func put(t *testing.T, dir, name, features string, varsSize int) {
	t.Helper()
	code, vars := filepath.Join(dir, name+".code"), filepath.Join(dir, name+".vars")
	for path, size := range map[string]int{code: 4096, vars: varsSize} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf(`{"interface-types":["uefi"],"mapping":{"device":"flash","executable":{"filename":%q,"format":"raw"},"nvram-template":{"filename":%q,"format":"raw"}},"targets":[{"architecture":"x86_64","machines":["pc-q35-*"]}],"features":[%s]}`, code, vars, features)
	if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheFirstFittingDescriptorIsTaken(t *testing.T) {
	etc, usr := t.TempDir(), t.TempDir()
	put(t, usr, "40-secure", secureFeatures, 4096)
	put(t, usr, "50-no-keys", `"secure-boot","requires-smm"`, 4096)
	put(t, usr, "60-plain", plain, 4096)
	put(t, usr, "70-small", plain, 2048)
	if err := os.WriteFile(filepath.Join(usr, "10-broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	dirs := []string{etc, usr, filepath.Join(usr, "missing")}
	for _, c := range []struct {
		secure bool
		size   int64
		want   string
	}{{true, 0, usr + "/40-secure.code"}, {false, 0, usr + "/60-plain.code"}, {false, 2048, usr + "/70-small.code"}, {true, 4096, usr + "/40-secure.code"}} {
		f, err := Find(dirs, c.secure, c.size)
		if err != nil || f.Code != c.want || c.size != 0 && f.VarsSize != c.size {
			t.Errorf("%+v: %+v, %v", c, f, err)
		}
	}
	put(t, etc, "60-plain", plain, 4096)
	if f, err := Find(dirs, false, 0); err != nil || f.Code != etc+"/60-plain.code" {
		t.Errorf("the administrator's is not taken: %+v, %v", f, err)
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	dir := t.TempDir()
	_, err := Find([]string{dir}, true, 0)
	if api.CodeOf(err) != api.CodeUnsupported || !strings.Contains(err.Error(), "install the package ovmf") || !strings.Contains(err.Error(), "Secure Boot") {
		t.Error(err)
	}
	put(t, dir, "1", plain, 4096)
	if _, err := Find([]string{dir}, false, 8192); err == nil || !strings.Contains(err.Error(), "8192 bytes") {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "1.code")); err != nil {
		t.Fatal(err)
	}
	if f, err := Find([]string{dir}, false, 0); err == nil {
		t.Errorf("a firmware without its file: %+v", f)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"interface-types":["uefi"],"mapping":{"device":"flash","executable":{"filename":"/c","format":"raw"},"nvram-template":{"filename":"/v","format":"raw"}},"targets":[{"architecture":"x86_64","machines":["pc-q35-*"]}],"features":[]}`), false)
	f.Add([]byte(`{"mapping":7}`), true)
	f.Fuzz(func(t *testing.T, b []byte, secure bool) {
		if fw, ok := parse(b, secure); ok && (!filepath.IsAbs(fw.Code) || !filepath.IsAbs(fw.Vars)) {
			t.Fatalf("%+v", fw)
		}
	})
}
