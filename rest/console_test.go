// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"io"
	"net/http"
	"testing"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

func TestConsoleFromAnyNode(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	f.report(vm.Meta.ID, api.VMRunning)
	f.console.rings[vm.Meta.ID] = []byte("line one\nline two\n")
	for _, node := range []string{"m1", "m2"} {
		c, _, err := f.dialNode(node, "vms/web1/console?history=9", api.RoleOperator)
		if err != nil {
			t.Fatal(err)
		}
		read := func(expect string) {
			t.Helper()
			typ, b, err := c.Read(t.Context())
			if err != nil || typ != websocket.MessageBinary || string(b) != expect {
				t.Fatalf("%s: %v %q %v, want %q", node, typ, b, err, expect)
			}
		}
		read("line two\n")
		for _, text := range []string{"ls\n", "\x03"} {
			if err := c.Write(t.Context(), websocket.MessageBinary, []byte(text)); err != nil {
				t.Fatal(err)
			}
			read(text)
		}
		if err := c.Write(t.Context(), websocket.MessageBinary, []byte("bye")); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
			t.Errorf("%s: the end of the console: %v", node, err)
		}
		a := f.do(call{method: "GET", path: "vms/web1/console/log?bytes=4", node: node, role: api.RoleViewer})
		if a.status != 200 || string(a.body) != "two\n" || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%s: log %d %q", node, a.status, a.body)
		}
	}
}

func TestConsoleRefusals(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	_, resp, err := f.dial("vms/web1/console", api.RoleOperator)
	if err == nil {
		t.Fatal("a console of a stopped VM")
	}
	b, _ := io.ReadAll(resp.Body)
	wantProblem(t, answer{resp.StatusCode, resp.Header, b}, 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console"}), 422, api.CodeInvalid, "Upgrade")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console?history=262145"}), 422, api.CodeInvalid, "history")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console/log?bytes=0"}), 422, api.CodeInvalid, "bytes")
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console/log"}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "GET", path: "vms/nope/console/log"}), 404, api.CodeNotFound, "")

	// One hop only: a request that was sent on is not sent on again.
	home := f.binding(vm.Meta.ID).Spec.Node
	other := map[string]string{"m1": "m2", "m2": "m1"}[home]
	h := map[string]string{testPeer: home, headerBy: home, headerActor: "a", headerRole: "viewer"}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console/log", node: other, token: "none", header: h}), 409, api.CodeRefused, "")

	// The owner cannot be reached.
	f.urls[home] = "http://127.0.0.1:1"
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/console/log", node: other}), http.StatusBadGateway, api.CodeTimeout, "")
}
