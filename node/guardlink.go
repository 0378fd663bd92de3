// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/hypervisor"
	"github.com/muster-vm/muster/internal/guard"
)

// guardRetry is the pause between two attempts to reach or launch the guard.
const guardRetry = 500 * time.Millisecond

// guardOldLook is the pause between two looks whether a guard of an earlier version
// can be ended, if nothing that happens gives an earlier reason.
const guardOldLook = time.Minute

// guardLink keeps a connection to the guard of this host, launching one if none
// answers. It supplies the guard to ha and hypervisor.
type guardLink struct {
	binary, runDir, logPath, watchdog string
	log                               *slog.Logger
	onExit                            func(vm string) // a VM's process ended
	onNew                             func()          // a connection was made
	oldLook                           time.Duration   // guardOldLook, less in tests
	forgot                            chan struct{}   // a record was forgotten

	mu     sync.Mutex
	client *guard.Client
	hello  guard.Hello
	ready  chan struct{} // closed while client is set
}

func newGuardLink(c *Config, log *slog.Logger) *guardLink {
	return &guardLink{
		binary: c.Guard, runDir: c.RunDir, logPath: filepath.Join(c.DataDir, "guard.log"), watchdog: c.Watchdog,
		log: log, ready: make(chan struct{}), onExit: func(string) {}, onNew: func() {},
		oldLook: guardOldLook, forgot: make(chan struct{}, 1),
	}
}

