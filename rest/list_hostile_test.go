// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/base64"
	"net/http"
	"testing"

	"github.com/muster-vm/muster/api"
)

// What is behind all objects has an empty page: a program that sent a wrong value took
// that for the end of the list.
func TestAPageBeginsBehindAnObject(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped)
	f.newVM("b", api.VMStopped)
	page := want[List[api.VM]](t, f.do(call{path: "vms?limit=1"}), http.StatusOK)
	if rest := want[List[api.VM]](t, f.do(call{path: "vms?continue=" + page.Continue}), http.StatusOK); len(rest.Items) != 1 || rest.Items[0].Meta.Name != "b" {
		t.Errorf("%+v", rest.Items)
	}
	for _, text := range []string{"zzzz", "web1", page.Items[0].Meta.ID + "/", page.Items[0].Meta.ID + ".", "\xff\xfe"} {
		token := base64.RawURLEncoding.EncodeToString([]byte(text))
		for _, path := range []string{"vms?continue=", "events?last=3&continue="} {
			wantProblem(t, f.do(call{path: path + token}), 422, api.CodeInvalid, "continue")
		}
	}
	wantProblem(t, f.do(call{path: "raw/?prefix=app/&continue=" + base64.RawURLEncoding.EncodeToString([]byte("b"))}), 422, api.CodeInvalid, "continue")
}
