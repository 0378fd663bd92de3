// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Calls between nodes are HTTP/2 (RFC 9113) over the protocol muster-rpc: one
// connection per peer carries any number of calls, each with its own deadline.

// Limits of calls.
const (
	// MaxCallBytes is the largest request or answer.
	MaxCallBytes = 16 << 20
	// maxErrorText is how much of an unexpected answer an error repeats.
	maxErrorText = 512
	// pingAfter and pingWait find a dead peer on an idle connection.
	pingAfter = 2 * time.Second
	pingWait  = 2 * time.Second
)

type peerKey struct{}

// caller is who called.
type caller struct {
	id   string
	life uint64
}

// CallerOf returns the ID of the node that made a call.
func CallerOf(ctx context.Context) string {
	return callerOf(ctx).id
}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(peerKey{}).(caller)
	return c
}

// Handler answers one method: bytes in, bytes out.
type Handler func(ctx context.Context, request []byte) ([]byte, error)

// RPCServer answers calls. Register all methods before Serve.
type RPCServer struct {
	mux   *http.ServeMux
	log   *slog.Logger
	trust func(nodeID string) error
	life  uint64 // of the cluster, see Life
	// strangers are the callers of other lives that the log has named.
	strangers sync.Map
}

// NewRPCServer returns a server without methods.
func NewRPCServer(log *slog.Logger) *RPCServer {
	return &RPCServer{mux: http.NewServeMux(), log: log, life: 1, trust: func(string) error { return nil }}
}

// Life sets in which life of the cluster calls are answered; without it, in the
// first. Set it before Serve.
func (s *RPCServer) Life(life uint64) { s.life = max(1, life) }

// admit refuses a caller before anything of its call is carried out.
func (s *RPCServer) admit(c caller) error {
	if c.life == s.life {
		return s.trust(c.id)
	}
	if _, told := s.strangers.LoadOrStore(c, true); !told { // it may call a thousand times a second
		s.log.Warn("a node of another life of the cluster calls and is refused", "node", c.id, "life", c.life, "own", s.life)
	}
	return lifeError{caller: c.life, own: s.life}
}

// Trust sets what refuses a caller although its certificate is good, before
// anything of its call is carried out. Set it before Serve.
func (s *RPCServer) Trust(f func(nodeID string) error) { s.trust = f }

// RemoteError is an error that the other node answered.
type RemoteError struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

// Error implements error.
func (e *RemoteError) Error() string { return e.Detail }

// Handle registers a method, such as "configdb.txn". An error with a method
// RPCCode() string keeps that code on the way back.
func (s *RPCServer) Handle(method string, h Handler) {
	s.mux.HandleFunc("POST /"+method, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxCallBytes))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var out []byte
		if err = s.admit(callerOf(r.Context())); err == nil {
			out, err = h(r.Context(), body)
		}
		if err == nil {
			_, _ = w.Write(out)
			return
		}
		re := RemoteError{Detail: err.Error()}
		var coded interface{ RPCCode() string }
		if errors.As(err, &coded) {
			re.Code = coded.RPCCode()
		}
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(re)
	})
}

// Serve answers calls on a listener of the port until the context ends.
func (s *RPCServer) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           s.mux,
		Protocols:         h2only(),
		ReadHeaderTimeout: 10 * time.Second,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 4096, SendPingTimeout: 30 * time.Second},
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if p, ok := c.(plainConn); ok {
				cs := p.Conn.(*tls.Conn).ConnectionState()
				id, _ := PeerNode(&cs)
				_, life := splitWire(cs.NegotiatedProtocol)
				return context.WithValue(ctx, peerKey{}, caller{id, life})
			}
			return ctx
		},
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	err := srv.Serve(plainListener{ln})
	_ = srv.Close() // Serve returns before the connections are closed
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve calls: %w", err)
	}
	return nil
}

func h2only() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

// plainConn hides that a connection is TLS: net/http would look for "h2" in
// its ALPN, but ours says muster-rpc and the protocol is agreed beforehand.
type plainConn struct{ net.Conn }

type plainListener struct{ net.Listener }

func (l plainListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return plainConn{c}, nil
}

// RPCClient calls other nodes. Close it when done.
type RPCClient struct {
	id   *Identity
	ctx  context.Context // of the connections being made
	stop context.CancelFunc
	mu   sync.Mutex
	// by node and address, so that a changed address is dialled
	peers map[string]*rpcPeer
}

// NewRPCClient returns a client without connections.
func NewRPCClient(id *Identity) *RPCClient {
	ctx, stop := context.WithCancel(context.Background())
	return &RPCClient{id: id, ctx: ctx, stop: stop, peers: map[string]*rpcPeer{}}
}

// Close ends all connections, with the calls under way. Later calls fail.
func (c *RPCClient) Close() {
	c.stop()
	var conns []*http.ClientConn
	c.mu.Lock()
	for _, p := range c.peers {
		conns = append(conns, p.end()...)
	}
	c.mu.Unlock()
	var wg sync.WaitGroup
	for _, conn := range conns { // one that takes nothing any more delays no other
		wg.Go(func() { _ = conn.Close() })
	}
	wg.Wait()
}

func (c *RPCClient) peer(nodeID, address string) *rpcPeer {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := nodeID + "@" + address
	if p := c.peers[key]; p != nil {
		return p
	}
	t := &http.Transport{
		Protocols: h2only(),
		HTTP2:     &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingWait},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := c.id.Dial(ctx, nodeID, address, ProtoRPC)
			if err != nil {
				return nil, err
			}
			return plainConn{conn}, nil
		},
		DisableCompression: true,
	}
	p := &rpcPeer{
		dial:    func() (*http.ClientConn, error) { return t.NewClientConn(c.ctx, "http", nodeID+":0") },
		news:    make(chan struct{}),
		retired: map[*http.ClientConn]struct{}{},
	}
	c.peers[key] = p
	return p
}

