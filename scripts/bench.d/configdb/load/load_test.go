// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package load

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake is a cluster in memory whose calls take a while.
type fake struct {
	mu     sync.Mutex
	data   map[string]string
	dialed [Nodes]int
	takes  time.Duration
	loses  bool  // answers writes that it does not keep
	fails  error // of every write
}

type fakeSession struct{ f *fake }

func (f *fake) Dial(_ context.Context, node int) (Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dialed[node]++
	return fakeSession{f}, nil
}

func (f *fake) Leader(context.Context) (int, error) { return 0, nil }

func (s fakeSession) Put(ctx context.Context, key string, value []byte) error {
	select {
	case <-time.After(s.f.takes):
	case <-ctx.Done():
		return ctx.Err()
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if s.f.fails != nil {
		return s.f.fails
	}
	if _, twice := s.f.data[key]; twice {
		return errors.New("the key was written before")
	}
	if !s.f.loses {
		s.f.data[key] = string(value)
	}
	return nil
}

func (s fakeSession) Get(_ context.Context, key string) ([]byte, error) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return []byte(s.f.data[key]), nil
}

func (fakeSession) Close() {}

func newFake() *fake { return &fake{data: map[string]string{}, takes: time.Millisecond} }

var window = Window{Warmup: 20 * time.Millisecond, Measure: 200 * time.Millisecond}

func TestWritesCountAndSpread(t *testing.T) {
	f := newFake()
	r, err := Writes(t.Context(), f, "t", 6, All(1), window, true)
	if err != nil {
		t.Fatal(err)
	}
	if r.Count() == 0 || r.Count() > len(f.data) || r.Percentile(0.5) < f.takes || r.Gap <= 0 || r.Gap > window.Measure {
		t.Errorf("count %d of %d keys, p50 %s, gap %s", r.Count(), len(f.data), r.Percentile(0.5), r.Gap)
	}
	// Two clients each, and the look at their last writes: one each through the next node.
	if f.dialed != [Nodes]int{4, 4, 4} {
		t.Errorf("dialed %v", f.dialed)
	}
}

func TestWritesFindALostWrite(t *testing.T) {
	f := newFake()
	f.loses = true
	if _, err := Writes(t.Context(), f, "t", 2, All(1), window, false); err == nil || !strings.Contains(err.Error(), "lost write") {
		t.Errorf("err %v", err)
	}
}

func TestWritesThatFailEndTheLoad(t *testing.T) {
	f := newFake()
	f.fails = errors.New("no room")
	if _, err := Writes(t.Context(), f, "t", 2, All(1), window, false); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("err %v", err)
	}
}

func TestReadsCheckTheAnswers(t *testing.T) {
	f := newFake()
	f.takes = 0
	if err := PrepareReads(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	if len(f.data) != readKeys {
		t.Fatalf("%d keys", len(f.data))
	}
	if _, err := Reads(t.Context(), f, 4, Only(1), window); err != nil {
		t.Fatal(err)
	}
	f.data[key("read", 0, 7)] = "else"
	if _, err := Reads(t.Context(), f, 4, Only(1), window); !errors.Is(err, errWrong) {
		t.Errorf("err %v, want %v", err, errWrong)
	}
}

func TestPercentileIsTheNearestRank(t *testing.T) {
	var l []time.Duration
	for i := 100; i > 0; i-- {
		l = append(l, time.Duration(i))
	}
	r := newResult(l, time.Second)
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 50, 0.99: 99, 0.999: 100, 1: 100} {
		if got := r.Percentile(q); got != want {
			t.Errorf("percentile %v is %d, want %d", q, got, want)
		}
	}
}

func TestLongestGapCountsBothEnds(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(1000 + ms)) }
	for _, c := range []struct {
		name string
		acks []time.Time
		want time.Duration
	}{
		{"nothing came", nil, 100 * time.Millisecond},
		{"in the middle", []time.Time{at(90), at(10)}, 80 * time.Millisecond},
		{"at the begin", []time.Time{at(70), at(80)}, 70 * time.Millisecond},
		{"at the end", []time.Time{at(10), at(20)}, 80 * time.Millisecond},
	} {
		if got := longestGap(at(0), c.acks, at(100)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestValuesDiffer(t *testing.T) {
	if a, b := value(1, 2), value(1, 3); len(a) != ValueBytes || string(a) == string(b) {
		t.Errorf("values %q and %q", a, b)
	}
}
