// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/contain"
)

const (
	// detachKey is Ctrl-].
	detachKey = 0x1d
	// firstHistory is how much earlier output is shown on connect.
	firstHistory = 4096
	// consoleOutage is how long reconnects are tried by default.
	consoleOutage = 60 * time.Second
	// consoleTail is how much printed output is kept to find, after a
	// reconnect, where the new node's history goes on.
	consoleTail = 1024
	// inputChunk and inputQueue bound what waits to be sent to the guest.
	inputChunk = 4096
	inputQueue = 16
	// retryFirst and retryMost are the pauses between reconnects.
	retryFirst = 200 * time.Millisecond
	retryMost  = 2 * time.Second
	// stableAfter is how long a connection must last to count as one.
	stableAfter = 5 * time.Second
)

func (a *app) consoleCmd() *cobra.Command {
	var log bool
	var n int
	cmd := &cobra.Command{
		Use: "console NAME", Short: "Attach to the serial console of a VM", Args: args("NAME"),
		Long: `Attaches to the serial console of a running VM. On a terminal, Ctrl-] detaches
and every other key goes to the guest. Without a terminal the output is copied to
stdout until the VM stops or the command is killed; the end of stdin does not end
it. When the node that serves the console fails, it goes on through another;
--timeout (default 60s) says how long that is tried.

With --log it prints the last output and ends.`,
		Example:           "  muster vm console web1\n  muster vm console web1 --log --bytes 65536",
		Annotations:       map[string]string{ownTimeout: "reconnect"},
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			if n < 0 || n > client.MaxHistory {
				return usagef("--bytes: %d is out of range; give 0 to %d", n, client.MaxHistory)
			}
			if cmd.Flags().Changed("bytes") && !log {
				return usagef("--bytes is for --log, which is not given")
			}
			if log {
				return a.consoleLog(cmd.Context(), names[0], n)
			}
			return a.console(cmd.Context(), names[0])
		},
	}
	cmd.Flags().BoolVar(&log, "log", false, "print the last output and end")
	cmd.Flags().IntVar(&n, "bytes", firstHistory, "how much output --log prints")
	return cmd
}

func (a *app) consoleLog(ctx context.Context, name string, n int) error {
	if a.flags.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.flags.timeout)
		defer cancel()
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	b, err := c.ConsoleLog(ctx, a.project, name, n)
	if err != nil {
		return err
	}
	_, err = a.guestOut().Write(b)
	return err
}

// consoleSession is one attachment, over as many connections as it takes.
type consoleSession struct {
	a    *app
	c    *client.Client
	name string
	raw  bool
	tail []byte      // the end of what was printed
	in   chan []byte // keys for the guest
	out  io.Writer   // what the guest prints goes here
}

var errDetached = errors.New("detached")

