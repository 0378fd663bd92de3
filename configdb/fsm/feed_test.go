// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
)

func TestChangedKeys(t *testing.T) {
	s := New()
	apply(t, s, entry{1, 1, put("a/1", "", RequestID{})})
	apply(t, s, entry{2, 1, put("b", "", RequestID{})})
	c := put("a/2", "", RequestID{})
	c.Txns = append(c.Txns, put("a/1", "", RequestID{}).Txns[0])
	apply(t, s, entry{4, 1, c})
	apply(t, s, entry{5, 1, Command{Txns: []Txn{{Ops: []Op{{Key: "a/2", Delete: true}}}}}})
	apply(t, s, entry{6, 1, Command{Txns: []Txn{{Require: []Precondition{{CheckExists, "none", 0}}, Ops: []Op{{Key: "a/3"}}}}}})
	for _, x := range []struct {
		prefix   string
		from, to uint64
		want     string
	}{
		{"", 0, 6, "[b a/1 a/2]"},
		{"a/", 0, 6, "[a/1 a/2]"},
		{"a/", 0, 3, "[a/1]"},
		{"a/", 1, 4, "[a/1 a/2]"},
		{"", 4, 6, "[a/2]"},
		{"", 5, 6, "[]"},
		{"", 6, 6, "[]"},
		{"", 100, 200, "[]"},
		{"zz", 0, 6, "[]"},
	} {
		got, err := s.ChangedKeys(x.prefix, x.from, x.to)
		if err != nil || fmt.Sprint(got) != x.want {
			t.Errorf("%q after %d up to %d: %v, %v; want %s", x.prefix, x.from, x.to, got, err, x.want)
		}
	}
}

// The ring is bounded; who is behind it is told, at the right revision.
func TestHistoryIsBounded(t *testing.T) {
	s := New()
	var c Command
	for i := range MaxTxnOps {
		c.Txns = append(c.Txns, Txn{Ops: []Op{{Key: fmt.Sprintf("k%04d", i)}}})
	}
	data := c.Encode()
	rounds := uint64(2*HistoryLength/MaxTxnOps + 1)
	for i := range rounds {
		if _, err := s.Apply(i+1, 1, data); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.feed.ring); n != HistoryLength || cap(s.feed.ring) > 2*HistoryLength {
		t.Errorf("the ring holds %d of %d", n, cap(s.feed.ring))
	}
	first := rounds - HistoryLength/MaxTxnOps
	if _, err := s.ChangedKeys("", first-1, rounds); !errors.Is(err, ErrCompacted) {
		t.Errorf("from %d: %v", first-1, err)
	}
	keys, err := s.ChangedKeys("", first, rounds)
	if err != nil || len(keys) != MaxTxnOps || !slices.IsSorted(keys) {
		t.Errorf("from %d: %d keys, %v", first, len(keys), err)
	}
}

func TestRestoreCompactsTheHistory(t *testing.T) {
	s := New()
	apply(t, s, entry{1, 1, put("gone", "", RequestID{})})
	changed := s.Changed()
	if err := s.Restore(bytes.NewReader(snapshotOf(t, smallState(t)))); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("watchers were not woken")
	}
	if _, err := s.ChangedKeys("", 1, 3); !errors.Is(err, ErrCompacted) {
		t.Errorf("changes across a restored snapshot: %v", err)
	}
	if _, err := s.ChangedKeys("", 3, 3); err != nil {
		t.Errorf("from the snapshot on: %v", err)
	}
}

// Readers see one revision, whole, however many entries are applied meanwhile.
func TestViewsAreImmutable(t *testing.T) {
	const keys, rounds = 200, 300
	s := New()
	write := func(i uint64) {
		var c Command
		for k := range keys {
			op := Op{Key: fmt.Sprintf("k%03d", k), Value: fmt.Append(nil, i), Delete: i%7 == 6}
			c.Txns = append(c.Txns, Txn{Ops: []Op{op}})
		}
		apply(t, s, entry{i, 1, c})
	}
	write(1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				v := s.View()
				n := 0
				for e := range v.Scan("k", "") {
					if e.Revision != v.Revision() || string(e.Value) != fmt.Sprint(v.Revision()) {
						t.Errorf("a view at %d shows %+v", v.Revision(), e)
						return
					}
					n++
				}
				if n != v.Len() || (n != 0 && n != keys) {
					t.Errorf("a view at %d has %d keys, said %d", v.Revision(), n, v.Len())
				}
				if _, err := s.ChangedKeys("k", v.Revision()-1, v.Revision()); err != nil {
					t.Error(err)
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for i := uint64(2); i < rounds; i++ {
		write(i)
	}
	close(stop)
	wg.Wait()
}

// A value keeps neither the log entry nor the restored snapshot alive.
func TestValuesDoNotRetainTheirEntry(t *testing.T) {
	s := New()
	collected := make(chan struct{})
	func() {
		c := put("small", "x", RequestID{})
		c.Txns = append(c.Txns, put("big", string(make([]byte, MaxValueBytes)), RequestID{}).Txns[0])
		data := c.Encode()
		runtime.AddCleanup(&data[0], func(done chan struct{}) { close(done) }, collected)
		apply(t, s, entry{1, 1, Command{}})
		if _, err := s.Apply(2, 1, data); err != nil {
			t.Fatal(err)
		}
	}()
	for range 50 {
		runtime.GC()
		select {
		case <-collected:
			if e, _ := s.View().Get("small"); string(e.Value) != "x" {
				t.Errorf("value %q", e.Value)
			}
			return
		default:
			runtime.Gosched()
		}
	}
	t.Error("the entry is still in memory though only its values are needed")
}

func TestScanCanStopEarly(t *testing.T) {
	s := smallState(t)
	for e := range s.View().Scan("", "") {
		if e.Key != "key/a" {
			t.Errorf("went on to %q", e.Key)
		}
		break
	}
}
