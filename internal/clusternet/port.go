// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/contain"
)

// Limits of the accepting side.
const (
	HandshakeTimeout = 10 * time.Second
	MaxHandshakes    = 512
	// MaxHandshakesPerIP keeps one address from taking all places.
	MaxHandshakesPerIP = 128
	backlog            = 128 // finished handshakes waiting for a protocol's server
)

// Port accepts on one listener and hands each connection to its protocol.
type Port struct {
	ln     net.Listener
	id     *Identity
	config *tls.Config
	log    *slog.Logger

	mu      sync.Mutex
	protos  map[string]*protoListener
	shaking map[string]int // handshakes under way, by address
}

// NewPort returns a port that serves nothing until Listener and Serve.
func NewPort(ln net.Listener, id *Identity, log *slog.Logger) *Port {
	return &Port{ln: ln, id: id, config: id.serverConfig(), log: log, protos: map[string]*protoListener{}, shaking: map[string]int{}}
}

// Listener returns the listener of some protocols. Its connections are
// *tls.Conn whose handshake is done, but for ProtoSSH, which are plain.
func (p *Port) Listener(protocols ...string) net.Listener {
	l := &protoListener{addr: p.ln.Addr(), conns: make(chan net.Conn, backlog), closed: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range protocols {
		p.protos[name] = l
	}
	return l
}

// Serve accepts until the context ends, which is not an error.
func (p *Port) Serve(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = p.ln.Close() })
	defer stop()
	slots := make(chan struct{}, MaxHandshakes)
	for {
		c, err := p.ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on %s: %w", p.ln.Addr(), err)
			}
			p.log.Warn("accept failed", "err", err)
			select { // out of descriptors, most likely: let some be closed
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		from, ok := p.admit(c)
		if ok {
			select {
			case slots <- struct{}{}:
			default:
				p.dismiss(from)
				ok = false
			}
		}
		if !ok {
			_ = c.Close() // over a limit; the client tries again
			continue
		}
		wg.Go(func() {
			defer func() {
				<-slots
				p.dismiss(from)
			}()
			if err := contain.Do(func() { p.handshake(ctx, c) }); err != nil {
				p.log.Error("handshake ended by a bug", "peer", c.RemoteAddr(), "err", err)
				_ = c.Close()
			}
		})
	}
}

func (p *Port) handshake(ctx context.Context, raw net.Conn) {
	hctx, cancel := context.WithTimeout(ctx, HandshakeTimeout)
	defer cancel()
	tracked := &trackedConn{Conn: raw}
	first := &peekedConn{Conn: tracked}
	if first.begins(hctx, sshGreeting) {
		if l := p.listener(ProtoSSH); l == nil || !l.deliver(hctx, first) {
			_ = raw.Close()
		}
		return
	}
	c := tls.Server(first, p.config)
	if err := c.HandshakeContext(hctx); err != nil {
		p.log.Debug("handshake failed", "peer", raw.RemoteAddr(), "err", err)
		_ = raw.Close()
		return
	}
	if err := p.id.trackAccepted(tracked, c.ConnectionState()); err != nil {
		p.log.Debug("connection refused", "peer", raw.RemoteAddr(), "err", err)
		_ = tracked.Close()
		return
	}
	proto, _ := splitWire(c.ConnectionState().NegotiatedProtocol)
	if proto == "" {
		proto = ProtoH1 // a web client without ALPN
	}
	if l := p.listener(proto); l == nil || !l.deliver(hctx, c) {
		_ = c.Close()
	}
}

// admit counts a handshake of the address that a connection comes from.
func (p *Port) admit(c net.Conn) (from string, ok bool) {
	from, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err != nil {
		from = c.RemoteAddr().String()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shaking[from] >= MaxHandshakesPerIP {
		return from, false
	}
	p.shaking[from]++
	return from, true
}

func (p *Port) dismiss(from string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shaking[from]--; p.shaking[from] == 0 {
		delete(p.shaking, from)
	}
}

func (p *Port) listener(proto string) *protoListener {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.protos[proto]
}

// sshGreeting begins the first line of an SSH client (RFC 4253 section 4.2),
// which may speak before the server does; a TLS client begins with 0x16.
const sshGreeting = "SSH-"

// peekedConn is a connection whose first bytes were looked at. They are read
// again by whoever gets the connection.
type peekedConn struct {
	net.Conn
	head []byte
}

// begins reads as much as is needed to tell whether the client begins with a
// word, until the context ends.
func (c *peekedConn) begins(ctx context.Context, word string) bool {
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Now()) })
	defer stop()
	buf := make([]byte, len(word))
	for len(c.head) < len(word) {
		n, err := c.Conn.Read(buf[:len(word)-len(c.head)])
		c.head = append(c.head, buf[:n]...)
		if err != nil || !strings.HasPrefix(word, string(c.head)) {
			return false
		}
	}
	return true
}

// Read implements net.Conn.
func (c *peekedConn) Read(b []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// protoListener is the net.Listener of one protocol.
type protoListener struct {
	addr   net.Addr
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *protoListener) deliver(ctx context.Context, c net.Conn) bool {
	select {
	case <-l.closed:
		return false
	default:
	}
	select {
	case l.conns <- c:
		select {
		case <-l.closed:
			l.drain() // Close may have looked before
		default:
		}
		return true
	case <-l.closed:
	case <-ctx.Done():
	}
	return false
}

// Accept implements net.Listener.
func (l *protoListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. Connections that nobody accepted are closed.
func (l *protoListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.drain()
	return nil
}

func (l *protoListener) drain() {
	for {
		select {
		case c := <-l.conns:
			_ = c.Close()
		default:
			return
		}
	}
}

// Addr implements net.Listener.
func (l *protoListener) Addr() net.Addr { return l.addr }
