// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
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
		if time.Since(w.pinged) >= every {
			if !w.q.stillWelcome() {
				return configdb.Batch{}, errNotWelcome
			}
			if err := w.sink.ping(ctx); err != nil {
				return configdb.Batch{}, err
			}
			w.pinged = time.Now()
		}
		quiet, cancel := context.WithTimeoutCause(ctx, every, errQuiet)
		b, err := cw.Next(quiet)
		cancel()
		if !errors.Is(err, errQuiet) {
			return b, err
		}
	}
}

var errNotWelcome = errors.New("the token has expired or was deleted")

// sse writes server-sent events (WHATWG HTML section 9.2).
type sse struct{ q *request }

func (s sse) write(text string) error {
	_ = s.q.ctl.SetWriteDeadline(time.Now().Add(streamWrite))
	if _, err := s.q.w.Write([]byte(text)); err != nil {
		return err
	}
	return s.q.ctl.Flush()
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
	err := w.run(w.q.ctx())
	w.q.s.log.Debug("watch ended", "err", err)
	return nil
}

// socket writes events to a WebSocket, one text frame each.
type socket struct{ c *websocket.Conn }

func (s socket) send(ctx context.Context, e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, streamWrite)
	defer cancel()
	return s.c.Write(ctx, websocket.MessageText, b)
}

func (s socket) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, streamWrite)
	defer cancel()
	return s.c.Ping(ctx)
}

func (w *watcher) serveWebSocket() error {
	c, err := websocket.Accept(w.q.w, w.q.r, nil)
	if err != nil {
		return nil // Accept has answered
	}
	defer func() { _ = c.CloseNow() }()
	w.sink = socket{c}
	// A client has nothing to say here; CloseRead answers its pings and ends
	// the context when it closes.
	err = w.run(c.CloseRead(w.q.ctx()))
	code, reason := websocket.StatusGoingAway, "resume from the last revision"
	if errors.Is(err, errNotWelcome) {
		code, reason = websocket.StatusPolicyViolation, err.Error()
	}
	_ = c.Close(code, reason) // the client may be gone, which is as well
	w.q.s.log.Debug("watch ended", "err", err)
	return nil
}

// wantsWebSocket reports a request to upgrade (RFC 6455 section 4.1).
func wantsWebSocket(r *http.Request) bool {
	return strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}