// Serve keeps the connection until the context ends. The guard itself goes on.
func (g *guardLink) Serve(ctx context.Context) error {
	for {
		err := g.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		g.log.Warn("guard connection lost", "err", err)
		select {
		case <-time.After(guardRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// session is the life of one connection.
func (g *guardLink) session(ctx context.Context) error {
	if err := guard.Launch(ctx, g.binary, g.runDir, g.logPath, "--watchdog", g.watchdog); err != nil {
		return err
	}
	c, err := guard.Dial(ctx, g.runDir)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.Watch(ctx); err != nil {
		return err
	}
	hello, err := c.Hello(ctx)
	if err != nil {
		return err
	}
	if hello.Protocol != guard.ProtocolVersion {
		return fmt.Errorf("the running guard speaks protocol %d, this daemon %d; end its VMs and restart it", hello.Protocol, guard.ProtocolVersion)
	}
	knows := func(feature string) bool { return slices.Contains(hello.Features, feature) }
	old := !knows(guard.FeatureUser) || !knows(guard.FeatureControl)
	if old && endUnused(ctx, c) {
		return errOldEnded
	}
	if !knows(guard.FeatureUser) {
		g.log.Warn("the running guard is of an earlier version and cannot give VMs users of their own; no VM starts until those that run are stopped", "pid", hello.PID)
	}
	if knows(guard.FeatureControl) {
		// Before anybody asks what runs: no start that this daemon, or the one before,
		// sent over an earlier connection may follow the answer.
		if err := c.Control(ctx); err != nil {
			return err
		}
	}
	g.set(c, hello)
	defer g.set(nil, guard.Hello{})
	g.log.Info("guard connected", "pid", hello.PID, "level", hello.Level)
	g.onNew()
	var look <-chan time.Time
	if old {
		ticker := time.NewTicker(g.oldLook)
		defer ticker.Stop()
		look = ticker.C
	}
	for {
		select {
		case e, ok := <-c.Events():
			if !ok {
				return c.Err()
			}
			if e.Kind == guard.EventExit {
				g.onExit(e.VM)
			} else {
				g.onNew() // the lease lapsed: look at everything
			}
		case <-look:
		case <-g.forgot:
		case <-ctx.Done():
			return ctx.Err()
		}
		if old && endUnused(ctx, c) {
			return errOldEnded
		}
	}
}

var errOldEnded = errors.New("the guard of an earlier version ran no VM and was ended")

// endUnused ends a guard of an earlier version, so that a new one is launched, and says
// whether it did. It stays as long as its VMs do, and as long as there is a record of one
// that has exited: the hypervisor has not judged that yet, and the record is all there is.
func endUnused(ctx context.Context, c *guard.Client) bool {
	records, err := c.List(ctx)
	return err == nil && len(records) == 0 && c.Stop(ctx) == nil
}

func (g *guardLink) set(c *guard.Client, h guard.Hello) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c != nil {
		close(g.ready)
	} else {
		g.ready = make(chan struct{})
	}
	g.client, g.hello = c, h
}

// use waits for the connection.
func (g *guardLink) use(ctx context.Context) (*guard.Client, error) {
	for {
		g.mu.Lock()
		c, ready := g.client, g.ready
		g.mu.Unlock()
		if c != nil {
			return c, nil
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("guard is not reachable: %w", ctx.Err())
		}
	}
}

// Level is what the guard can rely on, for the administrator; empty while it
// is not connected.
func (g *guardLink) Level() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return string(g.hello.Level)
}

// The leader counts with the time that the guard takes: neither may be changed
// alone.
var _ = [1]struct{}{}[ha.KillTime-guard.KillTime]

// leaseGuard is the guard as ha sees it.
type leaseGuard struct{ *guardLink }

var _ ha.Guard = leaseGuard{}

// Session implements ha.Guard.
func (g leaseGuard) Session(ctx context.Context) (uint64, error) {
	c, err := g.use(ctx)
	if err != nil {
		return 0, err
	}
	h, err := c.Hello(ctx)
	return h.Session, err
}

// Extend implements ha.Guard.
func (g leaseGuard) Extend(ctx context.Context, session uint64, deadline time.Duration) error {
	c, err := g.use(ctx)
	if err != nil {
		return err
	}
	_, err = c.Extend(ctx, session, int64(deadline))
	if errors.Is(err, guard.ErrLapsed) || errors.Is(err, guard.ErrStaleSession) {
		return fmt.Errorf("%w: %w", ha.ErrLapsed, err)
	}
	return err
}

// vmGuard is the guard as hypervisor sees it.
type vmGuard struct{ *guardLink }

var _ hypervisor.Guard = vmGuard{}

// Start implements hypervisor.Guard.
func (g vmGuard) Start(ctx context.Context, r hypervisor.StartRequest) (hypervisor.Process, error) {
	c, err := g.use(ctx)
	if err != nil {
		return hypervisor.Process{}, err
	}
	s, err := c.Start(ctx, guard.StartRequest{
		VM: r.VM, Epoch: r.Epoch, Session: r.Session, Protected: r.Protected,
		Argv: r.Argv, Env: r.Env, Dir: r.Dir, LogPath: r.LogPath, User: guardUser(r.User),
	})
	if err != nil {
		return hypervisor.Process{}, err
	}
	p := hypervisor.Process{VM: r.VM, Epoch: r.Epoch, PID: s.PID, Protected: r.Protected, State: hypervisor.ProcessRunning, LogPath: r.LogPath}
	if r.User != nil {
		p.UID = r.User.UID
	}
	return p, nil
}

func guardUser(u *hypervisor.ProcessUser) *guard.User {
	if u == nil {
		return nil
	}
	g := &guard.User{UID: uint32(u.UID), GID: uint32(u.GID), MemlockBytes: uint64(u.Memlock)}
	for _, id := range u.Groups {
		g.Groups = append(g.Groups, uint32(id))
	}
	return g
}

// Kill implements hypervisor.Guard.
func (g vmGuard) Kill(ctx context.Context, vm string) error {
	c, err := g.use(ctx)
	if err != nil {
		return err
	}
	_, err = c.Kill(ctx, vm)
	return err
}

// Protect implements hypervisor.Guard.
func (g vmGuard) Protect(ctx context.Context, vm string, on bool) error {
	c, err := g.use(ctx)
	if err != nil {
		return err
	}
	return c.Protect(ctx, vm, on)
}

// Forget implements hypervisor.Guard.
func (g vmGuard) Forget(ctx context.Context, vm string) error {
	c, err := g.use(ctx)
	if err != nil {
		return err
	}
	if err := c.Forget(ctx, vm); err != nil {
		return err
	}
	select {
	case g.forgot <- struct{}{}: // it may have been the last record of an old guard
	default:
	}
	return nil
}

// List implements hypervisor.Guard.
func (g vmGuard) List(ctx context.Context) ([]hypervisor.Process, error) {
	c, err := g.use(ctx)
	if err != nil {
		return nil, err
	}
	records, err := c.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]hypervisor.Process, len(records))
	for i, r := range records {
		out[i] = hypervisor.Process{
			VM: r.VM, Epoch: r.Epoch, PID: r.PID, Protected: r.Protected, State: processState(r.State),
			Reason: string(r.Reason), ExitCode: r.ExitCode, Signal: r.Signal, LogPath: r.LogPath, UID: int(r.UID),
		}
	}
	return out, nil
}

// processState: one that is being forked is there already, only without a PID.
func processState(s guard.State) hypervisor.ProcessState {
	switch s {
	case guard.StateExited:
		return hypervisor.ProcessExited
	case guard.StateKilling:
		return hypervisor.ProcessKilling
	}
	return hypervisor.ProcessRunning
}
