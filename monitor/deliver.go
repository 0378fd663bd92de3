// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/monitor/notify"
)

// Limits of delivery.
const (
	// MaxReceivers is how many receivers are told.
	MaxReceivers = 32
	// MaxBackoff is the longest pause after failures, minBackoff the first.
	MaxBackoff = 5 * time.Minute
	minBackoff = time.Second
	// GiveUp is how long a leader tries a message, from when it saw it first: the clock
	// that the alert was written by may be another's, or have been set.
	GiveUp        = 24 * time.Hour
	maxStatusText = 500
)

// The phases of a receiver.
const (
	ReceiverOK      = "ok"
	ReceiverFailing = "failing"
)

// secretLabel is what the secret of a receiver is sealed for.
func secretLabel(receiverID string) string { return "receiver/" + receiverID }

// SealSecret seals the secret of a receiver.
func (s *Service) SealSecret(receiverID, secret string) ([]byte, error) {
	return s.cfg.Sealer.Seal(secretLabel(receiverID), []byte(secret))
}

// outbox is what the delivery remembers of a receiver while this node leads;
// what must not be lost is in the alerts.
type outbox struct {
	busy     bool
	failures int
	next     time.Time
	spec     uint64 // revision that the last attempt was made with
	// seen is when each alert that is owed was seen first, in CLOCK_BOOTTIME.
	seen map[occurrence]time.Duration
}

// occurrence is one phase of an alert.
type occurrence struct {
	id, phase string
	entered   int64 // ns since 1970
}

func occurrenceOf(a *api.Alert) occurrence {
	return occurrence{a.Meta.ID, string(a.Status.Phase), entered(a).UnixNano()}
}

// see notes when alerts were seen first, and forgets what is owed no more.
func (b *outbox) see(owed []api.Alert, now time.Duration) {
	was := b.seen
	b.seen = make(map[occurrence]time.Duration, len(owed))
	for i := range owed {
		o := occurrenceOf(&owed[i])
		at, known := was[o]
		if !known {
			at = now
		}
		b.seen[o] = at
	}
}

// age is for how long all of a batch have been seen.
func (b *outbox) age(batch []api.Alert, now time.Duration) time.Duration {
	last := b.seen[occurrenceOf(&batch[0])]
	for i := range batch {
		last = max(last, b.seen[occurrenceOf(&batch[i])])
	}
	return now - last
}

// due reports that a receiver may be tried: the pause after a failure is over,
// or somebody has changed the receiver since.
func (b *outbox) due(r *api.Receiver) bool {
	return !b.busy && (b.spec != r.Meta.Revision || !time.Now().Before(b.next))
}

// outboxes are those of all receivers.
type outboxes struct {
	mu   sync.Mutex
	byID map[string]*outbox
}

// only forgets the receivers that are not in a list, and are not busy.
func (o *outboxes) only(list []api.Receiver) {
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.byID, func(id string, b *outbox) bool {
		return !b.busy && !slices.ContainsFunc(list, func(r api.Receiver) bool { return r.Meta.ID == id })
	})
}

// deliverLoop starts deliveries: for each receiver at most one at a time, each
// in a goroutine of its own, so that one that hangs holds up no other.
func (s *Service) deliverLoop(ctx context.Context, term uint64) {
	tick := time.NewTicker(s.timing.deliver)
	defer tick.Stop()
	group, ctx := contain.NewGroup(ctx)
	defer func() { _ = group.Stop() }() // each delivery contains its own bugs
	boxes := outboxes{byID: map[string]*outbox{}}
	for {
		list := s.receivers(s.db.Local())
		boxes.only(list)
		for i := range list {
			s.deliverNext(ctx, term, group, &boxes, list[i])
		}
		select {
		case <-tick.C:
		case <-s.tell:
		case <-ctx.Done():
			return
		}
	}
}

// deliverNext starts the next delivery to a receiver, if it is due.
func (s *Service) deliverNext(ctx context.Context, term uint64, group *contain.Group, boxes *outboxes, r api.Receiver) {
	boxes.mu.Lock()
	b := boxes.byID[r.Meta.ID]
	if b == nil {
		b = &outbox{}
		boxes.byID[r.Meta.ID] = b
	}
	due := b.due(&r)
	boxes.mu.Unlock()
	if !due {
		return
	}
	// Read only now: what the last delivery marked must be seen.
	batch, owed := s.queue(s.db.Local(), &r)
	queued, now := len(owed), s.clock()
	boxes.mu.Lock()
	b.see(owed, now)
	if queued == 0 {
		boxes.mu.Unlock()
		return
	}
	age := b.age(batch, now)
	b.busy, b.spec = true, r.Meta.Revision
	boxes.mu.Unlock()
	group.Go(func() {
		// A bug that only one receiver's answers meet must not stop the rest.
		err := contain.Call(func() error { return s.deliver(ctx, term, r, batch, queued, age) })
		var p *contain.Panic
		if errors.As(err, &p) {
			s.log.Error("delivery panicked", "receiver", r.Meta.Name, "panic", p.Value, "stack", p.Stack)
			s.reportFailure(ctx, term, r.Meta.ID, err, queued)
		}
		boxes.mu.Lock()
		defer boxes.mu.Unlock()
		b.busy = false
		if err == nil {
			b.failures, b.next = 0, time.Time{}
			wake(s.tell) // there may be more
			return
		}
		b.next = time.Now().Add(min(s.timing.backoff<<min(b.failures, 20), s.timing.maxBackoff))
		b.failures++
	})
}

