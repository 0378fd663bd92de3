// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// lockNow takes the lock, then reads the clock and acts on what time it is. The
// order matters: a time read before waiting for the lock would be old.
func (s *Server) lockNow() int64 {
	s.mu.Lock()
	now := s.clock.NowNS()
	if s.tab.observe(now) {
		ins := s.tab.condemned()
		for _, in := range ins {
			s.procs.signal(in.proc, unix.SIGKILL)
		}
		s.log.Warn("lease expired", "session", s.tab.session, "late_ns", now-s.tab.deadlineNS, "killed", len(ins))
		s.broadcast(lapsedEvent{Kind: EventLapsed, Session: s.tab.session})
		s.poke()
	}
	return now
}

// poke makes the enforcer look soon.
func (s *Server) poke() {
	select {
	case s.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// enforce is the one goroutine that watches the deadline, kills, reaps and pets
// the watchdog. That it also pets is on purpose: a stuck enforcer lets the
// watchdog bite.
func (s *Server) enforce(end <-chan struct{}) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)
	house := time.NewTicker(petEvery)
	defer house.Stop()
	again := time.NewTimer(KillRepeat)
	defer again.Stop()
	for {
		select {
		case <-end:
			return
		case <-s.timer.C():
		case <-children:
		case <-s.wake:
		case <-again.C:
		case <-house.C:
			s.housekeep()
		}
		if s.pass() {
			again.Reset(KillRepeat)
		} else {
			again.Stop()
		}
		if s.dogIdle { // written by this goroutine alone
			s.pet()
		}
	}
}

// pass looks at everything once and tells whether something remains to be
// killed.
func (s *Server) pass() bool {
	now := s.lockNow()
	defer s.mu.Unlock()
	for _, in := range s.tab.forked() {
		st, ended := s.procs.reap(in.proc)
		if !ended {
			continue
		}
		rec := s.tab.exit(now, in, st.code, st.signal)
		s.log.Info("vm exited", "vm", rec.VM, "pid", rec.PID, "code", rec.ExitCode,
			"signal", rec.Signal, "reason", string(rec.Reason))
		s.broadcast(exitEvent{Kind: EventExit, Record: rec})
	}
	ins := s.tab.condemned()
	for _, in := range ins {
		s.procs.signal(in.proc, unix.SIGKILL)
	}
	return len(ins) > 0
}

// housekeep does what is due every second.
func (s *Server) housekeep() {
	if s.hard.SchedRR == hardenedOK {
		_ = realtimeThreads() // told at the start whether it works
	}
	s.chaseStrangers()
	s.pet()
}

// pet pets the watchdog, unless that would let something run on for too long.
func (s *Server) pet() {
	now := s.lockNow()
	ins, strangers := s.tab.disobedient(now, s.dog.timeout)
	obeys := !strangers
	for _, in := range ins {
		// Giving back the memory of a large VM takes seconds in which nothing of it
		// runs any more.
		ended := in.rec.State == StateKilling && in.proc != nil && s.procs.exiting(in.proc)
		obeys = obeys && ended
	}
	changed := s.dogIdle == obeys
	s.dogIdle = !obeys
	s.mu.Unlock()
	if !obeys {
		if changed {
			s.log.Warn("the watchdog is not petted: the lease is not renewed, or a protected vm does not die", "level", string(s.level), "vms", len(ins))
		}
		return
	}
	if err := s.dog.pet(); err != nil {
		s.log.Error("watchdog", "err", err)
	}
}

// chaseStrangers goes on killing what an earlier guard left.
func (s *Server) chaseStrangers() {
	s.strangers = append(s.strangers, s.sweeper.late()...) // only the enforcer writes it once serving
	if len(s.strangers) == 0 {
		return
	}
	blocked := make(map[string]int)
	var left []leftover
	for _, l := range s.strangers {
		if l.gone() {
			s.log.Info("process of an earlier guard is gone", "vm", l.vm, "pid", l.pid)
			continue
		}
		l.kill()
		left = append(left, l)
		blocked[l.vm] = l.pid
	}
	s.strangers = left
	s.lockNow()
	s.tab.strangers = blocked
	s.mu.Unlock()
}
