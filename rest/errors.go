// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// problemType is the base of the "type" of problem documents.
const problemType = "https://muster-vm.org/problems/"

// statuses is the one place where codes become HTTP statuses and titles.
var statuses = map[api.Code]struct {
	status int
	title  string
}{
	api.CodeInvalid:      {http.StatusUnprocessableEntity, "The request is malformed or a field is out of range"},
	api.CodeUnauthorized: {http.StatusUnauthorized, "A valid token is needed"},
	api.CodeForbidden:    {http.StatusForbidden, "The token does not allow it"},
	api.CodeNotFound:     {http.StatusNotFound, "No such object"},
	api.CodeExists:       {http.StatusConflict, "The name is taken"},
	api.CodeConflict:     {http.StatusPreconditionFailed, "Changed meanwhile"},
	api.CodeRefused:      {http.StatusConflict, "The present state does not allow it"},
	api.CodeUnplaceable:  {http.StatusConflict, "No node fits"},
	api.CodeTooLarge:     {http.StatusRequestEntityTooLarge, "Over a limit"},
	api.CodeNoQuorum:     {http.StatusServiceUnavailable, "The cluster has no quorum"},
	api.CodeNodeFull:     {http.StatusServiceUnavailable, "This node's disk is full"},
	api.CodeNotMember:    {http.StatusServiceUnavailable, "This host belongs to no cluster"},
	api.CodeInternal:     {http.StatusInternalServerError, "Internal error"},
	api.CodeTimeout:      {http.StatusGatewayTimeout, "The deadline passed"},
	api.CodeStorageFull:  {http.StatusInsufficientStorage, "No space left"},
	api.CodeIncomplete:   {http.StatusBadRequest, "The upload ended early"},
	api.CodeChecksum:     {http.StatusUnprocessableEntity, "The content is not what was announced"},
	api.CodeUnsupported:  {http.StatusNotImplemented, "This build or host cannot do it"},
}

// httpError gives an error another status than its code has.
type httpError struct {
	status int
	err    error
}

// Error implements error.
func (e *httpError) Error() string { return e.err.Error() }

// Unwrap returns the error with the code.
func (e *httpError) Unwrap() error { return e.err }

// Problem is an error as the client sees it (RFC 9457).
type Problem struct {
	Type   string   `json:"type" doc:"https://muster-vm.org/problems/CODE"`
	Title  string   `json:"title"`
	Status int      `json:"status"`
	Code   api.Code `json:"code" doc:"stable, for programs"`
	Detail string   `json:"detail" doc:"what was attempted and what to do"`
	Field  string   `json:"field,omitempty" doc:"JSON path or parameter at fault"`
}

// classify returns err as an error with a code.
func classify(err error) *api.Error {
	var e *api.Error
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &tooLong):
		return api.Errorf(api.CodeTooLarge, "the body is larger than %d bytes", tooLong.Limit)
	// First: it may wrap what ended the last try, of which the promise that
	// nothing was changed does not hold for the tries before.
	case errors.Is(err, configdb.ErrUncertain):
		return api.Errorf(api.CodeTimeout, "%w: read before you try again, or repeat the request with its Idempotency-Key", err)
	case errors.Is(err, configdb.ErrNoQuorum):
		return api.Errorf(api.CodeNoQuorum, "%w", err)
	case errors.Is(err, configdb.ErrDiskFull):
		return api.Errorf(api.CodeNodeFull, "%w", err)
	case errors.Is(err, configdb.ErrConflict):
		return api.Errorf(api.CodeConflict, "%w", err)
	case errors.Is(err, configdb.ErrTooLarge):
		return api.Errorf(api.CodeTooLarge, "%w", err)
	case errors.Is(err, configdb.ErrClosed):
		return api.Errorf(api.CodeNoQuorum, "this node is shutting down; use another one: %w", err)
	case errors.Is(err, api.ErrNewerSchema):
		return api.Errorf(api.CodeUnsupported, "%w", err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return api.Errorf(api.CodeTimeout, "%w", err)
	}
	return api.Errorf(api.CodeInternal, "%w", err)
}

// problem writes err as a problem document.
func (s *Server) problem(w http.ResponseWriter, r *http.Request, err error) {
	e := classify(err)
	st, known := statuses[e.Code]
	if !known {
		st = statuses[api.CodeInternal]
	}
	status := st.status
	var h *httpError
	if errors.As(err, &h) {
		status = h.status
	}
	if status == http.StatusInternalServerError {
		s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	detail := *e
	detail.Field = "" // it has a place of its own
	writeJSON(w, "application/problem+json", status, Problem{
		Type: problemType + string(e.Code), Title: st.title, Status: status, Code: e.Code, Detail: detail.Error(), Field: e.Field,
	})
}

// writeJSON sends a value. The values are ours, so encoding cannot fail but
// for a bug; a failed write means that the client is gone.
func writeJSON(w http.ResponseWriter, contentType string, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("rest: encode reply: " + err.Error())
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}

// reply sends a successful answer that reflects a revision.
func (q *request) reply(status int, revision uint64, v any) {
	if revision > 0 {
		setRevision(q.w.Header(), revision)
	}
	writeJSON(q.w, "application/json", status, v)
}

// noContent answers 204.
func (q *request) noContent(revision uint64) {
	if revision > 0 {
		setRevision(q.w.Header(), revision)
	}
	q.w.WriteHeader(http.StatusNoContent)
}

// clip shortens what a client sent for use in a message.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
