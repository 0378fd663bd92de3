// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	goqmp "github.com/digitalocean/go-qemu/qmp"

	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of a connection.
const (
	// MaxMessageBytes is the largest reply, its line end included, MaxEventBytes the
	// largest event.
	MaxMessageBytes = 4 << 20
	MaxEventBytes   = 64 << 10
	// MaxPending bounds the commands of one connection that wait for a reply.
	MaxPending = 64
	// ConnectTimeout bounds connecting, greeting and capabilities.
	ConnectTimeout = 10 * time.Second
	// DefaultTimeout is the deadline of a command whose context has none.
	DefaultTimeout = 10 * time.Second
	readBuffer     = 64 << 10
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrClosed: Disconnect was called, or Connect was not.
	ErrClosed = errors.New("QMP connection is not open")
	// ErrBusy: MaxPending commands are waiting already.
	ErrBusy = errors.New("too many QMP commands are waiting for this QEMU")
	// ErrTimeout: QEMU did not answer in time. The command may still take effect.
	ErrTimeout = errors.New("QEMU did not answer in time")
)

// CommandError is QEMU's refusal of one command.
type CommandError struct {
	Command string
	// Class is such as "GenericError" or "CommandNotFound" (QAPI QapiErrorClass).
	Class string
	Desc  string
}

// Error implements error.
func (e *CommandError) Error() string {
	return fmt.Sprintf("QEMU refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Dialer opens the stream to QEMU.
type Dialer func(ctx context.Context) (net.Conn, error)

// Conn is one QMP connection. All methods may be called from any goroutine.
type Conn struct {
	dial Dialer
	log  *Log // nil: nothing is kept

	// write holds one token; who takes it may write a command.
	write chan struct{}
	done  chan struct{}

	mu        sync.Mutex
	stream    net.Conn
	connected bool
	version   goqmp.Version
	nextID    uint64
	pending   map[uint64]chan *reply
	subs      map[*Subscription]struct{}
	late      uint64
	err       error // set before done is closed
}

var _ goqmp.Monitor = (*Conn)(nil)

// New returns a connection that is not open yet.
func New(dial Dialer) *Conn {
	return &Conn{
		dial: dial, write: make(chan struct{}, 1), done: make(chan struct{}),
		pending: map[uint64]chan *reply{}, subs: map[*Subscription]struct{}{},
	}
}

// Dial connects to a unix socket and negotiates.
func Dial(ctx context.Context, path string) (*Conn, error) { return DialLogged(ctx, path, 0, nil) }

// DialLogged is Dial for a connection whose conversation is kept in a log, if one is
// given. It refuses a socket behind which another process listens than pid, unless
// that is 0; see access.Dial.
func DialLogged(ctx context.Context, path string, pid int, log *Log) (*Conn, error) {
	c := New(func(ctx context.Context) (net.Conn, error) { return access.Dial(ctx, path, pid) })
	c.log = log
	if err := c.ConnectContext(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Connect implements go-qemu's Monitor with ConnectTimeout.
func (c *Conn) Connect() error { return c.ConnectContext(context.Background()) }

// ConnectContext opens the stream, reads the greeting and negotiates
// capabilities. QEMU serves one client at a time: while another one is
// connected, no greeting comes and the call times out.
func (c *Conn) ConnectContext(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ConnectTimeout)
	defer cancel()
	c.mu.Lock()
	used := c.connected || c.err != nil
	c.connected = true
	c.mu.Unlock()
	if used {
		return fmt.Errorf("connect to QMP: %w: a connection is used once", ErrClosed)
	}
	stream, err := c.dial(ctx)
	if err != nil {
		c.fail(err)
		return fmt.Errorf("connect to QMP: %w", err)
	}
	c.mu.Lock()
	c.stream = stream
	gone := c.err != nil // Disconnect came meanwhile
	c.mu.Unlock()
	if gone {
		_ = stream.Close()
		return fmt.Errorf("connect to QMP: %w", ErrClosed)
	}
	r := bufio.NewReaderSize(stream, readBuffer)
	if err := c.greet(ctx, r); err != nil {
		c.fail(err)
		return fmt.Errorf("read the QMP greeting: %w", err)
	}
	go c.read(r)
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.fail(err)
		return fmt.Errorf("negotiate QMP: %w", err)
	}
	return nil
}

func (c *Conn) greet(ctx context.Context, r *bufio.Reader) error {
	// The end of the context, also by cancellation, ends the read.
	stop := context.AfterFunc(ctx, func() { _ = c.stream.SetReadDeadline(time.Unix(1, 0)) })
	line, err := readLine(r, MaxMessageBytes)
	if !stop() {
		return fmt.Errorf("%w: %w", ErrTimeout, context.Cause(ctx))
	}
	if err != nil {
		return err
	}
	m, err := decode(line)
	if err != nil {
		return err
	}
	if m.greeting == nil {
		return fmt.Errorf("%w: %q is not a greeting", ErrProtocol, clip(line))
	}
	c.mu.Lock()
	c.version = *m.greeting
	c.mu.Unlock()
	return nil
}

// Disconnect implements go-qemu's Monitor. QEMU goes on and accepts another
// connection.
func (c *Conn) Disconnect() error {
	c.fail(ErrClosed)
	return nil
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection ended: io.EOF or io.ErrUnexpectedEOF when QEMU
// went away, ErrClosed after Disconnect, nil while it is open.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Version is QEMU's, from its greeting.
func (c *Conn) Version() goqmp.Version {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version
}

// LateReplies counts the replies that came after their command had given up.
func (c *Conn) LateReplies() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.late
}

// Execute runs a command and decodes what it returns into result, if that is
// not nil. args is nil or what encodes to a JSON object. QEMU's refusal is a
// *CommandError.
func (c *Conn) Execute(ctx context.Context, cmd string, args, result any) error {
	r, err := c.roundTrip(ctx, cmd, args)
	if err != nil {
		return err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.ret, result); err != nil {
		return fmt.Errorf("read the reply of QEMU to %s: %w", cmd, err)
	}
	return nil
}

// Run implements go-qemu's Monitor: command is an encoded go-qemu Command, the
// answer QEMU's whole reply. Its deadline is DefaultTimeout.
func (c *Conn) Run(command []byte) ([]byte, error) {
	var cmd struct {
		Execute string          `json:"execute"`
		Args    json.RawMessage `json:"arguments"`
	}
	if err := json.Unmarshal(command, &cmd); err != nil {
		return nil, fmt.Errorf("read QMP command: %w", err)
	}
	if cmd.Execute == "" {
		return nil, errors.New("read QMP command: it has no \"execute\"")
	}
	var args any
	if cmd.Args != nil {
		args = cmd.Args
	}
	r, err := c.roundTrip(context.Background(), cmd.Execute, args)
	if err != nil {
		return nil, err
	}
	return r.raw, nil
}

// request is a go-qemu Command with the id that its reply will carry.
type request struct {
	goqmp.Command
	ID uint64 `json:"id"`
}

func (c *Conn) roundTrip(ctx context.Context, cmd string, args any) (*reply, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultTimeout)
		defer cancel()
	}
	id, answer, err := c.register()
	if err != nil {
		return nil, fmt.Errorf("QMP %s: %w", cmd, err)
	}
	defer c.forget(id)
	line, err := json.Marshal(request{goqmp.Command{Execute: cmd, Args: args}, id})
	if err != nil {
		return nil, fmt.Errorf("encode QMP %s: %w", cmd, err)
	}
	c.log.add(LogCommand, cmd, line)
	if err := c.send(ctx, append(line, '\n')); err != nil {
		return nil, fmt.Errorf("send QMP %s: %w", cmd, err)
	}
	select {
	case r := <-answer:
		return c.checked(r, cmd)
	case <-ctx.Done():
		return nil, fmt.Errorf("QMP %s: %w", cmd, ended(ctx))
	case <-c.done:
	}
	select { // the reply may have come just before the end
	case r := <-answer:
		return c.checked(r, cmd)
	default:
		return nil, fmt.Errorf("QMP %s: %w", cmd, c.Err())
	}
}

