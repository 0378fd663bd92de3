// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// inspectFile runs a file through the inspection, as an upload would.
func inspectFile(t *testing.T, path string) (inspected, error) {
	t.Helper()
	s := New(Config{NodeID: api.NewID(), NodeName: "m1"})
	root := t.TempDir()
	lp := &localPool{name: "p", what: "pool \"p\" at " + root, path: root, work: newLane("p", maxWorkCalls)}
	return s.inspect(t.Context(), lp, path)
}

func TestInspectAccepts(t *testing.T) {
	for name, c := range map[string]struct {
		args   []string
		format string
	}{
		"qcow2":                  {[]string{"-f", "qcow2"}, "qcow2"},
		"old qcow2":              {[]string{"-f", "qcow2", "-o", "compat=0.10"}, "qcow2"},
		"zstd qcow2":             {[]string{"-f", "qcow2", "-o", "compression_type=zstd"}, "qcow2"},
		"raw":                    {[]string{"-f", "raw"}, "raw"},
		"vmdk":                   {[]string{"-f", "vmdk"}, "qcow2"},
		"vmdk stream":            {[]string{"-f", "vmdk", "-o", "subformat=streamOptimized"}, "qcow2"},
		"vdi":                    {[]string{"-f", "vdi"}, "qcow2"},
		"vhdx":                   {[]string{"-f", "vhdx"}, "qcow2"},
		"vpc":                    {[]string{"-f", "vpc"}, "qcow2"},
		"qcow2 with refcount 64": {[]string{"-f", "qcow2", "-o", "refcount_bits=64,cluster_size=4k"}, "qcow2"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x:y,z")
			qemu(t, append(append([]string{"create"}, c.args...), "file:"+path, "8M")...)
			if c.args[1] == "vmdk" && len(c.args) > 2 { // a stream is made by convert
				raw := filepath.Join(t.TempDir(), "raw")
				qemu(t, "create", "-f", "raw", raw, "8M")
				qemu(t, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, "file:"+path)
			}
			got, err := inspectFile(t, path)
			if err != nil || got.format != c.format || got.virtualSize < 8<<20 {
				t.Fatalf("got %+v, %v", got, err)
			}
			if foreign := c.format != c.args[1]; foreign != (got.path != path) {
				t.Errorf("kept %s", got.path)
			}
		})
	}
}

