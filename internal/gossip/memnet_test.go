// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// memNet is a network in memory, for tests in a bubble of testing/synctest, where
// minutes of the cluster take a second.
type memNet struct {
	mu    sync.Mutex
	ports map[string]*memPort
}

// memPort is one node's port: packets and connections that came for it.
type memPort struct {
	net     *memNet
	addr    *net.UDPAddr
	packets chan memPacket
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once

	mu    sync.Mutex
	timer *time.Timer
	late  chan struct{} // closed when the deadline to read has passed
}

type memPacket struct {
	b    []byte
	from net.Addr
}

func (n *memNet) open() *memPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := len(n.ports)
	p := &memPort{
		net: n, addr: &net.UDPAddr{IP: net.IPv4(10, 0, byte(i/256), byte(i%256)), Port: 7600},
		packets: make(chan memPacket, 1024), conns: make(chan net.Conn, 64), closed: make(chan struct{}), late: make(chan struct{}),
	}
	n.ports[p.addr.String()] = p
	return p
}

func (n *memNet) port(addr string) *memPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ports[addr]
}

// dial makes a connection; a connection of TCP has buffers, a pipe has none, and
// TLS does not need them.
func (n *memNet) dial(ctx context.Context, addr string) (net.Conn, error) {
	p := n.port(addr)
	if p == nil {
		return nil, fmt.Errorf("nobody is at %s", addr)
	}
	here, there := net.Pipe()
	select {
	case p.conns <- there:
		return here, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (p *memPort) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (p *memPort) Addr() net.Addr { return p.addr }

// Close implements net.Listener and net.PacketConn.
func (p *memPort) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// ReadFrom implements net.PacketConn.
func (p *memPort) ReadFrom(b []byte) (int, net.Addr, error) {
	p.mu.Lock()
	late := p.late
	p.mu.Unlock()
	select {
	case x := <-p.packets:
		return copy(b, x.b), x.from, nil
	case <-late:
		return 0, nil, os.ErrDeadlineExceeded
	case <-p.closed:
		return 0, nil, net.ErrClosed
	}
}

// WriteTo implements net.PacketConn.
func (p *memPort) WriteTo(b []byte, to net.Addr) (int, error) {
	if o := p.net.port(to.String()); o != nil {
		select {
		case o.packets <- memPacket{append([]byte(nil), b...), p.addr}:
		default: // lost
		}
	}
	return len(b), nil
}

// SetReadDeadline implements net.PacketConn.
func (p *memPort) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
	select {
	case <-p.late:
		p.late = make(chan struct{})
	default:
	}
	if !t.IsZero() {
		late := p.late
		p.timer = time.AfterFunc(time.Until(t), func() { close(late) })
	}
	return nil
}

// LocalAddr implements net.PacketConn.
func (p *memPort) LocalAddr() net.Addr { return p.addr }

// SetDeadline implements net.PacketConn.
func (p *memPort) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetWriteDeadline implements net.PacketConn.
func (p *memPort) SetWriteDeadline(time.Time) error { return nil }
