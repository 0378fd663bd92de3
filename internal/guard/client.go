// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// eventBuffer bounds the events not yet taken from Client.Events.
	eventBuffer = 1024
	// writeWait bounds the writing of one request.
	writeWait = 10 * time.Second
	// lastWordsWait is how long a failed write waits for the reader to learn why.
	lastWordsWait = time.Second
)

// Client is one connection to a guard, safe for concurrent use. When it breaks
// (Done), it stays broken; the caller dials again, watches, and lists.
type Client struct {
	c      net.Conn
	events chan Event
	done   chan struct{}

	writeMu sync.Mutex

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan []byte
	err     error // why the connection ended
}

// Dial connects to the guard of runDir. It does not say hello.
func Dial(ctx context.Context, runDir string) (*Client, error) {
	dir, err := runDirName(runDir)
	if err != nil {
		return nil, err
	}
	addr, release, err := socketAddr(dir)
	if err != nil {
		return nil, err
	}
	defer release()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", addr.Name)
	if err != nil {
		return nil, fmt.Errorf("guard: dial: %w", err)
	}
	cl := &Client{
		c: c, events: make(chan Event, eventBuffer), done: make(chan struct{}),
		pending: make(map[uint64]chan []byte),
	}
	go cl.read()
	return cl, nil
}

// Close ends the connection and waits for its reader.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.done
	return nil
}

// Done is closed when the connection has ended; Err says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns nil while the connection lives; its errors unwrap to ErrClosed, never
// to an Error: a connection that ended is no answer to any request.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Events delivers what happens after Watch; it is closed with the connection. A
// caller that lets more than 1024 events wait loses the connection, not
// events in the middle.
func (c *Client) Events() <-chan Event { return c.events }

// Hello asks the guard about itself.
func (c *Client) Hello(ctx context.Context) (Hello, error) {
	var h Hello
	err := c.call(ctx, opHello, nil, &h)
	return h, err
}

// Extend sets the deadline (CLOCK_BOOTTIME ns, at most MaxAhead from now) of
// session and returns the one in force, which is never earlier within a session.
func (c *Client) Extend(ctx context.Context, session uint64, deadlineNS int64) (int64, error) {
	var r struct {
		DeadlineNS int64 `json:"deadline_ns"`
	}
	err := c.call(ctx, opExtend, extendBody{session, deadlineNS}, &r)
	return r.DeadlineNS, err
}

// Start runs a VM. If ctx ends first, the VM may start nevertheless: Kill it.
func (c *Client) Start(ctx context.Context, req StartRequest) (Started, error) {
	var r Started
	err := c.call(ctx, opStart, req, &r)
	return r, err
}

// Kill kills a VM and waits until it is reaped, or for KillWait (ErrTimeout).
// An unknown or exited VM is no error.
func (c *Client) Kill(ctx context.Context, vm string) (Outcome, error) {
	var r struct {
		Outcome Outcome `json:"outcome"`
	}
	err := c.call(ctx, opKill, vmBody{vm}, &r)
	return r.Outcome, err
}

// Protect turns the protection of a running VM on or off.
func (c *Client) Protect(ctx context.Context, vm string, on bool) error {
	return c.call(ctx, opProtect, protectBody{vm, on}, nil)
}

// List returns all records, exited ones too, sorted by VM id.
func (c *Client) List(ctx context.Context) ([]Record, error) {
	var r struct {
		VMs []Record `json:"vms"`
	}
	err := c.call(ctx, opList, nil, &r)
	return r.VMs, err
}

// Forget drops the record of an exited VM; an unknown VM is no error.
func (c *Client) Forget(ctx context.Context, vm string) error {
	return c.call(ctx, opForget, vmBody{vm}, nil)
}

// Watch turns events on. Watch first, then List, and nothing is missed.
func (c *Client) Watch(ctx context.Context) error {
	return c.call(ctx, opWatch, nil, nil)
}

// Control takes control. The connection that had it is ended, and what came over it
// and was not begun yet never will be: what List and Kill say of a VM from now on is
// not overtaken by a start that was sent before. A guard without FeatureControl does
// not know it.
func (c *Client) Control(ctx context.Context) error {
	return c.call(ctx, opControl, nil, nil)
}

// Stop ends a guard that runs no VM (ErrBusy otherwise).
func (c *Client) Stop(ctx context.Context) error {
	return c.call(ctx, opStop, nil, nil)
}