// redialAfter is how old an attempt to connect may be for another call to join it: a peer
// or a network that has come back since may never answer it.
const redialAfter = time.Second

// rpcPeer is the one connection to a node, for any number of calls: a hundred
// calls to a node that just became leader make one handshake.
type rpcPeer struct {
	dial    func() (*http.ClientConn, error)
	mu      sync.Mutex
	conn    *http.ClientConn
	latest  *attempt
	news    chan struct{} // closed, and another made, when an attempt ends
	retired map[*http.ClientConn]struct{}
	closed  bool
}

// attempt is one to connect, for all calls that want to. It goes on when their
// deadlines end: on a slow line a later call has its result.
type attempt struct {
	began time.Time
	conn  *http.ClientConn
	err   error
}

func (a *attempt) over() bool { return a.conn != nil || a.err != nil }

// connection returns the one that stands, or makes it. What comes of the first attempt
// that the call has waited for is what it gets; one that has begun later may help it before.
func (p *rpcPeer) connection(ctx context.Context) (*http.ClientConn, error) {
	var first *attempt
	for {
		p.mu.Lock()
		switch {
		case p.closed:
			defer p.mu.Unlock()
			return nil, net.ErrClosed
		case p.conn != nil && p.conn.Err() == nil:
			defer p.mu.Unlock()
			return p.conn, nil
		case first != nil && first.over(): // it failed, or the connection has ended at once
			defer p.mu.Unlock()
			return first.conn, first.err
		}
		if p.latest == nil || p.latest.over() || time.Since(p.latest.began) >= redialAfter {
			p.latest = &attempt{began: time.Now()}
			go p.try(p.latest)
		}
		if first == nil {
			first = p.latest
		}
		news, old := p.news, time.NewTimer(time.Until(p.latest.began.Add(redialAfter)))
		p.mu.Unlock()
		select {
		case <-news:
		case <-old.C:
		case <-ctx.Done():
			old.Stop()
			return nil, ctx.Err()
		}
		old.Stop()
	}
}

func (p *rpcPeer) try(a *attempt) {
	conn, err := p.dial()
	p.mu.Lock()
	a.conn, a.err = conn, err
	if err == nil && !p.closed && (p.conn == nil || p.conn.Err() != nil) {
		p.conn, conn = conn, nil
	}
	close(p.news)
	p.news = make(chan struct{})
	p.mu.Unlock()
	if conn != nil { // another was faster, or nobody wants one any more
		_ = conn.Close()
	}
}

// retire has a connection that took no call used no more; calls that it has
// under way end first.
func (p *rpcPeer) retire(conn *http.ClientConn) {
	p.mu.Lock()
	if p.conn == conn {
		p.conn = nil
	}
	p.retired[conn] = struct{}{}
	p.mu.Unlock()
	closeIdle := func(c *http.ClientConn) {
		if c.InFlight() > 0 {
			return
		}
		_ = c.Close()
		p.mu.Lock()
		delete(p.retired, c)
		p.mu.Unlock()
	}
	conn.SetStateHook(closeIdle)
	closeIdle(conn)
}

// end makes no connections any more, and returns those that stand.
func (p *rpcPeer) end() []*http.ClientConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	conns := slices.Collect(maps.Keys(p.retired))
	if p.conn != nil {
		conns = append(conns, p.conn)
	}
	return conns
}

// send carries a request over the connection. One that was closed before it took
// any of the request says nothing about the node, which is then tried anew.
func (p *rpcPeer) send(ctx context.Context, url string, body []byte) (*http.Response, error) {
	for again := true; ; again = false {
		conn, err := p.connection(ctx)
		if err != nil {
			return nil, err
		}
		var sent atomic.Bool
		trace := &httptrace.ClientTrace{WroteHeaderField: func(string, []string) { sent.Store(true) }}
		req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, trace), http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		resp, err := conn.RoundTrip(req)
		if err == nil {
			return resp, nil
		}
		if sent.Load() || ctx.Err() != nil {
			return nil, err
		}
		if p.retire(conn); !again {
			return nil, err
		}
	}
}

// Call asks a node. The error is a *RemoteError when the node answered with
// one, otherwise the call may or may not have reached it.
func (c *RPCClient) Call(ctx context.Context, nodeID, address, method string, request []byte) ([]byte, error) {
	resp, err := c.peer(nodeID, address).send(ctx, "http://"+nodeID+"/"+method, request)
	if err != nil {
		return nil, fmt.Errorf("call %s on node %s: %w", method, nodeID, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxCallBytes+1))
	if err != nil {
		return nil, fmt.Errorf("call %s on node %s: %w", method, nodeID, err)
	}
	if len(body) > MaxCallBytes {
		return nil, fmt.Errorf("call %s on node %s: the answer is larger than %d bytes", method, nodeID, MaxCallBytes)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return body, nil
	case http.StatusUnprocessableEntity:
		var re RemoteError
		if err := json.Unmarshal(body, &re); err == nil {
			return nil, &re
		}
	}
	return nil, fmt.Errorf("call %s on node %s: status %d: %s", method, nodeID, resp.StatusCode, bytes.TrimSpace(body[:min(len(body), maxErrorText)]))
}
