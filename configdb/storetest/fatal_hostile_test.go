// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// A node that met an entry that it cannot apply has to end. Close is on the way
// to that end, so it must not wait for the entry.
func TestANodeThatCannotApplyCanBeClosed(t *testing.T) {
	c := &Cluster{tb: t}
	var err error
	if c.caCert, c.caKey, err = pki.NewCA("test", api.NewID()); err != nil {
		t.Fatal(err)
	}
	n := c.newNode(0, t.TempDir())
	id, err := clusternet.NewIdentity(n.cert, n.key, c.caCert)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fatal := make(chan error, 1)
	state := fsm.New()
	node, err := raftnode.Open(raftnode.Config{
		Dir: t.TempDir(), NodeID: n.ID, Address: ln.Addr().String(), Identity: id, Listener: ln, State: state,
		OnFatal: func(err error) { fatal <- err }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	c.Eventually("it leads", func() error { return node.Barrier(time.Second) })
	before := state.View().Revision()
	go func() { _, _ = node.Apply([]byte{99}) }()
	cmd := fsm.Command{Txns: []fsm.Txn{{Ops: []fsm.Op{{Key: "after"}}}}}
	<-fatal
	go func() { _, _ = node.Apply(cmd.Encode()) }()
	closed := make(chan error, 1)
	go func() { closed <- node.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a node that cannot go on cannot be closed either: its process would never end")
	}
	if state.View().Revision() != before {
		t.Error("something was applied after the entry that could not be")
	}
}
