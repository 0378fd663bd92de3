// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// acceptPause is the rest after a failed accept (out of descriptors).
	acceptPause = 100 * time.Millisecond
	// flushWait bounds the writing of the last answers at exit.
	flushWait = time.Second
)

// Config of a Server. Only RunDir is required.
type Config struct {
	// RunDir holds the lock and the socket; made (0700) if missing.
	RunDir string
	// Watchdog is WatchdogAuto (the default), WatchdogNone or a device path.
	Watchdog string
	// Device, if set, is used instead: what resets the host, or stands for that in
	// a fault campaign, when nothing was written to it for DeviceTimeout. The
	// server owns it.
	Device        *os.File
	DeviceTimeout time.Duration
	// Harden applies the process-wide measures of Hardening.
	Harden bool
	// Log receives the log lines, by way of a bounded queue. Default: os.Stderr.
	Log io.Writer
	// Clock defaults to BootClock.
	Clock Clock

	procs processes // for tests; default: the real forker
	dog   *watchdog // for tests; default: what Watchdog names
}

// Server is the guard of one run directory.
type Server struct {
	dir   string
	log   *slog.Logger
	logW  *logWriter
	clock Clock
	procs processes
	dog   *watchdog
	timer Timer
	lock  *os.File
	ln    *net.UnixListener
	level Level
	hard  Hardening

	wake     chan struct{} // makes the enforcer look
	stopOp   chan struct{} // closed by op stop
	stopOnce sync.Once
	requests sync.WaitGroup // connections

	mu        sync.Mutex
	tab       *table
	conns     map[*conn]struct{}
	control   *conn // the one that has it, if any
	strangers []leftover
	sweeper   *sweeper
	dogIdle   bool // petting has stopped; logged once
}

// NewServer takes the run directory (ErrLocked if another guard has it), kills
// what an earlier guard left there, which takes up to LeftoverWait, and listens.
func NewServer(cfg Config) (*Server, error) {
	dir, err := prepareRunDir(cfg.RunDir)
	if err != nil {
		return nil, err
	}
	lock, err := lockRunDir(dir)
	if err != nil {
		return nil, err
	}
	s, err := newServer(cfg, dir, lock)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	return s, nil
}

func newServer(cfg Config, dir string, lock *os.File) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = os.Stderr
	}
	if cfg.Clock == nil {
		cfg.Clock = BootClock{}
	}
	timer, err := cfg.Clock.NewTimer()
	if err != nil {
		return nil, fmt.Errorf("guard: %w", err)
	}
	s := &Server{
		dir: dir, lock: lock, clock: cfg.Clock, timer: timer, procs: cfg.procs,
		wake: make(chan struct{}, 1), stopOp: make(chan struct{}),
		tab: newTable(), conns: make(map[*conn]struct{}), sweeper: newSweeper(dir),
		logW: newLogWriter(cfg.Log),
		hard: Hardening{Mlockall: hardenedOff, SchedRR: hardenedOff, OOMScore: hardenedOff},
	}
	s.log = slog.New(slog.NewTextHandler(s.logW, nil))
	if cfg.Harden {
		s.hard = harden()
	}
	if s.dog = cfg.dog; s.dog == nil && cfg.Device != nil {
		s.dog = &watchdog{f: cfg.Device, level: LevelHardware, timeout: cfg.DeviceTimeout, note: hardenedOK + ": given"}
	} else if s.dog == nil {
		s.dog = openWatchdog(cfg.Watchdog)
	}
	s.level, s.hard.Watchdog = s.dog.level, s.dog.note
	if s.procs == nil {
		tree := s.openCgroups()
		s.sweepLeftovers(tree)
		s.procs = newForker(dir, tree)
	}
	s.ln, err = listen(dir)
	if err != nil {
		s.procs.close()
		_ = s.dog.close(true)
		_ = timer.Close()
		s.logW.close()
		return nil, err
	}
	return s, nil
}

func (s *Server) openCgroups() *cgroupTree {
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.hard.Cgroup = err.Error()
		return nil
	}
	tree, err := openCgroupTree(findCgroupMount(string(mountinfo)), s.dir)
	if err != nil {
		s.hard.Cgroup = err.Error()
		return nil
	}
	s.hard.Cgroup = hardenedOK + ": " + tree.base
	return tree
}

