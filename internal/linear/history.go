// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package linear

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"time"
)

// Forever is the return of an operation whose outcome never became known.
const Forever = math.MaxInt64

// Status is what a client knows about its operation.
type Status uint8

// The statuses.
const (
	// Unknown: it may have taken effect, may still do so, or never will.
	Unknown Status = iota
	// Applied: a transaction took effect, or a read was answered.
	Applied
	// Refused: a precondition did not hold.
	Refused
	// Failed: the system said that nothing was done, for a reason that is not
	// a precondition (no quorum, say).
	Failed
)

func (s Status) String() string {
	return [...]string{"unknown", "applied", "refused", "failed"}[s]
}

// CondKind is the kind of a precondition.
type CondKind uint8

// The preconditions.
const (
	// AtRevision: the key was last changed at the revision; 0: it is absent.
	AtRevision CondKind = iota
	// Exists: the key exists.
	Exists
	// Unchanged is AtRevision for a write whose revision the client has not
	// learned; Cond.Value names the value that must still be there.
	Unchanged
)

// Cond must hold for a transaction to take effect.
type Cond struct {
	Key      string
	Kind     CondKind
	Revision uint64
	Value    string
}

// Change is a put, or a delete.
type Change struct {
	Key    string
	Value  string
	Delete bool
}

// Cell is what a key held. Values are unique in a history: no two changes
// write the same one.
type Cell struct {
	Key      string
	Exists   bool
	Value    string
	Revision uint64
}

// Op is one operation of one client.
type Op struct {
	// ID is the operation's place in the history.
	ID     int
	Client int
	// Node through which it went, and Kind (get, put, …), for people.
	Node, Kind string
	// Group is the set of keys that is searched as one; all keys of the
	// operation belong to it.
	Group string
	// Call and Return are nanoseconds on one clock.
	Call, Return int64

	// Reads are the keys of a read; a transaction has none.
	Reads []string
	// Stale reads promise no place in the order: only the facts are checked.
	Stale   bool
	Require []Cond
	Changes []Change

	Status Status
	// Revision of a transaction that was applied or refused, or of the view
	// that a read was answered from; 0 if the answer did not say.
	Revision uint64
	// FailedCond is the precondition that a refusal named, or -1.
	FailedCond int
	// Cells is the answer to a read, in the order of Reads.
	Cells []Cell
	// Note is what the answer said in words, for people.
	Note string
}

// IsRead reports whether the operation changes nothing.
func (o *Op) IsRead() bool { return len(o.Reads) > 0 }

// String is one line for people.
func (o *Op) String() string {
	var b strings.Builder
	ret := "never"
	if o.Return != Forever {
		ret = fmt.Sprintf("%.3f", time.Duration(o.Return).Seconds())
	}
	fmt.Fprintf(&b, "#%d [%.3f %s] client %d at %s: %s", o.ID, time.Duration(o.Call).Seconds(), ret, o.Client, o.Node, o.Kind)
	for _, c := range o.Require {
		switch c.Kind {
		case Exists:
			fmt.Fprintf(&b, " if %s exists", c.Key)
		case Unchanged:
			fmt.Fprintf(&b, " if %s = %s", c.Key, c.Value)
		default:
			fmt.Fprintf(&b, " if %s @%d", c.Key, c.Revision)
		}
	}
	for _, c := range o.Changes {
		if c.Delete {
			fmt.Fprintf(&b, " delete %s", c.Key)
		} else {
			fmt.Fprintf(&b, " %s = %s", c.Key, c.Value)
		}
	}
	fmt.Fprintf(&b, " -> %s", o.Status)
	if o.Revision > 0 {
		fmt.Fprintf(&b, " @%d", o.Revision)
	}
	for _, c := range o.Cells {
		if c.Exists {
			fmt.Fprintf(&b, " (%s = %s @%d)", c.Key, c.Value, c.Revision)
		} else {
			fmt.Fprintf(&b, " (%s absent)", c.Key)
		}
	}
	if o.Note != "" {
		fmt.Fprintf(&b, " %q", o.Note)
	}
	return b.String()
}

// Recorder collects a history from any number of goroutines.
type Recorder struct {
	now  func() time.Duration
	mu   sync.Mutex
	last time.Duration
	ops  []*Op
}

// NewRecorder returns an empty history whose clock counts from now on. The
// clock must be one for all clients and never go back.
func NewRecorder() *Recorder {
	began := time.Now()
	return &Recorder{now: func() time.Duration { return time.Since(began) }}
}

// Now is the time on the history's clock.
func (r *Recorder) Now() time.Duration { return r.now() }

// tick is a time that no other call or return has, so that the order in which
// they came is kept even by a clock that stands still. The caller holds mu.
func (r *Recorder) tick() int64 {
	r.last = max(r.last+1, r.now())
	return int64(r.last)
}

// Begin notes the call of an operation, with its outcome unknown until End.
func (r *Recorder) Begin(o *Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.ID, o.Status, o.Return, o.FailedCond = len(r.ops), Unknown, Forever, -1
	r.ops = append(r.ops, o)
	o.Call = r.tick()
}

// End notes the return of an operation; f fills in the answer. An operation
// that ends as Unknown stays open.
func (r *Recorder) End(o *Op, f func(o *Op)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(o)
	if o.Status != Unknown {
		o.Return = r.tick()
	}
}

// Ops returns a copy of what was recorded so far.
func (r *Recorder) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Op, len(r.ops))
	for i, o := range r.ops {
		out[i] = *o
	}
	return out
}
