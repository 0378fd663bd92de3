// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/configdb"
)

// errQuiet: nothing changed within the ping interval.
var errQuiet = errors.New("rest: nothing changed")

// next waits for a batch. At least once in a ping interval, busy or quiet, it
// sees to it that the client is still there and still welcome.
func (w *watcher) next(ctx context.Context, cw *configdb.Watch) (configdb.Batch, error) {
	every := w.q.s.pingEvery
	for {
		if err := w.attend(ctx); err != nil {
			return configdb.Batch{}, err
		}
		quiet, cancel := context.WithTimeoutCause(ctx, every, errQuiet)
		b, err := cw.Next(quiet)
		cancel()
		if !errors.Is(err, errQuiet) {
			return b, err
		}
	}
}

// attend looks after the client once in a ping interval.
func (w *watcher) attend(ctx context.Context) error {
	if time.Since(w.pinged) < w.q.s.pingEvery {
		return nil
	}
	if !w.q.stillWelcome() {
		return errNotWelcome
	}
	if err := w.sink.ping(ctx); err != nil {
		return err
	}
	w.pinged = time.Now()
	return nil
}

var errNotWelcome = errors.New("the token has expired or was deleted")

// errStalled: the client takes nothing. If a message is half sent there is no
// place for a close frame any more: the connection just ends.
var errStalled = errors.New("the client takes nothing; resume from the last revision")

// sse writes server-sent events (WHATWG HTML section 9.2).
type sse struct{ q *request }

func (s sse) write(text string) error {
	_ = s.q.ctl.SetWriteDeadline(time.Now().Add(s.q.s.sendWithin))
	_, err := s.q.w.Write([]byte(text))
	if err == nil {
		err = s.q.ctl.Flush()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errStalled
	}
	return err
}

func (s sse) send(_ context.Context, e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	return s.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", e.Revision, e.Type, b))
}

func (s sse) ping(context.Context) error { return s.write(": ping\n\n") }

// serveSSE streams until either side ends. After the first byte there is no
// place for a problem document: the stream ends and the client resumes.
func (w *watcher) serveSSE() error {
	h := w.q.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no")
	w.q.w.WriteHeader(http.StatusOK)
	if err := w.q.ctl.Flush(); err != nil {
		return nil //nolint:nilerr // the client is gone or cannot stream; the status is sent
	}
	w.sink = sse{w.q}
	w.ended(w.run(w.q.ctx()))
	return nil
}

// socket writes events to a WebSocket, one text frame each.
type socket struct {
	c      *websocket.Conn
	within time.Duration
}

func (s socket) send(ctx context.Context, e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.within, errStalled)
	defer cancel()
	return stalled(ctx, s.c.Write(ctx, websocket.MessageText, b))
}

func (s socket) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.within, errStalled)
	defer cancel()
	return stalled(ctx, s.c.Ping(ctx))
}

// stalled names the reason if an error comes of waiting for too long.
func stalled(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}

func (w *watcher) serveWebSocket() error {
	c, err := websocket.Accept(w.q.w, w.q.r, nil)
	if err != nil {
		return nil // Accept has answered
	}
	defer func() { _ = c.CloseNow() }()
	w.sink = socket{c, w.q.s.sendWithin}
	// A client has nothing to say here; CloseRead answers its pings and ends
	// the context when it closes.
	err = w.run(c.CloseRead(w.q.ctx()))
	code, reason := websocket.StatusGoingAway, "resume from the last revision"
	switch {
	case errors.Is(err, errNotWelcome):
		code, reason = websocket.StatusPolicyViolation, err.Error()
	case errors.Is(err, errStalled):
		code, reason = websocket.StatusTryAgainLater, err.Error()
	}
	_ = c.Close(code, reason) // the client may be gone, which is as well
	w.ended(err)
	return nil
}

func (w *watcher) ended(err error) {
	if errors.Is(err, errStalled) {
		w.q.s.log.Info("a watch was cut off: its client takes nothing", "actor", w.q.who.actor, "from", w.q.r.RemoteAddr, "rev", w.at, "after", w.q.s.sendWithin)
		return
	}
	w.q.s.log.Debug("watch ended", "err", err)
}

// wantsWebSocket reports a request to upgrade (RFC 6455 section 4.1).
func wantsWebSocket(r *http.Request) bool {
	return strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}
