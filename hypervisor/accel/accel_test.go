// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package accel

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

func TestProgramPassesUnderTCG(t *testing.T) {
	bin, _, err := FindQEMU(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	o, err := runProbe(t.Context(), Config{Dir: t.TempDir()}, bin, "tcg", "max", 60*time.Second)
	if err != nil || !o.passed {
		t.Fatalf("the program does not run to its end: %+v, %v", o, err)
	}
}

func TestProgramOutOfTimeNamesItsStep(t *testing.T) {
	bin := script(t, `exec sleep 60`) // QEMU might get further, if this process stood still
	o, err := runProbe(t.Context(), Config{Dir: t.TempDir()}, bin, "tcg", "max", 100*time.Millisecond)
	if err != nil || o.passed || !o.timedOut || !strings.Contains(o.reason, "real mode") {
		t.Fatalf("%+v, %v", o, err)
	}
}

func TestBrokenProgramIsNotAProof(t *testing.T) {
	bin := script(t, `echo QEMU exploded >&2; exit 85`) // the right exit code, but no word
	o, err := runProbe(t.Context(), Config{Dir: t.TempDir()}, bin, "kvm", "host", 20*time.Second)
	if err != nil || o.passed || !strings.Contains(o.reason, "QEMU exploded") {
		t.Fatalf("%+v, %v", o, err)
	}
}

// A KVM that emulates gets no further than long mode in time; see probe.asm.
func TestAutoTellsWhatItChoseAndKeepsIt(t *testing.T) {
	dir := t.TempDir()
	r := Detect(t.Context(), Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if r.Problem != "" || r.Binary == "" || r.Version == "" || r.Reason == "" {
		t.Fatalf("%+v", r)
	}
	t.Logf("auto chose %s: %s", r.Accelerator, r.Reason)
	if _, err := os.Stat(kvmDevice); err != nil {
		if r.Accelerator != api.AccelTCG {
			t.Fatalf("chose %s without %s", r.Accelerator, kvmDevice)
		}
		return
	}
	again := Detect(t.Context(), Config{Dir: dir})
	if again != r {
		t.Fatalf("the second answer differs: %+v, first %+v", again, r)
	}
	if _, ok := readCache(dir, cacheKey(r.Binary)+"x"); ok {
		t.Fatal("an answer for another key was believed")
	}
}

func TestAdministratorsWordIsObeyed(t *testing.T) {
	for _, want := range []api.Accelerator{api.AccelTCG, api.AccelKVM} {
		r := Detect(t.Context(), Config{Dir: t.TempDir(), Want: want})
		if r.Accelerator != want || !strings.Contains(r.Reason, "administrator") {
			t.Errorf("want %s: %+v", want, r)
		}
	}
}

func TestQEMUMissingOrTooOldSaysWhatToInstall(t *testing.T) {
	for name, bin := range map[string]string{
		"missing":      filepath.Join(t.TempDir(), "none"),
		"too old":      script(t, `echo "QEMU emulator version 6.2.0 (Debian)"`),
		"fails":        script(t, `exit 3`),
		"not QEMU":     script(t, `echo hello`),
		"no such name": "qemu-of-nobody",
	} {
		t.Run(name, func(t *testing.T) {
			r := Detect(t.Context(), Config{Dir: t.TempDir(), Binary: bin})
			if r.Version != "" || r.ProblemReason != "QEMUUnusable" || !strings.Contains(r.Problem, "install qemu-system-x86") {
				t.Fatalf("%+v", r)
			}
		})
	}
}

func TestVersions(t *testing.T) {
	for _, c := range []struct {
		out     string
		version string
		ok      bool
	}{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2)", "7.2.22", true},
		{"QEMU emulator version 10.0.0", "10.0.0", true},
		{"QEMU emulator version 7.0", "7.0", true},
		{"QEMU emulator version 6.9.99", "6.9.99", false},
	} {
		v, found := parseVersion(c.out)
		if !found || v != c.version || atLeast(v, MinMajor, MinMinor) != c.ok {
			t.Errorf("%q: %q %v", c.out, v, found)
		}
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}
