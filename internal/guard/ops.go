// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Bodies of the answers.
type (
	extendReply struct {
		DeadlineNS int64 `json:"deadline_ns"`
	}
	killReply struct {
		Outcome Outcome `json:"outcome"`
	}
	listReply struct {
		VMs []Record `json:"vms"`
	}
)

// answer carries out a request and returns the line to send.
func (s *Server) answer(cn *conn, req request) []byte {
	body, e := s.do(cn, req)
	return s.reply(req, body, e)
}

func (s *Server) reply(req request, body any, e *Error) []byte {
	if e != nil {
		if req.op == opStart || req.op == opExtend {
			s.log.Warn("request refused", "op", string(req.op), "code", string(e.Code), "err", e.Msg)
		}
		return refusalLine(req.id, e)
	}
	return replyLine(req.id, body)
}

// do carries out what is not a start, of which handle takes care.
func (s *Server) do(cn *conn, req request) (any, *Error) {
	if b, ok := req.body.(vmBody); ok && req.op == opKill {
		return s.kill(cn, b.VM)
	}
	now, e := s.lockFor(cn)
	if e != nil {
		return nil, e
	}
	defer s.mu.Unlock()
	switch b := req.body.(type) {
	case extendBody:
		return s.extend(now, b)
	case protectBody:
		return nil, s.tab.protect(now, b.VM, b.On)
	case vmBody:
		return nil, s.tab.forget(b.VM)
	}
	switch req.op {
	case opHello:
		return s.hello(now), nil
	case opList:
		return listReply{VMs: s.tab.list()}, nil
	case opWatch:
		cn.watching = true
		return nil, nil
	case opControl:
		s.takeControl(cn)
		return nil, nil
	case opStop:
		return nil, s.tab.stop()
	}
	return nil, refuse(CodeInternal, "op %q is not implemented", string(req.op))
}

// lockFor is lockNow for a request. It is refused, without the lock, if its
// connection had control and another one has taken it: who has taken it must be
// able to rely on what it is told, so nothing that was sent before may follow.
func (s *Server) lockFor(cn *conn) (now int64, e *Error) {
	now = s.lockNow()
	if cn.superseded {
		s.mu.Unlock()
		return 0, refuse(CodeSuperseded, "a later connection has taken control")
	}
	return now, nil
}

// takeControl needs mu. Who had control is disconnected: if it is alive after all, it
// takes control again, and asks again what runs.
func (s *Server) takeControl(cn *conn) {
	if had := s.control; had != nil && had != cn {
		had.superseded = true
		had.drop()
		s.log.Info("a later connection takes control before the earlier one has ended")
	}
	s.control = cn
}

// hello needs mu.
func (s *Server) hello(now int64) Hello {
	h := Hello{
		Protocol: ProtocolVersion, PID: os.Getpid(), Level: s.level, Hardening: s.hard,
		NowNS: now, Features: []string{FeatureUser, FeatureControl}, Session: s.tab.session, DeadlineNS: s.tab.deadlineNS, Lapsed: s.tab.lapsed,
	}
	for vm := range s.tab.strangers {
		h.Strangers = append(h.Strangers, vm)
	}
	slices.Sort(h.Strangers)
	return h
}

// extend needs mu.
func (s *Server) extend(now int64, b extendBody) (any, *Error) {
	before := s.tab.session
	deadline, e := s.tab.extend(now, b.Session, b.DeadlineNS)
	if e != nil {
		return nil, e
	}
	if err := s.timer.Set(deadline); err != nil {
		// The enforcer looks every second anyway.
		s.log.Error("arm deadline timer", "err", err)
	}
	if before != b.Session {
		s.log.Info("new session", "session", b.Session, "before", before)
	}
	return extendReply{DeadlineNS: deadline}, nil
}

// reserve takes the VM's id. It is done in the order of the requests: a list or
// a kill that follows a start has to see it.
func (s *Server) reserve(cn *conn, req StartRequest) (*instance, *Error) {
	now, e := s.lockFor(cn)
	if e != nil {
		return nil, e
	}
	defer s.mu.Unlock()
	return s.tab.beginStart(now, req)
}

// fork carries out a start that has its reservation.
func (s *Server) fork(req StartRequest, in *instance) (any, *Error) {
	p, err := s.procs.start(req, func() error {
		now := s.lockNow()
		defer s.mu.Unlock()
		if e := s.tab.mayFork(now, in); e != nil {
			return e
		}
		return nil
	})

	now := s.lockNow()
	defer s.mu.Unlock()
	defer s.poke() // it may have ended before anybody could reap it
	if err != nil {
		s.tab.failStart(in)
		var refusal *Error
		if errors.As(err, &refusal) {
			return nil, refusal
		}
		return nil, refuse(CodeStartFailed, "%v", err)
	}
	in.proc = p
	if e := s.tab.finishStart(now, in, p.pid, p.startTicks); e != nil {
		s.procs.signal(p, unix.SIGKILL)
		return nil, e
	}
	s.log.Info("vm started", "vm", req.VM, "epoch", req.Epoch, "session", req.Session,
		"pid", p.pid, "protected", req.Protected)
	return Started{PID: p.pid, StartTicks: p.startTicks}, nil
}

func (s *Server) kill(cn *conn, vm string) (any, *Error) {
	now, e := s.lockFor(cn)
	if e != nil {
		return nil, e
	}
	in, outcome, e := s.tab.kill(now, vm)
	if e == nil && in != nil && in.proc != nil {
		s.procs.signal(in.proc, unix.SIGKILL)
	}
	s.mu.Unlock()
	s.poke()
	if e != nil {
		return nil, e
	}
	if in == nil {
		return killReply{Outcome: outcome}, nil
	}
	timer := time.NewTimer(KillWait)
	defer timer.Stop()
	select {
	case <-in.done:
		return killReply{Outcome: outcome}, nil
	case <-timer.C:
		return nil, refuse(CodeTimeout, "vm %s is not reaped after %v; killing goes on", vm, KillWait)
	}
}

// endIfStopped ends Serve once an op stop was granted and its answer queued.
func (s *Server) endIfStopped() {
	s.mu.Lock()
	stopping := s.tab.stopping
	s.mu.Unlock()
	if stopping {
		s.stopOnce.Do(func() { close(s.stopOp) })
	}
}
