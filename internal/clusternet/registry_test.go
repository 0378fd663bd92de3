// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/pki"
)

// hold keeps the connections of a listener open and unread, until the test
// ends; it counts those that ended before.
func hold(t *testing.T, ln net.Listener) (ended *atomic.Int64) {
	t.Helper()
	ended = &atomic.Int64{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
				ended.Add(1)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ended
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(waitTimeout)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", waitTimeout, what)
		}
		time.Sleep(time.Millisecond)
	}
}

func (c cluster) dial(t *testing.T, from *Identity, to string, p *Port, proto string) *tls.Conn {
	t.Helper()
	conn, err := from.Dial(t.Context(), to, address(p), proto)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// isClosed waits for the end of a connection.
func isClosed(c net.Conn) bool {
	_ = c.SetReadDeadline(time.Now().Add(waitTimeout))
	_, err := c.Read(make([]byte, 1))
	var ne net.Error
	return err != nil && (!errors.As(err, &ne) || !ne.Timeout())
}

func TestDropClosesWhatANodeHasOpen(t *testing.T) {
	c := newCluster(t)
	srv, bad, good := c.identity(t, "server"), c.identity(t, "bad"), c.identity(t, "good")
	p := listen(t, srv)
	ended := hold(t, p.Listener(ProtoRaft, ProtoRPC, ProtoH2, ProtoH1))
	var badConns []*tls.Conn
	for _, proto := range []string{ProtoRaft, ProtoRPC, ProtoH2, ProtoH1} {
		badConns = append(badConns, c.dial(t, bad, "server", p, proto))
	}
	kept := c.dial(t, good, "server", p, ProtoRaft)
	until(t, "all are known", func() bool { return srv.Connections("bad") == 4 && srv.Connections("good") == 1 })
	if n := srv.Drop("bad", Dialled); n != 0 {
		t.Errorf("%d accepted connections pass for dialled ones", n)
	}
	if n := srv.Drop("bad", Accepted|Dialled); n != 4 {
		t.Errorf("%d of 4 dropped", n)
	}
	for _, b := range badConns {
		if !isClosed(b) {
			t.Errorf("%s stays open", b.ConnectionState().NegotiatedProtocol)
		}
	}
	until(t, "the servers above notice", func() bool { return ended.Load() == 4 })
	if srv.Connections("bad") != 0 || srv.Connections("good") != 1 {
		t.Error("the wrong ones are forgotten")
	}
	if _, err := kept.Write([]byte("x")); err != nil {
		t.Errorf("another node's connection suffered: %v", err)
	}
	_ = kept.Close()
	until(t, "an ended connection is forgotten", func() bool { return srv.Connections("good") == 0 })
}

func TestDropClosesWhatWasDialled(t *testing.T) {
	c := newCluster(t)
	bad, cli := c.identity(t, "bad"), c.identity(t, "client")
	p := listen(t, bad)
	hold(t, p.Listener(ProtoRaft))
	conn := c.dial(t, cli, "bad", p, ProtoRaft)
	if n := cli.Drop("bad", Accepted); n != 0 {
		t.Errorf("%d dialled connections pass for accepted ones", n)
	}
	if n := cli.Drop("bad", Dialled); n != 1 || !isClosed(conn) {
		t.Errorf("%d dropped", n)
	}
	if cli.Connections("bad") != 0 {
		t.Error("not forgotten")
	}
}

// A node that is removed while it connects gets no Raft connection that stays:
// either Drop finds it, or it is refused.
func TestRemovalDuringTheHandshake(t *testing.T) {
	c := newCluster(t)
	srv, bad := c.identity(t, "server"), c.identity(t, "bad")
	var removed atomic.Bool
	asked := make(chan struct{}, 2)
	srv.Trust = func(string) error {
		gone := removed.Load()
		select {
		case asked <- struct{}{}:
		default:
		}
		if gone {
			return errors.New("removed")
		}
		return nil
	}
	p := listen(t, srv)
	hold(t, p.Listener(ProtoRaft))
	for range 50 {
		removed.Store(false)
		for len(asked) > 0 {
			<-asked
		}
		done := make(chan net.Conn, 1)
		go func() {
			conn, err := bad.Dial(context.Background(), "server", address(p), ProtoRaft)
			if err != nil {
				done <- nil
				return
			}
			done <- conn
		}()
		<-asked // in the middle of the handshake
		removed.Store(true)
		srv.Drop("bad", Accepted|Dialled)
		if conn := <-done; conn != nil {
			if !isClosed(conn) {
				t.Fatal("a removed node has a Raft connection")
			}
			_ = conn.Close()
		}
		until(t, "nothing is left", func() bool { return srv.Connections("bad") == 0 })
	}
}

// The same in a cluster that was recovered, where the protocols have other names,
// and for gossip.
func TestRemovalDuringTheHandshakeInALaterLife(t *testing.T) {
	for _, proto := range []string{ProtoRaft, ProtoGossip} {
		c := newCluster(t)
		srv, bad := c.identity(t, "server"), c.identity(t, "bad")
		srv.Life, bad.Life = 2, 2
		var asked atomic.Int32
		srv.Trust = func(string) error {
			if asked.Add(1) > 1 { // removed between the handshake's check and the list of connections
				return errors.New("removed")
			}
			return nil
		}
		p := listen(t, srv)
		hold(t, p.Listener(proto))
		if conn, err := bad.Dial(context.Background(), "server", address(p), proto); err == nil {
			if !isClosed(conn) {
				t.Errorf("a node removed during the handshake keeps its connection for %s", proto)
			}
			_ = conn.Close()
		}
	}
}

// rotated is a cluster in the middle of a rotation: old and new authority, the
// bridge, and the credentials of a node under each.
func rotated(t *testing.T) (old, fresh cluster, bridge []byte) {
	t.Helper()
	old, fresh = newCluster(t), newCluster(t)
	bridge, err := pki.Bridge(old.caCert, old.caKey, fresh.caCert)
	if err != nil {
		t.Fatal(err)
	}
	return old, fresh, bridge
}

func TestReplaceKeepsConnectionsAndShowsTheNewCertificate(t *testing.T) {
	c := newCluster(t)
	srv, cli := c.identity(t, "server"), c.identity(t, "client")
	p := listen(t, srv)
	hold(t, p.Listener(ProtoRaft))
	before := c.dial(t, cli, "server", p, ProtoRaft)
	cert, key := c.certificate(t, "server")
	if err := srv.Replace(Credentials{Cert: cert, Key: key, CA: c.caCert}); err != nil {
		t.Fatal(err)
	}
	if _, err := before.Write([]byte("x")); err != nil {
		t.Errorf("a standing connection: %v", err)
	}
	after := c.dial(t, cli, "server", p, ProtoRaft)
	shown := after.ConnectionState().PeerCertificates[0]
	if pki.Serial(shown) == pki.Serial(before.ConnectionState().PeerCertificates[0]) || pki.Serial(shown) != pki.Serial(srv.Leaf()) {
		t.Error("the new certificate is not shown")
	}
	// Dialling shows the new one too.
	cert, key = c.certificate(t, "client")
	if err := cli.Replace(Credentials{Cert: cert, Key: key, CA: c.caCert}); err != nil {
		t.Fatal(err)
	}
	c.dial(t, cli, "server", p, ProtoRaft)
	until(t, "three connections stand", func() bool { return srv.Connections("client") == 3 })
	want := pki.Serial(cli.Leaf())
	if n := srv.conns.closeIf(func(_ string, c *trackedConn) bool { return pki.Serial(c.chain[0]) == want }); n != 1 {
		t.Errorf("%d connections with the new certificate", n)
	}
}

func TestReplaceIsChecked(t *testing.T) {
	c, other := newCluster(t), newCluster(t)
	id := c.identity(t, "x")
	was := pki.Serial(id.Leaf())
	cert, key := c.certificate(t, "x")
	ycert, ykey := c.certificate(t, "y")
	for name, m := range map[string]Credentials{
		"another node's":         {Cert: ycert, Key: ykey, CA: c.caCert},
		"key and cert differ":    {Cert: cert, Key: ykey, CA: c.caCert},
		"authority does not fit": {Cert: cert, Key: key, CA: other.caCert},
		"no authority":           {Cert: cert, Key: key},
		"a bridge of junk":       {Cert: cert, Key: key, CA: c.caCert, Bridge: []byte("junk")},
	} {
		if err := id.Replace(m); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if pki.Serial(id.Leaf()) != was {
		t.Error("a refused replacement changed something")
	}
}

// All pairs of nodes in all states of a rotation that may meet, do meet.
func TestNodesMeetDuringARotation(t *testing.T) {
	old, fresh, bridge := rotated(t)
	both := pki.JoinPEM(fresh.caCert, old.caCert)
	make1 := func(signer cluster, id string, ca []byte) func() *Identity {
		return func() *Identity {
			cert, key := signer.certificate(t, id)
			i, err := NewIdentity(cert, key, pki.JoinPEM(ca, signer.caCert))
			if err != nil {
				t.Fatal(err)
			}
			if err := i.Replace(Credentials{Cert: cert, Key: key, CA: ca, Bridge: bridge}); err != nil {
				t.Fatal(err)
			}
			return i
		}
	}
	states := []struct {
		name string
		make func(id string) *Identity
	}{
		{"was away", func(id string) *Identity { return make1(old, id, old.caCert)() }},
		{"trusts both", func(id string) *Identity { return make1(old, id, both)() }},
		{"renewed", func(id string) *Identity { return make1(fresh, id, both)() }},
		{"finished", func(id string) *Identity { return make1(fresh, id, fresh.caCert)() }},
	}
	for i, a := range states {
		for j, b := range states {
			meet := i != 3 && j != 3 || i >= 2 && j >= 2 // finish waits for all to have renewed
			srv, cli := a.make("server"), b.make("client")
			p := listen(t, srv)
			echo(t, p.Listener(ProtoRaft))
			conn, err := cli.Dial(t.Context(), "server", address(p), ProtoRaft)
			var said []byte
			if err == nil {
				said, err = io.ReadAll(conn)
				_ = conn.Close()
			}
			if ok := err == nil && string(said) == `muster-raft from "client"`; ok != meet {
				t.Errorf("%q accepts from %q: %v, want %v (%v)", a.name, b.name, ok, meet, err)
			}
		}
	}
	// A client with the first ca.crt reads the web of a node that has renewed.
	srv := states[2].make("server")
	p := listen(t, srv)
	echo(t, p.Listener(ProtoH1))
	for name, ca := range map[string][]byte{"old": old.caCert, "new": fresh.caCert, "both": both} {
		list, err := pki.ParseBundle(ca)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ask(address(p), &tls.Config{RootCAs: pki.PoolOf(list...), ServerName: "localhost", NextProtos: []string{ProtoH1}})
		if err != nil || !strings.HasPrefix(got, "http/1.1") {
			t.Errorf("client with the %s file: %q, %v", name, got, err)
		}
	}
}

// Dropping an authority ends the connections that rest on it, and no others.
func TestDroppingAnAuthorityEndsItsConnections(t *testing.T) {
	old, fresh, bridge := rotated(t)
	both := pki.JoinPEM(fresh.caCert, old.caCert)
	under := func(c cluster, id string) *Identity {
		cert, key := c.certificate(t, id)
		i, err := NewIdentity(cert, key, both)
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Replace(Credentials{Cert: cert, Key: key, CA: both, Bridge: bridge}); err != nil {
			t.Fatal(err)
		}
		return i
	}
	cert, key := fresh.certificate(t, "server")
	srv := under(fresh, "server")
	if err := srv.Replace(Credentials{Cert: cert, Key: key, CA: both, Bridge: bridge}); err != nil {
		t.Fatal(err)
	}
	late, renewed := under(old, "late"), under(fresh, "renewed")
	p := listen(t, srv)
	hold(t, p.Listener(ProtoRaft, ProtoRPC))
	lateConn := old.dial(t, late, "server", p, ProtoRaft)
	keptConn := old.dial(t, renewed, "server", p, ProtoRaft)
	until(t, "both are known", func() bool { return srv.Connections("late") == 1 && srv.Connections("renewed") == 1 })
	if err := srv.Replace(Credentials{Cert: cert, Key: key, CA: fresh.caCert}); err != nil {
		t.Fatal(err)
	}
	if !isClosed(lateConn) {
		t.Error("a connection under the dropped authority stays")
	}
	if _, err := keptConn.Write([]byte("x")); err != nil || srv.Connections("renewed") != 1 {
		t.Errorf("a renewed node's connection suffered: %v", err)
	}
	if conn, err := late.Dial(t.Context(), "server", address(p), ProtoRPC); err == nil {
		if !isClosed(conn) {
			t.Error("the dropped authority is still accepted")
		}
		_ = conn.Close()
	}
}
