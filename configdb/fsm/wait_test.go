// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"fmt"
	"testing"
)

func woken(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Exactly those are woken below whose prefix something changed.
func TestAChangeWakesWhomItConcerns(t *testing.T) {
	keys := []string{"a", "a/1", "a/2", "b", "\xff"}
	for _, prefix := range []string{"", "a", "a/", "a/1", "a/1/", "a/2", "b", "c", "\xff"} {
		for i, k := range keys {
			s := New()
			apply(t, s, entry{1, 1, put("first", "", RequestID{})})
			changed, stop := s.Await(prefix)
			apply(t, s, entry{2, 1, put(k, "", RequestID{})})
			if want := bytes.HasPrefix([]byte(k), []byte(prefix)); woken(changed) != want {
				t.Errorf("key %d, %q, wakes %q: %v", i, k, prefix, !want)
			}
			s.Skip(3, 1)
			stop()
			_, stop = s.Await(prefix)
			stop()
			if p := &s.feed.prefixes; len(p.waiting) != 0 || len(p.lengths) != 0 {
				t.Errorf("%q is still waited for: %v, %v", prefix, p.waiting, p.lengths)
			}
		}
	}
}

// One of several who waits no longer takes nothing from the others.
func TestWaitersOfOnePrefix(t *testing.T) {
	s := New()
	one, stopOne := s.Await("a/")
	two, stopTwo := s.Await("a/")
	stopOne()
	apply(t, s, entry{1, 1, put("a/1", "", RequestID{})})
	if !woken(one) || !woken(two) {
		t.Error("not woken")
	}
	three, stopThree := s.Await("a/")
	stopTwo() // of the round before
	apply(t, s, entry{2, 1, put("b", "", RequestID{})})
	if woken(three) {
		t.Error("woken by another key")
	}
	apply(t, s, entry{3, 1, put("a/1", "", RequestID{})})
	if !woken(three) {
		t.Error("forgotten with one who had been woken before")
	}
	stopThree()
	if p := &s.feed.prefixes; len(p.waiting) != 0 || len(p.lengths) != 0 {
		t.Errorf("left: %v, %v", p.waiting, p.lengths)
	}
}

func TestAllAreWokenNowAndThen(t *testing.T) {
	s := New()
	changed, stop := s.Await("quiet/")
	defer stop()
	var c Command
	for i := range MaxTxnOps {
		c.Txns = append(c.Txns, Txn{Ops: []Op{{Key: fmt.Sprintf("noise/%d", i)}}})
	}
	for i := range uint64(wakeEvery / MaxTxnOps) {
		if woken(changed) {
			t.Fatalf("woken by entry %d", i)
		}
		apply(t, s, entry{i + 1, 1, c})
	}
	if !woken(changed) {
		t.Errorf("not woken by %d changes", wakeEvery)
	}
	changed, stop = s.Await("quiet/")
	defer stop()
	if err := s.Restore(bytes.NewReader(snapshotOf(t, smallState(t)))); err != nil {
		t.Fatal(err)
	}
	if !woken(changed) {
		t.Error("not woken by a snapshot")
	}
}
