// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/configdb/fsm"
)

func FuzzSplitAddress(f *testing.F) {
	f.Add("0190aaaa@10.0.0.1:7600")
	f.Add("@")
	f.Add("a@b@c")
	f.Fuzz(func(t *testing.T, s string) {
		id, hostport, err := SplitAddress(raft.ServerAddress(s))
		if err != nil {
			return
		}
		if id == "" || hostport == "" || string(ServerAddress(id, hostport)) != s {
			t.Fatalf("%q became %q and %q", s, id, hostport)
		}
	})
}

// An entry that a node cannot apply stops it: it changes nothing, and nothing
// after it is applied.
func FuzzApply(f *testing.F) {
	good := fsm.Command{Time: 7, Txns: []fsm.Txn{{Ops: []fsm.Op{{Key: "k", Value: []byte("v")}}}}}
	f.Add(good.Encode())
	f.Add([]byte{fsm.Format})
	f.Add([]byte{fsm.Format + 1, 0, 0})
	f.Add([]byte{})
	closed := make(chan struct{})
	close(closed)
	f.Fuzz(func(t *testing.T, data []byte) {
		fatal := 0
		a := &adapter{state: fsm.New(), closing: closed, onFatal: func(error) { fatal++ }}
		r := a.Apply(&raft.Log{Index: 5, Term: 2, Data: data}).(result)
		if (r.err != nil) != (fatal == 1) || fatal > 1 {
			t.Fatalf("error %v, fatal %d times", r.err, fatal)
		}
		want := uint64(5)
		if r.err != nil {
			want = 0
			if next := a.Apply(&raft.Log{Index: 6, Term: 2, Data: good.Encode()}).(result); next.err == nil {
				t.Fatal("the node went on after an entry that it could not apply")
			}
			if _, err := a.Snapshot(); err == nil {
				t.Fatal("a snapshot of a node that skipped an entry")
			}
		}
		if got := a.state.View().Revision(); got != want {
			t.Fatalf("revision %d, want %d", got, want)
		}
	})
}

// Whatever is in the file of the note, a node reads nothing from it that is not
// in one of the two slots whole, and its next note is found again.
func FuzzCommitted(f *testing.F) {
	f.Add(encodeCommitted(7, 2), encodeCommitted(8, 2), false)
	f.Add(encodeCommitted(9, 3), []byte{}, false)
	f.Add([]byte("MUSTERC\x01"), bytes.Repeat([]byte{0xff}, committedSize), true)
	f.Fuzz(func(t *testing.T, one, two []byte, sealed bool) {
		file := make([]byte, committedSlot+committedSize)
		want := uint64(0)
		for i, slot := range [][]byte{one, two} {
			b := file[i*committedSlot:][:committedSize]
			copy(b, slot)
			if sealed { // or no mutation would ever be looked at
				binary.LittleEndian.PutUint32(b[24:], crc32.Checksum(b[:24], castagnoli))
			}
			if index, _, ok := decodeCommitted(b); ok {
				if !bytes.Equal(encodeCommitted(binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])), b) {
					t.Fatalf("%x is taken for a note", b)
				}
				want = max(want, index)
			}
		}
		file = file[:len(file)-max(0, committedSize-len(two))] // cut short
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, committedFile), file, 0o600); err != nil {
			t.Fatal(err)
		}
		c, index, _, err := openCommitted(dir)
		if err != nil || index > want {
			t.Fatalf("index %d, at most %d was noted, %v", index, want, err)
		}
		next := index + 1
		err = c.note(next, 5)
		_ = c.file.Close()
		if next == 0 || err != nil {
			return
		}
		c, again, term, err := openCommitted(dir)
		if err != nil || again != next || term != 5 {
			t.Fatalf("after the note of %d there is %d of term %d, %v", next, again, term, err)
		}
		_ = c.file.Close()
	})
}

// saidConn is a peer that says something and is silent then.
type saidConn struct {
	net.Conn // nil: what is not below is not called
	said     io.Reader
	closed   chan struct{}
	once     sync.Once
}

