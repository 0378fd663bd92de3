// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"fmt"
	"io"

	"github.com/hashicorp/raft"
)

// intake stands between the network and Raft and puts right what a leader may
// ask of a node that has more than the leader thinks. A leader goes back one
// entry with every refusal, also when a full disk is the reason, and so may
// arrive before the beginning of this node's log.
type intake struct {
	// snapshot is the last entry that this node has without its log; applied
	// and term are Raft's.
	snapshot func() (index, term uint64)
	applied  func() uint64
	term     func() uint64
	// last is the end of the log; voter is one of the servers that may vote by
	// the newest membership in it, or empty.
	last  func() (index, term uint64, ok bool)
	voter func() []byte
	votes func(id []byte) bool
	// gone reports that the leader is gone, though Raft has not missed it yet.
	gone   func() bool
	header func() raft.RPCHeader
}

// run passes calls on until done is closed.
func (i *intake) run(from <-chan raft.RPC, to chan<- raft.RPC, done <-chan struct{}) {
	for {
		select {
		case rpc := <-from:
			switch req := rpc.Command.(type) {
			case *raft.AppendEntriesRequest:
				if err := whole(req); err != nil {
					rpc.Respond(nil, err)
					continue
				}
				i.trim(req)
			case *raft.RequestPreVoteRequest:
				i.admit(&req.RPCHeader, req.LastLogIndex, req.LastLogTerm)
				if i.grants(req) {
					rpc.Respond(&raft.RequestPreVoteResponse{RPCHeader: i.header(), Term: req.Term, Granted: true}, nil)
					continue
				}
			case *raft.RequestVoteRequest:
				i.admit(&req.RPCHeader, req.LastLogIndex, req.LastLogTerm)
				// By this Raft does not mind that it has a leader.
				req.LeadershipTransfer = req.LeadershipTransfer || i.gone()
			case *raft.InstallSnapshotRequest:
				if i.known(req) {
					_, err := io.Copy(io.Discard, rpc.Reader)
					rpc.Respond(&raft.InstallSnapshotResponse{Term: req.Term, Success: err == nil}, err)
					continue
				}
			}
			select {
			case to <- rpc:
			case <-done:
				return
			}
		case <-done:
			return
		}
	}
}

// whole refuses entries that are not there, which Raft would look into, and such
// as do not follow each other, which it would store.
func whole(req *raft.AppendEntriesRequest) error {
	for k, e := range req.Entries {
		if want := req.PrevLogEntry + 1 + uint64(k); e == nil || e.Index != want { //nolint:gosec // an index into a slice
			return fmt.Errorf("malformed request: entry %d is not where it should be", want)
		}
	}
	return nil
}

// trim leaves out the entries that the snapshot covers: they were committed, so
// the leader of a term that Raft accepts has the same. And it lets an entry
// count as committed only if this request has shown that it is the leader's:
// what follows in the log may be of a leader that was not.
func (i *intake) trim(req *raft.AppendEntriesRequest) {
	if at, term := i.snapshot(); req.PrevLogEntry < at {
		for len(req.Entries) > 0 && req.Entries[0].Index <= at {
			req.Entries = req.Entries[1:]
		}
		req.PrevLogEntry, req.PrevLogTerm = at, term
	}
	shown := req.PrevLogEntry
	if n := len(req.Entries); n > 0 {
		shown = req.Entries[n-1].Index
	}
	req.LeaderCommitIndex = min(req.LeaderCommitIndex, shown)
}

// admit lets a candidate be judged by its log alone if that goes on beyond this
// node's. Raft refuses who has no vote by the membership that this node knows;
// but the candidate may have a vote by a change that has not come here. A leader
// that dies just then would leave a majority without one: the candidate whom
// nobody knows, and the others, who must not lead because their logs are older.
func (i *intake) admit(from *raft.RPCHeader, lastIndex, lastTerm uint64) {
	index, term, ok := i.last()
	if !ok || lastTerm < term || (lastTerm == term && lastIndex <= index) {
		return
	}
	// Only whether it may vote is looked up by the ID; whom this node votes for
	// is kept by the address.
	if id := i.voter(); id != nil {
		from.ID = id
	}
}

// grants reports whether a pre-vote is granted for Raft, since the leader is gone.
// The rest is Raft's own rule.
func (i *intake) grants(req *raft.RequestPreVoteRequest) bool {
	index, term, ok := i.last()
	if !ok || req.LastLogTerm < term || (req.LastLogTerm == term && req.LastLogIndex < index) {
		return false
	}
	return req.Term > i.term() && i.votes(req.ID) && i.gone()
}

// known reports whether a snapshot of a present leader has nothing new. Raft
// would go back to it.
func (i *intake) known(req *raft.InstallSnapshotRequest) bool {
	return req.LastLogIndex <= i.applied() && req.Term >= i.term()
}
