// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/freeport"
)

// lonely is a Lone without goroutines: the test says what time it is and looks.
type lonely struct {
	*Lone
	k       *kit
	now     time.Time
	lost    bool
	unheard bool
	since   time.Time
	before  int
	others  Told
	asked   int
	file    []byte
	full    bool
}

func (y *lonely) Before() int { return y.before }
func (y *lonely) Told(context.Context) Told {
	y.asked++
	return y.others
}

func newLonely(k *kit) *lonely {
	k.t.Helper()
	y := &lonely{k: k, now: time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)}
	y.start()
	return y
}

// start begins a daemon's life.
func (y *lonely) start() {
	y.Lone = NewLone(LoneConfig{
		DB: y.k.db, NodeID: y.k.nodes["m1"].Meta.ID, NodeName: "m1", Cluster: "prod", ClusterID: "c1", Sealer: xorSealer{}, Neighbours: y,
		Loss: func() *api.QuorumLoss {
			if !y.lost {
				return nil
			}
			return &api.QuorumLoss{Since: y.since, Unheard: y.unheard, Banner: "no quorum at node m1: missing m2, m3"}
		},
		Load: func() ([]byte, error) { return y.file, nil },
		Save: func(b []byte) error {
			if y.full {
				return errors.New("no space left on device")
			}
			y.file = b
			return nil
		},
		Log: slog.New(slog.NewTextHandler(y.k.t.Output(), nil)), Now: func() time.Time { return y.now },
	})
	y.load()
}

// pass lets time pass and looks every second.
func (y *lonely) pass(d time.Duration) {
	for ; d > 0; d -= loneLook {
		y.now = y.now.Add(loneLook)
		y.look(y.k.t.Context())
	}
}

func (y *lonely) lose() { y.lost, y.since = true, y.now }

// mails counts those that were taken, of a loss and of its end.
func (m *mailSink) mailsOf() (lost, back int) {
	for _, mail := range m.all() {
		switch {
		case strings.Contains(unfold(mail), "X-Muster-Phase: firing"):
			lost++
		case strings.Contains(unfold(mail), "has its quorum again"):
			back++
		}
	}
	return lost, back
}

