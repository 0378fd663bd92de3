// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Times and limits.
const (
	// pollEvery is the pause between two looks at a host that is to go off.
	pollEvery = 300 * time.Millisecond
	// confirmAfter lies between the two readings of a confirmed off.
	confirmAfter = 500 * time.Millisecond
	// maxAnswer bounds the text of a device that is kept, in bytes.
	maxAnswer = 300
)

// State is what a device says of its host.
type State string

// The states.
const (
	On  State = "on"
	Off State = "off"
)

// ErrLogin is returned (wrapped) when a device refuses user or password.
var ErrLogin = errors.New("user or password refused")

// Target is one device with everything that is needed to speak to it.
type Target struct {
	// Name of the device, for steps and errors.
	Name     string
	Spec     api.PowerDeviceSpec
	Password string
}

// device is a session with one device.
type device interface {
	state(ctx context.Context) (State, error)
	command(ctx context.Context, a api.PowerVerb) error
	// identity returns the UUIDs that the host may have by the device's word;
	// none if it has no word on it.
	identity(ctx context.Context) ([]string, error)
	close()
}

// open logs in.
func open(ctx context.Context, t *Target) (device, error) {
	switch t.Spec.Driver {
	case api.PowerIPMI:
		return openIPMI(ctx, t)
	case api.PowerRedfish:
		return openRedfish(ctx, t)
	}
	return nil, fmt.Errorf("driver %q is unknown", t.Spec.Driver)
}

// session is a device with the notes of what was asked and answered.
type session struct {
	t     *Target
	d     device
	steps []api.PowerStep
}

// do asks the device one thing and notes it. What panics in the decoders of
// the libraries is an error of this device alone.
func (s *session) do(what api.PowerVerb, ask func() (answer string, err error)) error {
	began := time.Now()
	answer := ""
	err := contain.Call(func() (err error) {
		answer, err = ask()
		return err
	})
	step := api.PowerStep{At: began.UTC(), Device: s.t.Name, Do: what, OK: err == nil, Answer: answer, Milliseconds: time.Since(began).Milliseconds()}
	if err != nil {
		err = s.t.clean(err)
		step.Answer = err.Error()
	}
	s.steps = append(s.steps, step)
	return err
}

// clean returns an error of the device as it may be shown: short, on one line,
// without the password in whatever form.
func (t *Target) clean(err error) error {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if repeats(text, t.Password) {
		text = "the device's answer repeats the password and is not shown"
	}
	if len(text) > maxAnswer {
		text = strings.ToValidUTF8(text[:maxAnswer], "") + "…"
	}
	return &deviceError{text, err}
}

// deviceError shows the clean text and is found by what it wraps.
type deviceError struct {
	text  string
	cause error
}

func (e *deviceError) Error() string { return e.text }

// Is lets errors.Is see the cause, which itself must not be printed.
func (e *deviceError) Is(target error) bool { return errors.Is(e.cause, target) }

