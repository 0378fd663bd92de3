// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
)

// CodeUnavailable is the code of the error that this client makes when no
// server answers. No server sends it.
const CodeUnavailable api.Code = "unavailable"

// ProblemType is the prefix of the type of every problem document.
const ProblemType = "https://muster-vm.org/problems/"

// Problem is an RFC 9457 problem document. It wraps the *api.Error that it
// describes.
type Problem struct {
	Type   string   `json:"type"`
	Title  string   `json:"title"`
	Status int      `json:"status,omitempty"`
	Code   api.Code `json:"code"`
	Detail string   `json:"detail"`
	Field  string   `json:"field,omitempty"`
	// Node that answered; not part of the document.
	Node string `json:"-"`

	err *api.Error
}

// Error implements error.
func (p *Problem) Error() string { return p.err.Error() }

// Unwrap returns the *api.Error.
func (p *Problem) Unwrap() error { return p.err }

// ProblemOf returns the problem document of any error: the server's own if it
// sent one, otherwise one made from the error's code and text.
func ProblemOf(err error) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	out := &Problem{Code: api.CodeOf(err), Detail: err.Error()}
	var e *api.Error
	if errors.As(err, &e) {
		out.Field, out.Detail = e.Field, strings.TrimPrefix(err.Error(), e.Field+": ")
	}
	out.Type, out.Title = ProblemType+string(out.Code), strings.ReplaceAll(string(out.Code), "_", " ")
	out.err = &api.Error{Code: out.Code, Field: out.Field, Detail: out.Detail, Err: nil}
	return out
}

// problemFrom reads the answer of a server that is not a success.
func problemFrom(status int, h http.Header, body []byte) *Problem {
	p := &Problem{}
	media, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	isDoc := strings.HasSuffix(media, "json") && json.Unmarshal(body, p) == nil && p.Code != ""
	if !isDoc {
		text := strings.TrimSpace(string(body))
		if len(text) > maxPlainDetail {
			text = text[:maxPlainDetail]
		}
		if text == "" || strings.HasPrefix(text, "{") {
			text = http.StatusText(status)
		}
		p = &Problem{Code: codeOfStatus(status), Detail: fmt.Sprintf("the server answered %d: %s", status, text)}
		p.Type, p.Title = ProblemType+string(p.Code), http.StatusText(status)
	}
	if p.Status == 0 {
		p.Status = status
	}
	if p.Detail == "" {
		p.Detail = p.Title
	}
	p.Node = h.Get(headerNode)
	p.err = &api.Error{Code: p.Code, Field: p.Field, Detail: p.Detail}
	return p
}

const maxPlainDetail = 200

// codeOfStatus gives a code to an answer without a problem document, as a
// proxy between would send it.
func codeOfStatus(status int) api.Code {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusMethodNotAllowed:
		return api.CodeInvalid
	case http.StatusUnauthorized:
		return api.CodeUnauthorized
	case http.StatusForbidden:
		return api.CodeForbidden
	case http.StatusNotFound:
		return api.CodeNotFound
	case http.StatusConflict:
		return api.CodeRefused
	case http.StatusPreconditionFailed:
		return api.CodeConflict
	case http.StatusRequestEntityTooLarge:
		return api.CodeTooLarge
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return CodeUnavailable
	case http.StatusGatewayTimeout:
		return api.CodeTimeout
	case http.StatusInsufficientStorage:
		return api.CodeStorageFull
	case http.StatusNotImplemented:
		return api.CodeUnsupported
	}
	return api.CodeInternal
}

// attemptError is why one server did not take a request.
type attemptError struct {
	server string
	err    error
	// sent is false when nothing of the request can have reached the server.
	sent bool
}

// attempts is the failure on every server, on one line.
type attempts []attemptError

func (a attempts) Error() string {
	parts := make([]string, len(a))
	for i, e := range a {
		parts[i] = e.server + ": " + brief(e.err)
	}
	return strings.Join(parts, "; ")
}

// Unwrap lets errors.Is and errors.As look into every attempt.
func (a attempts) Unwrap() []error {
	out := make([]error, len(a))
	for i, e := range a {
		out[i] = e.err
	}
	return out
}

// brief leaves the essence of a network error: who reads the message knows
// the address already.
func brief(err error) string {
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case errors.Is(err, errNoAnswer), errors.Is(err, errStalled):
		return err.Error()
	case errors.As(err, &dns):
		return dns.Error()
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, os.ErrNotExist):
		return "no such socket; is the daemon running with this data directory?"
	case errors.Is(err, os.ErrPermission):
		return "permission denied; run as root"
	case errors.As(err, &op) && op.Timeout():
		return "no answer within " + dialTimeout.String()
	case errors.Is(err, context.DeadlineExceeded):
		return "no answer before the deadline"
	}
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err.Error() // without the method and the address
	}
	return err.Error()
}
