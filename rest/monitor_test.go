// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakeMonitor answers for one node.
type fakeMonitor struct {
	node string

	mu     sync.Mutex
	tested []string
}

func (m *fakeMonitor) WriteMetrics(b *strings.Builder) { b.WriteString("muster_node_load1 1.5\n") }

func (m *fakeMonitor) Metrics(name string, since time.Duration) api.Metrics {
	return api.Metrics{Node: m.node, Series: []api.MetricSeries{{Name: name, Points: []api.MetricPoint{{Value: since.Seconds()}}}}}
}

func (m *fakeMonitor) SealSecret(id, secret string) ([]byte, error) {
	return []byte("sealed:" + id + ":" + strings.ToUpper(secret)), nil
}

func (m *fakeMonitor) TestReceiver(_ context.Context, id, actor string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tested = append(m.tested, id+" by "+actor)
	return nil
}

func withMonitors(f *fixture) map[string]*fakeMonitor {
	out := map[string]*fakeMonitor{}
	for name, s := range f.servers {
		out[name] = &fakeMonitor{node: name}
		s.cfg.Monitor = out[name]
		s.cfg.Power = &fakePower{node: name}
	}
	return out
}

func TestMetricsOfAnyNodeFromAnyNode(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	for _, node := range []string{"", "m1", "m2"} {
		got := want[api.Metrics](t, f.do(call{method: "GET", path: "metrics?name=muster_node_*&since=10m&node=" + node, role: api.RoleViewer}), http.StatusOK)
		if node == "" {
			node = "m1"
		}
		if got.Node != node || got.Series[0].Points[0].Value != 600 || got.Series[0].Name != "muster_node_*" {
			t.Errorf("asked m1 for %s: %+v", node, got)
		}
	}
	if a := f.do(call{method: "GET", path: "/metrics"}); !strings.Contains(string(a.body), "\nmuster_node_load1 1.5\n") {
		t.Errorf("/metrics lacks the monitor's values: %s", a.body)
	}
	for query, field := range map[string]string{"since=yesterday": "since", "since=2h": "since", "since=-1s": "since", "node=../x": "node", "name=" + strings.Repeat("x", 300): "name"} {
		wantProblem(t, f.do(call{method: "GET", path: "metrics?" + query}), http.StatusUnprocessableEntity, api.CodeInvalid, field)
	}
	if a := f.do(call{method: "GET", path: "metrics?node=m9"}); a.status < 400 {
		t.Errorf("a node that does not exist: %d", a.status)
	}
	f.servers["m1"].cfg.Monitor = nil
	wantProblem(t, f.do(call{method: "GET", path: "metrics"}), http.StatusNotImplemented, api.CodeUnsupported, "")
}

func (f *fixture) audits(typ string) []api.Event {
	f.t.Helper()
	all := want[List[api.Event]](f.t, f.do(call{method: "GET", path: "events?last=1000&fields=spec.type=" + typ}), http.StatusOK)
	return all.Items
}

