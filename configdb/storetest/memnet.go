// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// memNet is a network in memory for a bubble of testing/synctest. Bytes take a
// time from end to end; links may fall silent in either direction, as a
// partition has it (what was sent arrives when they are whole again, as TCP
// has it), and connections may break at any write.
//
// A write never blocks: a goroutine that held a lock while it waited would keep
// the bubble's clock from going on.
type memNet struct {
	mu        sync.Mutex
	rng       *rand.Rand
	listeners map[string]*memListener
	silent    map[[2]int]bool // from, to
	refused   map[[2]int]bool // from, to
	conns     map[*memConn]bool
	breaks    float64 // chance that a write breaks its connection
	slowest   time.Duration
}

// Latencies of the network.
const (
	fastestChunk = 200 * time.Microsecond
	slowestChunk = 2 * time.Millisecond
)

func newMemNet(rng *rand.Rand) *memNet {
	return &memNet{
		rng: rng, listeners: map[string]*memListener{}, silent: map[[2]int]bool{}, refused: map[[2]int]bool{}, conns: map[*memConn]bool{}, slowest: slowestChunk,
	}
}

// memAddress is where a node listens.
func memAddress(node int) *net.TCPAddr {
	return &net.TCPAddr{IP: net.IPv4(10, 0, 0, byte(node+1)), Port: 7600}
}

type memListener struct {
	n      *memNet
	node   int
	queue  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

const memBacklog = 128

func (n *memNet) listen(node int) *memListener {
	l := &memListener{n: n, node: node, queue: make(chan net.Conn, memBacklog), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[memAddress(node).String()] = l
	return l
}

// Accept implements net.Listener.
func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *memListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *memListener) Addr() net.Addr { return memAddress(l.node) }

// dial connects a node to an address. Over a link that is silent in either
// direction nothing comes back, until ctx ends.
func (n *memNet) dial(ctx context.Context, from int, address string) (net.Conn, error) {
	for {
		n.mu.Lock()
		l := n.listeners[address]
		if l == nil || n.refused[[2]int{from, l.node}] {
			n.mu.Unlock()
			return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
		}
		if !n.silent[[2]int{from, l.node}] && !n.silent[[2]int{l.node, from}] {
			here, there := n.pair(from, l.node)
			n.mu.Unlock()
			select {
			case <-l.closed:
			default:
				select {
				case l.queue <- there:
					return here, nil
				case <-l.closed:
				case <-ctx.Done():
				}
			}
			here.abort()
			return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
		}
		n.mu.Unlock()
		select { // as a SYN is sent again
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("dial %s: %w", address, ctx.Err())
		}
	}
}

// chunk is what one Write sent.
type chunk struct {
	b  []byte
	at time.Time // when it has arrived
}

// memConn is one end of a connection.
type memConn struct {
	n          *memNet
	node, peer int
	other      *memConn

	// All below is guarded by n.mu.
	in            []chunk
	arrives       time.Time // of the last chunk
	wake          chan struct{}
	readBy, write time.Time // deadlines
	closed        bool      // by this end
	ended         bool      // the other end sends nothing more
	broken        bool
}

func (n *memNet) pair(from, to int) (*memConn, *memConn) {
	a := &memConn{n: n, node: from, peer: to, wake: make(chan struct{})}
	b := &memConn{n: n, node: to, peer: from, wake: make(chan struct{}), other: a}
	a.other = b
	n.conns[a], n.conns[b] = true, true
	return a, b
}

// rouse lets a reader look again. The caller holds n.mu.
func (c *memConn) rouse() {
	close(c.wake)
	c.wake = make(chan struct{})
}

// snap breaks a connection at both ends. The caller holds n.mu.
func (c *memConn) snap() {
	for _, e := range []*memConn{c, c.other} {
		e.broken = true
		e.rouse()
		delete(c.n.conns, e)
	}
}

func (c *memConn) abort() {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.snap()
}

// Write implements net.Conn.
func (c *memConn) Write(b []byte) (int, error) {
	n := c.n
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case c.closed:
		return 0, net.ErrClosed
	case c.broken || c.other.closed:
		return 0, syscall.ECONNRESET
	case !c.write.IsZero() && !time.Now().Before(c.write):
		return 0, os.ErrDeadlineExceeded
	}
	if n.rng.Float64() < n.breaks {
		c.snap()
		return 0, syscall.ECONNRESET
	}
	o := c.other
	at := time.Now().Add(fastestChunk + time.Duration(n.rng.Int64N(int64(n.slowest))))
	if at.Before(o.arrives) {
		at = o.arrives // in order
	}
	o.arrives = at
	o.in = append(o.in, chunk{append([]byte(nil), b...), at})
	o.rouse()
	return len(b), nil
}

