// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func TestGuestAgentFromAnyNode(t *testing.T) {
	f, vm := screens(t)
	home := f.binding(vm.Meta.ID).Spec.Node
	for _, node := range []string{"m1", "m2"} {
		k := want[api.GuestAgent](t, f.do(call{method: "GET", path: "vms/web1/agent", node: node, role: api.RoleViewer}), 200)
		if k.VM != "web1" || k.Node != home || !k.Answering || k.Version != "7.2" {
			t.Errorf("%+v", k)
		}
		fs := want[api.GuestFileSystems](t, f.do(call{method: "GET", path: "vms/web1/agent/filesystems", node: node, role: api.RoleViewer}), 200)
		if len(fs.Items) != 1 || fs.Items[0].Mount != "/" {
			t.Errorf("%+v", fs)
		}
		out := want[api.GuestExecResult](t, f.do(call{method: "POST", path: "vms/web1/agent/exec", node: node, body: `{"command":["/bin/x","a b"],"input":"c2VjcmV0","env":["KEY=hidden"]}`}), 200)
		if out.ExitCode != 3 || string(out.Stdout) != "hello\n" {
			t.Errorf("%+v", out)
		}
	}
	if r := f.console.guest.ran; string(r.Input) != "secret" || r.Seconds != api.DefaultExecSeconds {
		t.Errorf("%+v", r)
	}
	got := f.audits("audit.vm.exec")
	if len(got) != 2 || got[0].Spec.Details["command"] != `"/bin/x" "a b"` || got[0].Spec.Target != "web1" {
		t.Fatalf("%+v", got)
	}
	if b, _ := json.Marshal(got); strings.Contains(string(b), "secret") || strings.Contains(string(b), "hidden") {
		t.Errorf("the input or the environment is in the events: %s", b)
	}
	// Frozen once.
	z := want[api.GuestFrozen](t, f.do(call{method: "POST", path: "vms/web1/agent/freeze", node: "m2", role: api.RoleOperator, body: `{"seconds":5}`}), 200)
	if !z.Frozen || z.FileSystems != 2 || z.ThawsAt == nil || time.Until(*z.ThawsAt) > 5*time.Second {
		t.Errorf("%+v", z)
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/agent/freeze"}), 409, api.CodeRefused, "")
	want[api.GuestFrozen](t, f.do(call{method: "POST", path: "vms/web1/agent/thaw"}), 200)
}

func TestGuestAgentRefusals(t *testing.T) {
	f, vm := screens(t)
	for path, bodies := range map[string]map[string]string{
		"exec": {
			`{}`: "command", `{"command":[""]}`: "command", `{"command":["a\u0000"]}`: "command", `{"command":["a"],"seconds":301}`: "seconds",
			`{"command":["a"],"env":["x"]}`: "env", `{"command":["a"],"shell":true}`: "shell",
		},
		"password": {
			`{"user":"root"}`: "password", `{"password":"hidden"}`: "user", `{"user":"a:b","password":"hidden"}`: "user", `{"user":"root","password":"a\nb"}`: "password",
			`{"user":"root","password":{"is":"hidden"}}`: "password.is",
		},
		"freeze": {`{"seconds":601}`: "seconds", `{"seconds":-1}`: "seconds"},
	} {
		for body, field := range bodies {
			a := f.do(call{method: "POST", path: "vms/web1/agent/" + path, body: body})
			if a.status != 422 || strings.Contains(string(a.body), "hidden") {
				t.Errorf("%s %s: %d %s", path, body, a.status, a.body)
			} else if p := want[Problem](t, a, 422); !strings.HasPrefix(field, p.Field) || p.Field == "" {
				t.Errorf("%s %s: field %q, want %q", path, body, p.Field, field)
			}
		}
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/agent/exec", role: api.RoleOperator, body: `{"command":["a"]}`}), 403, api.CodeForbidden, "")
	if f.console.guest.ran.Command != nil || f.console.guest.password != "" || f.console.guest.frozen {
		t.Error("a refused request reached the guest")
	}
	f.console.guest.fail = api.Errorf(api.CodeUnsupported, "the agent cannot")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/agent/password", body: `{"user":"root","password":"hidden"}`}), 501, api.CodeUnsupported, "")
	if n := len(f.audits("audit.vm.password")); n != 0 {
		t.Errorf("%d events of a password that was not changed", n)
	}
	if k := want[api.GuestAgent](t, f.do(call{method: "GET", path: "vms/web1/agent"}), 200); k.Answering {
		t.Errorf("%+v", k)
	}
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/stop"}), 202)
	f.report(vm.Meta.ID, api.VMStopped)
	for _, c := range []call{
		{method: "GET", path: "vms/web1/agent"}, {method: "GET", path: "vms/web1/agent/filesystems"}, {method: "POST", path: "vms/web1/agent/thaw"},
		{method: "POST", path: "vms/web1/agent/exec", body: `{"command":["a"]}`},
	} {
		wantProblem(t, f.do(c), 409, api.CodeRefused, "")
	}
}

// TestGuestPasswordIsKeptNowhere: not in the database, not in the log.
func TestGuestPasswordIsKeptNowhere(t *testing.T) {
	f, _ := screens(t)
	var log bytes.Buffer
	all := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for _, s := range f.servers {
		s.log = all
	}
	h := map[string]string{headerIdemKey: "k1"}
	for _, node := range []string{"m1", "m2"} {
		a := f.do(call{method: "POST", path: "vms/web1/agent/password", node: node, role: api.RoleOperator, body: `{"user":"root","password":"correct horse"}`, header: h})
		if a.status != 204 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	if f.console.guest.password != "root:correct horse" {
		t.Error(f.console.guest.password)
	}
	for e := range f.db.Local().Scan(configdb.Root, "") {
		if bytes.Contains(e.Value, []byte("horse")) {
			t.Errorf("%s has the password", e.Key)
		}
	}
	if got := f.audits("audit.vm.password"); len(got) != 2 || got[0].Spec.Details["user"] != "root" {
		t.Errorf("%+v", got)
	}
	for _, stop := range f.stops { // then nobody writes to the log any more
		stop()
	}
	if strings.Contains(log.String(), "horse") {
		t.Error(log.String())
	}
}
