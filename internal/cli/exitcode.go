// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// The exit codes, a contract with scripts.
const (
	ExitDone        = 0 // done
	ExitFailed      = 1 // failed
	ExitUsage       = 2 // the command line or a value in it is wrong
	ExitNotFound    = 3 // no such object
	ExitRefused     = 4 // conflict, refused, already exists, no node fits, not allowed
	ExitUnavailable = 5 // no quorum, no cluster, or no server answers
)

// usageError is a mistake in the command line.
type usageError struct {
	message string
	hint    string
}

func (e *usageError) Error() string { return e.message }

func usagef(format string, args ...any) *usageError {
	return &usageError{message: fmt.Sprintf(format, args...)}
}

// taskError is a task that did not succeed.
type taskError struct {
	message string
	code    api.Code
	hint    string
}

func (e *taskError) Error() string { return e.message }

// exitCode maps every error to the code of the process.
func exitCode(err error) int {
	var usage *usageError
	var task *taskError
	switch {
	case err == nil:
		return ExitDone
	case errors.As(err, &usage):
		return ExitUsage
	case errors.As(err, &task):
		// A wish that no node can fulfil is refused, whether the node that
		// took the call or the leader's placement found it out.
		switch task.code {
		case api.CodeUnplaceable, api.CodeRefused:
			return ExitRefused
		}
		return ExitFailed
	case errors.Is(err, context.Canceled):
		return ExitFailed
	}
	switch api.CodeOf(err) {
	case api.CodeInvalid, api.CodeTooLarge:
		return ExitUsage
	case api.CodeNotFound:
		return ExitNotFound
	case api.CodeExists, api.CodeConflict, api.CodeRefused, api.CodeUnplaceable,
		api.CodeUnauthorized, api.CodeForbidden:
		return ExitRefused
	case api.CodeNoQuorum, api.CodeNodeFull, api.CodeNotMember, client.CodeUnavailable:
		return ExitUnavailable
	}
	return ExitFailed
}
