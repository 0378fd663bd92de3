// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// patience bounds the waits on the real network. How soon things are seen is looked at in
// bubbles, whose clocks go on only when all have done what there is to do.
const patience = time.Minute

func TestMembersSeeEachOtherAndTheirLoad(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	for i, m := range f.nodes {
		m.load.Store(uint64(i + 7))
	}
	f.up()
	for _, m := range f.nodes {
		for _, o := range f.nodes {
			f.eventually(patience, "the load of "+o.id+" is known at "+m.id, func() error {
				p := m.peer(o)
				if !p.Known || p.Summary.VMs != o.load.Load() || p.Summary.Version != "0.1" || p.Summary.CPUPercent != 1.5 {
					return fmt.Errorf("it is %+v", p)
				}
				if p.SummaryAge < 0 || p.SummaryAge > 15*time.Second {
					return fmt.Errorf("its age is %v", p.SummaryAge)
				}
				return nil
			})
		}
		if p := m.peer(m); !p.Self || p.State != api.GossipAlive {
			t.Errorf("%s of itself: %+v", m.id, p)
		}
	}
	// A newer summary replaces the older one.
	f.nodes[0].load.Store(99)
	f.eventually(patience, "the newer load of node-1 is known", func() error {
		if got := f.nodes[2].peer(f.nodes[0]).Summary.VMs; got != 99 {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
}

// With its links cut a node is like one that was stopped.
func TestSuspectIsSeen(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	gone, rest := f.nodes[2], f.nodes[:2]
	changed := f.nodes[0].Changed()
	began := time.Now()
	f.split(f.nodes[2:], rest)
	f.nodes[0].waits(patience, gone, api.GossipSuspect)
	t.Logf("suspect after %v", time.Since(began))
	select {
	case <-changed:
	default:
		t.Error("the change was not told")
	}
	f.nodes[1].waits(patience, gone, api.GossipSuspect, api.GossipDead)
	for _, m := range rest {
		m.waits(patience, gone, api.GossipDead)
	}
	t.Logf("dead after %v", time.Since(began))
	if p := f.nodes[0].peer(gone); p.Since.Before(began) || !p.Known {
		t.Errorf("the dead: %+v", p)
	}
	f.mend()
	for _, m := range rest {
		m.waits(patience, gone, api.GossipAlive)
		gone.waits(patience, m, api.GossipAlive)
	}
}

// Who objects in time is never called dead.
func TestSuspectThatObjectsIsAliveAgain(t *testing.T) {
	t.Parallel()
	inBubble(t, 3, func(t *testing.T, f *flock) {
		f.up()
		gone, rest := f.nodes[2], f.nodes[:2]
		f.split(f.nodes[2:], rest)
		f.nodes[0].waits(6*time.Second, gone, api.GossipSuspect)
		f.mend()
		for _, m := range rest {
			t.Logf("alive after %v", m.waits(10*time.Second, gone, api.GossipAlive))
			if p := m.peer(gone); p.Since.IsZero() {
				t.Errorf("%+v", p)
			}
		}
	})
}

func TestPartitionHeals(t *testing.T) {
	t.Parallel()
	inBubble(t, 5, func(t *testing.T, f *flock) {
		f.up()
		a, b := f.nodes[:2], f.nodes[2:]
		f.split(a, b)
		for _, x := range a {
			for _, y := range b {
				x.waits(20*time.Second, y, api.GossipDead)
				y.waits(20*time.Second, x, api.GossipDead)
			}
		}
		for _, side := range [][]*member{a, b} {
			for _, x := range side {
				for _, y := range side {
					if s := x.peer(y).State; s != api.GossipAlive {
						t.Errorf("%s has %s of its own side as %s", x.id, y.id, s)
					}
				}
			}
		}
		f.mend()
		for _, x := range a {
			for _, y := range b {
				x.waits(20*time.Second, y, api.GossipAlive)
				y.waits(20*time.Second, x, api.GossipAlive)
			}
		}
	})
}

func TestLeaveAndReturn(t *testing.T) {
	t.Parallel()
	inBubble(t, 3, func(t *testing.T, f *flock) {
		f.up()
		gone := f.nodes[2]
		before := gone.nextNumber(0)
		gone.stop()
		for _, m := range f.nodes[:2] {
			m.waits(3*time.Second, gone, api.GossipLeft)
		}
		// The same process runs it again, as its supervisor does, and it leaves again.
		gone.start()
		for _, m := range f.nodes[:2] {
			m.waits(10*time.Second, gone, api.GossipAlive)
			gone.waits(10*time.Second, m, api.GossipAlive)
		}
		gone.stop()
		for _, m := range f.nodes[:2] {
			m.waits(3*time.Second, gone, api.GossipLeft)
		}
		// A daemon that begins anew counts from one, and its clock went back: it is
		// believed all the same.
		gone.Service = gone.newService()
		gone.last = before - 1000
		gone.load.Store(55)
		gone.SetMembers(f.members())
		if err := gone.SetKeys(Keys{Primary: secret(1)}); err != nil {
			t.Fatal(err)
		}
		gone.start()
		for _, m := range f.nodes[:2] {
			m.waits(10*time.Second, gone, api.GossipAlive)
			f.eventually(3*summaryInterval, "the new load is known", func() error {
				if got := m.peer(gone).Summary.VMs; got != 55 {
					return fmt.Errorf("it is %d", got)
				}
				return nil
			})
		}
	})
}

// A key is needed besides the certificate.
func TestWrongKey(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	stranger := f.nodes[2]
	if err := stranger.SetKeys(Keys{Primary: secret(2)}); err != nil {
		t.Fatal(err)
	}
	for _, m := range f.nodes {
		m.start()
	}
	f.nodes[0].waits(patience, f.nodes[1], api.GossipAlive)
	f.nodes[1].waits(patience, f.nodes[0], api.GossipAlive)
	sent := stranger.tlsBytes.Load()
	f.eventually(patience, "the stranger tried", func() error {
		if stranger.tlsBytes.Load() < sent+2000 {
			return fmt.Errorf("it sent %d bytes", stranger.tlsBytes.Load())
		}
		return nil
	})
	for _, m := range f.nodes[:2] {
		if p := m.peer(stranger); p.State != api.GossipUnknown || p.Known {
			t.Errorf("%s believes %+v", m.id, p)
		}
		if p := stranger.peer(m); p.State != api.GossipUnknown || p.Known {
			t.Errorf("the stranger knows %+v", p)
		}
	}
	// With the right key it is one of them.
	if err := stranger.SetKeys(Keys{Primary: secret(1)}); err != nil {
		t.Fatal(err)
	}
	for _, m := range f.nodes[:2] {
		m.waits(patience, stranger, api.GossipAlive)
	}
}

// A removed node has a good certificate and, for a while, the key.
func TestRemovedNode(t *testing.T) {
	t.Parallel()
	inBubble(t, 4, func(t *testing.T, f *flock) {
		f.up()
		gone, rest := f.nodes[3], f.nodes[:3]
		for _, m := range rest {
			m.SetMembers(f.members()[:3])
			if p := m.peer(gone); p.ID != "" {
				t.Errorf("%s still lists %+v", m.id, p)
			}
		}
		for _, m := range rest {
			gone.waits(20*time.Second, m, api.GossipDead)
		}
		// It goes on trying, and nobody believes it.
		tried := gone.tlsBytes.Load()
		f.eventually(20*time.Second, "the removed node tried", func() error {
			if gone.tlsBytes.Load() < tried+2000 {
				return fmt.Errorf("it sent %d bytes", gone.tlsBytes.Load()-tried)
			}
			return nil
		})
		for _, m := range rest {
			if len(m.Peers()) != 3 {
				t.Errorf("%s lists %v", m.id, m.Peers())
			}
			for _, o := range rest {
				if s := m.peer(o).State; s != api.GossipAlive {
					t.Errorf("%s has %s as %s", m.id, o.id, s)
				}
			}
			f.eventually(20*time.Second, m.id+" has forgotten it", func() error {
				m.table.mu.Lock()
				defer m.table.mu.Unlock()
				if p := m.table.peers[gone.id]; p != nil {
					return fmt.Errorf("it has %+v", p)
				}
				return nil
			})
		}
		// Named again, it is back.
		for _, m := range rest {
			m.SetMembers(f.members())
		}
		for _, m := range rest {
			m.waits(40*time.Second, gone, api.GossipAlive)
		}
	})
}

// On a machine that is short of CPU somebody may be suspect for a moment; in a
// bubble nobody is.
func TestKeysChangeUnderTraffic(t *testing.T) {
	t.Parallel()
	changeKeys(newFlock(t, 3), api.GossipAlive, api.GossipSuspect)
}

// changeKeys changes the keys in steps, which every node sees at its own time.
// Nobody loses a peer meanwhile, and at the end the old key is worth nothing.
func changeKeys(f *flock, allowed ...api.GossipState) {
	f.up()
	done := make(chan struct{})
	var watch sync.WaitGroup
	for _, m := range f.nodes {
		watch.Go(func() {
			for {
				changed := m.Changed()
				for _, p := range m.Peers() {
					if !slices.Contains(allowed, p.State) {
						f.tb.Errorf("%s has %s as %s", m.id, p.ID, p.State)
					}
				}
				select {
				case <-changed:
				case <-done:
					return
				}
			}
		})
	}
	round := uint64(100)
	talk := func() { // a word of each reaches all
		round++
		for _, m := range f.nodes {
			m.load.Store(round)
			m.speak()
		}
		for _, m := range f.nodes {
			for _, o := range f.nodes {
				// A few words in a thousand miss somebody, and the next ones come
				// every 5 s.
				f.eventually(patience, fmt.Sprintf("%s hears round %d of %s", m.id, round, o.id), func() error {
					if got := m.peer(o).Summary.VMs; got != round {
						return fmt.Errorf("it has %d", got)
					}
					return nil
				})
			}
		}
	}
	old := byte(1)
	for next := byte(2); next < 5; next++ {
		for _, step := range []Keys{
			{Primary: secret(old), Others: [][]byte{secret(next)}},
			{Primary: secret(next), Others: [][]byte{secret(old)}},
			{Primary: secret(next)},
		} {
			for _, m := range f.nodes {
				if err := m.SetKeys(step); err != nil {
					f.tb.Fatal(err)
				}
				talk()
			}
		}
		old = next
	}
	close(done)
	watch.Wait()
	if got := f.nodes[0].ring.GetKeys(); len(got) != 1 || string(got[0]) != string(secret(4)) {
		f.tb.Errorf("%d keys are left", len(got))
	}
	// Who knows only an old key is out.
	out := f.nodes[len(f.nodes)-1]
	if err := out.SetKeys(Keys{Primary: secret(3)}); err != nil {
		f.tb.Fatal(err)
	}
	for _, m := range f.nodes[:len(f.nodes)-1] {
		m.waits(patience, out, api.GossipDead)
	}
}

func TestKeysAreChecked(t *testing.T) {
	t.Parallel()
	s := newFlock(t, 1).nodes[0].newService()
	for name, k := range map[string]Keys{
		"none":     {},
		"short":    {Primary: secret(1)[:16]},
		"other":    {Primary: secret(1), Others: [][]byte{nil}},
		"too many": {Primary: secret(1), Others: [][]byte{secret(2), secret(3), secret(4)}},
	} {
		if err := s.SetKeys(k); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	a, err1 := DeriveKey(secret(1), "one")
	b, err2 := DeriveKey(secret(1), "two")
	if err1 != nil || err2 != nil || len(a) != KeyBytes || string(a) == string(b) || string(a) == string(secret(1)) {
		t.Errorf("derived %x, %x: %v, %v", a, b, err1, err2)
	}
	if _, err := DeriveKey(secret(1)[:16], "one"); err == nil {
		t.Error("a short secret is taken")
	}
}

// Run waits for keys, and ends without them.
func TestWithoutKeysNothingRuns(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	late := f.nodes[1]
	late.Service = late.newService()
	late.SetMembers(f.members())
	f.nodes[0].start()
	late.start()
	f.eventually(patience, "the other tried", func() error {
		if f.nodes[0].tlsBytes.Load() == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if s := f.nodes[0].peer(late).State; s != api.GossipUnknown {
		t.Errorf("a node without a key is %s", s)
	}
	if err := late.SetKeys(Keys{Primary: secret(1)}); err != nil {
		t.Fatal(err)
	}
	f.nodes[0].waits(patience, late, api.GossipAlive)
	third := f.newMember("node-3")
	third.start()
	third.stop() // must not hang
}

// A panic ends the run with an error, and the next run works.
func TestPanicEndsTheRunOnly(t *testing.T) {
	t.Parallel()
	inBubble(t, 2, func(t *testing.T, f *flock) {
		m := f.nodes[0]
		ended := make(chan error, 1)
		go func() { ended <- m.Run(context.Background()) }()
		f.nodes[1].start()
		m.waits(10*time.Second, f.nodes[1], api.GossipAlive)
		m.contained(func() { panic("a bug") })
		var p *contain.Panic
		if err := <-ended; !errors.As(err, &p) || p.Value != "a bug" {
			t.Errorf("the run ended with %v", err)
		}
		f.nodes[1].waits(10*time.Second, m, api.GossipLeft)
		m.start()
		m.waits(10*time.Second, f.nodes[1], api.GossipAlive)
		f.nodes[1].waits(10*time.Second, m, api.GossipAlive)
	})
}
