// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/monitor/alert"
	"github.com/muster-vm/muster/monitor/notify"
)

// Limits of Lone.
const (
	loneLook = time.Second
	// bootPatience is how long a daemon that has heard no leader yet waits at
	// least: not all hosts are switched on at once.
	bootPatience = 5 * time.Minute
	// backPatience is how long a quorum must last before the loss is over.
	backPatience = 15 * time.Second
	// lossPause lies between two losses that are told.
	lossPause = 10 * time.Minute
	// rankPause is for each node that is to tell before this one.
	rankPause = 10 * time.Second
	// loneBackoff is the first pause after a failure; MaxBackoff the longest.
	loneBackoff = 5 * time.Second
	askTimeout  = 3 * time.Second
	// askAgain is the pause while others tell. They may fail, and an attempt of theirs
	// hides those after it for as long as it takes.
	askAgain = rankPause
)

// engineMark holds the term of the newest leader and when it began, "TERM SECONDS"
// since 1970: what an SNMP engine counts from.
const engineMark = configdb.Root + "monitor/engine"

// noteEngine writes when the engine of this term began.
func (s *Service) noteEngine(ctx context.Context, term uint64) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	text := fmt.Sprintf("%d %d", term, s.send.Began().Unix())
	_, err := configdb.Transact(ctx, s.db, Actor, writeAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		if e, ok := v.Get(engineMark); ok && string(e.Value) == text {
			return nil
		}
		tx.RequireTerm(term)
		tx.Put(engineMark, []byte(text))
		return nil
	})
	return err
}

// engine reads what noteEngine wrote.
func engine(v *configdb.View) (term uint64, began time.Time, ok bool) {
	e, found := v.Get(engineMark)
	if !found {
		return 0, time.Time{}, false
	}
	first, second, _ := strings.Cut(string(e.Value), " ")
	term, errTerm := strconv.ParseUint(first, 10, 64)
	seconds, errTime := strconv.ParseInt(second, 10, 64)
	return term, time.Unix(seconds, 0), errTerm == nil && errTime == nil
}

// Told are the IDs of receivers of the message that there is no quorum.
type Told struct {
	Told    []string `json:"told,omitempty"`
	Telling []string `json:"telling,omitempty"` // an attempt is under way
}

// Neighbours are the other nodes that this one reaches.
type Neighbours interface {
	// Before is how many of them are to tell before this one.
	Before() int
	// Told is whom they told of this loss, or are telling. Who does not answer told nobody.
	Told(ctx context.Context) Told
}

// LoneConfig describes a Lone. All fields but Log and Now must be set.
type LoneConfig struct {
	DB                 configdb.DB
	NodeID, NodeName   string
	Cluster, ClusterID string
	Sealer             Sealer
	Neighbours         Neighbours
	// Loss is what the node knows of a lost quorum, nil while it has one.
	Loss func() *api.QuorumLoss
	// Load and Save keep what must outlast the daemon; Load returns nil for nothing.
	Load func() ([]byte, error)
	Save func([]byte) error
	Log  *slog.Logger
	Now  func() time.Time
}

// Lone tells the receivers that this node has lost its quorum, and that it is
// back: nobody else can.
type Lone struct {
	cfg  LoneConfig
	send *notify.Sender

	mu sync.Mutex // of state and telling, for Told
	// state is what is saved, and the rest what need not be.
	state    loneState
	telling  []string  // the IDs of the receivers whom it is telling of a loss
	back     time.Time // since when there is a quorum again
	next     time.Time // no attempt before
	failures int
	warned   string // of what cannot be saved or read
}

type loneState struct {
	// Since is when the loss began; zero while there is none.
	Since time.Time `json:"since,omitzero"`
	// Ended is when the quorum was back; zero while there is none.
	Ended time.Time `json:"ended,omitzero"`
	// Tried are the receivers who are to hear that it is back, Told those who heard
	// of the loss: their IDs.
	Tried []string `json:"tried,omitempty"`
	Told  []string `json:"told,omitempty"`
	// LastTold is when a loss was first told, of this one or of one before.
	LastTold time.Time `json:"lastTold,omitzero"`
}

// NewLone returns one that does nothing until Run.
func NewLone(cfg LoneConfig) *Lone {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Lone{cfg: cfg, send: notify.New(cfg.Cluster, cfg.ClusterID, cfg.NodeName)}
}