func (s *Service) receivers(v *configdb.View) []api.Receiver {
	all, err := configdb.Receivers.List(v)
	if err != nil {
		s.log.Error("receivers that cannot be read are not told", "err", err)
	}
	all = slices.DeleteFunc(all, func(r api.Receiver) bool { return r.Spec.Disabled || r.Meta.Deleting() })
	return all[:min(len(all), MaxReceivers)]
}

// queue returns what a receiver is to be told next: the oldest alerts that
// entered the same phase in the same evaluation, and all. It follows from the alerts
// alone, so that it survives restarts and changes of the leader.
func (s *Service) queue(v *configdb.View, r *api.Receiver) (batch, alerts []api.Alert) {
	alerts, _ = configdb.Alerts.List(v) // what cannot be read is logged by the evaluation
	alerts = slices.DeleteFunc(alerts, func(a api.Alert) bool { return !owed(&a, r) })
	slices.SortFunc(alerts, func(a, b api.Alert) int {
		return cmp.Or(entered(&a).Compare(entered(&b)), cmp.Compare(a.Status.Phase, b.Status.Phase),
			-cmp.Compare(a.Spec.Severity.Rank(), b.Spec.Severity.Rank()), cmp.Compare(a.Meta.ID, b.Meta.ID))
	})
	for i := range alerts {
		if len(batch) == notify.MaxItems || !entered(&alerts[i]).Equal(entered(&alerts[0])) || alerts[i].Status.Phase != alerts[0].Status.Phase {
			break
		}
		batch = append(batch, alerts[i])
	}
	return batch, alerts
}

// entered is when an alert entered its phase.
func entered(a *api.Alert) time.Time {
	at := a.Status.FiringAt
	if a.Status.Phase == api.AlertResolved {
		at = a.Status.ResolvedAt
	}
	if at == nil {
		return time.Time{}
	}
	return *at
}

// owed reports whether a receiver is to be told of an alert's phase. A new
// receiver is told of what fires now and not of what was over before it was
// made; an alert that came and went while it could not be reached is told of
// as resolved.
func owed(a *api.Alert, r *api.Receiver) bool {
	st := &a.Status
	if st.Phase != api.AlertFiring && st.Phase != api.AlertResolved || st.FiringAt == nil || entered(a).IsZero() {
		return false
	}
	if a.Spec.Severity.Rank() < r.Spec.MinSeverity.Rank() || slices.Contains(st.Sent, api.SentMark(r.Meta, st.Phase)) {
		return false
	}
	return !st.FiringAt.Before(r.Meta.CreatedAt) || slices.Contains(st.Sent, api.SentMark(r.Meta, api.AlertFiring)) ||
		st.Phase == api.AlertFiring
}

