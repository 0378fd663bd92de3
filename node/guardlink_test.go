// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/guard"
)

// testLink is a link to the guard of a run directory; it can launch none.
func testLink(dir string) *guardLink {
	c := &Config{Guard: "/nonexistent", RunDir: dir, DataDir: filepath.Join(dir, "data"), Watchdog: guard.WatchdogNone}
	return newGuardLink(c, slog.New(slog.DiscardHandler))
}

// The daemon has control of the guard when it is told of the connection, and takes it
// again when it was taken away.
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
	other, err := guard.Dial(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	link := testLink(dir)
	var once sync.Once
	link.onNew = func() {
		once.Do(func() {
			first, err := link.use(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			if err := other.Control(ctx); err != nil {
				t.Error(err)
			}
			select { // the link does nothing more meanwhile
			case <-first.Done():
			case <-time.After(10 * time.Second):
				t.Error("the daemon had no control")
			}
		})
	}
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
	select {
	case <-other.Done():
	case <-ctx.Done():
		t.Fatal("the daemon did not take it again")
	}
	again, err := link.use(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.List(ctx); err != nil {
		t.Error(err)
	}
}

// fakeGuard speaks the guard's protocol, with the features of whatever version.
type fakeGuard struct {
	t         *testing.T
	features  []string
	onControl func()
	listed    chan struct{} // a list with something in it was sent

	mu       sync.Mutex
	records  []guard.Record
	watching []*json.Encoder
	stops    int
}

// serveFakeGuard answers on the socket of a run directory until the test ends.
func serveFakeGuard(t *testing.T, f *fakeGuard) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "mst") // short: a socket lies in it
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(dir, guard.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	f.t, f.listed = t, make(chan struct{}, 1)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { f.answer(c) }) // until the client hangs up
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		all.Wait()
		_ = os.RemoveAll(dir)
	})
	return dir
}

func (f *fakeGuard) answer(c net.Conn) {
	defer func() { _ = c.Close() }()
	in, out := json.NewDecoder(c), json.NewEncoder(c)
	for {
		var r struct {
			ID     uint64
			Op, VM string
		}
		if err := in.Decode(&r); err != nil {
			return
		}
		if r.Op == "control" && f.onControl != nil {
			f.onControl()
		}
		f.mu.Lock()
		answer := map[string]any{"id": r.ID, "ok": true}
		switch r.Op {
		case "hello":
			answer["protocol"], answer["pid"], answer["features"] = guard.ProtocolVersion, os.Getpid(), f.features
		case "watch":
			f.watching = append(f.watching, out)
		case "list":
			answer["vms"] = f.records
			if len(f.records) > 0 {
				select {
				case f.listed <- struct{}{}:
				default:
				}
			}
		case "forget":
			f.records = slices.DeleteFunc(f.records, func(had guard.Record) bool { return had.VM == r.VM })
		case "stop":
			f.stops++
			if len(f.records) > 0 { // one that runs would make it refuse; any other would be lost
				f.t.Errorf("asked to stop with %+v", f.records)
			}
		}
		_ = out.Encode(answer)
		f.mu.Unlock()
	}
}

// gone drops all records; with tell, the end of one is told.
func (f *fakeGuard) gone(tell bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.records = nil
	if !tell {
		return
	}
	for _, out := range f.watching {
		if err := out.Encode(map[string]any{"event": guard.EventExit, "vm": "a", "state": guard.StateExited}); err != nil {
			f.t.Error(err)
		}
	}
}

func (f *fakeGuard) stopped() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stops
}

// Nobody may use the connection before it has control.
func TestControlIsTakenBeforeTheConnectionIsUsed(t *testing.T) {
	f := &fakeGuard{features: []string{guard.FeatureUser, guard.FeatureControl}}
	dir := serveFakeGuard(t, f)
	link := testLink(dir)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	taken, told := false, false
	f.onControl = func() {
		link.mu.Lock()
		defer link.mu.Unlock()
		if link.client != nil || told {
			t.Error("the connection is used already")
		}
		taken = true
	}
	link.onNew = func() {
		link.mu.Lock()
		defer link.mu.Unlock()
		told = true
		if !taken {
			t.Error("the daemon was told of a connection without control")
		}
		cancel()
	}
	if err := link.session(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if f.stopped() != 0 {
		t.Error("a guard of this version was ended")
	}
}

// A guard of an earlier version that has nothing to tell is replaced at once.
func TestAnUnusedGuardOfAnEarlierVersionIsEnded(t *testing.T) {
	for _, features := range [][]string{nil, {guard.FeatureUser}, {guard.FeatureControl}} {
		f := &fakeGuard{features: features}
		link := testLink(serveFakeGuard(t, f))
		link.onNew = func() { t.Error("it was used") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := link.session(ctx); !errors.Is(err, errOldEnded) || f.stopped() != 1 {
			t.Errorf("%v: %v, asked %d times to stop", features, err, f.stopped())
		}
		cancel()
	}
}

// One that has VMs, or records of them that nobody has judged yet, stays until those are gone.
func TestAGuardOfAnEarlierVersionIsEndedWhenItsVMsAreGone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		state guard.State
		look  time.Duration
		gone  func(ctx context.Context, f *fakeGuard, link *guardLink) error
	}{
		{"the hypervisor has judged it", guard.StateExited, time.Hour, func(ctx context.Context, _ *fakeGuard, link *guardLink) error {
			return vmGuard{link}.Forget(ctx, "a")
		}},
		{"it ended", guard.StateRunning, time.Hour, func(_ context.Context, f *fakeGuard, _ *guardLink) error {
			f.gone(true)
			return nil
		}},
		{"nobody says anything", guard.StateExited, time.Millisecond, func(ctx context.Context, f *fakeGuard, _ *guardLink) error {
			for range 3 { // it looked, and went on looking
				select {
				case <-f.listed:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			f.gone(false)
			return nil
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fakeGuard{records: []guard.Record{{VM: "a", State: tt.state}}}
			link := testLink(serveFakeGuard(t, f))
			link.oldLook = tt.look
			used := make(chan struct{})
			link.onNew = func() { close(used) }
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- link.session(ctx) }()
			select {
			case <-used:
			case err := <-ended:
				t.Fatalf("not used: %v", err)
			}
			if f.stopped() != 0 {
				t.Fatal("asked to stop at once")
			}
			if err := tt.gone(ctx, f, link); err != nil {
				t.Error(err)
			}
			if err := <-ended; !errors.Is(err, errOldEnded) || f.stopped() != 1 {
				t.Errorf("%v, asked %d times to stop", err, f.stopped())
			}
		})
	}
}
