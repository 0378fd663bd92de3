// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// term is a leader's delivery without goroutines: the test says what time it is.
type term struct {
	*Service
	boxes outboxes
	boot  time.Duration
}

func (k *kit) newTerm() *term {
	w := &term{Service: k.service("m2"), boxes: outboxes{byID: map[string]*outbox{}}}
	w.timing.backoff = 0
	w.clock = func() time.Duration { return w.boot }
	return w
}

// try makes one attempt for each receiver.
func (w *term) try(k *kit) {
	k.t.Helper()
	group, ctx := contain.NewGroup(k.t.Context())
	for _, r := range w.receivers(k.db.Local()) {
		w.deliverNext(ctx, 1, group, &w.boxes, r)
	}
	if err := group.Wait(); err != nil {
		k.t.Fatal(err)
	}
}

// fires writes an alert as a leader does whose clock differs from this one's.
func (k *kit) fires(rule string, off time.Duration) {
	k.t.Helper()
	at := time.Now().Add(off).UTC()
	a := api.Alert{
		Meta: api.NewMeta(api.KindAlert, "", rule), Spec: api.AlertSpec{Rule: rule, Severity: api.SeverityCritical, TargetKind: api.KindNode, Target: "m1"},
		Status: api.AlertStatus{Phase: api.AlertFiring, FiringAt: &at, Message: "node m1 is lost"},
	}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Alerts.CreateUnnamed(tx, &a) })
}

func (k *kit) wantGivenUp(when string, want int) {
	k.t.Helper()
	if got := len(k.events("receiver.gave-up")); got != want {
		k.t.Fatalf("%s: given up %d times, want %d", when, got, want)
	}
}

// The clock that an alert was written by may have been wrong by days, or be set later.
func TestAMessageIsTriedForADayWhateverTheClock(t *testing.T) {
	for name, off := range map[string]time.Duration{"late": -50 * time.Hour, "ahead": 50 * time.Hour} {
		t.Run(name+", and it is taken", func(t *testing.T) {
			k := newKit(t)
			k.db.SetTerm(1)
			sink := newMailSink(t, 0)
			k.receiver("ops", sink.spec())
			k.fires("node-lost", off)
			k.newTerm().try(k)
			k.wantGivenUp("at once", 0)
			if n := len(sink.all()); n != 1 {
				t.Errorf("%d mails", n)
			}
		})
		t.Run(name+", and it is not", func(t *testing.T) {
			k := newKit(t)
			k.db.SetTerm(1)
			k.receiver("ops", newMailSink(t, 1<<30).spec())
			k.fires("node-lost", off)
			w := k.newTerm()
			w.try(k)
			w.boot += GiveUp
			w.try(k)
			k.wantGivenUp("after a day", 0)
			// A leader that begins counts anew.
			w = k.newTerm()
			w.try(k)
			w.boot += GiveUp
			w.try(k)
			k.wantGivenUp("under the next leader", 0)
			w.boot += time.Second
			w.try(k)
			k.wantGivenUp("after more than a day", 1)
			w.try(k)
			k.wantGivenUp("later", 1)
		})
	}
}

// What waits behind another message is owed for as long.
func TestMessagesThatWaitAreGivenUpTogether(t *testing.T) {
	k := newKit(t)
	k.db.SetTerm(1)
	k.receiver("ops", newMailSink(t, 1<<30).spec())
	k.fires("node-lost", 0)
	w := k.newTerm()
	w.try(k)
	k.fires("quorum-margin", time.Second)
	w.boot += time.Hour
	w.try(k)
	w.boot += GiveUp - time.Minute
	w.try(k)
	k.wantGivenUp("the first is over", 1)
	w.try(k)
	k.wantGivenUp("the second has a minute left", 1)
	w.boot += 2 * time.Minute
	w.try(k)
	k.wantGivenUp("both are over", 2)
}
