// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/kvwire"
)

// Limits of a key stream beside those of kvwire.
const (
	// kvReplyBytes is how much is gathered into one message of answers.
	kvReplyBytes = 256 << 10
	// kvAuditEvery is how often the changes of a stream are added up in an event.
	kvAuditEvery = time.Minute
	// kvIdle ends a stream whose client does not even answer pings.
	kvIdle = 30 * time.Second
)

// kvStream is one stream of requests for keys; see internal/kvwire.
type kvStream struct {
	q     *request
	conn  *websocket.Conn
	slots chan struct{} // one per request that is worked on
	out   chan []byte   // encoded answers; has room for all of them
	work  sync.WaitGroup

	mu            sync.Mutex
	puts, deletes int
	under         map[string]bool // first parts of the keys that were changed
}

// maxUnder bounds the first parts of keys that one event names, and maxUnderBytes
// each of them.
const maxUnder, maxUnderBytes = 8, 16

// kv answers GET /kv.
func kv(q *request) error {
	if !wantsWebSocket(q.r) {
		return api.Invalid("Upgrade", "open a WebSocket with the subprotocol %s; single keys are at %sraw/KEY", kvwire.Protocol, base)
	}
	if !q.s.watches.tryAcquire() {
		return api.Errorf(api.CodeRefused, "%d streams are open on node %s; close one or ask another node", maxWatches, q.s.cfg.Node())
	}
	defer q.s.watches.release()
	c, err := websocket.Accept(q.w, q.r, &websocket.AcceptOptions{Subprotocols: []string{kvwire.Protocol}})
	if err != nil {
		return nil //nolint:nilerr // Accept has answered
	}
	defer func() { _ = c.CloseNow() }()
	if c.Subprotocol() != kvwire.Protocol {
		_ = c.Close(websocket.StatusPolicyViolation, "offer the subprotocol "+kvwire.Protocol)
		return nil
	}
	c.SetReadLimit(kvwire.MaxMessageBytes)
	s := &kvStream{
		q: q, conn: c, slots: make(chan struct{}, kvwire.MaxInFlight), out: make(chan []byte, kvwire.MaxInFlight),
		under: map[string]bool{},
	}
	err = s.run(q.ctx())
	code := websocket.StatusGoingAway
	switch {
	case errors.Is(err, kvwire.ErrMalformed):
		code = websocket.StatusProtocolError
	case errors.Is(err, errNotWelcome):
		code = websocket.StatusPolicyViolation
	}
	_ = c.Close(code, clip(fmt.Sprint(err)))
	q.s.log.Debug("key stream ended", "err", err)
	return nil
}

func (s *kvStream) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var side sync.WaitGroup
	side.Go(func() { cancel(contain.Call(func() error { return s.write(ctx) })) })
	side.Go(func() { cancel(contain.Call(func() error { return s.look(ctx) })) })
	err := s.read(ctx)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(err)
	s.work.Wait()
	side.Wait()
	s.tell()
	return err
}

// read takes messages in until the stream ends.
func (s *kvStream) read(ctx context.Context) error {
	for {
		kind, b, err := s.conn.Read(ctx)
		if err != nil {
			return err
		}
		if kind != websocket.MessageBinary {
			return kvwire.ErrMalformed
		}
		if err := s.message(ctx, b); err != nil {
			return err
		}
	}
}