// over reports whether a context has ended or is just about to: what waits for
// its deadline may end a moment before it.
func over(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

func repeats(text, secret string) bool {
	if secret == "" {
		return false
	}
	bare := func(s string) string {
		return strings.Map(func(r rune) rune {
			if r == '\\' || r == '"' || r == ' ' || r == '\n' || r == '\t' || r == '\r' {
				return -1
			}
			return r
		}, s)
	}
	return strings.Contains(text, secret) || bare(secret) != "" && strings.Contains(bare(text), bare(secret))
}

func (s *session) connect(ctx context.Context) error {
	return s.do(api.PowerConnect, func() (string, error) {
		d, err := open(ctx, s.t)
		s.d = d
		return "session opened", err
	})
}

func (s *session) read(ctx context.Context) (State, error) {
	var st State
	err := s.do(api.PowerRead, func() (string, error) {
		var err error
		st, err = s.d.state(ctx)
		return string(st), err
	})
	return st, err
}

func (s *session) send(ctx context.Context, verb api.PowerVerb) error {
	return s.do(verb, func() (string, error) { return "accepted", s.d.command(ctx, verb) })
}

func (s *session) close() {
	if s.d != nil {
		_ = contain.Call(func() error { s.d.close(); return nil })
	}
}

// Result is what came of an action, with the proof.
type Result struct {
	// Done: the host is as it was to be, read back from the device.
	Done  bool
	Steps []api.PowerStep
	// Err is why not; of the last device that was tried.
	Err error
}

// try lets devices do something in their order, until one has done it. Each
// has its own time-out, and its share of what is left.
func try(ctx context.Context, list []Target, f func(ctx context.Context, s *session) error) Result {
	var r Result
	for i := range list {
		within := list[i].Spec.Within()
		if deadline, ok := ctx.Deadline(); ok {
			within = min(within, time.Until(deadline)/time.Duration(len(list)-i))
		}
		dctx, cancel := context.WithTimeout(ctx, within)
		s := &session{t: &list[i]}
		err := s.connect(dctx)
		if err == nil {
			err = f(dctx, s)
		}
		s.close()
		cancel()
		r.Steps = append(r.Steps, s.steps...)
		if err == nil {
			r.Done, r.Err = true, nil
			return r
		}
		r.Err = fmt.Errorf("device %s: %w", list[i].Name, err)
		if ctx.Err() != nil {
			return r
		}
	}
	if len(list) == 0 {
		r.Err = errors.New("the node has no power device; add one with: muster node power add")
	}
	return r
}

// SwitchOff commands off and reads back until the host is off, twice. before is
// called right before each command and stops the attempt by an error.
func SwitchOff(ctx context.Context, list []Target, before func(context.Context) error) Result {
	return try(ctx, list, func(ctx context.Context, s *session) error {
		// A host that is off already may refuse the command; that is no failure.
		was, err := s.read(ctx)
		if err != nil {
			return err
		}
		if before != nil {
			if err := before(ctx); err != nil {
				return fmt.Errorf("not commanded: %w", err)
			}
		}
		if err := s.send(ctx, api.PowerOff); err != nil && was != Off {
			return err
		}
		return s.await(ctx, Off)
	})
}

// await reads until the host is in a state, and reads that once more after a
// pause.
func (s *session) await(ctx context.Context, want State) error {
	seen, last := false, State("unknown")
	late := func() error {
		return fmt.Errorf("the device took the command, but the host was still %s when the time was over: %w", last, context.DeadlineExceeded)
	}
	for {
		st, err := s.read(ctx)
		switch {
		case err != nil && over(ctx):
			return late()
		case err != nil:
			return err
		case st == want && seen:
			return nil
		}
		last = st
		seen = st == want
		pause := pollEvery
		if seen {
			pause = confirmAfter
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return late()
		}
	}
}

// SwitchOn commands on and reads back.
func SwitchOn(ctx context.Context, list []Target) Result {
	return try(ctx, list, func(ctx context.Context, s *session) error {
		was, err := s.read(ctx)
		if err != nil {
			return err
		}
		if err := s.send(ctx, api.PowerOn); err != nil && was != On {
			return err
		}
		return s.await(ctx, On)
	})
}

// Cycle switches off, as SwitchOff does, and then on.
func Cycle(ctx context.Context, list []Target) Result {
	r := SwitchOff(ctx, list, nil)
	if !r.Done {
		return r
	}
	on := SwitchOn(ctx, list)
	on.Steps = append(r.Steps, on.Steps...)
	return on
}

// Read returns the state that one device tells.
func Read(ctx context.Context, t *Target) (State, Result) {
	var st State
	r := try(ctx, []Target{*t}, func(ctx context.Context, s *session) error {
		var err error
		st, err = s.read(ctx)
		return err
	})
	return st, r
}

// Check tries everything of a device that switches nothing: login, state, and
// whether the device is the host's whose UUID is given.
func Check(ctx context.Context, t *Target, hostUUID string) api.PowerCheck {
	c := api.PowerCheck{Device: t.Name, Driver: t.Spec.Driver, Identity: api.IdentityUnknown}
	var ids []string
	var identErr error
	r := try(ctx, []Target{*t}, func(ctx context.Context, s *session) error {
		st, err := s.read(ctx)
		if err != nil {
			return err
		}
		c.State = string(st)
		identErr = s.do(api.PowerIdentify, func() (string, error) {
			var err error
			ids, err = s.d.identity(ctx)
			return strings.Join(ids, " or "), err
		})
		return nil
	})
	c.OK, c.Steps = r.Done, r.Steps
	if r.Err != nil {
		c.Message = r.Err.Error()
		return c
	}
	c.Identity, c.Message = compare(ids, identErr, hostUUID)
	c.OK = c.Identity != api.IdentityOther
	return c
}
