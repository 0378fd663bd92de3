// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package isofs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestXorrisoReadsIt: an independent reader finds every file with its name and
// content. That Linux does is tested with a guest, in node.
func TestXorrisoReadsIt(t *testing.T) {
	files := []File{
		{"meta-data", []byte("instance-id: muster-1\n")}, {"user-data", bytes.Repeat([]byte("#cloud-config\n"), 5000)}, {"empty", nil},
		{"openstack/latest/meta_data.json", []byte("{}")}, {"openstack/content/0000", []byte("x")}, {"größe.txt", []byte("umlaut")},
		{"exactly", bytes.Repeat([]byte("y"), sector)},
	}
	b, err := Image("cidata", files)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "seed.iso"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(img, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("xorriso", "-osirrox", "on", "-indev", img, "-extract", "/", mnt).CombinedOutput(); err != nil {
		t.Fatalf("xorriso (Debian package xorriso, which scripts/test installs): %v: %s", err, out)
	}
	seen := 0
	err = filepath.WalkDir(mnt, func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			seen++
		}
		return err
	})
	if err != nil || seen != len(files) {
		t.Errorf("%d files, want %d: %v", seen, len(files), err)
	}
	for _, f := range files {
		got, err := os.ReadFile(filepath.Join(mnt, f.Path))
		if err != nil || !bytes.Equal(got, f.Data) {
			t.Errorf("%s: %d bytes, %v", f.Path, len(got), err)
		}
	}
	out, err := exec.Command("blkid", "-p", "-o", "export", img).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "LABEL=cidata") || !strings.Contains(string(out), "TYPE=iso9660") {
		t.Errorf("blkid: %v\n%s", err, out)
	}
}

func TestImageIsTheSameForTheSameInput(t *testing.T) {
	a := []File{{"b", []byte("1")}, {"a/c", []byte("2")}}
	x, err := Image("cidata", a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := Image("cidata", []File{a[1], a[0]})
	if err != nil || !bytes.Equal(x, y) {
		t.Errorf("the order of the files matters: %v", err)
	}
}

func TestWhatDoesNotFitIsRefused(t *testing.T) {
	var many []File
	for i := range 100 {
		many = append(many, File{fmt.Sprintf("file%d", i), nil})
	}
	for name, tc := range map[string]struct {
		label string
		files []File
	}{
		"no label":       {"", nil},
		"long label":     {"abcdefghijklmnopq", nil},
		"control":        {"a\nb", nil},
		"no name":        {"a", []File{{"", nil}}},
		"absolute":       {"a", []File{{"/x", nil}}},
		"upwards":        {"a", []File{{"../x", nil}}},
		"twice":          {"a", []File{{"x", nil}, {"x", nil}}},
		"file and dir":   {"a", []File{{"x", nil}, {"x/y", nil}}},
		"dir and file":   {"a", []File{{"x/y", nil}, {"x", nil}}},
		"long name":      {"a", []File{{strings.Repeat("x", 65), nil}}},
		"forbidden name": {"a", []File{{"a:b", nil}}},
		"many":           {"a", many},
		"large":          {"a", []File{{"x", make([]byte, MaxBytes+1)}}},
	} {
		if _, err := Image(tc.label, tc.files); err == nil {
			t.Errorf("%s: made", name)
		}
	}
}
