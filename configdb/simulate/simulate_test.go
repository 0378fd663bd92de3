// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
)

// TestShort is the simulation at a size for every day.
func TestShort(t *testing.T) {
	const timeout = 5 * time.Minute
	s := size{nodes: 20, vms: 500, changes: 2000, idle: time.Second}
	s.timing = timing(2 * time.Second) // a test machine may be busy
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	r, err := simulate(ctx, s, slog.New(slog.DiscardHandler), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	r.table(&b)
	t.Logf("\n%s", b.String())
	// 8 keys of a VM with its volume and binding, and 2 of a node, with history.
	if least := 8*s.vms + 2*s.nodes; r.keys < least || r.stateBytes < int64(s.vms)<<10 {
		t.Errorf("%d keys with %d bytes, want at least %d", r.keys, r.stateBytes, least)
	}
	if len(r.latency) != s.changes || r.entries < 1 || r.entries > s.changes+10 {
		t.Errorf("%d changes in %d entries, want %d", len(r.latency), r.entries, s.changes)
	}
	// What every replica must have got was sent by somebody.
	if least := r.changed.entryBytes * int64(s.nodes-1); r.changed.leader.bytes < least/2 {
		t.Errorf("the leader sent %d bytes; the entries are %d for all others", r.changed.leader.bytes, least)
	}
	if each := (r.changedMemory - r.emptyMemory) / int64(s.nodes); each < r.stateBytes {
		t.Errorf("%d bytes of memory a node, less than the state's %d", each, r.stateBytes)
	}
}

// A replica that is not like the others is found, whatever the difference is.
func TestADifferentReplicaIsFound(t *testing.T) {
	make := func(entries ...fsm.Command) *configdb.View {
		s := fsm.New()
		for i, c := range entries {
			if _, err := s.Apply(uint64(i)+1, 1, c.Encode()); err != nil {
				t.Fatal(err)
			}
		}
		return s.View()
	}
	put := func(key, value string) fsm.Command {
		return fsm.Command{Txns: []fsm.Txn{{Ops: []fsm.Op{{Key: key, Value: []byte(value)}}}}}
	}
	all := []*configdb.View{make(put("a", "1"), put("b", "2")), make(put("a", "1"), put("b", "2"))}
	if _, _, err := same(all); err != nil {
		t.Errorf("the same: %v", err)
	}
	for name, other := range map[string]*configdb.View{
		"value":    make(put("a", "1"), put("b", "3")),
		"key":      make(put("a", "1"), put("c", "2")),
		"revision": make(put("a", "1"), put("b", "2"), fsm.Command{}),
		"order":    make(put("b", "2"), put("a", "1")),
		"missing":  make(put("a", "1")),
	} {
		if _, _, err := same(append(all, other)); err == nil || !strings.Contains(err.Error(), "replica 3") {
			t.Errorf("another %s: %v", name, err)
		}
	}
}

func TestTwoEntriesOfOnePlaceAreFound(t *testing.T) {
	b := newLibrary()
	var found error
	one, two := &shelf{library: b}, &shelf{library: b, broken: func(err error) { found = err }}
	entry := func(data string) []*raft.Log { return []*raft.Log{{Index: 1, Term: 1, Data: []byte(data)}} }
	if err := one.StoreLogs(entry("a")); err != nil {
		t.Fatal(err)
	}
	if err := two.StoreLogs(entry("b")); err == nil || found == nil {
		t.Errorf("%v, %v", err, found)
	}
}

func TestAConnectionInMemory(t *testing.T) {
	w, sent, there := newWire(), &traffic{}, &traffic{}
	l := w.listen(1, there)
	c, err := w.dial(t.Context(), 0, sent, address(1))
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("x"), 3*connBuffer)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(big)
		done <- err
	}()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, big) {
		t.Fatal("the bytes do not come through", err)
	}
	if err := <-done; err != nil || sent.bytes.Load() != int64(len(big)) || there.bytes.Load() != 0 {
		t.Errorf("%v, %d bytes counted", err, sent.bytes.Load())
	}
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := s.Read(got); !os.IsTimeout(err) {
		t.Errorf("past the deadline: %v", err)
	}
	_ = s.SetReadDeadline(time.Time{})
	_, _ = c.Write([]byte("last"))
	_ = c.Close()
	if n, err := s.Read(got); n != 4 || err != nil {
		t.Errorf("what was under way: %d, %v", n, err)
	}
	if _, err := s.Read(got); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
	if _, err := s.Write([]byte("x")); err == nil {
		t.Error("written to a closed connection")
	}
	_ = l.Close()
	if _, err := l.Accept(); err != net.ErrClosed {
		t.Error(err)
	}
}
