// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/internal/cli"
)

// session is one channel: a shell, or one command.
type session struct {
	c  *conn
	ch ssh.Channel
	// pty is what the client said of its terminal, nil without one.
	pty     *ptyRequest
	started bool
	told    bool // the user of this shell was told that there is no quorum

	mu   sync.Mutex
	term *terminal
}

func newSession(c *conn, ch ssh.Channel) *session { return &session{c: c, ch: ch} }

// The payloads of requests (RFC 4254, section 6).
type (
	ptyRequest struct {
		Term          string
		Columns, Rows uint32
		Width, Height uint32
		Modes         string
	}
	windowChange struct{ Columns, Rows, Width, Height uint32 }
	execRequest  struct{ Command string }
	exitStatus   struct{ Status uint32 }
)

// serve answers the requests of the channel until the client closes it.
func (s *session) serve(ctx context.Context, requests <-chan *ssh.Request) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { _ = s.ch.Close() }()
	defer cancel()
	for r := range requests {
		ok := s.request(ctx, cancel, r, &wg)
		if r.WantReply {
			_ = r.Reply(ok, nil)
		}
	}
}

// request carries out one request; env, agents, X11 and subsystems are none.
func (s *session) request(ctx context.Context, cancel context.CancelFunc, r *ssh.Request, wg *sync.WaitGroup) bool {
	switch r.Type {
	case "pty-req":
		var p ptyRequest
		if s.started || s.pty != nil || ssh.Unmarshal(r.Payload, &p) != nil {
			return false
		}
		s.pty = &p
		return true
	case "window-change":
		var w windowChange
		if ssh.Unmarshal(r.Payload, &w) != nil || s.terminal() == nil {
			return false
		}
		s.terminal().resize(int(min(w.Columns, maxColumns)), int(min(w.Rows, maxColumns)))
		return true
	case "signal", "break":
		if t := s.terminal(); t != nil {
			t.signal()
		} else {
			cancel()
		}
		return true
	case "shell", "exec":
		var e execRequest
		if s.started || r.Type == "exec" && (ssh.Unmarshal(r.Payload, &e) != nil || len(e.Command) > MaxLine) {
			return false
		}
		s.started = true
		if s.pty != nil {
			s.open(wg)
		}
		wg.Go(func() {
			if !s.c.s.alone("session", func() { s.run(ctx, e.Command, r.Type == "shell") }) {
				s.finish(cli.ExitFailed)
			}
		})
		return true
	}
	return false
}

func (s *session) terminal() *terminal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term
}

// open makes the terminal and begins to read it.
func (s *session) open(wg *sync.WaitGroup) {
	t := newTerminal(s.ch, int(min(s.pty.Columns, maxColumns)), int(min(s.pty.Rows, maxColumns)),
		s.c.touch, func(n int32) { s.c.touch(); s.c.busy.Add(n) })
	s.mu.Lock()
	s.term = t
	s.mu.Unlock()
	s.c.addScreen(t)
	wg.Go(func() {
		defer s.c.dropScreen(t)
		if !s.c.s.alone("terminal", t.pump) {
			t.stop(io.ErrUnexpectedEOF)
		}
	})
}

// run is the shell or the command; its end is the end of the channel.
func (s *session) run(ctx context.Context, command string, shell bool) {
	var code int
	switch t := s.terminal(); {
	case t != nil && shell:
		code = s.interact(ctx, t)
	case t != nil:
		code = s.onTerminal(ctx, t, command)
	case shell:
		code = s.script(ctx)
	default:
		s.c.busy.Add(1)
		code = s.plain(ctx, command, &input{ch: s.ch})
		s.c.touch()
		s.c.busy.Add(-1)
	}
	s.finish(code)
}

// finish tells the exit code and closes the channel. Nobody takes what is typed
// any more, so what reads it must not wait for room.
func (s *session) finish(code int) {
	if t := s.terminal(); t != nil {
		t.stop(io.EOF)
	}
	_, _ = s.ch.SendRequest("exit-status", false, ssh.Marshal(exitStatus{uint32(code)}))
	_ = s.ch.Close()
}

// command runs a line with some streams and returns its exit code.
func (s *session) command(ctx context.Context, line string, streams cli.Streams) (code int) {
	words, err := split(line)
	if err != nil {
		fmt.Fprintf(streams.Err, "muster: %v\n", err)
		return cli.ExitUsage
	}
	if len(words) == 0 {
		return cli.ExitDone
	}
	if !s.c.s.alone("command of "+s.c.user, func() { code = cli.Run(ctx, words, streams) }) {
		fmt.Fprintf(streams.Err, "muster: the command met a bug; the log of node %s has it\n", s.c.s.cfg.Node())
		return cli.ExitFailed
	}
	return code
}

// streams are those of a command but for its input and output.
func (s *session) streams() cli.Streams {
	return cli.Streams{
		Getenv: func(string) string { return "" }, // the daemon's is not the user's
		Now:    s.c.s.cfg.Now, Version: s.c.s.cfg.Version,
		Shell: &cli.Shell{Transport: s.c.rest, Node: s.c.s.cfg.Node()},
	}
}

// plain runs a command without a terminal.
func (s *session) plain(ctx context.Context, line string, in io.Reader) int {
	st := s.streams()
	st.In, st.Out, st.Err = in, s.ch, s.ch.Stderr()
	st.Shell.Guest = func(w io.Writer) io.Writer { return newFilter(w) }
	return s.command(ctx, line, st)
}

// onTerminal runs one command on a terminal.
func (s *session) onTerminal(ctx context.Context, t *terminal, line string) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, end := t.begin(cancel)
	defer end()
	st := s.streams()
	st.In, st.Out, st.Err = in, t, t
	st.InTTY, st.OutTTY, st.ErrTTY = true, true, true
	st.Raw, st.Size = t.setRaw, t.size
	st.Shell.Tells = s.told
	code := s.command(ctx, line, st)
	t.tidy()
	return code
}

// input is the stdin of a command without a terminal. A connection that breaks
// looks like the end of input; a half-sent image or document must not be taken
// for a whole one, so the client is asked.
type input struct {
	ch  ssh.Channel
	err error
}

// Read implements io.Reader.
func (i *input) Read(p []byte) (int, error) {
	if i.err != nil {
		return 0, i.err
	}
	n, err := i.ch.Read(p)
	if err == nil || n > 0 {
		return n, nil
	}
	i.err = err
	if errors.Is(err, io.EOF) && !i.alive() {
		i.err = io.ErrUnexpectedEOF
	}
	return 0, i.err
}

// alive asks the client for an answer, which may as well be that it does not
// know the request.
func (i *input) alive() bool {
	late := time.AfterFunc(eofTimeout, func() { _ = i.ch.Close() })
	defer late.Stop()
	_, err := i.ch.SendRequest("keepalive@openssh.com", true, nil)
	return err == nil
}
