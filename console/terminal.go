// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"golang.org/x/crypto/ssh"
)

// mode is who gets what is typed.
type mode int

const (
	modeEdit   mode = iota // the line editor
	modeCooked             // a command: Ctrl-C ends it, its input comes in lines
	modeRaw                // an attached console: every key
)

// terminal is a channel with a person behind it.
type terminal struct {
	ch    ssh.Channel
	touch func() // a key was pressed
	// busy is told when a console is attached and left.
	busy func(n int32)

	mu        sync.Mutex
	wake      sync.Cond
	buf       []byte // typed and not yet taken, at most maxTypeAhead
	err       error  // the end of input
	mode      mode
	interrupt func() // ends the running command
	columns   int
	rows      int
	resized   bool // since the editor last looked

	outMu  sync.Mutex
	filter *filter
	raw    bool // guest output: line ends stay as they are
	last   byte // of what was written
}

func newTerminal(ch ssh.Channel, columns, rows int, touch func(), busy func(int32)) *terminal {
	t := &terminal{ch: ch, touch: touch, busy: busy, filter: newFilter(ch)}
	t.wake.L = &t.mu
	t.resize(columns, rows)
	return t
}

// resize notes what the client says of its window.
func (t *terminal) resize(columns, rows int) {
	if columns <= 0 {
		columns = defaultColumns
	}
	if rows <= 0 {
		rows = defaultRows
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.columns, t.rows, t.resized = min(max(columns, minColumns), maxColumns), min(rows, maxColumns), true
	t.wake.Broadcast()
}

// errResized is returned by next when the window has another size.
var errResized = errors.New("the window was resized")

func (t *terminal) size() (columns, rows int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.columns, t.rows
}

// pump reads what is typed until the channel ends.
func (t *terminal) pump() {
	chunk := make([]byte, inputChunk)
	for {
		n, err := t.ch.Read(chunk)
		if n > 0 {
			t.touch()
			t.accept(chunk[:n])
		}
		if err != nil {
			t.stop(err)
			return
		}
	}
}

// stop ends the input.
func (t *terminal) stop(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	t.wake.Broadcast()
}

// accept queues what was typed. It waits while the queue is full, so that a
// paste waits in the client and not in our memory.
func (t *terminal) accept(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p = t.heed(p)
	for len(p) > 0 && t.err == nil {
		room := maxTypeAhead - len(t.buf)
		if room <= 0 {
			t.wake.Wait()
			p = t.heed(p) // a command may have begun meanwhile
			continue
		}
		n := min(room, len(p))
		t.buf = append(t.buf, p[:n]...)
		p = p[n:]
		t.wake.Broadcast()
	}
}

// heed looks for Ctrl-C while a command runs. What was typed before it is
// meant no more.
func (t *terminal) heed(p []byte) []byte {
	if t.mode != modeCooked {
		return p
	}
	i := bytes.LastIndexByte(p, 0x03)
	if i < 0 {
		return p
	}
	t.buf = t.buf[:0]
	if t.interrupt != nil {
		t.interrupt()
	}
	t.wake.Broadcast()
	return p[i+1:]
}

// signal is Ctrl-C by way of the protocol.
func (t *terminal) signal() {
	t.mu.Lock()
	running := t.mode == modeCooked
	t.mu.Unlock()
	if running {
		t.accept([]byte{0x03})
	}
}

// next returns the next byte for the editor; more says that others wait
// behind it. When the context is over it is the end, whatever waits.
func (t *terminal) next(ctx context.Context) (b byte, more bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.buf) == 0 { // not for each byte of a paste
		defer context.AfterFunc(ctx, t.nudge)()
	}
	for len(t.buf) == 0 || ctx.Err() != nil {
		switch {
		case ctx.Err() != nil:
			return 0, false, ctx.Err()
		case t.err != nil:
			return 0, false, t.err
		case t.resized:
			t.resized = false
			return 0, false, errResized
		}
		t.wake.Wait()
	}
	return t.pop(), len(t.buf) > 0, nil
}

// pop takes a byte; the queue is not empty.
func (t *terminal) pop() byte {
	b := t.buf[0]
	t.buf = t.buf[1:]
	if len(t.buf) == 0 {
		t.buf = nil // lets go of the array, which slicing only moves along
	}
	if len(t.buf) == maxTypeAhead/2 {
		t.wake.Broadcast() // accept may wait for room; not for each byte of it
	}
	return b
}

func (t *terminal) nudge() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.wake.Broadcast()
}

// begin gives the input to a command until its end is called. Ctrl-C calls
// interrupt.
func (t *terminal) begin(interrupt func()) (in *commandInput, end func()) {
	in = &commandInput{t: t}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mode, t.interrupt = modeCooked, interrupt
	waiting := t.buf
	t.buf = nil
	t.buf = append(t.buf, t.heed(waiting)...)
	return in, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		in.closed = true
		t.mode, t.interrupt = modeEdit, nil
		t.wake.Broadcast()
	}
}

