// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLaunchRace(t *testing.T) {
	dir := filepath.Join(shortDir(t), "run")
	log := filepath.Join(shortDir(t), "guard.log")
	t.Cleanup(func() { // only if the test failed is there one left
		if pid, err := answers(context.Background(), dir); err == nil {
			_ = unix.Kill(pid, unix.SIGTERM)
		}
	})
	stop := func() {
		c := dial(t, dir)
		h, err := c.Hello(testCtx(t))
		wantErr(t, err, nil)
		wantErr(t, c.Stop(testCtx(t)), nil)
		eventually(t, "the guard has ended", func() bool {
			st, err := readProcStat(h.PID)
			return err != nil || st.gone()
		})
	}
	for range 3 {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if err := Launch(testCtx(t), self(t), dir, log); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		stop()
		if _, err := os.Stat(filepath.Join(dir, SocketName)); err == nil {
			t.Fatal("another guard was left behind")
		}
	}
}

func TestLaunchTellsWhyItFailed(t *testing.T) {
	dir := shortDir(t)
	log := filepath.Join(dir, "log")
	if err := Launch(testCtx(t), "/no/such/guard", dir, log); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	sh := filepath.Join(dir, "bad-guard")
	wantErr(t, os.WriteFile(sh, []byte("#!/bin/sh\necho out of luck\nexit 3\n"), 0o700), nil)
	if err := Launch(testCtx(t), sh, dir, log); err == nil || !strings.Contains(err.Error(), "out of luck") {
		t.Fatal(err)
	}
}

// A lock that the starter of the daemon holds must not be held by the guard,
// which outlives both, nor by the VMs.
func TestLaunchHandsNoDescriptorOn(t *testing.T) {
	dir := filepath.Join(shortDir(t), "run")
	path := filepath.Join(shortDir(t), "lock")
	f, err := os.Create(path)
	wantErr(t, err, nil)
	fd, err := unix.Dup(int(f.Fd())) // without close-on-exec, as one that was inherited
	wantErr(t, err, nil)
	t.Cleanup(func() { _ = unix.Close(fd); _ = f.Close() })
	wantErr(t, Launch(testCtx(t), self(t), dir, filepath.Join(shortDir(t), "guard.log")), nil)
	c := dial(t, dir)
	h, err := c.Hello(testCtx(t))
	wantErr(t, err, nil)
	t.Cleanup(func() { _ = c.Stop(context.Background()) })
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.PID))
	wantErr(t, err, nil)
	for _, e := range entries {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", h.PID, e.Name())); to == path {
			t.Errorf("the guard has descriptor %s open on %s", e.Name(), to)
		}
	}
	if len(entries) < 3 {
		t.Errorf("only %d descriptors seen", len(entries))
	}
}