func (c *Conn) checked(r *reply, cmd string) (*reply, error) {
	if r.err != nil {
		c.log.add(LogError, cmd, r.raw)
		r.err.Command = cmd
		return nil, r.err
	}
	c.log.add(LogReply, cmd, r.ret)
	return r, nil
}

// ended tells a deadline from a cancellation.
func ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", ErrTimeout, ctx.Err())
	}
	return context.Cause(ctx)
}

func (c *Conn) register() (uint64, chan *reply, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return 0, nil, c.err
	case c.stream == nil:
		return 0, nil, ErrClosed
	case len(c.pending) >= MaxPending:
		return 0, nil, ErrBusy
	}
	c.nextID++
	answer := make(chan *reply, 1)
	c.pending[c.nextID] = answer
	return c.nextID, answer, nil
}

func (c *Conn) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// send writes one line. A line that was written in part would swallow the next
// one, so it ends the connection.
func (c *Conn) send(ctx context.Context, line []byte) error {
	select {
	case c.write <- struct{}{}:
		defer func() { <-c.write }()
	case <-ctx.Done():
		return ended(ctx)
	case <-c.done:
		return c.Err()
	}
	deadline, _ := ctx.Deadline()
	if err := c.stream.SetWriteDeadline(deadline); err != nil {
		return err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.stream.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	n, err := c.stream.Write(line)
	if !stop() {
		<-interrupted // or it would hit the next command's write
	}
	if err == nil {
		return nil
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		// QEMU is gone. What it said last, SHUTDOWN above all, may still wait to
		// be read: the reader ends the connection when it has seen everything.
		return err
	}
	if n > 0 {
		c.fail(fmt.Errorf("write to QEMU: %w", err))
	}
	return fmt.Errorf("%w: %w", ErrTimeout, err)
}

// read hands on what QEMU says until the stream ends.
func (c *Conn) read(r *bufio.Reader) {
	var flood flood
	for {
		line, err := readLine(r, MaxMessageBytes)
		if err != nil {
			c.fail(err)
			return
		}
		var m message
		if err := contain.Call(func() (err error) { m, err = decode(line); return err }); err != nil {
			c.fail(err)
			return
		}
		switch {
		case m.event != nil:
			c.log.add(LogEvent, m.event.Event, line)
			c.publish(*m.event)
			flood.unasked(len(line), c.done)
		case m.reply != nil:
			if !c.deliver(m.reply) {
				flood.unasked(len(line), c.done)
			}
		default:
			c.fail(fmt.Errorf("%w: a second greeting", ErrProtocol))
			return
		}
	}
}

func (c *Conn) publish(e goqmp.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		s.push(e)
	}
}

// deliver reports whether somebody waits for the reply.
func (c *Conn) deliver(r *reply) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer, ok := c.pending[r.id]
	if !ok {
		c.late++
		return false
	}
	delete(c.pending, r.id)
	answer <- r // has room: each id is delivered once
	return true
}

// fail ends the connection; the first reason stays. A reset is how the kernel
// reports that QEMU died with unread commands: for callers it is the same EOF.
func (c *Conn) fail(err error) {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "read" && !op.Timeout() {
		err = io.EOF
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	if c.stream != nil {
		_ = c.stream.Close()
	}
	close(c.done)
}