// message starts the work on all requests of a message. Its linearizable reads
// share one view: they were all asked before it is taken.
func (s *kvStream) message(ctx context.Context, b []byte) error {
	var gets []kvwire.Request
	for len(b) > 0 {
		var r kvwire.Request
		var err error
		if r, b, err = kvwire.NextRequest(b); err != nil {
			return err
		}
		select {
		case s.slots <- struct{}{}:
		default:
			// The reads that were gathered hold places; let them go first.
			s.startGets(ctx, gets)
			gets = nil
			select {
			case s.slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		switch r.Op {
		case kvwire.Get:
			gets = append(gets, r)
		case kvwire.GetStale:
			s.answer(s.get(s.q.db.Local(), &r))
		case kvwire.Put, kvwire.Delete:
			s.work.Go(func() {
				a := kvwire.Answer{}
				if err := contain.Do(func() { a = s.change(ctx, &r) }); err != nil {
					a = failure(r.Number, err)
				}
				s.answer(a)
			})
		}
	}
	s.startGets(ctx, gets)
	return nil
}

func (s *kvStream) startGets(ctx context.Context, gets []kvwire.Request) {
	if len(gets) == 0 {
		return
	}
	s.work.Go(func() {
		answers := make([]kvwire.Answer, len(gets))
		err := contain.Call(func() error {
			ctx, cancel := context.WithTimeout(ctx, readTimeout)
			defer cancel()
			v, err := s.q.db.View(ctx)
			for i := range gets {
				if err == nil {
					answers[i] = s.get(v, &gets[i])
				}
			}
			return err
		})
		for i := range gets {
			if err != nil {
				answers[i] = failure(gets[i].Number, err)
			}
			s.answer(answers[i])
		}
	})
}

func failure(number uint64, err error) kvwire.Answer {
	e := classify(err)
	return kvwire.Answer{Number: number, Status: kvwire.Error, Code: string(e.Code), Detail: e.Error()}
}

func (s *kvStream) get(v *configdb.View, r *kvwire.Request) kvwire.Answer {
	key := string(r.Key)
	if secret(key) {
		return failure(r.Number, api.Errorf(api.CodeForbidden, "keys below %s hold secrets and are never shown", strings.Join(secretPrefixes, " and ")))
	}
	e, ok := v.Get(key)
	if !ok {
		return kvwire.Answer{Number: r.Number, Status: kvwire.None, Revision: v.Revision()}
	}
	return kvwire.Answer{Number: r.Number, Status: kvwire.Value, Revision: e.Revision, Value: e.Value}
}

func (s *kvStream) change(ctx context.Context, r *kvwire.Request) kvwire.Answer {
	key := string(r.Key)
	if strings.HasPrefix(key, configdb.Root) {
		return failure(r.Number, api.Errorf(api.CodeForbidden, "keys below %s are reserved for typed objects", configdb.Root))
	}
	if err := s.count(r.Op, key); err != nil {
		return failure(r.Number, err)
	}
	tx := &configdb.Txn{Actor: s.q.who.actor}
	if r.Condition > 0 {
		tx.RequireRevision(key, r.Condition-1)
	}
	if r.Op == kvwire.Put {
		tx.Put(key, r.Value)
	} else {
		tx.Delete(key)
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	rev, err := s.q.db.Txn(ctx, tx)
	var c *configdb.ConflictError
	switch {
	case errors.As(err, &c):
		return kvwire.Answer{Number: r.Number, Status: kvwire.Conflict, Revision: c.Actual}
	case err != nil:
		return failure(r.Number, err)
	}
	return kvwire.Answer{Number: r.Number, Status: kvwire.Done, Revision: rev}
}

// answer hands an answer to the writer, for which there is always room.
func (s *kvStream) answer(a kvwire.Answer) {
	s.out <- kvwire.AppendAnswer(nil, &a)
}

// write sends answers, as many as there are in one message.
func (s *kvStream) write(ctx context.Context) error {
	var b []byte
	for {
		select {
		case one := <-s.out:
			b = append(b[:0], one...)
		case <-ctx.Done():
			return ctx.Err()
		}
		answered := 1
	gather:
		for len(b) < kvReplyBytes {
			select {
			case one := <-s.out:
				b = append(b, one...)
				answered++
			default:
				break gather
			}
		}
		wctx, cancel := context.WithTimeout(ctx, streamWrite)
		err := s.conn.Write(wctx, websocket.MessageBinary, b)
		cancel()
		if err != nil {
			return err
		}
		for range answered {
			<-s.slots
		}
	}
}

// look sees to it that the client is still there and still welcome, and writes
// the events.
func (s *kvStream) look(ctx context.Context) error {
	ping, audit := time.NewTicker(s.q.s.pingEvery), time.NewTicker(kvAuditEvery)
	defer ping.Stop()
	defer audit.Stop()
	for {
		select {
		case <-ping.C:
			if !s.q.stillWelcome() {
				return errNotWelcome
			}
			pctx, cancel := context.WithTimeout(ctx, kvIdle)
			err := s.conn.Ping(pctx)
			cancel()
			if err != nil {
				return err
			}
		case <-audit.C:
			s.tell()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// count notes a change for the audit log. Before the first one of a stream the
// log says who begins; the sums follow every minute and at the end.
func (s *kvStream) count(op kvwire.Op, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.puts+s.deletes == 0 && len(s.under) == 0 {
		if err := s.event("key stream: begins to change keys", nil); err != nil {
			return err
		}
	}
	if op == kvwire.Put {
		s.puts++
	} else {
		s.deletes++
	}
	first, _, _ := strings.Cut(key, "/")
	first = first[:min(len(first), maxUnderBytes)]
	if len(s.under) < maxUnder {
		s.under[first] = true
	} else if !s.under[first] {
		s.under["…"] = true
	}
	return nil
}

func (s *kvStream) tell() {
	s.mu.Lock()
	puts, deletes := s.puts, s.deletes
	under := slices.Sorted(maps.Keys(s.under))
	s.puts, s.deletes = 0, 0
	s.mu.Unlock()
	if puts+deletes == 0 {
		return
	}
	text := fmt.Sprintf("key stream: %d keys written, %d removed", puts, deletes)
	if err := s.event(text, map[string]string{"put": fmt.Sprint(puts), "delete": fmt.Sprint(deletes), "below": strings.Join(under, " ")}); err != nil {
		s.q.s.log.Error("audit event not written", "actor", s.q.who.actor, "text", text, "err", err)
	}
}

func (s *kvStream) event(text string, details map[string]string) error {
	ev := s.q.auditEvent("raw", api.Meta{Name: "stream"})
	ev.Spec.Message = s.q.who.actor + ": " + text
	for k, v := range details {
		ev.Spec.Details[k] = v
	}
	b, err := ev.EncodeSpec()
	if err != nil {
		return err
	}
	tx := &configdb.Txn{Actor: s.q.who.actor}
	tx.Put(configdb.Events.SpecKey(ev.Meta.ID), b)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.q.ctx()), writeTimeout)
	defer cancel()
	_, err = s.q.db.Txn(ctx, tx)
	return err
}
