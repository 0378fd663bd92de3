// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// connBuffer is how many bytes may be under way in one direction of a
	// connection; whoever writes more waits, as with TCP.
	connBuffer = 1 << 20
	// backlog bounds the connections that a node has not accepted yet.
	backlog = 1024
)

// traffic counts what one node handed to its connections.
type traffic struct{ bytes, writes atomic.Int64 }

// wire is the network: listeners by address.
type wire struct {
	mu        sync.Mutex
	listeners map[string]*listener
}

func newWire() *wire { return &wire{listeners: map[string]*listener{}} }

// address of a node.
func address(node int) string { return fmt.Sprintf("10.0.%d.%d:7600", node/250, node%250+1) }

type listener struct {
	addr   memAddr
	sent   *traffic
	queue  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

type memAddr string

func (memAddr) Network() string  { return "memory" }
func (a memAddr) String() string { return string(a) }

// listen opens a node's port; what it sends on accepted connections is counted.
func (w *wire) listen(node int, sent *traffic) *listener {
	l := &listener{addr: memAddr(address(node)), sent: sent, queue: make(chan net.Conn, backlog), closed: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listeners[string(l.addr)] = l
	return l
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.addr }

// dial connects a node, whose bytes are counted in sent, to an address.
func (w *wire) dial(ctx context.Context, from int, sent *traffic, to string) (net.Conn, error) {
	w.mu.Lock()
	l := w.listeners[to]
	w.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: %w", to, syscall.ECONNREFUSED)
	}
	there, back := newHalf(), newHalf()
	local := memAddr(address(from))
	near := &conn{in: back, out: there, sent: sent, local: local, remote: l.addr}
	far := &conn{in: there, out: back, sent: l.sent, local: l.addr, remote: local}
	select {
	case l.queue <- far:
		return near, nil
	case <-l.closed:
		return nil, fmt.Errorf("dial %s: %w", to, syscall.ECONNREFUSED)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial %s: %w", to, ctx.Err())
	}
}

// half is one direction of a connection.
type half struct {
	mu            sync.Mutex
	moved         sync.Cond // bytes, room, the end or a deadline
	buf           []byte
	ended, broken bool // the writer, the reader closed
	readBy        deadline
	writeBy       deadline
}

func newHalf() *half {
	h := &half{}
	h.moved.L = &h.mu
	return h
}

// deadline is guarded by its half.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) over() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// set moves a deadline and rouses who waits when it comes.
func (h *half) set(d *deadline, at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d.at = at
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if at.IsZero() {
		return
	}
	rouse := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.moved.Broadcast()
	}
	if wait := time.Until(at); wait > 0 {
		d.timer = time.AfterFunc(wait, rouse)
	} else {
		h.moved.Broadcast()
	}
}

func (h *half) read(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.broken:
			return 0, net.ErrClosed
		case h.readBy.over():
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			n := copy(b, h.buf)
			if h.buf = h.buf[n:]; len(h.buf) == 0 {
				h.buf = nil
			}
			h.moved.Broadcast()
			return n, nil
		case h.ended:
			return 0, io.EOF
		case len(b) == 0:
			return 0, nil
		}
		h.moved.Wait()
	}
}

func (h *half) write(b []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n < len(b) {
		switch {
		case h.ended:
			return n, net.ErrClosed
		case h.broken:
			return n, syscall.ECONNRESET
		case h.writeBy.over():
			return n, os.ErrDeadlineExceeded
		case len(h.buf) >= connBuffer:
			h.moved.Wait()
			continue
		}
		k := min(len(b)-n, connBuffer-len(h.buf))
		h.buf = append(h.buf, b[n:n+k]...)
		n += k
		h.moved.Broadcast()
	}
	return n, nil
}

func (h *half) close(flag *bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*flag = true
	for _, d := range []*deadline{&h.readBy, &h.writeBy} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	h.moved.Broadcast()
}

// conn is one end of a connection.
type conn struct {
	in, out       *half
	sent          *traffic
	local, remote memAddr
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) { return c.in.read(b) }

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	n, err := c.out.write(b)
	c.sent.bytes.Add(int64(n))
	c.sent.writes.Add(1)
	return n, err
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.out.close(&c.out.ended)
	c.in.close(&c.in.broken)
	return nil
}

// LocalAddr implements net.Conn.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.set(&c.in.readBy, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.out.set(&c.out.writeBy, t)
	return nil
}
