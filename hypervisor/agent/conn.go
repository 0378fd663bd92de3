// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

// Limits of the conversation.
const (
	// MaxReply is the largest answer in bytes, and how much is read in search of
	// one that was asked for. An output of MaxExecOutput twice, in base64, fits.
	MaxReply = 4 << 20
	// MaxDepth of brackets in an answer.
	MaxDepth   = 16
	readBuffer = 16 << 10
	// sentinel begins the answer to guest-sync-delimited, and throws away what
	// the agent has read of a command before.
	sentinel = 0xff
)

// Errors of a conversation that is over.
var (
	errTooLong = fmt.Errorf("the agent sent more than %d bytes without the answer", MaxReply)
	errTooDeep = fmt.Errorf("the agent's answer has more than %d levels", MaxDepth)
	errSilent  = errors.New("the agent did not answer in time")
)

// CommandError is the agent's refusal of one command, in its own words.
type CommandError struct {
	Command, Class, Desc string
}

// Error implements error.
func (e *CommandError) Error() string {
	return fmt.Sprintf("the guest agent refused %s: %s", e.Command, e.Desc)
}

// conn is one connection. After an error that is no *CommandError it is of no
// use any more.
type conn struct {
	stream net.Conn
	r      *bufio.Reader
}

func newConn(stream net.Conn) *conn {
	return &conn{stream: stream, r: bufio.NewReaderSize(stream, readBuffer)}
}

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
}

// sync throws away what was said before and makes sure that somebody answers.
func (c *conn) sync(ctx context.Context) error {
	return c.within(ctx, func() error {
		id := rand.Int64N(1 << 31)
		line, err := json.Marshal(request{"guest-sync-delimited", map[string]any{"id": id}})
		if err != nil {
			return err
		}
		if _, err := c.stream.Write(append([]byte{sentinel}, append(line, '\n')...)); err != nil {
			return err
		}
		left := MaxReply
		for {
			if err := c.skip(&left); err != nil {
				return err
			}
			line, err := c.line(&left)
			if err != nil {
				return err
			}
			var got struct {
				Return *int64 `json:"return"`
			}
			if json.Unmarshal(line, &got) == nil && got.Return != nil && *got.Return == id {
				return nil
			}
		}
	})
}

// command runs a command and decodes what it returns into result, if that is
// not nil.
func (c *conn) command(ctx context.Context, name string, args, result any) error {
	return c.within(ctx, func() error {
		line, err := json.Marshal(request{name, args})
		if err != nil {
			return err
		}
		if _, err := c.stream.Write(append(line, '\n')); err != nil {
			return err
		}
		left := MaxReply
		if line, err = c.line(&left); err != nil {
			return err
		}
		return decode(line, name, result)
	})
}

// decode reads one answer.
func decode(line []byte, command string, result any) error {
	if tooDeep(line) {
		return errTooDeep
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return fmt.Errorf("the agent's answer to %s is no JSON object", command)
	}
	switch {
	case reply.Error != nil:
		return &CommandError{Command: command, Class: clean(reply.Error.Class), Desc: clean(reply.Error.Desc)}
	case reply.Return == nil || string(reply.Return) == "null":
		return fmt.Errorf("the agent's answer to %s has neither return nor error", command)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(reply.Return, result); err != nil {
		return fmt.Errorf("the agent's answer to %s has the wrong form", command)
	}
	return nil
}

// tooDeep counts brackets outside strings, before anything recursive sees them.
func tooDeep(b []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch ch := b[i]; {
		case quoted && ch == '\\':
			i++
		case ch == '"':
			quoted = !quoted
		case quoted:
		case ch == '{' || ch == '[':
			if depth++; depth > MaxDepth {
				return true
			}
		case ch == '}' || ch == ']':
			depth--
		}
	}
	return false
}

// skip reads up to and including a sentinel.
func (c *conn) skip(left *int) error {
	for {
		part, err := c.r.ReadSlice(sentinel)
		if *left -= len(part); *left < 0 {
			return errTooLong
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

// line reads one line.
func (c *conn) line(left *int) ([]byte, error) {
	var line []byte
	for {
		part, err := c.r.ReadSlice('\n')
		if *left -= len(part); *left < 0 {
			return nil, errTooLong
		}
		line = append(line, part...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// within runs f, which reads and writes the stream, until the context ends.
func (c *conn) within(ctx context.Context, f func() error) error {
	deadline, _ := ctx.Deadline()
	if err := c.stream.SetDeadline(deadline); err != nil {
		return err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.stream.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	err := f()
	if !stop() {
		<-interrupted
	}
	var timeout net.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &timeout) && timeout.Timeout():
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
			return cause
		}
		return errSilent
	case errors.Is(err, io.EOF):
		return errors.New("QEMU closed the agent's channel")
	}
	return err
}
