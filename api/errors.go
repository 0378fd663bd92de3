// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"errors"
	"fmt"
)

// Code is the stable, machine-readable name of an error. It appears as "code"
// in problem documents (RFC 9457) and decides the HTTP status and the exit
// code of the command line in one place each.
type Code string

// The codes. New ones may be added; none is ever renamed.
const (
	CodeInvalid      Code = "invalid"         // the request is malformed or a field is out of range: HTTP 422
	CodeUnauthorized Code = "unauthorized"    // no token or a wrong one: HTTP 401
	CodeForbidden    Code = "forbidden"       // the token's role does not allow it: HTTP 403
	CodeNotFound     Code = "not_found"       // no such object: HTTP 404
	CodeExists       Code = "already_exists"  // the name is taken: HTTP 409
	CodeConflict     Code = "conflict"        // changed meanwhile (If-Match): HTTP 412
	CodeRefused      Code = "refused"         // understood, but the state does not allow it: HTTP 409
	CodeUnplaceable  Code = "unplaceable"     // no node fits; the detail lists why: HTTP 409
	CodeTooLarge     Code = "too_large"       // over a documented limit: HTTP 413
	CodeNoQuorum     Code = "no_quorum"       // the cluster cannot take writes now: HTTP 503
	CodeNodeFull     Code = "node_full"       // this node's disk takes no changes, others do: HTTP 503
	CodeNotMember    Code = "not_initialized" // this host belongs to no cluster yet: HTTP 503
	CodeInternal     Code = "internal"        // a bug or an environment failure: HTTP 500
	CodeTimeout      Code = "timeout"         // the deadline passed: HTTP 504
	CodeStorageFull  Code = "storage_full"    // no space left where data must go: HTTP 507
	CodeIncomplete   Code = "incomplete"      // an upload ended early: HTTP 400
	CodeChecksum     Code = "checksum"        // the content is not what was announced: HTTP 422
	CodeUnsupported  Code = "unsupported"     // this build or host cannot do it: HTTP 501
)

// Error is an error that a user can act on. Detail says what was attempted on
// which object and what to do; Field is the offending JSON path, if one is.
type Error struct {
	Code   Code
	Field  string
	Detail string
	Err    error
}

// Error implements error.
func (e *Error) Error() string {
	s := e.Detail
	if e.Field != "" {
		s = e.Field + ": " + s
	}
	if e.Err != nil {
		if cause := e.Err.Error(); cause != "" {
			s += ": " + cause
		}
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf builds an Error without a field. A %w verb sets the cause of the
// chain as with fmt.Errorf.
func Errorf(code Code, format string, args ...any) *Error {
	w := fmt.Errorf(format, args...)
	return &Error{Code: code, Detail: w.Error(), Err: hidden(errors.Unwrap(w))}
}

// Invalid builds a validation error about one field.
func Invalid(field, format string, args ...any) *Error {
	return &Error{Code: CodeInvalid, Field: field, Detail: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of the first Error in err's chain, or CodeInternal.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// IgnoreNotFound returns nil for an error with the code not_found, for callers
// to whom an object that is gone is nothing to do.
func IgnoreNotFound(err error) error {
	if CodeOf(err) == CodeNotFound {
		return nil
	}
	return err
}

// hiddenError keeps the chain for errors.Is without repeating the text, which
// Errorf has already put into the detail.
type hiddenError struct{ error }

func (h hiddenError) Error() string { return "" }
func (h hiddenError) Unwrap() error { return h.error }

func hidden(err error) error {
	if err == nil {
		return nil
	}
	return hiddenError{err}
}
