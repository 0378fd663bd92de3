// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
)

// stallTimeout ends an upload whose server takes no byte for so long. Once
// the content is delivered the server may take its time to check it.
const stallTimeout = 60 * time.Second

var errStalled = errors.New("took no data for " + stallTimeout.String())

// attachStream makes a stream the request's body and watches that it moves.
func (c *Client) attachStream(req *http.Request, s *Stream, cancel context.CancelCauseFunc) (stop func(), err error) {
	body, err := s.Open()
	if err != nil {
		return nil, api.Errorf(api.CodeInternal, "open the content to upload: %w", err)
	}
	w := &watchedBody{body: body}
	w.timer = time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	req.Body = w
	req.ContentLength = s.Size
	if s.Size == 0 {
		req.Body = http.NoBody // a length of 0 with a body would mean "unknown"
	}
	// The server may refuse by the headers alone, before gigabytes flow.
	req.Header.Set("Expect", "100-continue")
	if req.Header.Get("Content-Type") == "" {
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	return func() { w.stop(); _ = w.Close() }, nil
}

// watchedBody restarts the stall timer with every read.
type watchedBody struct {
	body  io.ReadCloser
	timer *time.Timer

	mu      sync.Mutex
	stopped bool
}

func (w *watchedBody) Read(p []byte) (int, error) {
	n, err := w.body.Read(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.stopped = true
		w.timer.Stop()
	} else if !w.stopped {
		w.timer.Reset(stallTimeout)
	}
	return n, err
}

func (w *watchedBody) Close() error { w.stop(); return w.body.Close() }

func (w *watchedBody) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	w.timer.Stop()
}