func (c *saidConn) Read(b []byte) (int, error)       { return c.said.Read(b) }
func (c *saidConn) Write(b []byte) (int, error)      { return len(b), nil }
func (c *saidConn) SetDeadline(time.Time) error      { return nil }
func (c *saidConn) SetReadDeadline(time.Time) error  { return nil }
func (c *saidConn) SetWriteDeadline(time.Time) error { return nil }
func (c *saidConn) RemoteAddr() net.Addr             { return layerAddr("fuzz@10.0.0.9:1") }
func (c *saidConn) LocalAddr() net.Addr              { return layerAddr("self@10.0.0.1:1") }
func (c *saidConn) Close() error                     { c.once.Do(func() { close(c.closed) }); return nil }

type saidLayer struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *saidLayer) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *saidLayer) Close() error   { close(l.closed); return nil }
func (l *saidLayer) Addr() net.Addr { return layerAddr("self@10.0.0.1:1") }
func (l *saidLayer) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) {
	return nil, net.ErrClosed
}

// raftCall is a call as the library sends it: its kind and the request.
func raftCall(f *testing.F, kind byte, request any) []byte {
	f.Helper()
	b := bytes.NewBuffer([]byte{kind})
	if err := codec.NewEncoder(b, &codec.MsgpackHandle{}).Encode(request); err != nil {
		f.Fatal(err)
	}
	return b.Bytes()
}

// Whatever a peer sends as calls of Raft, what comes out behind the transport
// and the intake is a request that Raft can look at, and the connection ends.
func FuzzRaftStream(f *testing.F) {
	head := raft.RPCHeader{ProtocolVersion: 3, ID: []byte("n2"), Addr: []byte("n2@10.0.0.2:1")}
	entries := []*raft.Log{{Index: 4, Term: 2, Data: []byte("d")}, {Index: 5, Term: 2, Type: raft.LogConfiguration}}
	f.Add(raftCall(f, 0, &raft.AppendEntriesRequest{RPCHeader: head, Term: 2, PrevLogEntry: 3, PrevLogTerm: 1, Entries: entries, LeaderCommitIndex: 9}))
	f.Add(raftCall(f, 0, &raft.AppendEntriesRequest{RPCHeader: head, Term: 2, Entries: []*raft.Log{nil}}))
	f.Add(raftCall(f, 1, &raft.RequestVoteRequest{RPCHeader: head, Term: 2, LastLogIndex: 9, LastLogTerm: 9}))
	f.Add(append(raftCall(f, 2, &raft.InstallSnapshotRequest{RPCHeader: head, Term: 2, LastLogIndex: 1, Size: 4}), "snap"...))
	f.Add(raftCall(f, 3, &raft.TimeoutNowRequest{RPCHeader: head}))
	f.Add(raftCall(f, 4, &raft.RequestPreVoteRequest{RPCHeader: head, Term: 2, LastLogIndex: 9, LastLogTerm: 9}))
	f.Add([]byte{0xff})
	layer := &saidLayer{conns: make(chan net.Conn), closed: make(chan struct{})}
	trans := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: layer, MaxPool: 1, Timeout: time.Second, Logger: hclog.NewNullLogger()})
	in := &intake{
		snapshot: func() (uint64, uint64) { return 3, 1 }, applied: func() uint64 { return 3 }, term: func() uint64 { return 2 },
		last: func() (uint64, uint64, bool) { return 5, 2, true }, voter: func() []byte { return []byte("n1") },
		votes: func(id []byte) bool { return string(id) == "n1" }, gone: func() bool { return true }, header: func() raft.RPCHeader { return head },
	}
	calls, done := make(chan raft.RPC), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { in.run(trans.Consumer(), calls, done) })
	wg.Go(func() {
		for {
			select {
			case rpc := <-calls:
				if req, ok := rpc.Command.(*raft.AppendEntriesRequest); ok {
					for i, e := range req.Entries {
						if e.Index != req.Entries[0].Index+uint64(i) { //nolint:gosec // an index into a slice
							panic("raft would store entries that do not follow each other")
						}
					}
				}
				rpc.Respond(nil, io.EOF)
			case <-done:
				return
			}
		}
	})
	f.Cleanup(func() {
		close(done)
		wg.Wait()
		_ = trans.Close()
	})
	f.Fuzz(func(t *testing.T, said []byte) {
		c := &saidConn{said: bytes.NewReader(said), closed: make(chan struct{})}
		layer.conns <- c
		select {
		case <-c.closed:
		case <-time.After(10 * time.Second):
			t.Fatal("the connection stays open")
		}
	})
}
