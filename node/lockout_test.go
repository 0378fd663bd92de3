// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// other is the identity of another node of a lone member's cluster.
func other(t *testing.T, m *member, id string) *clusternet.Identity {
	t.Helper()
	spec := m.spec(t)
	caKey, err := pki.Open(m.info.clusterKey, caKeyLabel, spec.SealedCAKey)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	b, err := pki.NewCSR(key, "x")
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(b)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SignNode([]byte(spec.CACert), caKey, csr, id, "x", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	out, err := clusternet.NewIdentity(cert, key, []byte(spec.CACert))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// background runs until the test ends.
func background(t *testing.T, run func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func ended(c net.Conn) bool {
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := c.Read(make([]byte, 1))
	var ne net.Error
	return err != nil && (!errors.As(err, &ne) || !ne.Timeout())
}

// What a node has open, and what is open to it, ends when the removal is seen;
// what a node that stays has open does not.
func TestRemovalEndsConnectionsOfBothSides(t *testing.T) {
	m := lone(t)
	background(t, func(ctx context.Context) { _ = m.port.Serve(ctx) })
	gone, stays := other(t, m, api.NewID()), other(t, m, api.NewID())

	var in []net.Conn
	for _, id := range []*clusternet.Identity{gone, stays} {
		c, err := id.Dial(t.Context(), m.info.NodeID, m.info.Address, clusternet.ProtoRaft)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		in = append(in, c)
	}
	// The other node's own port, which reads and says nothing.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := clusternet.NewPort(ln, gone, slog.New(slog.DiscardHandler))
	accepted := port.Listener(clusternet.ProtoRaft)
	background(t, func(ctx context.Context) { _ = port.Serve(ctx) })
	background(t, func(ctx context.Context) {
		stop := context.AfterFunc(ctx, func() { _ = accepted.Close() })
		defer stop()
		for {
			c, err := accepted.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	})
	out, err := m.identity.Dial(t.Context(), gone.NodeID, ln.Addr().String(), clusternet.ProtoRaft)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()

	background(t, func(ctx context.Context) { _ = m.lockOut(ctx) })
	tx := &configdb.Txn{}
	tx.Put(removedPrefix+gone.NodeID, []byte("gone"))
	if _, err := m.store.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	if !ended(in[0]) {
		t.Error("what the removed node opened stays open")
	}
	if !ended(out) {
		t.Error("what was open to the removed node stays open")
	}
	if n := m.identity.Connections(stays.NodeID); n != 1 {
		t.Errorf("a node that stays has %d connections", n)
	}
	if c, err := gone.Dial(t.Context(), m.info.NodeID, m.info.Address, clusternet.ProtoRaft); err == nil {
		if !ended(c) {
			t.Error("a removed node gets a new Raft connection")
		}
		_ = c.Close()
	}
}
