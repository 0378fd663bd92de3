// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
)

// Entry, View and the limits are the state machine's own.
type (
	// Entry is one key with its value and revisions.
	Entry = fsm.Entry
	// View is the whole state at one revision, immutable.
	View = fsm.View
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrConflict: a precondition did not hold; nothing was changed. The error
	// is a *ConflictError.
	ErrConflict = errors.New("changed meanwhile")
	// ErrNoQuorum: there is no leader with a majority, so nothing was changed.
	ErrNoQuorum = errors.New("no quorum: the cluster has no leader with a majority of its voters")
	// ErrUncertain: the deadline passed after the transaction was handed on;
	// it may or may not take effect. Read before you try again.
	ErrUncertain = errors.New("outcome unknown: no answer within the deadline")
	// ErrCompacted: a watch is too far behind and must begin anew.
	ErrCompacted = fsm.ErrCompacted
	// ErrTooLarge: a key, value or transaction is over a limit.
	ErrTooLarge = fsm.ErrTooLarge
	// ErrDiskFull: this node's disk takes no more changes, so that it neither
	// writes nor knows the newest state; the others do. Nothing was changed.
	ErrDiskFull = errors.New("the disk of this node's configuration database is full; use another node, and free some space here")
	// ErrClosed: the database was closed.
	ErrClosed = errors.New("configuration database is closed")
)

// ConflictError says which precondition did not hold.
type ConflictError struct {
	Precondition fsm.Precondition
	// Actual revision of the key (0: absent), or the actual term.
	Actual uint64
	// Revision at which the transaction was decided.
	Revision uint64
}

// Error implements error.
func (e *ConflictError) Error() string {
	return fmt.Sprintf("changed meanwhile: %s, found %d", e.Precondition, e.Actual)
}

// Is makes errors.Is(err, ErrConflict) true.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// DB is what modules see of the database, whether one replica in a process of
// its own or a test's.
type DB interface {
	// Local returns this node's replica as it is, without asking anyone.
	Local() *View
	// View returns a linearizable view: everything acknowledged before the
	// call is in it.
	View(ctx context.Context) (*View, error)
	// Txn carries out a transaction and returns its revision once this node
	// has applied it.
	Txn(ctx context.Context, t *Txn) (uint64, error)
	// WaitRevision waits until this node has applied a revision and returns a
	// view that contains it.
	WaitRevision(ctx context.Context, revision uint64) (*View, error)
	// Watch follows the keys below prefix. From 0 it begins with the whole set;
	// from a revision it begins with the changes after it.
	Watch(prefix string, from uint64) *Watch
	// Staleness returns how long ago this node last knew itself up to date with
	// the leader; known is false if it never did since it started.
	Staleness() (age time.Duration, known bool)
}

// Txn collects preconditions and changes. The zero value is ready for use; a
// Txn is used once, by one goroutine.
type Txn struct {
	// Actor is recorded with the change: who, by name, asked for it.
	Actor string
	// Source and Note are recorded in the history: from where it was asked for,
	// such as "api 10.0.0.5" (see WithSource), and why, if there is more to say.
	Source, Note string
	// Time of the history's records; the time of the proposal when zero.
	Time    time.Time
	t       fsm.Txn
	history []pendingRecord
	node    string // name of the node that proposes it
	joined  *joined
	// done holds what callers want to happen after a commit.
	done []func(revision uint64)
}

// RequireRevision makes the transaction fail unless key was last changed at
// revision; 0 requires that the key does not exist.
func (t *Txn) RequireRevision(key string, revision uint64) {
	t.t.Require = append(t.t.Require, fsm.Precondition{Check: fsm.CheckRevision, Key: key, Revision: revision})
}

// RequireExists makes the transaction fail unless key exists.
func (t *Txn) RequireExists(key string) {
	t.t.Require = append(t.t.Require, fsm.Precondition{Check: fsm.CheckExists, Key: key})
}