func (a *app) console(ctx context.Context, name string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	if a.Shell == nil { // there, signals are the daemon's
		var stop context.CancelFunc
		// SIGQUIT would otherwise end the process with the terminal still raw.
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		defer stop()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &consoleSession{a: a, c: c, name: name, in: make(chan []byte, inputQueue), out: a.guestOut()}
	conn, err := c.Console(ctx, a.project, name, firstHistory)
	if err != nil {
		return err
	}
	restore, err := s.prepare(conn)
	if err != nil {
		conn.Close()
		return err
	}
	defer restore()
	raw := s.raw
	go func() { // inside the daemon a bug must not end more than this console
		if err := contain.Do(func() { s.readInput(ctx, raw, func() { cancel(errDetached) }) }); err != nil {
			cancel(err)
		}
	}()
	err = s.run(ctx, conn)
	switch {
	case errors.Is(context.Cause(ctx), errDetached):
		restore()
		a.notice("detached from %s", name)
		return nil
	case ctx.Err() != nil:
		return nil // a console has no other end than being told to stop
	case errors.Is(err, client.ErrConsoleEnded):
		restore()
		a.notice("%s has stopped", name)
		return nil
	}
	restore()
	return err
}

// prepare puts a terminal into raw mode. Both ends must be one: with stdout in
// a pipe its end would kill the process before the terminal is restored.
func (s *consoleSession) prepare(conn *client.Console) (restore func(), err error) {
	a := s.a
	if a.Raw == nil || !a.InTTY || !a.OutTTY {
		return func() {}, nil
	}
	a.notice("connected to %s through %s; detach with Ctrl-]", s.name, conn.Server())
	cooked, err := a.Raw()
	if err != nil {
		return nil, err
	}
	s.raw = true
	done := false
	return func() {
		if done {
			return
		}
		done = true
		s.raw = false
		cooked()
		fmt.Fprint(a.Err, "\r\n")
	}, nil
}

// notice is a line between the guest's output. In raw mode a line needs its
// carriage return.
func (s *consoleSession) notice(format string, args ...any) {
	if s.a.flags.quiet {
		return
	}
	eol := "\n"
	if s.raw {
		eol = "\r\n"
		fmt.Fprint(s.a.Err, eol)
	}
	fmt.Fprintf(s.a.Err, "muster: %s%s", clean(fmt.Sprintf(format, args...)), eol)
}

// run copies output until the end, over lost connections.
func (s *consoleSession) run(ctx context.Context, conn *client.Console) error {
	wait, unstable := retryFirst, time.Time{}
	for {
		began := time.Now()
		err := s.copy(ctx, conn)
		conn.Close()
		if ctx.Err() != nil || errors.Is(err, client.ErrConsoleEnded) {
			return err
		}
		var w writeError
		if errors.As(err, &w) {
			return w.error
		}
		s.notice("connection through %s lost; reconnecting", conn.Server())
		switch {
		case time.Since(began) > stableAfter:
			wait, unstable = retryFirst, time.Time{}
		case unstable.IsZero():
			unstable = began
		case time.Since(unstable) > s.outage():
			return api.Errorf(client.CodeUnavailable, "console of %s: every connection is lost at once: %w", s.name, err)
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, retryMost)
		if conn, err = s.reconnect(ctx); err != nil {
			return err
		}
		s.notice("connected again through %s", conn.Server())
	}
}

// writeError is a failure of our own stdout, which no reconnect mends.
type writeError struct{ error }

// copy serves one connection until it ends.
func (s *consoleSession) copy(ctx context.Context, conn *client.Console) error {
	ctx, cancel := context.WithCancel(ctx)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if err := contain.Do(func() { s.send(ctx, conn) }); err != nil {
			conn.Close() // the reader finds it lost
		}
	}()
	defer func() { cancel(); <-sent }()
	resumed := len(s.tail) > 0
	for {
		b, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		if resumed {
			b = after(s.tail, b)
			resumed = false
		}
		if _, err := s.out.Write(b); err != nil {
			return writeError{fmt.Errorf("write console output: %w", err)}
		}
		s.tail = append(s.tail, b...)
		if over := len(s.tail) - consoleTail; over > 0 {
			s.tail = append(s.tail[:0], s.tail[over:]...)
		}
	}
}

// after returns the part of history that follows what was printed, or all of
// it when the two do not meet: rather twice than never.
func after(printed, history []byte) []byte {
	if i := bytes.Index(history, printed); i >= 0 {
		return history[i+len(printed):]
	}
	return history
}

// send passes keys to the guest.
func (s *consoleSession) send(ctx context.Context, conn *client.Console) {
	for {
		select {
		case b := <-s.in:
			if conn.Write(ctx, b) != nil {
				return // the reader finds the connection lost as well
			}
		case <-ctx.Done():
			return
		}
	}
}

// outage is how long reconnects are tried.
func (s *consoleSession) outage() time.Duration {
	if s.a.flags.timeout > 0 {
		return s.a.flags.timeout
	}
	return consoleOutage
}

// reconnect tries until a node has the console again: while the VM is being
// restarted elsewhere, it is refused as not running.
func (s *consoleSession) reconnect(ctx context.Context) (*client.Console, error) {
	deadline := time.Now().Add(s.outage())
	wait := retryFirst
	for {
		conn, err := s.c.Console(ctx, s.a.project, s.name, client.MaxHistory)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		code := api.CodeOf(err)
		passing := exitCode(err) == ExitUnavailable || code == api.CodeRefused || code == api.CodeTimeout || code == api.CodeInternal
		if !passing || time.Now().Add(wait).After(deadline) {
			return nil, err
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
		wait = min(2*wait, retryMost)
	}
}

// readInput reads keys until the input ends. On a terminal keys pressed while
// there is no connection are dropped, so that Ctrl-] is always heard; from a
// pipe nothing is lost.
func (s *consoleSession) readInput(ctx context.Context, raw bool, detach func()) {
	buf := make([]byte, inputChunk)
	for {
		n, err := s.a.In.Read(buf)
		b := bytes.Clone(buf[:n])
		if raw {
			if i := bytes.IndexByte(b, detachKey); i >= 0 {
				detach()
				return
			}
			select {
			case s.in <- b:
			default:
			}
		} else if n > 0 {
			select {
			case s.in <- b:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return // the end of stdin is not the end of the console
		}
	}
}