// deliver sends one batch, which is owed for age, and marks it.
func (s *Service) deliver(ctx context.Context, term uint64, r api.Receiver, batch []api.Alert, queued int, age time.Duration) error {
	m := notify.Message{Phase: batch[0].Status.Phase, At: entered(&batch[0])}
	for i := range batch {
		m.Items = append(m.Items, notify.ItemOf(&batch[i]))
	}
	if age > GiveUp {
		s.log.Warn("receiver given up for old alerts", "receiver", r.Meta.Name, "alerts", len(batch), "age", age)
		return s.marked(ctx, term, &r, batch, func(v *configdb.View, tx *configdb.Txn) error {
			e := api.NewEvent("receiver.gave-up", api.SeverityWarning, api.KindReceiver, r.Meta,
				fmt.Sprintf("receiver %s was not told of %d alerts for %s; they are no longer sent to it", r.Meta.Name, len(batch), GiveUp), s.now())
			return configdb.PutEvent(tx, &e)
		})
	}
	err := sendTo(ctx, s.send, s.cfg.Sealer, &r, m)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	remark := ""
	var partial *notify.Partial
	if errors.As(err, &partial) {
		remark, err = partial.Error(), nil
		s.log.Warn("alerts not sent to everybody", "receiver", r.Meta.Name, "err", partial)
	}
	if err != nil {
		s.reportFailure(ctx, term, r.Meta.ID, err, queued)
		return err
	}
	s.log.Info("alerts sent", "receiver", r.Meta.Name, "phase", m.Phase, "alerts", len(batch))
	err = s.marked(ctx, term, &r, batch, func(v *configdb.View, tx *configdb.Txn) error {
		return updateReceiver(v, tx, r.Meta.ID, func(st *api.ReceiverStatus) {
			now := s.now().UTC()
			*st = api.ReceiverStatus{Phase: ReceiverOK, Message: remark, LastSent: &now, Queued: queued - len(batch)}
		})
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("alerts sent, but not marked: they will be sent again", "receiver", r.Meta.Name, "err", err)
	}
	return err
}

// sendTo opens the secret of a receiver and sends to it.
func sendTo(ctx context.Context, send *notify.Sender, seals Sealer, r *api.Receiver, m notify.Message) error {
	secret := ""
	if len(r.Spec.SealedSecret) > 0 {
		b, err := seals.Open(secretLabel(r.Meta.ID), r.Spec.SealedSecret)
		if err != nil {
			return fmt.Errorf("open the secret of receiver %s: %w; set it again", r.Meta.Name, err)
		}
		secret = string(b)
	}
	return send.Send(ctx, notify.Receiver{Name: r.Meta.Name, Spec: r.Spec, Secret: secret}, m)
}

// marked notes in the alerts that they were sent in the phase that they had.
func (s *Service) marked(ctx context.Context, term uint64, r *api.Receiver, batch []api.Alert, also func(*configdb.View, *configdb.Txn) error) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err := configdb.Transact(ctx, s.db, Actor, writeAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		tx.RequireTerm(term)
		for i := range batch {
			was := &batch[i]
			a, err := configdb.Alerts.Get(v, was.Meta.ID)
			if api.CodeOf(err) == api.CodeNotFound {
				continue
			}
			if err != nil {
				return err
			}
			mark := api.SentMark(r.Meta, was.Status.Phase)
			anew := a.Status.FiringAt == nil || !a.Status.FiringAt.Equal(*was.Status.FiringAt)
			if anew || slices.Contains(a.Status.Sent, mark) {
				continue // what was sent is of an occurrence that is over
			}
			a.Status.Sent = append(slices.Clone(a.Status.Sent), mark)
			if err := configdb.Alerts.UpdateStatus(v, tx, &a); err != nil {
				return err
			}
		}
		return also(v, tx)
	})
	return err
}

func updateReceiver(v *configdb.View, tx *configdb.Txn, id string, change func(*api.ReceiverStatus)) error {
	r, err := configdb.Receivers.Get(v, id)
	if api.CodeOf(err) == api.CodeNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	change(&r.Status)
	return configdb.Receivers.UpdateStatus(v, tx, &r)
}

// reportFailure shows a failure at the receiver, once for each different one.
func (s *Service) reportFailure(ctx context.Context, term uint64, id string, failure error, queued int) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	text := failure.Error()
	if len(text) > maxStatusText {
		text = text[:maxStatusText]
	}
	_, err := configdb.Transact(ctx, s.db, Actor, writeAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		err := updateReceiver(v, tx, id, func(st *api.ReceiverStatus) {
			st.Phase, st.LastError, st.Queued = ReceiverFailing, text, queued
			st.Message = "alerts wait; they are tried again with a pause of at most " + MaxBackoff.String()
		})
		if err == nil && !tx.Empty() {
			tx.RequireTerm(term)
			s.log.Warn("alerts not sent", "err", failure)
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("failure of a receiver not noted", "err", err)
	}
}

// TestReceiver sends a message to a receiver at once. It must be called on the
// leader, whose term the notifications of SNMP v3 carry.
func (s *Service) TestReceiver(ctx context.Context, receiverID, actor string) error {
	r, err := configdb.Receivers.Get(s.db.Local(), receiverID)
	if err != nil {
		return err
	}
	now := s.now().UTC()
	it := notify.Item{
		ID: api.NewID(), Rule: "test", Severity: api.SeverityInfo, Phase: api.AlertFiring, TargetKind: api.KindReceiver,
		TargetID: r.Meta.ID, Target: r.Meta.Name, Message: "test message, asked for by " + actor, FiringAt: now,
	}
	it.Key = it.ID
	err = sendTo(ctx, s.send, s.cfg.Sealer, &r, notify.Message{Phase: api.AlertFiring, At: now, Items: []notify.Item{it}, Test: true})
	if err != nil && !errors.Is(err, context.Canceled) {
		return api.Errorf(api.CodeRefused, "%w", err)
	}
	return err
}