// RequireEmpty makes the transaction fail if any key begins with prefix.
func (t *Txn) RequireEmpty(prefix string) {
	t.t.Require = append(t.t.Require, fsm.Precondition{Check: fsm.CheckEmpty, Key: prefix})
}

// RequireTerm makes the transaction fail unless it is committed in this Raft
// term. Services of the leader use it, so that a deposed leader's late
// decision cannot land.
func (t *Txn) RequireTerm(term uint64) {
	t.t.Require = append(t.t.Require, fsm.Precondition{Check: fsm.CheckTerm, Revision: term})
}

// Put sets a key. The last change of a key in one transaction wins.
func (t *Txn) Put(key string, value []byte) { t.set(fsm.Op{Key: key, Value: value}) }

// Delete removes a key; it is no error if the key does not exist.
func (t *Txn) Delete(key string) { t.set(fsm.Op{Key: key, Delete: true}) }

func (t *Txn) set(op fsm.Op) {
	for i := range t.t.Ops {
		if t.t.Ops[i].Key == op.Key {
			t.t.Ops[i] = op
			return
		}
	}
	t.t.Ops = append(t.t.Ops, op)
}

// within takes out of the transaction what the cluster's level does not have
// yet.
func (t *Txn) within(levels *feature.Reader, v *View) {
	level := levels.Level(v)
	for _, op := range t.t.Ops {
		if level == 0 && !op.Delete && strings.HasPrefix(op.Key, Clusters.SpecPrefix()) {
			level = feature.LevelOf(op.Value) // the transaction that founds it
		}
	}
	if !feature.History.At(level) {
		t.history = nil
	}
}

// Empty reports whether the transaction would change nothing.
func (t *Txn) Empty() bool { return len(t.t.Ops) == 0 }

// onCommit registers f to be called with the revision after a commit.
func (t *Txn) onCommit(f func(revision uint64)) { t.done = append(t.done, f) }

func (t *Txn) committed(revision uint64) {
	for _, f := range t.done {
		f(revision)
	}
}

// Transact runs f on a fresh view and commits what f put into the transaction,
// again on fresh state as long as it conflicts, at most attempts times. It is
// the way to write a decision that depends on what was read.
func Transact(ctx context.Context, db DB, actor string, attempts int, f func(v *View, t *Txn) error) (uint64, error) {
	var conflict error
	v := db.Local()
	for range max(1, attempts) {
		t := &Txn{Actor: actor, Source: SourceOf(ctx)}
		if err := f(v, t); err != nil {
			return v.Revision(), err
		}
		if t.Empty() {
			return v.Revision(), nil
		}
		rev, err := db.Txn(ctx, t)
		var c *ConflictError
		if !errors.As(err, &c) {
			return rev, err
		}
		conflict = err
		if v, err = db.WaitRevision(ctx, c.Revision); err != nil {
			return 0, err
		}
	}
	return 0, conflict
}

// Propose validates a transaction, hands it to commit and turns the outcome
// into the result of DB.Txn. Implementations of DB share it.
func Propose(t *Txn, commit func(*fsm.Txn) (fsm.Outcome, error)) (uint64, error) {
	t.t.Actor = t.Actor
	t.seal()
	if err := t.t.Validate(); err != nil {
		return 0, err
	}
	out, err := commit(&t.t)
	if err != nil {
		return 0, err
	}
	switch out.Status {
	case fsm.Applied:
		t.committed(out.Revision)
		return out.Revision, nil
	case fsm.Conflict:
		if out.Failed < 0 || out.Failed >= len(t.t.Require) {
			return 0, fmt.Errorf("transaction ended with a conflict in precondition %d of %d", out.Failed, len(t.t.Require))
		}
		return 0, &ConflictError{Precondition: t.t.Require[out.Failed], Actual: out.Actual, Revision: out.Revision}
	case fsm.SessionUnknown:
		return 0, fmt.Errorf("%w: the request's session is no longer known", ErrUncertain)
	}
	return 0, fmt.Errorf("transaction ended with unexpected outcome %d", out.Status)
}
