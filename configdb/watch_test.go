// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
)

// overrun makes more changes than are kept.
func overrun(t *testing.T, s *fsm.State) {
	t.Helper()
	var c fsm.Command
	for i := range fsm.MaxTxnOps {
		c.Txns = append(c.Txns, fsm.Txn{Ops: []fsm.Op{{Key: fmt.Sprintf("noise/%d", i)}}})
	}
	data := c.Encode()
	at := s.View().Revision()
	for i := range uint64(2*fsm.HistoryLength/fsm.MaxTxnOps + 2) {
		if _, err := s.Apply(at+i+1, 1, data); err != nil {
			t.Fatal(err)
		}
	}
}

// replica is a DB on a state machine that the test drives.
type replica struct {
	*storetest.Mem
	state *fsm.State
}

func (r replica) Local() *configdb.View { return r.state.View() }
func (r replica) Watch(prefix string, from uint64) *configdb.Watch {
	return configdb.NewWatch(r.state, nil, prefix, from)
}

func applyOps(t *testing.T, s *fsm.State, ops ...fsm.Op) {
	t.Helper()
	c := fsm.Command{Txns: []fsm.Txn{{Ops: ops}}}
	if _, err := s.Apply(s.View().Revision()+1, 1, c.Encode()); err != nil {
		t.Fatal(err)
	}
}

func TestAWatcherThatFallsBehindIsTold(t *testing.T) {
	s := fsm.New()
	applyOps(t, s, fsm.Op{Key: "w/a"})
	w := configdb.NewWatch(s, nil, "w/", 0)
	if b, err := w.Next(t.Context()); err != nil || len(b.Changes) != 1 {
		t.Fatalf("%+v, %v", b, err)
	}
	overrun(t, s)
	if _, err := w.Next(t.Context()); !errors.Is(err, configdb.ErrCompacted) {
		t.Errorf("far behind: %v", err)
	}
	if _, err := configdb.NewWatch(s, nil, "w/", 1).Next(t.Context()); !errors.Is(err, configdb.ErrCompacted) {
		t.Errorf("resumed from long ago: %v", err)
	}
}

func TestFollowBeginsAnewAfterCompaction(t *testing.T) {
	s := fsm.New()
	applyOps(t, s, fsm.Op{Key: "w/a"}, fsm.Op{Key: "w/b"})
	done := errors.New("seen enough")
	var batches []configdb.Batch
	err := configdb.Follow(t.Context(), replica{storetest.New(t), s}, "w/", func(b configdb.Batch) error {
		batches = append(batches, b)
		switch len(batches) {
		case 1:
			applyOps(t, s, fsm.Op{Key: "w/b", Delete: true})
			overrun(t, s)
		case 2:
			applyOps(t, s, fsm.Op{Key: "w/c"})
		case 3:
			return done
		}
		return nil
	})
	if !errors.Is(err, done) || len(batches) != 3 {
		t.Fatalf("%d batches, %v", len(batches), err)
	}
	for i, want := range []struct {
		synced  bool
		changes int
	}{{true, 2}, {true, 1}, {false, 1}} {
		if batches[i].Synced != want.synced || len(batches[i].Changes) != want.changes {
			t.Errorf("batch %d: %+v", i, batches[i])
		}
	}
}

// Who waits for keys that nobody changes is not left behind by the others'.
func TestAQuietWatcherKeepsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fsm.New()
		applyOps(t, s, fsm.Op{Key: "w/a"})
		w := configdb.NewWatch(s, nil, "w/", s.View().Revision())
		got := make(chan error, 1)
		go func() {
			b, err := w.Next(t.Context())
			if err == nil && (len(b.Changes) != 1 || b.Changes[0].Key != "w/b") {
				err = fmt.Errorf("%+v", b)
			}
			got <- err
		}()
		for range 4 * fsm.HistoryLength / fsm.MaxTxnOps {
			var c fsm.Command
			for i := range fsm.MaxTxnOps {
				c.Txns = append(c.Txns, fsm.Txn{Ops: []fsm.Op{{Key: fmt.Sprintf("noise/%d", i)}}})
			}
			if _, err := s.Apply(s.View().Revision()+1, 1, c.Encode()); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // it looks, or waits on
		}
		applyOps(t, s, fsm.Op{Key: "w/b"})
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

func TestAWatchEndsWithItsDatabase(t *testing.T) {
	s, closed := fsm.New(), make(chan struct{})
	applyOps(t, s, fsm.Op{Key: "x"})
	w := configdb.NewWatch(s, closed, "w/", s.View().Revision())
	close(closed)
	if b, err := w.Next(t.Context()); !errors.Is(err, configdb.ErrClosed) || b.Revision != 1 {
		t.Errorf("%+v, %v", b, err)
	}
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, err := configdb.NewWatch(s, nil, "w/", 1).Next(ctx); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
}
