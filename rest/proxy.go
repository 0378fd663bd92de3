// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// proxy sends the request on to another node, once. The caller's credentials
// stay here; what goes along is who asked, which the other node believes
// because of this node's certificate.
func (q *request) proxy(node string) error {
	if q.who.forwarded {
		return api.Errorf(api.CodeRefused, "node %s was asked by another node, but the object is on node %s now; try again", q.s.cfg.Node(), node)
	}
	transport, target, err := q.s.cfg.Peers.Proxy(node)
	if err != nil {
		return err
	}
	var failed error
	p := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(target)
			pr.Out.Host = pr.In.Host // what a browser's Origin is compared with
			h := pr.Out.Header
			h.Del("Authorization")
			h.Del("Cookie")
			for name := range h {
				if strings.HasPrefix(name, "Muster-Forwarded-") {
					h.Del(name)
				}
			}
			h.Set(headerBy, q.s.cfg.Node())
			h.Set(headerActor, q.who.actor)
			h.Set(headerRole, string(q.who.role))
			h.Set(headerSource, q.source())
			if q.who.tokenID != "" {
				h.Set(headerToken, q.who.tokenID+" "+q.who.secretHash)
			}
		},
		Transport:     transport,
		FlushInterval: -1,
		ErrorHandler:  func(_ http.ResponseWriter, _ *http.Request, err error) { failed = err },
	}
	// What view may have said about this node's replica is not the answer's.
	for _, name := range []string{headerRevision, headerConsistency, headerAge} {
		q.w.Header().Del(name)
	}
	_ = q.ctl.SetWriteDeadline(time.Time{}) // the other node has the deadlines
	r := q.r
	in := &uploadReader{ctl: q.ctl, from: q.r.Body}
	if q.r.ContentLength != 0 {
		r = q.r.Clone(q.ctx())
		r.Body = in
	}
	q.whileWelcome(func(ctx context.Context) { p.ServeHTTP(q.w, r.WithContext(ctx)) })
	if failed == nil {
		return nil
	}
	if incomplete := in.failed.Load(); incomplete != nil {
		return incomplete
	}
	if errors.Is(failed, context.Canceled) && q.ctx().Err() != nil {
		return context.Cause(q.ctx())
	}
	return &httpError{http.StatusBadGateway, api.Errorf(api.CodeTimeout, "node %s, which has to answer this, cannot be reached from node %s: %w", node, q.s.cfg.Node(), failed)}
}

// whileWelcome runs f with a context that ends with the caller's token. The
// other node cannot look after that: it does not know the token.
func (q *request) whileWelcome(f func(context.Context)) {
	ctx, cancel := context.WithCancel(q.ctx())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		defer cancel()
		_ = contain.Do(func() { // if it cannot look, the call ends
			tick := time.NewTicker(q.s.pingEvery)
			defer tick.Stop()
			for q.stillWelcome() {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
	}()
	defer func() {
		cancel()
		<-watched
	}()
	f(ctx)
}