func TestEveryChangeIsAudited(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	vm := f.newVM("web1", api.VMStopped)
	got := f.audits("audit.vm.create")
	if len(got) != 1 {
		t.Fatalf("%d events of the creation", len(got))
	}
	e := got[0].Spec
	if e.Actor != "administrator" || e.Source != "127.0.0.1" || e.Node != "m1" || e.Details["method"] != "POST" || e.Details["path"] != "/api/v1/vms" {
		t.Errorf("event %+v", e)
	}
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start", node: "m2", role: api.RoleOperator}), http.StatusAccepted)
	if got = f.audits("audit.vm.start"); len(got) != 1 || got[0].Spec.Actor != "operator" || got[0].Spec.TargetID != vm.Meta.ID || got[0].Spec.Target != "web1" {
		t.Errorf("events of the start %+v", got)
	}
	f.do(call{method: "PATCH", path: "vms/web1", body: `{"meta":{"labels":{"a":"b"}}}`})
	f.do(call{method: "PATCH", path: "vms/web1", body: `{"meta":{"labels":{"a":"b"}}}`}) // changes nothing
	if n := len(f.audits("audit.vm.update")); n != 1 {
		t.Errorf("%d events of one change", n)
	}
	f.do(call{method: "PUT", path: "raw/mine/key", body: "a secret value"})
	if got = f.audits("audit.raw.update"); len(got) != 1 || strings.Contains(got[0].Spec.Message, "secret") || got[0].Spec.TargetID != "mine/key" {
		t.Errorf("events of the raw key %+v", got)
	}
	f.do(call{method: "POST", path: "vms", body: vmBody("web1")}) // refused
	f.do(call{method: "POST", path: "vms", body: vmBody("web2"), role: api.RoleViewer})
	if n := len(f.audits("audit.vm.create")); n != 1 {
		t.Errorf("%d events, though nothing was created", n)
	}
	f.do(call{method: "POST", path: "vms", body: vmBody("web3"), header: map[string]string{headerIdemKey: "k"}})
	f.do(call{method: "POST", path: "vms", body: vmBody("web3"), header: map[string]string{headerIdemKey: "k"}})
	if n := len(f.audits("audit.vm.create")); n != 2 {
		t.Errorf("%d events, a repeated request made one, too", n)
	}
	if last := want[List[api.Event]](t, f.do(call{method: "GET", path: "events?last=1"}), http.StatusOK); len(last.Items) != 1 || last.Items[0].Spec.Target != "web3" {
		t.Errorf("the newest event is %+v", last.Items)
	}
	wantProblem(t, f.do(call{method: "GET", path: "events?last=0"}), http.StatusUnprocessableEntity, api.CodeInvalid, "last")
	if a := f.do(call{method: "DELETE", path: "events/" + got[0].Meta.ID}); a.status != http.StatusMethodNotAllowed {
		t.Errorf("an event can be deleted: %d", a.status)
	}
}