// head is what every line from the guard may begin with.
type head struct {
	ID    uint64 `json:"id"`
	OK    bool   `json:"ok"`
	Code  Code   `json:"code"`
	Error string `json:"error"`
	Event string `json:"event"`
}

func (c *Client) call(ctx context.Context, o op, body, into any) error {
	id, answer, err := c.enroll()
	if err != nil {
		return err
	}
	defer c.resign(id)
	line, err := requestLine(id, o, body)
	if err != nil {
		return err
	}
	if err := c.write(ctx, line); err != nil {
		return err
	}
	var reply []byte
	select {
	case <-ctx.Done():
		return fmt.Errorf("guard: %s: %w", o, ctx.Err())
	case reply = <-answer:
	case <-c.done:
		select { // the answer may have been the last thing read
		case reply = <-answer:
		default:
			return c.Err()
		}
	}
	var h head
	if err := json.Unmarshal(reply, &h); err != nil {
		return fmt.Errorf("guard: answer to %s: %w", o, err)
	}
	if !h.OK {
		return &Error{Code: h.Code, Msg: h.Error}
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(reply, into); err != nil {
		return fmt.Errorf("guard: answer to %s: %w", o, err)
	}
	return nil
}

func (c *Client) enroll() (uint64, chan []byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	c.nextID++
	answer := make(chan []byte, 1)
	c.pending[c.nextID] = answer
	return c.nextID, answer, nil
}

func (c *Client) resign(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// write sends one line. A line cut off by a timeout would garble the next, so
// any error here ends the connection.
func (c *Client) write(ctx context.Context, line []byte) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	deadline := time.Now().Add(writeWait)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = c.c.SetWriteDeadline(deadline)
	_, err := c.c.Write(line)
	if err == nil {
		return nil
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		// The guard hung up; its last words, still to be read, say why.
		select {
		case <-c.done:
		case <-time.After(lastWordsWait):
		}
	}
	c.fail(err)
	return c.Err()
}

// requestLine encodes a request; body is nil or encodes as an object.
func requestLine(id uint64, o op, body any) ([]byte, error) {
	line := fmt.Appendf(nil, `{"id":%d,"op":%q`, id, string(o))
	if body == nil {
		return append(line, "}\n"...), nil
	}
	enc, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("guard: encode %s: %w", o, err)
	}
	line = append(line, ',')
	line = append(line, enc[1:]...)
	line = append(line, '\n')
	if len(line) > MaxRequestBytes {
		return nil, &Error{Code: CodeBadRequest, Msg: fmt.Sprintf("%s of %d bytes is over %d", o, len(line), MaxRequestBytes)}
	}
	return line, nil
}

func (c *Client) read() {
	defer close(c.done)
	defer close(c.events)
	sc := bufio.NewScanner(c.c)
	sc.Buffer(make([]byte, firstReadBytes), MaxReplyBytes)
	sc.Split(splitLine)
	for sc.Scan() {
		if err := c.take(sc.Bytes()); err != nil {
			c.fail(err)
			return
		}
	}
	err := sc.Err()
	if err == nil {
		err = errors.New("the guard hung up")
	}
	c.fail(err)
}

// take hands one line to whom it belongs.
func (c *Client) take(line []byte) error {
	var h head
	if err := json.Unmarshal(line, &h); err != nil {
		return fmt.Errorf("garbled line: %w", err)
	}
	switch {
	case h.Event != "":
		var ev Event
		if err := json.Unmarshal(line, &ev); err != nil {
			return fmt.Errorf("garbled event: %w", err)
		}
		select {
		case c.events <- ev:
			return nil
		default:
			return fmt.Errorf("%d events were not taken", eventBuffer)
		}
	case h.ID == 0:
		// No request of ours: the guard turned the connection away. Only the text goes on.
		// As an Error it would count as the refusal of every request that still waits.
		e := Error{Code: h.Code, Msg: h.Error}
		return errors.New(e.Error())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.pending[h.ID]; ok {
		select {
		case answer <- append([]byte(nil), line...):
		default: // answered twice; the first counts
		}
	}
	return nil
}

// fail ends the connection; the first reason stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	if !errors.Is(err, ErrClosed) {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.err = err
	_ = c.c.Close()
}
