// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"cmp"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
)

// Member is a node of the cluster as the configuration database has it.
type Member struct {
	ID, Name string
	// Address is host:port of the node's one port.
	Address string
}

// Peer is what gossip knows of a member.
type Peer struct {
	Member
	// Self is true for this node, which is always alive to itself.
	Self  bool
	State api.GossipState
	// Since is when this node came to that state; zero if it is unknown.
	Since time.Time
	// Summary is the newest that the node sent, SummaryAge how long ago it made
	// it. Known is false if there is none yet.
	Summary    Summary
	SummaryAge time.Duration
	Known      bool
}

// peer is an entry of the table.
type peer struct {
	Member
	// listed is false for a node that is no member any more, and that memberlist
	// has not forgotten yet.
	listed bool
	udp    *net.UDPAddr // nil until the address is resolved

	state       api.GossipState
	since       time.Time
	incarnation uint32 // memberlist's, as last seen

	number  uint64
	summary Summary
	raw     []byte    // the summary as it came
	made    time.Time // by this node's clock; zero without a summary

	nextTry time.Time // to join it, while it is not alive
	pause   time.Duration
}

func (p *peer) up() bool { return p.state == api.GossipAlive || p.state == api.GossipSuspect }

// table is all that this node knows of the members.
type table struct {
	self string
	// told is called with every change of a peer's state, under no lock.
	told func(p Member, state api.GossipState)

	mu       sync.Mutex
	peers    map[string]*peer
	changed  chan struct{} // closed with every change of a state
	suspects atomic.Int32  // how many are
}

func (t *table) anySuspect() bool { return t.suspects.Load() > 0 }

func newTable(self string, told func(Member, api.GossipState)) *table {
	return &table{self: self, told: told, peers: map[string]*peer{}, changed: make(chan struct{})}
}

// setMembers brings the table in line with the list.
func (t *table) setMembers(list []Member) {
	t.mu.Lock()
	defer t.mu.Unlock()
	named := map[string]bool{}
	for _, m := range list {
		named[m.ID] = true
		p := t.peers[m.ID]
		if p == nil {
			p = &peer{state: api.GossipUnknown}
			t.peers[m.ID] = p
		}
		if p.Address != m.Address {
			p.udp = literalUDP(m.Address)
			p.nextTry, p.pause = time.Time{}, 0
		}
		p.Member, p.listed = m, true
	}
	for id, p := range t.peers {
		if named[id] {
			continue
		}
		p.listed = false
		p.made = time.Time{}
		if !p.up() {
			delete(t.peers, id)
		}
	}
}

// member reports whether a node is one.
func (t *table) member(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	return p != nil && p.listed
}

// where returns a member's addresses; the UDP one is nil until it is resolved.
func (t *table) where(id string) (address string, udp *net.UDPAddr, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	if p == nil || !p.listed {
		return "", nil, false
	}
	return p.Address, p.udp, true
}

// count returns the number of members.
func (t *table) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, p := range t.peers {
		if p.listed {
			n++
		}
	}
	return n
}

// move sets the state of a node if decide agrees, and tells of it.
func (t *table) move(id string, decide func(p *peer) (api.GossipState, bool)) {
	t.mu.Lock()
	p := t.peers[id]
	if p == nil || id == t.self {
		t.mu.Unlock()
		return
	}
	state, ok := decide(p)
	if !ok || state == p.state {
		t.mu.Unlock()
		return
	}
	if p.state == api.GossipSuspect {
		t.suspects.Add(-1)
	}
	if state == api.GossipSuspect {
		t.suspects.Add(1)
	}
	p.state, p.since = state, time.Now()
	p.nextTry, p.pause = time.Time{}, 0
	if !p.up() {
		p.udp = literalUDP(p.Address) // a name may stand for another address now
	}
	listed, m := p.listed, p.Member
	if !listed && !p.up() {
		delete(t.peers, id)
	}
	close(t.changed)
	t.changed = make(chan struct{})
	t.mu.Unlock()
	if listed {
		t.told(m, state)
	}
}

// forget makes the state of all peers unknown, when memberlist begins anew.
func (t *table) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, p := range t.peers {
		p.state, p.since, p.incarnation = api.GossipUnknown, time.Time{}, 0
		p.nextTry, p.pause = time.Time{}, 0
		if !p.listed {
			delete(t.peers, id)
		}
	}
	t.suspects.Store(0)
	close(t.changed)
	t.changed = make(chan struct{})
}

// learn keeps a record if it is newer than what is known, and says whether it was.
func (t *table) learn(r record, s Summary, age time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[r.id]
	if p == nil || !p.listed || !p.made.IsZero() && r.number <= p.number {
		return false
	}
	p.number, p.summary, p.raw, p.made = r.number, s, r.summary, time.Now().Add(-age)
	return true
}

// state returns all records for an exchange.
func (t *table) state() []aged {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []aged
	for id, p := range t.peers {
		if p.listed && !p.made.IsZero() {
			out = append(out, aged{record{id, p.number, p.raw}, time.Since(p.made)})
		}
	}
	return out
}

// list returns the members in order of name.
func (t *table) list() []Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Peer, 0, len(t.peers))
	for _, p := range t.peers {
		if !p.listed {
			continue
		}
		one := Peer{Member: p.Member, State: p.state, Since: p.since, Self: p.ID == t.self}
		if one.Self {
			one.State = api.GossipAlive
		}
		if !p.made.IsZero() {
			one.Known, one.Summary, one.SummaryAge = true, p.summary, time.Since(p.made)
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b Peer) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID))
	})
	return out
}

// due returns some peers that should be asked to let this node in: those that
// are not alive, each after a pause that doubles, in random order.
func (t *table) due(now time.Time, most int, pause func(last time.Duration) time.Duration) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Member
	for id, p := range t.peers { // in random order
		if len(out) == most {
			break
		}
		if !p.listed || p.up() || id == t.self || now.Before(p.nextTry) {
			continue
		}
		p.pause = pause(p.pause)
		p.nextTry = now.Add(p.pause)
		out = append(out, p.Member)
	}
	return out
}

// unresolved returns members whose address is a name that is not resolved.
func (t *table) unresolved(most int) []Member {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Member
	for _, p := range t.peers {
		if p.listed && p.udp == nil && p.ID != t.self && len(out) < most {
			out = append(out, p.Member)
		}
	}
	return out
}

// resolved notes what a member's address stands for, unless it changed meanwhile.
func (t *table) resolved(m Member, udp *net.UDPAddr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[m.ID]; p != nil && p.Address == m.Address {
		p.udp = udp
	}
}
