// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
)

func TestNamesOfProtocolsTellLives(t *testing.T) {
	for _, c := range []struct {
		proto string
		life  uint64
		name  string
	}{
		{ProtoRaft, 0, ProtoRaft}, {ProtoRaft, 1, ProtoRaft}, {ProtoRaft, 2, "muster-raft.2"}, {ProtoRPC, 1 << 63, "muster-rpc.9223372036854775808"},
		{ProtoH1, 7, ProtoH1}, {ProtoH2, 7, ProtoH2},
	} {
		name := wireName(c.proto, c.life)
		if name != c.name {
			t.Errorf("%s in life %d is %q", c.proto, c.life, name)
		}
		if proto, life := splitWire(name); name != c.proto && (proto != c.proto || life != c.life) || name == c.proto && (proto != name || life != 1) {
			t.Errorf("%q is %s in life %d", name, proto, life)
		}
	}
	for _, name := range []string{"muster-raft.", "muster-raft.1", "muster-raft.02", "muster-raft.x", "muster-raft.-2", "muster-rpc.2.2", "h2.2", "http/1.1", ".", ""} {
		if proto, life := splitWire(name); proto != name || life != 1 {
			t.Errorf("%q is %s in life %d", name, proto, life)
		}
	}
}

// aliveIn serves calls and Raft in a life.
func aliveIn(t *testing.T, c cluster, name string, life uint64) (id *Identity, addr string, raft net.Listener) {
	t.Helper()
	id = c.identity(t, name)
	id.Life = life
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	port, rpc := NewPort(ln, id, log), NewRPCServer(log)
	rpc.Life(life)
	rpc.Handle("who", func(ctx context.Context, _ []byte) ([]byte, error) { return []byte(CallerOf(ctx)), nil })
	raft, rpcLn := port.Listener(ProtoRaft), port.Listener(ProtoRPC)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = port.Serve(ctx) })
	wg.Go(func() { _ = rpc.Serve(ctx, rpcLn) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return id, ln.Addr().String(), raft
}

// All nodes have good certificates of one authority.
func TestLivesOfAClusterDoNotMeet(t *testing.T) {
	c := newCluster(t)
	lives := []uint64{0, 1, 2, 3}
	for _, server := range lives {
		_, addr, raft := aliveIn(t, c, "server", server)
		for _, client := range lives {
			id := c.identity(t, "client")
			id.Life = client
			same := max(1, client) == max(1, server)

			conn, err := id.Dial(timeout(t, waitTimeout), "server", addr, ProtoRaft)
			if same != (err == nil) {
				t.Errorf("raft from life %d to life %d: %v", client, server, err)
			}
			if err == nil {
				in, err := raft.Accept()
				if err != nil {
					t.Fatal(err)
				}
				_, _ = in.Close(), conn.Close()
			}

			_, err = newClient(t, id).Call(timeout(t, waitTimeout), "server", addr, "who", nil)
			var refused *RemoteError
			switch {
			case same && err != nil:
				t.Errorf("call within life %d: %v", client, err)
			case same:
			case !errors.As(err, &refused):
				t.Errorf("call from life %d to life %d: %v", client, server, err)
			case client < server && (refused.Code != CodeOldLife || !strings.Contains(refused.Detail, "musterd forget")):
				t.Errorf("call from life %d to life %d: %s, %s", client, server, refused.Code, refused.Detail)
			case client > server && refused.Code != CodeNewLife:
				t.Errorf("call from life %d to life %d: %s", client, server, refused.Code)
			}
		}
	}
}

// Somebody without a certificate learns nothing, whatever life he names.
func TestLivesNeedACertificate(t *testing.T) {
	c := newCluster(t)
	_, addr, _ := aliveIn(t, c, "server", 2)
	for _, name := range []string{"muster-rpc", "muster-rpc.2", "muster-rpc.3", "muster-raft.2", "muster-raft"} {
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{name}}) //nolint:gosec // it is the attacker
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			_ = conn.Close()
		}
		if err == nil {
			t.Errorf("%s is answered", name)
		}
	}
}