func TestSecretsOfReceiversAreSealedAndNeverShown(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	const secret = "hunter2-hunter2"
	body := map[string]any{"meta": map[string]any{"name": "ops"}, "spec": map[string]any{
		"type": "smtp", "address": "127.0.0.1:25", "from": "a@example.org", "to": []string{"b@example.org"}, "user": "u", "secret": secret,
	}}
	made := f.do(call{method: "POST", path: "receivers", body: body})
	r := want[api.Receiver](t, made, http.StatusCreated)
	shown := []answer{made, f.do(call{method: "GET", path: "receivers/ops"}), f.do(call{method: "GET", path: "receivers"}),
		f.do(call{method: "PATCH", path: "receivers/ops", body: `{"spec":{"minSeverity":"critical"}}`})}
	for _, a := range shown {
		if a.status >= 300 || strings.Contains(strings.ToLower(string(a.body)), "hunter2") || strings.Contains(string(a.body), "sealed") {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	stored := func() api.Receiver {
		t.Helper()
		o, err := configdb.Receivers.Find(f.db.Local(), "", "ops")
		if err != nil || o.Spec.Secret != "" {
			t.Fatalf("stored %+v, %v", o.Spec, err)
		}
		return o
	}
	sealed := "sealed:" + r.Meta.ID + ":HUNTER2-HUNTER2"
	if o := stored(); string(o.Spec.SealedSecret) != sealed || o.Spec.MinSeverity != api.SeverityCritical {
		t.Errorf("after a change of another field: %+v", o.Spec)
	}
	// What was shown can be put back without losing the secret.
	var doc map[string]any
	if err := json.Unmarshal(shown[1].body, &doc); err != nil {
		t.Fatal(err)
	}
	want[api.Receiver](t, f.do(call{method: "PUT", path: "receivers/ops", body: doc}), http.StatusOK)
	f.do(call{method: "PATCH", path: "receivers/ops", body: `{"spec":{"sealedSecret":"AAAA"}}`})
	if o := stored(); string(o.Spec.SealedSecret) != sealed {
		t.Errorf("after what was shown was put back: %+v", o.Spec)
	}
	want[api.Receiver](t, f.do(call{method: "PATCH", path: "receivers/ops", body: `{"spec":{"secret":"new"}}`}), http.StatusOK)
	if o := stored(); string(o.Spec.SealedSecret) != "sealed:"+r.Meta.ID+":NEW" {
		t.Errorf("after a new secret: %+v", o.Spec)
	}
	for _, role := range []api.Role{api.RoleViewer, api.RoleOperator} {
		wantProblem(t, f.do(call{method: "GET", path: "receivers/ops", role: role}), http.StatusForbidden, api.CodeForbidden, "")
	}
	if a := f.do(call{method: "DELETE", path: "receivers/ops"}); a.status != http.StatusNoContent {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	for _, e := range f.audits("audit.receiver.create") {
		if b, _ := json.Marshal(e); strings.Contains(string(b), "hunter2") {
			t.Errorf("the audit event tells the secret: %s", b)
		}
	}
}

func TestBadReceiversAndRules(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	for name, tc := range map[string]struct{ path, spec, field string }{
		"no such type":         {"receivers", `{"type":"pigeon","address":"h:1"}`, "spec.type"},
		"mail without people":  {"receivers", `{"type":"smtp","address":"h:25"}`, "spec.to"},
		"a header in a name":   {"receivers", `{"type":"smtp","address":"h:25","from":"a@b","to":["x@y\r\nBcc: z@z"]}`, "spec.to"},
		"no port":              {"receivers", `{"type":"smtp","address":"h","from":"a@b","to":["x@y"]}`, "spec.address"},
		"half a mail address":  {"receivers", `{"type":"smtp","address":"h:25","from":"@b","to":["x@y"]}`, "spec.to"},
		"a name with the mail": {"receivers", `{"type":"smtp","address":"h:25","from":"a@b","to":["Ann <x@y>"]}`, "spec.to"},
		"no host":              {"receivers", `{"type":"smtp","address":":25","from":"a@b","to":["x@y"]}`, "spec.address"},
		"a port in words":      {"receivers", `{"type":"snmp","address":"h:trap","secret":"public"}`, "spec.address"},
		"a port out of range":  {"receivers", `{"type":"snmp","address":"h:70000","secret":"public"}`, "spec.address"},
		"a password in a URL":  {"receivers", `{"type":"webhook","address":"https://ann:pw@h/"}`, "spec.address"},
		"unknown kind of TLS":  {"receivers", `{"type":"smtp","address":"h:25","from":"a@b","to":["x@y"],"tls":"ssl"}`, "spec.tls"},
		"an odd severity":      {"receivers", `{"type":"webhook","address":"http://h","minSeverity":"loud"}`, "spec.minSeverity"},
		"many metrics at once": {"rules", `{"check":"metric","metric":"muster_*","threshold":1}`, "spec.metric"},
		"a file for a webhook": {"receivers", `{"type":"webhook","address":"file:///etc/passwd"}`, "spec.address"},
		"snmp without secret":  {"receivers", `{"type":"snmp","address":"h:162"}`, "spec.secret"},
		"short pass phrase":    {"receivers", `{"type":"snmp","address":"h:162","version":"3","user":"u","secret":"short"}`, "spec.secret"},
		"endless secret":       {"receivers", `{"type":"webhook","address":"http://h","secret":"` + strings.Repeat("x", 2000) + `"}`, "spec.secret"},
		"unknown field":        {"receivers", `{"type":"webhook","url":"http://h"}`, "spec.url"},
		"no such check":        {"rules", `{"check":"mood"}`, "spec.check"},
		"metric without name":  {"rules", `{"check":"metric"}`, "spec.metric"},
		"more than full":       {"rules", `{"check":"pool-full","threshold":101}`, "spec.threshold"},
		"negative skew":        {"rules", `{"check":"clock-skew","threshold":-1}`, "spec.threshold"},
		"waits for ever":       {"rules", `{"check":"node-lost","forSeconds":100000}`, "spec.forSeconds"},
	} {
		t.Run(name, func(t *testing.T) {
			wantProblem(t, f.do(call{method: "POST", path: tc.path, body: `{"meta":{"name":"x"},"spec":` + tc.spec + `}`}), http.StatusUnprocessableEntity, api.CodeInvalid, tc.field)
		})
	}
	want[api.Rule](t, f.do(call{method: "POST", path: "rules", body: `{"meta":{"name":"x"},"spec":{"check":"pool-full"}}`}), http.StatusCreated)
	if r := want[api.Rule](t, f.do(call{method: "PATCH", path: "rules/x", body: `{"spec":{"threshold":80}}`}), http.StatusOK); r.Spec.Threshold != 80 {
		t.Errorf("rule %+v", r.Spec)
	}
	wantProblem(t, f.do(call{method: "POST", path: "rules", body: `{"meta":{"name":"x"},"spec":{"check":"pool-full"}}`}), http.StatusConflict, api.CodeExists, "")
	if a := f.do(call{method: "DELETE", path: "rules/x"}); a.status != http.StatusNoContent {
		t.Errorf("delete: %d", a.status)
	}
}

func TestAReceiverIsTestedOnTheLeader(t *testing.T) {
	f := newFixture(t)
	monitors := withMonitors(f)
	want[api.Receiver](t, f.do(call{method: "POST", path: "receivers", body: `{"meta":{"name":"hook"},"spec":{"type":"webhook","address":"http://127.0.0.1:1"}}`}), http.StatusCreated)
	for _, node := range []string{"m1", "m2"} {
		if a := f.do(call{method: "POST", path: "receivers/hook/test", node: node}); a.status != http.StatusNoContent {
			t.Fatalf("at %s: %d %s", node, a.status, a.body)
		}
	}
	st, err := f.cluster.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(monitors[st.Leader].tested); n != 2 {
		t.Errorf("the leader %s sent %d tests, want 2", st.Leader, n)
	}
	wantProblem(t, f.do(call{method: "POST", path: "receivers/none/test"}), http.StatusNotFound, api.CodeNotFound, "")
}

func TestAlertsAreAcknowledgedOnce(t *testing.T) {
	f := newFixture(t)
	a := api.Alert{Meta: api.NewMeta(api.KindAlert, "", ""), Spec: api.AlertSpec{Rule: "node-lost", Severity: api.SeverityCritical}}
	a.Meta.Name = a.Meta.ID
	a.Status.Phase = api.AlertFiring
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Alerts.CreateUnnamed(tx, &a) })
	path := "alerts/" + a.Meta.ID + "/acknowledge"
	wantProblem(t, f.do(call{method: "POST", path: path, role: api.RoleViewer}), http.StatusForbidden, api.CodeForbidden, "")
	for _, role := range []api.Role{api.RoleOperator, api.RoleAdministrator} {
		if got := want[api.Alert](t, f.do(call{method: "POST", path: path, role: role}), http.StatusOK); got.Spec.AcknowledgedBy != "operator" || got.Spec.AcknowledgedAt == nil {
			t.Errorf("after %s: %+v", role, got.Spec)
		}
	}
	if n := len(f.audits("audit.alert.acknowledge")); n != 1 {
		t.Errorf("%d audit events", n)
	}
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Alerts.Get(v, a.Meta.ID)
		if err != nil {
			return err
		}
		o.Status.Phase = api.AlertResolved
		return configdb.Alerts.UpdateStatus(v, tx, &o)
	})
	wantProblem(t, f.do(call{method: "POST", path: path}), http.StatusConflict, api.CodeRefused, "")
	list := want[List[api.Alert]](t, f.do(call{method: "GET", path: "alerts?fields=status.phase=resolved", role: api.RoleViewer}), http.StatusOK)
	if len(list.Items) != 1 || !slices.ContainsFunc(list.Items, func(x api.Alert) bool { return x.Meta.ID == a.Meta.ID }) {
		t.Errorf("list %+v", list.Items)
	}
}