func lonelyKit(t *testing.T, refuse int) (*kit, *lonely, *mailSink, api.Receiver) {
	t.Helper()
	k := newKit(t)
	s := k.service("m1")
	k.db.SetTerm(1)
	if err := s.createBuiltins(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	sink := newMailSink(t, refuse)
	return k, newLonely(k), sink, k.receiver("ops", sink.spec())
}

func wantMails(t *testing.T, sink *mailSink, when string, lost, back int) {
	t.Helper()
	if l, b := sink.mailsOf(); l != lost || b != back {
		t.Errorf("%s: %d mails of a loss and %d of its end; want %d and %d", when, l, b, lost, back)
	}
}

func TestALostQuorumIsToldOnceAndSoIsItsEnd(t *testing.T) {
	_, y, sink, _ := lonelyKit(t, 0)
	y.pass(time.Minute)
	y.lose()
	y.pass(59 * time.Second)
	wantMails(t, sink, "before the time of the rule", 0, 0)
	y.pass(time.Second)
	wantMails(t, sink, "after it", 1, 0)
	y.pass(20 * time.Minute)
	y.start()
	y.lost = false
	y.pass(10 * time.Second) // a daemon that has just begun does not know yet
	y.lost, y.unheard = true, true
	y.pass(20 * time.Minute)
	wantMails(t, sink, "after a restart of the daemon", 1, 0)
	y.lost, y.unheard = false, false
	y.pass(14 * time.Second)
	wantMails(t, sink, "a quorum that may not last", 1, 0)
	y.pass(20 * time.Second)
	wantMails(t, sink, "the end", 1, 1)
	y.pass(time.Hour)
	y.start()
	y.pass(time.Hour)
	wantMails(t, sink, "long after", 1, 1)
	if mail := unfold(sink.all()[0]); !strings.Contains(mail, "missing m2, m3") || !strings.Contains(mail, "muster cluster status") || strings.Contains(mail, "alert show") {
		t.Errorf("the mail says %s", mail)
	}
}

func TestAShortLossIsNotTold(t *testing.T) {
	_, y, sink, _ := lonelyKit(t, 0)
	for range 5 {
		y.lose()
		y.pass(55 * time.Second)
		y.lost = false
		y.pass(time.Minute)
	}
	wantMails(t, sink, "elections", 0, 0)
	y.lose()
	y.unheard = true
	y.pass(4 * time.Minute)
	wantMails(t, sink, "while the other hosts are switched on", 0, 0)
	y.pass(2 * time.Minute)
	wantMails(t, sink, "when they do not come", 1, 0)
}

// A receiver that does not answer keeps nobody else from hearing of the next loss.
func TestASecondLossIsToldThoughAReceiverIsDead(t *testing.T) {
	k, y, sink, _ := lonelyKit(t, 0)
	far := sink.spec()
	far.Address = "127.0.0.1:1"
	k.receiver("far", far)
	y.lose()
	y.pass(2 * time.Minute)
	y.lost = false
	y.pass(time.Minute)
	wantMails(t, sink, "the first", 1, 1)
	y.pass(time.Hour)
	y.lose()
	y.pass(59 * time.Second)
	wantMails(t, sink, "before the time of the rule", 1, 1)
	y.pass(20 * time.Minute)
	y.lost = false
	y.pass(30 * time.Minute)
	wantMails(t, sink, "the second", 2, 2)
}

func TestAClockThatIsSetBackDoesNotSilence(t *testing.T) {
	_, y, sink, _ := lonelyKit(t, 1)
	y.lose()
	y.pass(62 * time.Second)
	wantMails(t, sink, "refused", 0, 0)
	y.now = y.now.Add(-time.Hour)
	y.since = y.now.Add(-time.Hour)
	y.pass(3 * time.Minute)
	wantMails(t, sink, "after the clock was set back", 1, 0)
}

func TestAFlappingQuorumSendsFewMails(t *testing.T) {
	_, y, sink, _ := lonelyKit(t, 0)
	for range 30 { // an hour
		y.lose()
		y.pass(90 * time.Second)
		y.lost = false
		y.pass(30 * time.Second)
	}
	lost, back := sink.mailsOf()
	if lost < 4 || lost > 7 || back != lost {
		t.Errorf("%d mails of a loss and %d of its end in an hour", lost, back)
	}
	y.lose()
	y.pass(11 * time.Minute)
	wantMails(t, sink, "a loss that lasts", lost+1, back)
}

func TestOneOfSeveralNodesTells(t *testing.T) {
	_, y, sink, r := lonelyKit(t, 0)
	y.before, y.others = 1, Told{Told: []string{r.Meta.ID}}
	y.lose()
	y.pass(69 * time.Second)
	if y.asked != 0 {
		t.Error("the others were asked before they had their time")
	}
	y.pass(10 * time.Minute)
	wantMails(t, sink, "another told", 0, 0)
	y.before, y.others = 0, Told{} // it died
	y.pass(askAgain)
	wantMails(t, sink, "who told is silent", 1, 0)
	y.lost = false
	y.pass(time.Minute)
	wantMails(t, sink, "the end", 1, 1)
}

// TestWhomANodeIsTellingTheNextOneLeavesOut: a receiver that takes long would hear of
// the loss twice.
func TestWhomANodeIsTellingTheNextOneLeavesOut(t *testing.T) {
	k, y, _, r := lonelyKit(t, 0)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	slow := k.receiver("slow", (&mailSink{addr: ln.Addr().String()}).spec())
	y.lose()
	y.pass(59 * time.Second)
	if got := y.Lone.Told(); len(got.Told)+len(got.Telling) != 0 {
		t.Errorf("before its time it told %v", got)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		y.pass(time.Second)
	}()
	c, err := ln.Accept() // and no word
	if err != nil {
		t.Fatal(err)
	}
	if got := y.Lone.Told(); !slices.Contains(got.Telling, slow.Meta.ID) || !slices.Contains(got.Telling, r.Meta.ID) {
		t.Errorf("while it tells others are to leave out %v", got)
	}
	_ = c.Close()
	<-done
	if got := y.Lone.Told(); !slices.Equal(got.Told, []string{r.Meta.ID}) || len(got.Telling) != 0 {
		t.Errorf("when the attempt has failed others are to leave out %v", got)
	}
}

// Whom another node is telling may have heard of this one before: an attempt that failed
// may have been heard, and that of the other may fail, too.
func TestWhomAnotherNodeIsTellingStillHearsOfTheEnd(t *testing.T) {
	_, y, _, r := lonelyKit(t, 1)
	y.lose()
	y.pass(time.Minute) // refused
	if !slices.Equal(y.state.Tried, []string{r.Meta.ID}) || len(y.state.Told) > 0 {
		t.Fatalf("%+v", y.state)
	}
	y.others = Told{Telling: []string{r.Meta.ID}}
	y.pass(time.Minute)
	if !slices.Equal(y.state.Tried, []string{r.Meta.ID}) || len(y.state.Told) > 0 {
		t.Errorf("%+v", y.state)
	}
	y.others = Told{Told: []string{r.Meta.ID}}
	y.pass(5 * time.Minute)
	if len(y.state.Tried) > 0 {
		t.Errorf("whom another node told, that one tells of the end: %+v", y.state)
	}
}

func TestAReceiverOutOfReachHearsOfTheEnd(t *testing.T) {
	k, y, _, _ := lonelyKit(t, 0)
	far := &mailSink{addr: freeport.Loopback(t)}
	k.receiver("far", far.spec())
	y.lose()
	y.pass(10 * time.Minute)
	if got := len(y.Lone.Told().Told); got != 1 {
		t.Errorf("%d receivers were told", got)
	}
	y.lost = false
	y.pass(time.Minute)
	if len(y.state.Tried) != 1 || y.state.Ended.IsZero() {
		t.Errorf("nobody is owed the end: %+v", y.state)
	}
	y.pass(GiveUp + time.Hour)
	if !y.state.Since.IsZero() {
		t.Errorf("it is not given up: %+v", y.state)
	}
}

func TestARefusedMailIsTriedAgain(t *testing.T) {
	_, y, sink, _ := lonelyKit(t, 3)
	y.full = true // nor can it be saved
	y.lose()
	y.pass(5 * time.Minute)
	wantMails(t, sink, "after three refusals", 1, 0)
}

func TestADisabledRuleTellsNothing(t *testing.T) {
	k, y, sink, _ := lonelyKit(t, 0)
	k.rule("quorum-lost", func(r *api.RuleSpec) { r.Disabled = true })
	y.lose()
	y.pass(time.Hour)
	wantMails(t, sink, "disabled", 0, 0)
}

// TestAnOlderClusterGetsTheNewRules: a rule of before that was removed does not come back.
func TestAnOlderClusterGetsTheNewRules(t *testing.T) {
	k := newKit(t)
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { tx.Put(builtinMark, []byte("1")); return nil })
	s := k.service("m1")
	k.db.SetTerm(1)
	for range 2 {
		if err := s.createBuiltins(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if _, ok := lossRule(k.db.Local()); !ok {
			t.Fatal("there is no rule")
		}
	}
	rules, err := configdb.Rules.List(k.db.Local())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i := range rules {
		names = append(names, rules[i].Meta.Name)
	}
	if slices.Sort(names); !slices.Equal(names, []string{"drill", "quorum-lost"}) {
		t.Errorf("the rules are %v: those of the first generation, which were removed here, must not come back", names)
	}
}

// The end of a loss is tried for a day whatever the clock: the daemon is started again and
// the clock is set meanwhile.
func TestTheEndOfALossIsToldThoughTheClockWasSet(t *testing.T) {
	for _, step := range []time.Duration{-50 * time.Hour, 50 * time.Hour} {
		_, y, sink, _ := lonelyKit(t, 1<<30)
		y.lose()
		y.pass(5 * time.Minute)
		y.lost = false
		y.pass(time.Minute)
		y.start()
		y.now = y.now.Add(step)
		sink.mu.Lock()
		sink.refuse = 0
		sink.mu.Unlock()
		y.pass(10 * time.Minute)
		wantMails(t, sink, "after "+step.String(), 0, 1)
	}
}
