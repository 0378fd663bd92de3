// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/freeport"
	"github.com/muster-vm/muster/internal/pki"
)

// waitTimeout bounds every wait of these tests.
const waitTimeout = 30 * time.Second

// cluster issues identities of one authority.
type cluster struct{ caCert, caKey []byte }

func newCluster(t *testing.T) cluster {
	t.Helper()
	cert, key, err := pki.NewCA("test", "id")
	if err != nil {
		t.Fatal(err)
	}
	return cluster{cert, key}
}

func (c cluster) certificate(t *testing.T, id string) (cert, key []byte) {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	b, err := pki.NewCSR(key, "n")
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(b)
	if err != nil {
		t.Fatal(err)
	}
	cert, err = pki.SignNode(c.caCert, c.caKey, csr, id, "n", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (c cluster) identity(t *testing.T, id string) *Identity {
	t.Helper()
	cert, key := c.certificate(t, id)
	i, err := NewIdentity(cert, key, c.caCert)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// listen opens a port that ends with the test.
func listen(t *testing.T, id *Identity) *Port {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, ln, id)
}

func serve(t *testing.T, ln net.Listener, id *Identity) *Port {
	t.Helper()
	p := NewPort(ln, id, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return p
}

func address(p *Port) string { return p.ln.Addr().String() }

// echo answers each connection of a listener with the name of its protocol
// and its peer.
func echo(t *testing.T, ln net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			cs := c.(*tls.Conn).ConnectionState()
			peer, _ := PeerNode(&cs)
			_, _ = fmt.Fprintf(c, "%s from %q", cs.NegotiatedProtocol, peer)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
}

// ask connects with a configuration and returns what the other end says.
func ask(addr string, cfg *tls.Config) (string, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: waitTimeout}, Config: cfg}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(waitTimeout))
	b, err := io.ReadAll(c)
	if err == nil && len(b) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return string(b), err
}

func TestOnePortManyProtocols(t *testing.T) {
	c := newCluster(t)
	srv, cli := c.identity(t, "server"), c.identity(t, "client")
	p := listen(t, srv)
	echo(t, p.Listener(ProtoRaft))
	echo(t, p.Listener(ProtoRPC))
	echo(t, p.Listener(ProtoH2, ProtoH1))
	stranger := newCluster(t).identity(t, "client")
	cfg := func(id *Identity, protos ...string) *tls.Config {
		out := &tls.Config{RootCAs: srv.shown.Load().roots, ServerName: pki.NodeDNSName("server"), NextProtos: protos}
		if id != nil {
			out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &id.shown.Load().cert, nil }
		}
		return out
	}
	old := cfg(cli, ProtoRPC)
	old.MaxVersion = tls.VersionTLS12
	for name, x := range map[string]struct {
		cfg  *tls.Config
		want string // empty: refused
	}{
		"raft":                                {cfg(cli, ProtoRaft), `muster-raft from "client"`},
		"rpc":                                 {cfg(cli, ProtoRPC), `muster-rpc from "client"`},
		"web of a node":                       {cfg(cli, ProtoH2), `h2 from "client"`},
		"web of a browser":                    {cfg(nil, ProtoH2, ProtoH1), `h2 from ""`},
		"old web":                             {cfg(nil, ProtoH1), `http/1.1 from ""`},
		"web without ALPN":                    {cfg(nil), ` from ""`},
		"cluster protocol first":              {cfg(cli, ProtoRPC, ProtoH2), `muster-rpc from "client"`},
		"cluster protocol last":               {cfg(cli, ProtoH2, ProtoRPC), `muster-rpc from "client"`},
		"rpc without a certificate":           {cfg(nil, ProtoRPC), ""},
		"rpc hidden behind the web":           {cfg(nil, ProtoH2, ProtoRPC), ""},
		"rpc with another cluster's":          {cfg(stranger, ProtoRPC), ""},
		"web with another cluster's":          {cfg(stranger, ProtoH2), ""},
		"rpc with the authority's by itself":  {&tls.Config{RootCAs: srv.shown.Load().roots, ServerName: pki.NodeDNSName("server"), NextProtos: []string{ProtoRPC}, Certificates: []tls.Certificate{{Certificate: [][]byte{cli.shown.Load().cert.Certificate[1]}, PrivateKey: cli.shown.Load().cert.PrivateKey}}}, ""},
		"unknown protocol":                    {cfg(cli, "muster-future"), ""},
		"an old TLS":                          {old, ""},
		"the server's name of another node":   {&tls.Config{RootCAs: srv.shown.Load().roots, ServerName: pki.NodeDNSName("other")}, ""},
		"a client that trusts another":        {&tls.Config{RootCAs: stranger.shown.Load().roots, ServerName: pki.NodeDNSName("server")}, ""},
		"a protocol that nobody serves (web)": {cfg(nil, "http/1.0"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ask(address(p), x.cfg)
			if x.want == "" {
				if err == nil {
					t.Errorf("answered %q", got)
				}
				return
			}
			if err != nil || got != x.want {
				t.Errorf("%q, %v; want %q", got, err, x.want)
			}
		})
	}
}