func TestInspectRefuses(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	good := content(t, "8M")
	write := func(name string, b []byte) string {
		if err := os.WriteFile(in(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return in(name)
	}
	patched := func(name string, at int, b ...byte) string {
		c := bytes.Clone(good)
		copy(c[at:], b)
		return write(name, c)
	}
	qemu(t, "create", "-f", "raw", in("base"), "8M")
	qemu(t, "create", "-f", "qcow2", "-u", "-F", "raw", "-b", "/etc/passwd", in("passwd"), "8M")
	qemu(t, "create", "-f", "qcow2", "-u", "-F", "raw", "-b", "json:{\"driver\":\"nbd\",\"host\":\"192.0.2.1\",\"port\":\"1\"}", in("json"), "8M")
	qemu(t, "create", "-f", "qcow2", "-u", "-F", "raw", "-b", "http://192.0.2.1/x", in("http"), "8M")
	qemu(t, "create", "-f", "qcow2", "-o", "data_file="+in("data"), in("datafile"), "8M")
	qemu(t, "create", "-f", "qcow2", in("snap"), "8M")
	qemu(t, "snapshot", "-c", "one", in("snap"))
	qemu(t, "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", in("flat.vmdk"), "8M")
	qemu(t, "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", in("split.vmdk"), "8M")
	qemu(t, "create", "-f", "vmdk", in("parent.vmdk"), "8M")
	qemu(t, "create", "-f", "vmdk", "-F", "vmdk", "-b", in("parent.vmdk"), in("child.vmdk"))
	qemu(t, "create", "-f", "qed", in("qed"), "8M")
	vmdk := read(t, in("parent.vmdk"))
	follow := bytes.Clone(vmdk)
	binary.LittleEndian.PutUint64(follow[12:], 0) // no content: QEMU would follow the descriptor
	twoExtents := bytes.Replace(vmdk, []byte("# The Disk Data Base"), []byte("RW 1 FLAT \"/etc/passwd\" 0\n"), 1)
	for name, c := range map[string]struct{ path, says string }{
		"backing file":              {in("passwd"), "backing file"},
		"backing by json":           {in("json"), "backing file"},
		"backing by http":           {in("http"), "backing file"},
		"data file":                 {in("datafile"), "data-file"},
		"internal snapshot":         {in("snap"), "internal snapshots"},
		"encrypted":                 {patched("luks", 35, 2), "encrypted"},
		"flat vmdk":                 {in("flat.vmdk"), "descriptor"},
		"split vmdk":                {in("split.vmdk"), "descriptor"},
		"part of a split vmdk":      {in("split-s001.vmdk"), "0 extents"},
		"vmdk with a parent":        {in("child.vmdk"), "parent"},
		"vmdk without content":      {write("follow", follow), "without content"},
		"vmdk with a second extent": {write("two", twoExtents), "names another file"},
		"disguised vmdk descriptor": {write("desc", []byte("\n# x\n  version=1\nRW 100 FLAT \"/etc/passwd\" 0\n")), "descriptor"},
		"old vmdk":                  {write("cowd", append([]byte("COWD"), make([]byte, 4096)...)), "old ESX"},
		"format without converter":  {in("qed"), "qed is not supported"},
		"empty":                     {write("empty", nil), "empty"},
		"truncated in the middle":   {write("trunc", good[:len(good)/2]), ""},
		"truncated header":          {write("head", good[:60]), "truncated"},
		"truncated after header":    {write("head2", good[:600]), ""},
		"qcow version 1":            {patched("v1", 4, 0, 0, 0, 1), "version 1"},
		"absurd size":               {patched("huge", 24, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0), "over the limit"},
		"size zero":                 {patched("zero", 24, make([]byte, 8)...), "virtual size is 0"},
		"corrupt bit":               {patched("corrupt", 72+7, 2), "marked corrupt"},
		"unknown feature":           {patched("feature", 72, 0x80), ""},
		"wild L1 table":             {patched("l1", 40, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0), ""},
		"absurd L1 size":            {patched("l1size", 36, 0xff, 0xff, 0xff, 0xff), ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := inspectFile(t, c.path)
			if err == nil {
				t.Fatalf("accepted as %+v", got)
			}
			if api.CodeOf(err) != api.CodeInvalid || !strings.Contains(err.Error(), "the image is refused: ") || !strings.Contains(err.Error(), c.says) {
				t.Errorf("code %s: %v", api.CodeOf(err), err)
			}
			if len(err.Error()) > 700 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestQemuImgIsBounded(t *testing.T) {
	script := filepath.Join(t.TempDir(), "qemu-img")
	run := func(body string) error {
		if err := os.WriteFile(script, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := newQemuImg(script).run(t.Context(), infoDeadline, infoCPUSeconds, "info")
		return err
	}
	if err := run("head -c 3000000 /dev/zero"); err == nil || !strings.Contains(err.Error(), "printed more than") {
		t.Errorf("flood: %v", err)
	}
	if err := run("head -c 3000000 /dev/zero | tr '\\0' x >&2; exit 1"); err == nil || len(err.Error()) > 2*maxErrorText {
		t.Errorf("flood of errors has %d bytes", len(err.Error()))
	}
	if err := run("ulimit -v; test $(ulimit -v) -le 4194304 && test $(ulimit -t) -le 20"); err != nil {
		t.Errorf("limits are not set: %v", err)
	}
	_, err := newQemuImg(filepath.Join(t.TempDir(), "nothing")).run(t.Context(), infoDeadline, 0, "info")
	wantCode(t, err, api.CodeUnsupported, "install the package qemu-utils")
	if _, err := exec.LookPath("prlimit"); err != nil {
		t.Error("prlimit is missing: install util-linux")
	}
}

func FuzzCheckHeader(f *testing.F) {
	f.Add([]byte(qcow2Magic + "\x00\x00\x00\x03"))
	f.Add([]byte("KDMV"))
	f.Add([]byte("# Disk DescriptorFile\nversion=1\n"))
	f.Add(content(f, "8M"))
	f.Fuzz(func(t *testing.T, b []byte) {
		format, err := checkHeader(bytes.NewReader(b))
		if err == nil && format == formatQcow2 && binary.BigEndian.Uint64(b[8:]) != 0 {
			t.Error("a backing file was accepted")
		}
	})
}
