// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeClock stands still until advanced.
type fakeClock struct {
	mu     sync.Mutex
	now    int64
	timers []*fakeTimer
}

type fakeTimer struct {
	clock *fakeClock
	at    int64 // 0: disarmed
	c     chan struct{}
}

func newFakeClock() *fakeClock { return &fakeClock{now: 1000 * sec} }

func (f *fakeClock) NowNS() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fakeClock) NewTimer() (Timer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &fakeTimer{clock: f, c: make(chan struct{}, 1)}
	f.timers = append(f.timers, t)
	return t, nil
}

// advance moves the time; silently leaves the timers as they are, as if the
// host were too busy to deliver them.
func (f *fakeClock) advance(d time.Duration, silently bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now += int64(d)
	for _, t := range f.timers {
		if !silently && t.at != 0 && f.now >= t.at {
			t.at = 0
			t.c <- struct{}{}
		}
	}
}

func (t *fakeTimer) Set(at int64) error {
	t.clock.mu.Lock()
	defer t.clock.mu.Unlock()
	t.at = at
	return nil
}
func (t *fakeTimer) C() <-chan struct{} { return t.c }
func (t *fakeTimer) Close() error       { return nil }

// fakeProcesses are processes that die when killed, unless stuck.
type fakeProcesses struct {
	mu      sync.Mutex
	nextPID int
	dead    map[int]exitStatus
	stuck   map[string]bool // vm: SIGKILL has no effect yet
	leaving map[string]bool // vm: none of its threads runs, but it is not reaped
	vms     map[int]string
	kills   map[string]int
	hold    chan struct{} // start waits for it between fork and return
	forked  chan struct{} // tells that it waits
	startIt error
}

func newFakeProcesses() *fakeProcesses {
	return &fakeProcesses{
		dead: make(map[int]exitStatus), stuck: make(map[string]bool), leaving: make(map[string]bool), vms: make(map[int]string),
		kills: make(map[string]int), forked: make(chan struct{}, 16),
	}
}

func (f *fakeProcesses) start(req StartRequest, check func() error) (*process, error) {
	if err := check(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.nextPID++
	pid := f.nextPID
	f.vms[pid] = req.VM
	hold, err := f.hold, f.startIt
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if hold != nil {
		f.forked <- struct{}{}
		<-hold
	}
	return &process{pid: pid, startTicks: uint64(pid)}, nil
}

func (f *fakeProcesses) signal(p *process, sig unix.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	vm := f.vms[p.pid]
	if sig == unix.SIGKILL {
		f.kills[vm]++
	}
	if !f.stuck[vm] {
		f.dead[p.pid] = exitStatus{code: -1, signal: int(sig)}
	}
}

func (f *fakeProcesses) reap(p *process) (exitStatus, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st, ok := f.dead[p.pid]
	return st, ok
}

func (f *fakeProcesses) exiting(p *process) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leaving[f.vms[p.pid]]
}

func (f *fakeProcesses) close() {}

func (f *fakeProcesses) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeProcesses) killCount(vm string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.kills[vm]
}

// shortDir returns a directory whose name fits into a socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "guard")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// testLog sends a server's log to the test.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(string(p[:len(p)-1]))
	return len(p), nil
}

// serve runs a server in this process until the test ends and returns the
// function that ends it, as SIGTERM would.
func serve(t testing.TB, cfg Config) (s *Server, stop func() error) {
	t.Helper()
	cfg.Watchdog = WatchdogNone
	cfg.Log = testLog{t}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Serve(ctx) }()
	var once sync.Once
	stop = func() (err error) {
		once.Do(func() {
			cancel()
			err = <-result
		})
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return s, stop
}

func dial(t testing.TB, dir string) *Client {
	t.Helper()
	c, err := Dial(testCtx(t), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func testCtx(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never came true: %s", what)
		}
	}
}

func nextEvent(t testing.TB, c *Client) Event {
	t.Helper()
	select {
	case ev, ok := <-c.Events():
		if !ok {
			t.Fatalf("no more events: %v", c.Err())
		}
		return ev
	case <-time.After(15 * time.Second):
		t.Fatal("no event came")
	}
	return Event{}
}

func record(t testing.TB, c *Client, vm string) Record {
	t.Helper()
	recs, err := c.List(testCtx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range recs {
		if r.VM == vm {
			return r
		}
	}
	return Record{}
}