// A session begun on the web without a certificate opens no cluster protocol.
func TestResumptionGainsNothing(t *testing.T) {
	c := newCluster(t)
	srv := c.identity(t, "server")
	p := listen(t, srv)
	echo(t, p.Listener(ProtoRPC))
	echo(t, p.Listener(ProtoH2, ProtoH1))
	cfg := &tls.Config{
		RootCAs: srv.shown.Load().roots, ServerName: pki.NodeDNSName("server"), NextProtos: []string{ProtoH2}, ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}
	for range 2 {
		if got, err := ask(address(p), cfg); err != nil || got != `h2 from ""` {
			t.Fatalf("%q, %v", got, err)
		}
	}
	cfg = cfg.Clone()
	cfg.NextProtos = []string{ProtoRPC}
	if got, err := ask(address(p), cfg); err == nil {
		t.Errorf("a web session was resumed as %q", got)
	}
}

func TestDialReachesTheNodeItMeans(t *testing.T) {
	c := newCluster(t)
	srv, cli := c.identity(t, "server"), c.identity(t, "client")
	p := listen(t, srv)
	echo(t, p.Listener(ProtoRPC))
	conn, err := cli.Dial(t.Context(), "server", address(p), ProtoRPC)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	_ = conn.Close()
	if err != nil || string(b) != `muster-rpc from "client"` {
		t.Errorf("%q, %v", b, err)
	}
	stranger := newCluster(t).identity(t, "client")
	for name, x := range map[string]struct {
		from *Identity
		node string
		addr string
		says string
	}{
		"another node":       {cli, "other", address(p), "certificate"},
		"no node":            {cli, "", address(p), ""},
		"nobody there":       {cli, "server", freeport.Loopback(t), "refused"},
		"another cluster":    {stranger, "server", address(p), "certificate"},
		"no address":         {cli, "server", "", ""},
		"an address of junk": {cli, "server", "a:b:c", ""},
	} {
		conn, err := x.from.Dial(t.Context(), x.node, x.addr, ProtoRPC)
		if err == nil {
			_ = conn.Close()
			t.Errorf("%s: connected", name)
			continue
		}
		if !strings.Contains(err.Error(), "connect to node "+x.node) || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A peer that is TLS but speaks no protocol of the cluster is told apart.
func TestDialRefusesAnotherProtocol(t *testing.T) {
	c := newCluster(t)
	srv, cli := c.identity(t, "server"), c.identity(t, "client")
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{srv.shown.Load().cert}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.(*tls.Conn).Handshake()
			_ = c.Close()
		}
	})
	defer wg.Wait()
	defer func() { _ = ln.Close() }()
	if _, err := cli.Dial(t.Context(), "server", ln.Addr().String(), ProtoRPC); err == nil || !strings.Contains(err.Error(), "does not speak muster-rpc") {
		t.Errorf("%v", err)
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	c := newCluster(t)
	cli := c.identity(t, "client")
	ln, err := net.Listen("tcp", "127.0.0.1:0") // accepts by the backlog, never answers
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(30*time.Millisecond, cancel)
	if _, err := cli.Dial(ctx, "server", ln.Addr().String(), ProtoRPC); !errors.Is(err, context.Canceled) { // not by its own deadline
		t.Errorf("%v", err)
	}
}