// setRaw switches an attached console on; the function returned switches it
// off and brings the terminal back to what it was.
func (t *terminal) setRaw() (restore func(), err error) {
	t.mu.Lock()
	t.mode = modeRaw
	t.mu.Unlock()
	t.busy(1)
	t.outMu.Lock()
	t.raw = true
	t.outMu.Unlock()
	return func() {
		t.mu.Lock()
		if t.mode == modeRaw {
			t.mode = modeCooked
		}
		t.mu.Unlock()
		t.busy(-1)
		t.outMu.Lock()
		defer t.outMu.Unlock()
		t.raw = false
		_, _ = io.WriteString(t.ch, t.filter.reset()) // a client that is gone needs none
	}, nil
}

// Write shows output of commands and guests. Lines get their carriage return.
func (t *terminal) Write(p []byte) (int, error) {
	t.outMu.Lock()
	defer t.outMu.Unlock()
	if err := t.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (t *terminal) write(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if !t.raw {
		p = withReturns(p, t.last)
	}
	t.last = p[len(p)-1]
	_, err := t.filter.Write(p)
	return err
}

// withReturns puts a carriage return before each line feed that has none.
func withReturns(p []byte, last byte) []byte {
	if bytes.IndexByte(p, '\n') < 0 {
		return p
	}
	out := make([]byte, 0, len(p)+len(p)/32+8)
	for _, b := range p {
		if b == '\n' && last != '\r' {
			out = append(out, '\r')
		}
		out = append(out, b)
		last = b
	}
	return out
}

// show writes what the shell itself composed: it knows what it does.
func (t *terminal) show(s string) error {
	if s == "" {
		return nil
	}
	t.outMu.Lock()
	defer t.outMu.Unlock()
	t.last = s[len(s)-1]
	_, err := io.WriteString(t.ch, s)
	return err
}

// tidy undoes what the last command may have done to the terminal.
func (t *terminal) tidy() {
	_ = t.show(t.filter.tidy())
}

// farewell tells why the session ends.
func (t *terminal) farewell(why string) {
	t.outMu.Lock()
	defer t.outMu.Unlock()
	_, _ = io.WriteString(t.ch, t.filter.reset()+"\r\nmuster: session ended: "+why+"\r\n")
}

// commandInput is the stdin of one command.
type commandInput struct {
	t      *terminal
	line   []byte // being typed
	ready  []byte // complete, not yet read
	eof    bool
	closed bool
}

// Read implements io.Reader: keys as they come on an attached console, else
// lines with echo, in which Ctrl-D at the beginning of one is the end.
func (c *commandInput) Read(p []byte) (int, error) {
	t := c.t
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if len(c.ready) > 0 && !c.closed {
			n := copy(p, c.ready)
			c.ready = c.ready[n:]
			return n, nil
		}
		switch {
		case c.closed, c.eof:
			return 0, io.EOF
		case len(t.buf) > 0 && t.mode == modeRaw:
			n := min(copy(p, t.buf), inputChunk)
			for range n {
				t.pop()
			}
			return n, nil
		case len(t.buf) > 0:
			echo := c.cooked()
			t.mu.Unlock()
			err := t.show(echo)
			t.mu.Lock()
			if err != nil {
				return 0, err
			}
		case t.err != nil:
			return 0, t.err
		default:
			t.wake.Wait()
		}
	}
}

// cooked takes what waits up to the end of a line and returns the echo.
func (c *commandInput) cooked() string {
	var echo bytes.Buffer
	for len(c.t.buf) > 0 && len(c.ready) == 0 && !c.eof {
		switch b := c.t.pop(); {
		case b == '\r' || b == '\n':
			c.line = append(c.line, '\n')
			c.ready, c.line = c.line, nil
			echo.WriteString("\r\n")
		case b == 0x04:
			c.ready, c.line = c.line, nil
			c.eof = len(c.ready) == 0
		case b == 0x7f || b == 0x08:
			c.erase(&echo)
		case b == 0x15: // Ctrl-U
			for len(c.line) > 0 {
				c.erase(&echo)
			}
		case b >= 0x20 || b == '\t':
			c.line = append(c.line, b)
			echo.WriteByte(b)
			if len(c.line) >= MaxLine {
				c.ready, c.line = c.line, nil
			}
		}
	}
	return echo.String()
}

// erase takes the last character back.
func (c *commandInput) erase(echo *bytes.Buffer) {
	if len(c.line) == 0 {
		return
	}
	n := 1
	for n < len(c.line) && n < 4 && c.line[len(c.line)-n]&0xc0 == 0x80 {
		n++
	}
	c.line = c.line[:len(c.line)-n]
	echo.WriteString("\b \b")
}
