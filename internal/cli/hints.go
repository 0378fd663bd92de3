// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"crypto/x509"
	"errors"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// hintFor says what to do about an error, where its text does not yet.
func (a *app) hintFor(err error) string {
	var u *usageError
	if errors.As(err, &u) {
		return u.hint
	}
	var h *hintedError
	if errors.As(err, &h) {
		return h.hint
	}
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &authority):
		return "give the cluster's CA certificate with --cacert or MUSTER_CACERT; every node has it as ca.crt in its data directory (if it worked before, the cluster has replaced its authority)"
	case errors.As(err, &host):
		return "the certificate of the node is for another name or address; use the address that the node was started with (--listen)"
	}
	var task *taskError
	if errors.As(err, &task) {
		return task.hint
	}
	if api.CodeOf(err) == api.CodeForbidden && !aboutRole(err) {
		return "" // no role is allowed this
	}
	if a.Shell != nil {
		switch api.CodeOf(err) {
		case api.CodeForbidden:
			return "your role does not allow it; an administrator gives another with: muster user set NAME --role ROLE"
		case api.CodeUnauthorized, client.CodeUnavailable:
			return "" // how to reach a cluster is no question here
		}
	}
	switch api.CodeOf(err) {
	case api.CodeUnauthorized:
		return "give a valid token with --token or MUSTER_TOKEN; an administrator makes one with: muster token create NAME --role ROLE"
	case api.CodeForbidden:
		return "use a token with a higher role"
	case api.CodeConflict:
		return "it was changed meanwhile; read it again and repeat the change"
	case api.CodeNoQuorum:
		return "a majority of the voting nodes must be up; see muster cluster status"
	case api.CodeNodeFull:
		return "free some space in that node's data directory, or use another node (--server)"
	case api.CodeNotMember:
		return "run on that host: muster cluster init, or muster cluster join TOKEN"
	case client.CodeUnavailable:
		return "check that the daemon runs and the address is right (--server, MUSTER_SERVER)"
	case api.CodeStorageFull:
		return "see muster pool show for the free space of each node"
	}
	return ""
}

// hintedError is an error with the hint that the command itself knows.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// aboutRole reports whether a higher role would be allowed what was forbidden.
// The server names the role then.
func aboutRole(err error) bool {
	return strings.Contains(err.Error(), "the role") || strings.Contains(err.Error(), "an administrator")
}