func (s *Server) sweepLeftovers(tree *cgroupTree) {
	s.sweeper.tree = tree
	s.strangers = s.sweeper.sweep(LeftoverWait, func() { _ = s.dog.pet() })
	for _, l := range s.strangers {
		s.tab.strangers[l.vm] = l.pid
		s.log.Error("a process of an earlier guard cannot be killed", "vm", l.vm, "pid", l.pid)
	}
	for pid := range s.sweeper.open {
		s.log.Warn("a process does not say whether it is of an earlier guard, and is killed as soon as it says so", "pid", pid)
	}
}

// prepareRunDir makes the directory and returns its one true name.
func prepareRunDir(dir string) (string, error) {
	if dir == "" {
		return "", errors.New("guard: no run directory given")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("guard: make run directory: %w", err)
	}
	return runDirName(dir)
}

func lockRunDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, LockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("guard: open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w %s", ErrLocked, dir)
		}
		return nil, fmt.Errorf("guard: lock %s: %w", dir, err)
	}
	return f, nil
}

// listen replaces a stale socket; the caller holds the lock.
func listen(dir string) (*net.UnixListener, error) {
	path := filepath.Join(dir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("guard: remove stale socket: %w", err)
	}
	addr, release, err := socketAddr(dir)
	if err != nil {
		return nil, err
	}
	defer release()
	ln, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, fmt.Errorf("guard: listen: %w", err)
	}
	ln.SetUnlinkOnClose(false) // addr may be a name of the moment
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("guard: protect socket: %w", err)
	}
	return ln, nil
}

// Serve answers requests and keeps the promise until op stop (nil), or until ctx
// ends: then VMs get SIGTERM, StopGrace later SIGKILL, and Serve returns nil, or
// an error when processes are left that would not die. Call it once.
func (s *Server) Serve(ctx context.Context) error {
	s.log.Info("guard serves", "pid", os.Getpid(), "dir", s.dir, "level", string(s.level),
		"mlockall", s.hard.Mlockall, "sched_rr", s.hard.SchedRR, "oom_score_adj", s.hard.OOMScore,
		"cgroup", s.hard.Cgroup, "watchdog", s.hard.Watchdog)
	endEnforcer := make(chan struct{})
	var helpers sync.WaitGroup
	helpers.Go(func() { s.enforce(endEnforcer) })
	helpers.Go(s.accept)

	select {
	case <-ctx.Done():
		s.stopVMs()
	case <-s.stopOp:
	}
	_ = s.ln.Close()
	s.closeConns()
	close(endEnforcer)
	helpers.Wait()
	return s.release()
}

// release gives back everything but the last processes.
func (s *Server) release() error {
	s.mu.Lock()
	left, protected := s.tab.present()
	s.mu.Unlock()
	s.procs.close()
	// A protected VM that will not die is the watchdog's business.
	if err := s.dog.close(protected == 0); err != nil {
		s.log.Error("close watchdog", "err", err)
	}
	_ = s.timer.Close()
	_ = os.Remove(filepath.Join(s.dir, SocketName))
	s.log.Info("guard ends", "left", left)
	s.logW.close()
	_ = s.lock.Close() // last: another guard may begin now
	if left > 0 {
		return fmt.Errorf("guard: %d VM processes would not die", left)
	}
	return nil
}

// stopVMs ends all VMs, politely first.
func (s *Server) stopVMs() {
	s.lockNow()
	for _, in := range s.tab.beginStopping() {
		s.procs.signal(in.proc, unix.SIGTERM)
	}
	waiting := s.tab.waiters()
	s.mu.Unlock()
	s.poke()
	s.log.Info("guard stops", "vms", len(waiting))
	if waitAll(waiting, StopGrace) {
		return
	}
	s.lockNow()
	s.tab.condemnAll()
	s.mu.Unlock()
	s.poke()
	waitAll(waiting, KillWait)
}

// waitAll waits for all channels to be closed, for at most limit in total.
func waitAll(all []<-chan struct{}, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for _, done := range all {
		select {
		case <-done:
		case <-timer.C:
			return false
		}
	}
	return true
}

func (s *Server) accept() {
	for {
		c, err := s.ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Error("accept", "err", err)
			time.Sleep(acceptPause)
			continue
		}
		if err := checkPeer(c); err != nil {
			s.log.Warn("connection refused", "err", err)
			_ = c.Close()
			continue
		}
		s.serveConn(c)
	}
}

// checkPeer lets in root and the guard's own user.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("peer credentials: %w", credErr)
	}
	if cred.Uid != 0 && cred.Uid != uint32(os.Getuid()) {
		return fmt.Errorf("peer has uid %d", cred.Uid)
	}
	return nil
}
