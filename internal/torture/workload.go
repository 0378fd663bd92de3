// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// What a client asks for.
type What string

// The operations on a register.
const (
	Get       What = "get"
	StaleGet  What = "stale-get"
	Put       What = "put"
	PutIf     What = "put-if"
	Create    What = "create"
	Delete    What = "delete"
	DeleteIf  What = "delete-if"
	weightAll      = 100
)

// mix is how often each is asked for, of weightAll.
var mix = []struct {
	what   What
	weight int
}{{Get, 34}, {StaleGet, 8}, {Put, 22}, {PutIf, 16}, {Create, 10}, {Delete, 6}, {DeleteIf, 4}}

// Registers: keys live for a while and make room for new ones, so that the
// history of each is short.
const (
	// RawSlots keys at a time, each for RawEpoch.
	RawSlots = 8
	RawEpoch = 4 * time.Second
	// RuleSlots objects at a time, each for RuleEpoch.
	RuleSlots = 4
	RuleEpoch = 30 * time.Second
	// rulePer100 operations are on objects, the rest on raw keys.
	rulePer100 = 25
	// oldPer100 reads are of a key of an earlier epoch.
	oldPer100 = 10
	// elsewherePer100 operations do not go to the client's own node.
	elsewherePer100 = 20
	pauseMost       = 250 * time.Millisecond
)

// Timeouts of the HTTP requests, of which each client has one. The longest is
// beyond every deadline of the server.
var Timeouts = []time.Duration{2 * time.Second, 5 * time.Second, 14 * time.Second}

// Ask is one operation that a client is to do.
type Ask struct {
	N    int
	What What
	// Rule: the register is an object; otherwise a raw key.
	Rule bool
	Slot int
	// Old is how many epochs ago its time was; 0: now.
	Old int
	// Elsewhere is the distance from the client's own node to the one to ask.
	Elsewhere int
	Pause     time.Duration
}

// Stream is what one client asks for, one after the other.
type Stream struct {
	rng    *rand.Rand
	client int
	nodes  int
	n      int
}

// NewStream returns the stream of a client.
func NewStream(seed uint64, client, nodes int) *Stream {
	return &Stream{rng: rand.New(rand.NewPCG(seed, clientStream+uint64(client))), client: client, nodes: nodes}
}

// Next returns the next operation. It draws the same numbers whatever the
// operation, so that nothing shifts.
func (s *Stream) Next() Ask {
	a := Ask{N: s.n}
	s.n++
	w := s.rng.IntN(weightAll)
	rule, slot, old, elsewhere := s.rng.IntN(100), s.rng.IntN(RawSlots*RuleSlots), s.rng.IntN(100), s.rng.IntN(100)
	away, back := s.rng.IntN(max(1, s.nodes-1)), s.rng.IntN(8)
	a.Pause = time.Duration(s.rng.Int64N(int64(pauseMost)))
	for _, m := range mix {
		if w -= m.weight; w < 0 {
			a.What = m.what
			break
		}
	}
	a.Rule = rule < rulePer100
	if a.Rule {
		a.Slot = slot % RuleSlots
	} else {
		a.Slot = slot % RawSlots
	}
	if old < oldPer100 && !a.Rule && a.What == Get {
		a.Old = 1 + back
	}
	if elsewhere < elsewherePer100 && s.nodes > 1 {
		a.Elsewhere = 1 + away
	}
	return a
}

// Value is unique to a client's operation.
func (s *Stream) Value(a Ask) string { return fmt.Sprintf("c%d-%d", s.client, a.N) }

// RawPrefix is where the raw registers are.
const RawPrefix = "torture/"

// RulePrefix begins the names of the objects.
const RulePrefix = "torture-"

// Register returns the name of the register that an operation is about, at a
// time since the beginning.
func Register(a Ask, now time.Duration) string {
	if a.Rule {
		return RuleName(int(now/RuleEpoch), a.Slot)
	}
	return fmt.Sprintf("%s%05d/%d", RawPrefix, max(0, int(now/RawEpoch)-a.Old), a.Slot)
}

// RuleName is the name of the object in a slot of an epoch.
func RuleName(epoch, slot int) string { return fmt.Sprintf("%s%05d-%d", RulePrefix, epoch, slot) }