// Run looks until the context ends.
func (l *Lone) Run(ctx context.Context) error {
	l.load()
	tick := time.NewTicker(loneLook)
	defer tick.Stop()
	for {
		l.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Told is whom this node told of the loss that it has now, or is telling: one that takes
// long is not to hear it of the next node, too.
func (l *Lone) Told() Told {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state.Since.IsZero() || !l.state.Ended.IsZero() {
		return Told{}
	}
	return Told{Told: slices.Clone(l.state.Told), Telling: slices.Clone(l.telling)}
}

func (l *Lone) load() {
	b, err := l.cfg.Load()
	var st loneState
	if err == nil && b != nil {
		err = json.Unmarshal(b, &st)
	}
	if err != nil {
		l.warn("what was told of a lost quorum is not known any more", err)
		return
	}
	if b != nil {
		l.set(st)
	}
}

func (l *Lone) set(st loneState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = st
}

// keep changes and saves the state.
func (l *Lone) keep(st loneState) {
	l.set(st)
	b, err := json.Marshal(st)
	if err == nil {
		err = l.cfg.Save(b)
	}
	if err != nil {
		l.warn("what was told of a lost quorum is not saved: after a restart it may be told again", err)
	}
}

func (l *Lone) warn(text string, err error) {
	if l.warned != err.Error() {
		l.warned = err.Error()
		l.cfg.Log.Warn(text, "err", err)
	}
}

// look does what is due.
func (l *Lone) look(ctx context.Context) {
	now := l.cfg.Now().UTC()
	if l.next.Sub(now) > MaxBackoff {
		l.next = now // the clock was set back
	}
	loss := l.cfg.Loss()
	st := l.state
	switch {
	case loss == nil && st.Since.IsZero():
	case loss == nil:
		l.lookBack(ctx, st, now)
	default:
		l.back = time.Time{}
		since := loss.Since.UTC()
		if since.After(now) {
			since = now
		}
		if st.Since.IsZero() || st.Since.After(now) {
			st.Since = since
			l.set(st) // saved when somebody is told
		}
		if !st.Ended.IsZero() { // another loss, for whoever has heard that it was back
			st.Since, st.Ended, l.failures, l.next = since, time.Time{}, 0, time.Time{}
			l.keep(st)
		}
		l.lookLost(ctx, loss, st, now)
	}
}

// lossRule is the first rule for a lost quorum that is not disabled.
func lossRule(v *configdb.View) (api.Rule, bool) {
	rules, _ := configdb.Rules.List(v) // one that cannot be read says nothing
	i := slices.IndexFunc(rules, func(r api.Rule) bool { return r.Spec.Check == api.CheckQuorumLost && !r.Spec.Disabled })
	if i < 0 {
		return api.Rule{}, false
	}
	return rules[i], true
}

// lookLost tells whom nobody has told yet of a loss that lasts.
func (l *Lone) lookLost(ctx context.Context, loss *api.QuorumLoss, st loneState, now time.Time) {
	v := l.cfg.DB.Local()
	rule, ok := lossRule(v)
	if !ok || now.Before(l.next) {
		return
	}
	wait := time.Duration(rule.Spec.ForSeconds) * time.Second
	if loss.Unheard && len(st.Tried) == 0 {
		wait = max(wait, bootPatience)
	}
	wait += time.Duration(l.cfg.Neighbours.Before()) * rankPause
	// LastTold is of this loss if it is after Since.
	early := !st.LastTold.After(now) && now.Sub(st.LastTold) < lossPause && st.LastTold.Before(st.Since)
	if now.Sub(st.Since) < wait || early {
		return
	}
	owed := l.receivers(v, rule.Spec.Severity)
	owed = slices.DeleteFunc(owed, func(r api.Receiver) bool { return slices.Contains(st.Told, r.Meta.ID) })
	if len(owed) == 0 {
		return
	}
	asking, cancel := context.WithTimeout(ctx, askTimeout)
	others := l.cfg.Neighbours.Told(asking)
	cancel()
	isTold := func(id string) bool { return slices.Contains(others.Told, id) }
	owed = slices.DeleteFunc(owed, func(r api.Receiver) bool {
		return isTold(r.Meta.ID) || slices.Contains(others.Telling, r.Meta.ID)
	})
	// Whoever told of the loss also says that it is over.
	st.Tried = slices.DeleteFunc(slices.Clone(st.Tried), func(id string) bool { return isTold(id) && !slices.Contains(st.Told, id) })
	if len(st.Tried) == 0 {
		st.LastTold = now // by whom does not matter: it flaps for all of them
	}
	if len(owed) == 0 {
		l.set(st)
		l.next = now.Add(askAgain) // who told may end
		return
	}
	for i := range owed {
		if id := owed[i].Meta.ID; !slices.Contains(st.Tried, id) {
			st.Tried = append(st.Tried, id)
		}
	}
	l.keep(st) // before: who may have heard of the loss is to hear of its end
	l.nowTelling(owed)
	sent, err := l.tell(ctx, owed, l.message(rule, st, loss.Banner))
	st.Told = append(slices.Clone(st.Told), sent...)
	l.keep(st)
	l.nowTelling(nil)
	l.pause(now, err)
}

func (l *Lone) nowTelling(list []api.Receiver) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.telling = nil
	for i := range list {
		l.telling = append(l.telling, list[i].Meta.ID)
	}
}

// lookBack ends a loss, and tells whoever was to hear of it.
func (l *Lone) lookBack(ctx context.Context, st loneState, now time.Time) {
	if l.back.IsZero() || l.back.After(now) {
		l.back = now
	}
	if now.Sub(l.back) < backPatience {
		return
	}
	if st.Ended.IsZero() {
		st.Ended = l.back
		l.failures, l.next = 0, time.Time{} // the way to the receivers may be free again
	}
	if now.Before(l.next) {
		return
	}
	v := l.cfg.DB.Local()
	owed := l.receivers(v, api.SeverityCritical)
	owed = slices.DeleteFunc(owed, func(r api.Receiver) bool { return !slices.Contains(st.Tried, r.Meta.ID) })
	if now.Sub(l.back) > GiveUp { // the time of Ended is in a file, and the clock may have been set since
		owed = nil
	}
	if len(owed) == 0 {
		l.failures, l.next, l.back = 0, time.Time{}, time.Time{}
		if over := (loneState{LastTold: st.LastTold}); len(st.Tried) > 0 {
			l.keep(over)
		} else {
			l.set(over)
		}
		return
	}
	l.keep(st)
	rule, ok := lossRule(v)
	if !ok {
		rule.Meta.Name, rule.Spec.Severity = quorumLost, api.SeverityCritical // somebody disabled it meanwhile
	}
	sent, err := l.tell(ctx, owed, l.message(rule, st, fmt.Sprintf("node %s has its quorum again since %s UTC; it was lost for %s",
		l.cfg.NodeName, st.Ended.Format(time.DateTime), st.Ended.Sub(st.Since).Round(time.Second))))
	heard := func(id string) bool { return slices.Contains(sent, id) }
	st.Tried = slices.DeleteFunc(slices.Clone(st.Tried), heard)
	st.Told = slices.DeleteFunc(slices.Clone(st.Told), heard)
	l.keep(st)
	l.pause(now, err)
}

// pause sets when the next attempt may be.
func (l *Lone) pause(now time.Time, err error) {
	if err == nil {
		l.failures, l.next = 0, now.Add(loneBackoff)
		return
	}
	l.next = now.Add(min(loneBackoff<<min(l.failures, 20), MaxBackoff))
	l.failures++
}

func (l *Lone) receivers(v *configdb.View, s api.Severity) []api.Receiver {
	all, _ := configdb.Receivers.List(v) // one that cannot be read cannot be told
	all = slices.DeleteFunc(all, func(r api.Receiver) bool {
		return r.Spec.Disabled || r.Meta.Deleting() || r.Spec.MinSeverity.Rank() > s.Rank()
	})
	return all[:min(len(all), MaxReceivers)]
}

// message is the same for every repetition.
func (l *Lone) message(rule api.Rule, st loneState, text string) notify.Message {
	a := api.Alert{Spec: api.AlertSpec{Rule: rule.Meta.Name, Severity: rule.Spec.Severity, TargetKind: api.KindNode, TargetID: l.cfg.NodeID, Target: l.cfg.NodeName}}
	a.Meta.ID = alert.ID(rule.Meta.Name, alert.Target{Kind: api.KindNode, ID: l.cfg.NodeID})
	a.Status = api.AlertStatus{Phase: api.AlertFiring, FiringAt: &st.Since, Message: text}
	at := st.Since
	if !st.Ended.IsZero() {
		a.Status.Phase, a.Status.ResolvedAt, at = api.AlertResolved, &st.Ended, st.Ended
	}
	it := notify.ItemOf(&a)
	it.More = "muster cluster status" // there is no such alert in the database
	return notify.Message{Phase: a.Status.Phase, At: at, Items: []notify.Item{it}}
}

// tell sends to all of a list at once, and returns the IDs of those who got it.
func (l *Lone) tell(ctx context.Context, list []api.Receiver, m notify.Message) (sent []string, err error) {
	if term, began, ok := engine(l.cfg.DB.Local()); ok {
		l.send.BeginAt(term, began)
	}
	errs := make([]error, len(list))
	group, ctx := contain.NewGroup(ctx)
	for i := range list {
		group.Go(func() {
			errs[i] = contain.Call(func() error { return sendTo(ctx, l.send, l.cfg.Sealer, &list[i], m) })
		})
	}
	broken := group.Wait()
	for i := range list {
		name := list[i].Meta.Name
		var partial *notify.Partial
		switch {
		case errors.As(errs[i], &partial):
			l.cfg.Log.Warn("quorum not told of to everybody", "receiver", name, "err", partial)
		case errs[i] != nil:
			l.cfg.Log.Warn("quorum not told of; it is tried again", "receiver", name, "phase", m.Phase, "err", errs[i])
			continue
		default:
			l.cfg.Log.Info("quorum told of", "receiver", name, "phase", m.Phase)
		}
		sent = append(sent, list[i].Meta.ID)
		errs[i] = nil
	}
	return sent, errors.Join(append(errs, broken)...)
}
