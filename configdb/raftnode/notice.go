// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Commit notices. Raft tells followers what was committed with the next
// entries, or after Timing.Commit when there are none: often enough to be idle
// cheaply, far too late for somebody who waits. So a leader whose log has come
// to rest says at once what it has committed, in an ordinary AppendEntries
// without entries. It names the committed entry as the previous one, with its
// term: a follower whose log differs there refuses it.

// noticePause gathers commits before the others are told.
const noticePause = time.Millisecond

// notices tells the followers of a leader what was committed.
type notices struct {
	n     *Node
	kick  chan struct{}
	mu    sync.Mutex
	peers map[raft.ServerID]*noticePeer
	done  chan struct{} // closed when no goroutine may be started any more
	wg    sync.WaitGroup
}

// noticePeer is the one notice that may be under way to a follower.
type noticePeer struct {
	kick chan struct{}
	sent uint64 // only its goroutine uses it
}

func newNotices(n *Node) *notices {
	t := &notices{n: n, kick: make(chan struct{}, 1), peers: map[raft.ServerID]*noticePeer{}, done: make(chan struct{})}
	t.wg.Go(t.run)
	return t
}

func (t *notices) close() {
	t.mu.Lock()
	close(t.done)
	t.mu.Unlock()
	t.wg.Wait()
}

// committed is called after entries were applied here.
func (t *notices) committed() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

func (t *notices) run() {
	for {
		select {
		case <-t.kick:
		case <-t.done:
			return
		}
		select {
		case <-time.After(noticePause):
		case <-t.done:
			return
		}
		// Entries that are under way carry the news, or their commit comes here.
		if !t.n.IsLeader() || t.n.raft.LastIndex() > t.n.raft.CommitIndex() {
			continue
		}
		for _, s := range t.n.servers() {
			if string(s.ID) != t.n.nodeID {
				t.to(s.ID)
			}
		}
	}
}

// to lets a follower know soon.
func (t *notices) to(id raft.ServerID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.done:
		return
	default:
	}
	p := t.peers[id]
	if p == nil {
		p = &noticePeer{kick: make(chan struct{}, 1)}
		t.peers[id] = p
		t.wg.Go(func() { t.serve(id, p) })
	}
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// serve sends one notice after the other to a follower.
func (t *notices) serve(id raft.ServerID, p *noticePeer) {
	for {
		select {
		case <-p.kick:
		case <-t.done:
			return
		}
		if addr, ok := t.n.addressOf(id); ok {
			t.send(id, addr, p)
		}
	}
}

func (t *notices) send(id raft.ServerID, addr raft.ServerAddress, p *noticePeer) {
	n := t.n
	term, commit := n.raft.CurrentTerm(), n.raft.AppliedIndex()
	var last raft.Log
	if commit <= p.sent || n.disk.GetLog(commit, &last) != nil {
		return
	}
	req := &raft.AppendEntriesRequest{
		RPCHeader: n.header(),
		Term:      term, Leader: n.transport.EncodePeer(raft.ServerID(n.nodeID), n.self), //nolint:staticcheck // still read by the library
		PrevLogEntry: commit, PrevLogTerm: last.Term, LeaderCommitIndex: commit,
	}
	// Only a leader may speak so, and only in the term in which it leads: an
	// entry of this term was committed, and this node has led since.
	if !n.IsLeader() || n.raft.CurrentTerm() != term || last.Term != term {
		return
	}
	var resp raft.AppendEntriesResponse
	if err := n.transport.AppendEntries(id, addr, req, &resp); err == nil && resp.Success {
		p.sent = commit
	}
}

func (n *Node) addressOf(id raft.ServerID) (raft.ServerAddress, bool) {
	for _, s := range n.servers() {
		if s.ID == id {
			return s.Address, true
		}
	}
	return "", false
}

// Notify lets a follower know at once what was committed.
func (n *Node) Notify(nodeID string) {
	if n.IsLeader() {
		n.notices.to(raft.ServerID(nodeID))
	}
}