// Read implements net.Conn.
func (c *memConn) Read(b []byte) (int, error) {
	for {
		k, err, wake, wait := c.take(b)
		if k > 0 || err != nil || len(b) == 0 {
			return k, err
		}
		if wait < 0 {
			<-wake
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// take returns what has arrived, or what to wait for: a change, and a time if
// wait is not negative.
func (c *memConn) take(b []byte) (k int, err error, wake <-chan struct{}, wait time.Duration) { //nolint:staticcheck // the rest belongs together
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	now, wait := time.Now(), time.Duration(-1)
	reached := !c.n.silent[[2]int{c.peer, c.node}]
	switch {
	case c.closed:
		return 0, net.ErrClosed, nil, 0
	case c.broken:
		return 0, syscall.ECONNRESET, nil, 0
	case !c.readBy.IsZero() && !now.Before(c.readBy):
		return 0, os.ErrDeadlineExceeded, nil, 0
	case len(c.in) > 0 && reached && !now.Before(c.in[0].at):
		k = copy(b, c.in[0].b)
		if c.in[0].b = c.in[0].b[k:]; len(c.in[0].b) == 0 {
			c.in = c.in[1:]
		}
		return k, nil, nil, 0
	case len(c.in) == 0 && c.ended && reached:
		return 0, io.EOF, nil, 0
	case len(c.in) > 0 && reached:
		wait = c.in[0].at.Sub(now)
	}
	if !c.readBy.IsZero() && (wait < 0 || c.readBy.Sub(now) < wait) {
		wait = c.readBy.Sub(now)
	}
	return 0, nil, c.wake, wait
}

// Close implements net.Conn.
func (c *memConn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed, c.other.ended = true, true
	c.rouse()
	c.other.rouse()
	delete(c.n.conns, c)
	return nil
}

// LocalAddr implements net.Conn.
func (c *memConn) LocalAddr() net.Addr { return memAddress(c.node) }

// RemoteAddr implements net.Conn.
func (c *memConn) RemoteAddr() net.Addr { return memAddress(c.peer) }

// SetDeadline implements net.Conn.
func (c *memConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *memConn) SetReadDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.readBy = t
	c.rouse()
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.write = t
	return nil
}

// setSilent says what is lost from one node to another.
func (n *memNet) setSilent(from, to int, silent bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.silent[[2]int{from, to}] = silent
	for c := range n.conns {
		c.rouse()
	}
}

// refuse breaks what two nodes have open to each other, and each hears that nobody
// listens at the other.
func (n *memNet) refuse(a, b int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refused[[2]int{a, b}], n.refused[[2]int{b, a}] = true, true
	for c := range n.conns {
		if c.node == a && c.peer == b || c.node == b && c.peer == a {
			c.snap()
		}
	}
}

// heal makes all links whole.
func (n *memNet) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.silent)
	clear(n.refused)
	n.breaks, n.slowest = 0, slowestChunk
	for c := range n.conns {
		c.rouse()
	}
}

// trouble sets how often connections break and how slow they are.
func (n *memNet) trouble(breaks float64, slowest time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.breaks, n.slowest = breaks, slowest
}

// crash breaks all that a node has open.
func (n *memNet) crash(node int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	address := memAddress(node).String()
	if l := n.listeners[address]; l != nil {
		_ = l.Close()
		delete(n.listeners, address)
	}
	for c := range n.conns {
		if c.node == node || c.peer == node {
			c.snap()
		}
	}
}
