// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/muster-vm/muster/api"
)

// errSilent ends a download whose server sends no byte for so long.
var errSilent = errors.New("sent no data for " + stallTimeout.String())

// Download sends a request to the first server that takes it and hands the body
// of its answer to sink, whose error it returns. Once sink was called no other
// server is tried.
func (c *Client) Download(ctx context.Context, r Request, sink func(io.Reader) error) error {
	r.Header = r.Header.Clone()
	if r.Header == nil {
		r.Header = http.Header{}
	}
	r.Header.Set("Accept", "application/octet-stream, application/json")
	failed := c.settle(ctx)
	if failed != nil {
		return c.giveUp(ctx, failed)
	}
	first := int(c.good.Load())
	for i := range c.endpoints {
		at := (first + i) % len(c.endpoints)
		e := c.endpoints[at]
		taken, err := c.download(ctx, e, &r, sink)
		var p *Problem
		answered := errors.As(err, &p)
		if taken || err == nil || answered && !passOver(p) {
			c.good.Store(int32(at))
			return err
		}
		failed = append(failed, attemptError{server: e.name, err: err, sent: true})
		if ctx.Err() != nil {
			break
		}
		if i < len(c.endpoints)-1 {
			c.notify(e.name + ": " + brief(err) + "; trying the next server")
		}
	}
	return c.giveUp(ctx, failed)
}

// download asks one server. taken is true once its answer went to sink.
func (c *Client) download(ctx context.Context, e *endpoint, r *Request, sink func(io.Reader) error) (taken bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := c.newRequest(ctx, e, r)
	if err != nil {
		return false, err
	}
	timer := time.AfterFunc(answerTimeout, func() { cancel(errNoAnswer) })
	defer timer.Stop()
	why := func(err error) error {
		if cause := context.Cause(ctx); err != nil && errors.Is(ctx.Err(), context.Canceled) && !errors.Is(cause, context.Canceled) {
			return cause
		}
		return err
	}
	resp, err := e.rest.Do(req)
	if err != nil {
		return false, why(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
		return false, problemFrom(resp.StatusCode, resp.Header, body)
	}
	timer.Stop()
	stall := time.AfterFunc(stallTimeout, func() { cancel(errSilent) })
	defer stall.Stop()
	err = sink(&livelyBody{body: resp.Body, timer: stall})
	if cause := why(err); cause != err { //nolint:errorlint // the very same or another
		return true, &api.Error{Code: CodeUnavailable, Detail: e.name + " broke off", Err: cause}
	}
	return true, err
}

// livelyBody restarts the stall timer with every read.
type livelyBody struct {
	body  io.Reader
	timer *time.Timer
}

// Read implements io.Reader.
func (l *livelyBody) Read(p []byte) (int, error) {
	n, err := l.body.Read(p)
	l.timer.Reset(stallTimeout)
	return n, err
}