func TestSlowHandshakesDelayNobody(t *testing.T) {
	c := newCluster(t)
	srv, cli := c.identity(t, "server"), c.identity(t, "client")
	p := listen(t, srv)
	echo(t, p.Listener(ProtoRPC))
	for range 100 {
		slow, err := net.Dial("tcp", address(p))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = slow.Close() }()
		_, _ = slow.Write([]byte{0x16, 3, 1}) // the beginning of a hello
	}
	begin := time.Now()
	conn, err := cli.Dial(t.Context(), "server", address(p), ProtoRPC)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if d := time.Since(begin); d > HandshakeTimeout/2 {
		t.Errorf("took %v", d)
	}
}

func TestHandshakesAreBounded(t *testing.T) {
	c := newCluster(t)
	p := listen(t, c.identity(t, "server"))
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range MaxHandshakes + 1 {
		conn, err := net.Dial("tcp", address(p))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	// The one too many is closed at once.
	last := conns[MaxHandshakes]
	_ = last.SetDeadline(time.Now().Add(HandshakeTimeout / 2))
	if _, err := last.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("over the limit: %v", err)
	}
}

func TestGarbageIsNoHandshake(t *testing.T) {
	c := newCluster(t)
	p := listen(t, c.identity(t, "server"))
	for _, junk := range []string{"GET / HTTP/1.1\r\n\r\n", "SSH-2.0-x\r\n", strings.Repeat("\x00", 4096), "\x16\x03\x01\xff\xff\xff"} {
		conn, err := net.Dial("tcp", address(p))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(junk))
		_ = conn.(*net.TCPConn).CloseWrite()
		_ = conn.SetDeadline(time.Now().Add(waitTimeout))
		if _, err := io.Copy(io.Discard, conn); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%.10q: the connection stays", junk)
		}
		_ = conn.Close()
	}
}

// Connections that nobody accepted are closed with their listener, whenever
// they were delivered.
func TestAClosedListenerKeepsNoConnection(t *testing.T) {
	for range 500 {
		l := &protoListener{conns: make(chan net.Conn, backlog), closed: make(chan struct{})}
		var wg sync.WaitGroup
		var ends []net.Conn
		for range 8 {
			a, b := net.Pipe()
			ends = append(ends, b)
			wg.Go(func() {
				if !l.deliver(context.Background(), a) {
					_ = a.Close()
				}
			})
		}
		_ = l.Close()
		wg.Wait()
		if n := len(l.conns); n != 0 {
			t.Fatalf("%d connections stay open", n)
		}
		for _, b := range ends {
			if _, err := b.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("a connection stays open: %v", err)
			}
		}
		if _, err := l.Accept(); err == nil {
			t.Error("accepted after the end")
		}
		_ = l.Close() // twice is harmless
	}
}

func TestServeReportsAListenerThatIsGone(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := NewPort(ln, newCluster(t).identity(t, "server"), slog.New(slog.DiscardHandler))
	_ = ln.Close()
	if err := p.Serve(t.Context()); err == nil {
		t.Error("ended without an error")
	}
}

func TestIdentitiesAreChecked(t *testing.T) {
	a, b := newCluster(t), newCluster(t)
	cert, key := a.certificate(t, "x")
	_, otherKey := a.certificate(t, "y")
	for name, x := range map[string][][]byte{
		"another node's key":      {cert, otherKey, a.caCert},
		"another cluster's":       {cert, key, b.caCert},
		"the authority as a node": {a.caCert, a.caKey, a.caCert},
		"no certificate":          {nil, key, a.caCert},
		"no authority":            {cert, key, nil},
		"a key for a certificate": {key, key, a.caCert},
	} {
		if _, err := NewIdentity(x[0], x[1], x[2]); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	id, err := NewIdentity(cert, key, a.caCert)
	if err != nil || id.NodeID != "x" {
		t.Fatalf("%+v, %v", id, err)
	}
	ca, err := pki.ParseCert(a.caCert)
	if err != nil {
		t.Fatal(err)
	}
	if len(id.shown.Load().cert.Certificate) != 2 || !slices.Equal(id.shown.Load().cert.Certificate[1], ca.Raw) {
		t.Error("the authority is not sent along")
	}
	if _, ok := PeerNode(nil); ok {
		t.Error("no connection has a peer")
	}
}
