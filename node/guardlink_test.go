// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/guard"
)

// The daemon's connection has control of the guard before anybody may use it, and
// takes it again when it was taken away.
func TestTheDaemonTakesControlOfItsGuard(t *testing.T) {
	dir := t.TempDir()
	s, err := guard.NewServer(guard.Config{RunDir: dir, Watchdog: guard.WatchdogNone, Log: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	link := newGuardLink(&Config{Guard: "/nonexistent", RunDir: dir, DataDir: filepath.Join(dir, "data"), Watchdog: guard.WatchdogNone}, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- link.Serve(ctx) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	first, err := link.use(ctx)
	if err != nil {
		t.Fatal(err)
	}
	other, err := guard.Dial(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if err := other.Control(ctx); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]*guard.Client{"the daemon had no control": first, "the daemon did not take it again": other} {
		select {
		case <-c.Done():
		case <-ctx.Done():
			t.Fatal(what)
		}
	}
	again, err := link.use(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.List(ctx); err != nil {
		t.Error(err)
	}
}
