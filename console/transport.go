// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
)

// Transport carries requests to an http.Server of the same process over pipes
// in memory, WebSockets and uploads included. It implements http.RoundTripper
// and io.Closer.
type Transport struct {
	http *http.Transport
	srv  *http.Server
	ln   *pipeListener
	done chan struct{}

	mu     sync.Mutex
	closed bool
	conns  map[*pipeConn]struct{}
}

// NewTransport serves srv, which must be used for nothing else. source is what
// requests give as their RemoteAddr. Close ends both.
func NewTransport(srv *http.Server, source string) *Transport {
	t := &Transport{
		srv: srv, done: make(chan struct{}), conns: map[*pipeConn]struct{}{},
		ln: &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{}), addr: pipeAddr(source)},
	}
	t.http = &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return t.dial(ctx)
	}}
	go func() {
		defer close(t.done)
		_ = srv.Serve(t.ln) // ends with Close
	}()
	return t
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) { return t.http.RoundTrip(r) }

// CloseIdleConnections is what http.Client calls.
func (t *Transport) CloseIdleConnections() { t.http.CloseIdleConnections() }

// Close ends all connections, also those of WebSockets, and the server.
func (t *Transport) Close() error {
	t.mu.Lock()
	t.closed = true
	open := t.conns
	t.conns = map[*pipeConn]struct{}{}
	t.mu.Unlock()
	err := t.srv.Close()
	_ = t.ln.Close()
	for c := range open {
		_ = c.Conn.Close()
	}
	t.http.CloseIdleConnections()
	<-t.done
	return err
}

func (t *Transport) dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	c := &pipeConn{Conn: ours, t: t}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil, net.ErrClosed
	}
	t.conns[c] = struct{}{}
	t.mu.Unlock()
	select {
	case t.ln.conns <- &serverConn{Conn: theirs, addr: t.ln.addr}:
		return c, nil
	case <-t.ln.closed:
		return nil, errors.Join(net.ErrClosed, c.Close())
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), c.Close())
	}
}

// pipeConn is the client's end; it leaves the list when it is closed.
type pipeConn struct {
	net.Conn
	t *Transport
}

func (c *pipeConn) Close() error {
	c.t.mu.Lock()
	delete(c.t.conns, c)
	c.t.mu.Unlock()
	return c.Conn.Close()
}

// serverConn is the server's end, which shows where the user comes from.
type serverConn struct {
	net.Conn
	addr net.Addr
}

func (c *serverConn) RemoteAddr() net.Addr { return c.addr }

type pipeAddr string

func (pipeAddr) Network() string  { return "ssh" }
func (a pipeAddr) String() string { return string(a) }

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return l.addr }
