// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bytes"
	"fmt"
	"image/png"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// TestRealQEMUShowsItsScreen: the handshake of RFB (RFC 6143 section 7.1), for
// two viewers at once, and a picture.
func TestRealQEMUShowsItsScreen(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{})
	var all []*Display
	for range 2 {
		d, err := e.h.Display(t.Context(), id)
		must(t, err)
		defer d.Close()
		all = append(all, d)
		name := handshake(t, d)
		if name != "QEMU (web1)" {
			t.Errorf("the screen is called %q", name)
		}
	}
	b, err := e.h.Screenshot(t.Context(), id)
	must(t, err)
	img, err := png.Decode(bytes.NewReader(b))
	if err != nil || img.Bounds().Dx() < 320 || img.Bounds().Dy() < 200 {
		t.Errorf("the screenshot of %d bytes: %v", len(b), err)
	}
	if _, err := os.Lstat(e.h.pathsOf(id).shot); !os.IsNotExist(err) {
		t.Errorf("the picture is left behind: %v", err)
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	for _, d := range all {
		for range d.Output() { // ends with QEMU
		}
	}
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if _, err := e.h.Display(t.Context(), id); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("the screen of a stopped VM: %v", err)
	}
	if _, err := e.h.Screenshot(t.Context(), id); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("a screenshot of a stopped VM: %v", err)
	}
}

// handshake speaks RFB 3.8 until the server has said what the screen is called.
func handshake(t *testing.T, d *Display) string {
	t.Helper()
	var have []byte
	read := func(n int) []byte {
		t.Helper()
		for len(have) < n {
			b, ok := <-d.Output()
			if !ok {
				t.Fatalf("the screen ended after %q", have)
			}
			have = append(have, b...)
		}
		out := have[:n]
		have = have[n:]
		return out
	}
	send := func(b ...byte) { must(t, d.Write(t.Context(), b)) }
	if got := string(read(12)); got != "RFB 003.008\n" {
		t.Fatalf("greeting %q", got)
	}
	send([]byte("RFB 003.008\n")...)
	types := read(int(read(1)[0]))
	if !bytes.Contains(types, []byte{1}) {
		t.Fatalf("security types %v, none of which is None", types)
	}
	send(1)
	if got := read(4); !bytes.Equal(got, make([]byte, 4)) {
		t.Fatalf("security result %v", got)
	}
	send(0) // not shared: it must not throw the others out
	init := read(24)
	return string(read(int(init[23])))
}

func TestVMWithoutAScreenSaysSo(t *testing.T) {
	e := newEnv(t, true)
	id, _ := e.running(api.VMSpec{Display: api.DisplayNone})
	_, err := e.h.Display(t.Context(), id)
	if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "no screen") {
		t.Errorf("viewer: %v", err)
	}
	_, err = e.h.Screenshot(t.Context(), id)
	if api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "no screen") {
		t.Errorf("screenshot: %v", err)
	}
}

func TestViewersOfOneScreenAreBounded(t *testing.T) {
	e := newEnv(t, false)
	id, _ := e.running(api.VMSpec{})
	ln, err := net.Listen("unix", e.h.pathsOf(id).vnc)
	must(t, err)
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	var first *Display
	for range MaxViewers {
		d, err := e.h.Display(t.Context(), id)
		must(t, err)
		defer d.Close()
		first = d
	}
	if _, err := e.h.Display(t.Context(), id); api.CodeOf(err) != api.CodeRefused {
		t.Fatalf("one viewer too many: %v", err)
	}
	first.Close()
	d, err := e.h.Display(t.Context(), id)
	must(t, err)
	defer d.Close()
	must(t, d.Write(t.Context(), []byte("hello")))
	if b := <-d.Output(); string(b) != "hello" {
		t.Errorf("echo %q", b)
	}
}

func TestPictureOfAnOlderQEMUIsConverted(t *testing.T) {
	b, err := pngOf([]byte("P6\n2 1\n255\n\x01\x02\x03\xff\x00\x80"))
	must(t, err)
	img, err := png.Decode(bytes.NewReader(b))
	must(t, err)
	if img.Bounds().Dx() != 2 || img.Bounds().Dy() != 1 || fmt.Sprint(img.At(0, 0)) != "{1 2 3 255}" || fmt.Sprint(img.At(1, 0)) != "{255 0 128 255}" {
		t.Errorf("%v %v %v", img.Bounds(), img.At(0, 0), img.At(1, 0))
	}
	for _, bad := range []string{"", "P5\n2 1\n255\n123456", "P6\n2 1\n255\n12345", "P6\n-2 1\n255\n", "P6\n99999 99999\n255\n", "P6\n1 1\n65535\n123456"} {
		if _, err := pngOf([]byte(bad)); err == nil {
			t.Errorf("%q is a picture", bad)
		}
	}
}

func TestPictureIsReadWithinBounds(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "shot")
	must(t, os.WriteFile(path, make([]byte, 10), 0o600))
	if b, err := readBounded(path, 10); err != nil || len(b) != 10 {
		t.Error(len(b), err)
	}
	if _, err := readBounded(path, 9); err == nil {
		t.Error("a larger file was read")
	}
	link := filepath.Join(dir, "link")
	must(t, os.Symlink("/etc/passwd", link))
	if _, err := readBounded(link, 1<<20); err == nil {
		t.Error("a link was followed")
	}
}
