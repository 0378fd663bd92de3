// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/muster-vm/muster/api"
)

// The header and the warning are there while the quorum is lost, for those who have
// logged in, and go with the loss.
func TestTheHeaderOfALostQuorumComesAndGoes(t *testing.T) {
	f := newFixture(t)
	var lost atomic.Pointer[api.QuorumLoss]
	f.servers["m1"].cfg.NoQuorum = lost.Load
	look := func(token string) http.Header {
		t.Helper()
		return f.do(call{method: http.MethodGet, path: "vms", token: token}).header
	}
	silent := func(when string, h http.Header) {
		t.Helper()
		if h.Get(headerQuorum) != "" || h.Get(headerWarning) != "" {
			t.Errorf("%s: %v", when, h)
		}
	}
	silent("before the loss", look(""))
	lost.Store(&api.QuorumLoss{Banner: "no quorum at node m1"})
	if h := look(""); h.Get(headerQuorum) != quorumLost || !strings.Contains(h.Get(headerWarning), "no quorum at node m1") {
		t.Errorf("while it is lost: %v", h)
	}
	silent("to a stranger", look("muster_unknown"))
	lost.Store(nil)
	silent("after the loss", look(""))
}
