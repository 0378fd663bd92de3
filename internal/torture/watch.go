// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"fmt"

	"github.com/muster-vm/muster/internal/linear"
)

// Seen is one message of a watch on one node.
type Seen struct {
	// Conn counts the connections; Since is where this one was to resume, 0
	// for the whole set.
	Conn  int
	Since uint64
	// Type is put, delete, synced or relist.
	Type string
	// Kind of the object, its ID and, for puts, its revision.
	Kind     string
	ID       string
	Revision uint64
	// Target is the register that the object is, or that an audit event is
	// about; Value is what the object holds.
	Target, Value string
	// Resume is the revision from which a client may resume after it.
	Resume uint64
}

// Kinds of objects that a campaign watches.
const (
	WatchedRule  = "rule"
	WatchedEvent = "event"
)

// WatchState is what a watch amounts to.
type WatchState struct {
	// Events are the audit events seen, by revision of the change.
	Events map[uint64]map[string]string // revision → event ID → target
	// Rules are the objects at the end, by register.
	Rules map[string]linear.Cell
	// Relists is how often the watch had to begin anew.
	Relists    int
	Violations []linear.Violation
}

// Replay follows the messages of one node's watch in the order in which they
// came and checks that it never goes back.
func Replay(node string, seen []Seen) *WatchState {
	w := &WatchState{Events: map[uint64]map[string]string{}, Rules: map[string]linear.Cell{}}
	byID, owner := map[string]string{}, map[string]string{} // object → register, and back
	conn, last, lastEvent := -1, uint64(0), uint64(0)
	var listed map[string]bool // registers of a set that is coming in; nil outside
	order := func(s Seen, format string, args ...any) {
		w.Violations = append(w.Violations, linear.Violation{Kind: WatchOrder, Group: node,
			Text: fmt.Sprintf("connection %d, %s %s %s: ", s.Conn, s.Type, s.Kind, s.ID) + fmt.Sprintf(format, args...)})
	}
	for _, s := range seen {
		if s.Conn != conn {
			conn, last, lastEvent, listed = s.Conn, s.Since, 0, nil
			if s.Since == 0 {
				listed = map[string]bool{}
			}
		}
		switch s.Type {
		case "relist":
			w.Relists++
			last, lastEvent, listed = 0, 0, map[string]bool{}
			continue
		case "synced":
			if listed != nil {
				for name := range w.Rules {
					if !listed[name] {
						delete(w.Rules, name)
					}
				}
				listed = nil
			}
		}
		if s.Resume < last {
			order(s, "its revision %d is before %d", s.Resume, last)
		}
		last = max(last, s.Resume)
		switch {
		case s.Type == "put" && s.Kind == WatchedEvent:
			// Events never change, so their own revisions must rise too.
			if s.Revision < lastEvent {
				order(s, "the event of revision %d comes after that of %d", s.Revision, lastEvent)
			}
			lastEvent = s.Revision
			if w.Events[s.Revision] == nil {
				w.Events[s.Revision] = map[string]string{}
			}
			w.Events[s.Revision][s.ID] = s.Target
		case s.Type == "put" && s.Kind == WatchedRule:
			byID[s.ID], owner[s.Target] = s.Target, s.ID
			if old := w.Rules[s.Target]; old.Revision > s.Revision {
				order(s, "%s was at revision %d and now is at %d", s.Target, old.Revision, s.Revision)
			}
			w.Rules[s.Target] = linear.Cell{Key: s.Target, Exists: true, Value: s.Value, Revision: s.Revision}
			if listed != nil {
				listed[s.Target] = true
			}
		case s.Type == "delete" && s.Kind == WatchedRule:
			// The name may have been taken by another object since.
			if name, known := byID[s.ID]; known && owner[name] == s.ID {
				delete(w.Rules, name)
			}
			delete(byID, s.ID)
		}
	}
	w.Violations = few(w.Violations)
	return w
}

// CheckWatch checks a watch against what was acknowledged and what is there at
// the end: every change has one audit event, which comes with it. forgotten is
// the revision up to which old events may have been removed before the watch
// began anew.
func CheckWatch(node string, w *WatchState, acks []Ack, final map[string]linear.Cell, forgotten uint64) []linear.Violation {
	var out []linear.Violation
	tell := func(kind linear.ViolationKind, format string, args ...any) {
		out = append(out, linear.Violation{Kind: kind, Group: node, Text: fmt.Sprintf(format, args...)})
	}
	for _, a := range acks {
		n := 0
		for _, target := range w.Events[a.Revision] {
			if target == a.Key {
				n++
			}
		}
		switch {
		case n == 0 && (w.Relists == 0 || a.Revision > forgotten):
			tell(WatchGap, "the change of %s that was acknowledged at revision %d was not seen", a.Key, a.Revision)
		case n > 1:
			tell(linear.DoubleApply, "%d events about %s at revision %d", n, a.Key, a.Revision)
		}
	}
	for name, want := range final {
		if got := w.Rules[name]; got.Value != want.Value || got.Revision != want.Revision {
			tell(WatchWrong, "%s: the watch has %q @%d, the cluster %q @%d", name, got.Value, got.Revision, want.Value, want.Revision)
		}
	}
	for name, got := range w.Rules {
		if _, ok := final[name]; !ok {
			tell(WatchWrong, "%s: the watch has %q @%d, the cluster nothing", name, got.Value, got.Revision)
		}
	}
	return few(out)
}
