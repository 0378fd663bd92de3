// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bufio"
	"net"
	"net/http"
	"strconv"
	"time"
)

// Headers of this interface.
const (
	headerNode        = "Muster-Node"
	headerRevision    = "Muster-Revision"
	headerConsistency = "Muster-Consistency"
	headerAge         = "Muster-Age"
	headerTask        = "Muster-Task"
	headerQuorum      = "Muster-Quorum"
	headerReplayed    = "Idempotency-Replayed"
	headerIdemKey     = "Idempotency-Key"
	headerActor       = "Muster-Forwarded-Actor"
	headerRole        = "Muster-Forwarded-Role"
	headerBy          = "Muster-Forwarded-By"
)

// recorder notes the status for the metrics and adds the headers that every
// reply has. Unwrap gives http.ResponseController the connection below.
type recorder struct {
	http.ResponseWriter
	s      *Server
	route  string
	began  time.Time
	status int
}

// Unwrap implements the contract of http.ResponseController.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *recorder) WriteHeader(status int) {
	if w.status == 0 || w.status < http.StatusOK && w.status != http.StatusSwitchingProtocols {
		w.status = status
		w.common()
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *recorder) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

// common sets what is still missing: a reply that came from another node keeps
// the name and the revision of that node.
func (w *recorder) common() {
	h := w.Header()
	if h.Get(headerNode) == "" {
		h.Set(headerNode, w.s.cfg.Node())
	}
	if h.Get(headerRevision) == "" {
		if db, ok := w.s.cfg.DB(); ok {
			setRevision(h, db.Local().Revision())
		}
	}
	h.Set("X-Content-Type-Options", "nosniff")
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "no-store")
	}
}

func setRevision(h http.Header, rev uint64) { h.Set(headerRevision, strconv.FormatUint(rev, 10)) }

func (w *recorder) done(r *http.Request) {
	took := w.s.cfg.Now().Sub(w.began)
	status := w.status
	if status == 0 {
		status = http.StatusOK
	}
	w.s.metrics.observe(r.Method, w.route, status, took)
	w.s.log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", status, "took", took)
}

// Hijack implements http.Hijacker: a connection that is taken over was
// upgraded.
func (w *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil && w.status == 0 {
		w.status = http.StatusSwitchingProtocols
	}
	return c, rw, err
}
