// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// The tests of this file look at every route there is, so that a new one cannot
// be open by mistake, nor go unaudited.

// wantNeed is the policy in words: what docs/access.md says.
func wantNeed(method, path string) access {
	kind, rest, _ := strings.Cut(strings.TrimPrefix(path, base), "/")
	switch {
	case path == "/healthz" || path == "/readyz" || path == "/metrics":
		return needLoopback
	case kind == "cluster" && slices.Contains([]string{"init", "join", "restore", "recover"}, rest):
		return needLocal
	case kind == "cluster" && strings.HasPrefix(rest, "backup"):
		return needAdministrator // whoever has one and the key has the cluster
	case path == base+"cluster/admit":
		return needNothing // the join token in it is the key
	case slices.Contains([]string{"tokens", "users", "receivers", "powerdevices", "raw", "kv"}, kind), kind == "nodes" && strings.HasSuffix(rest, "/power"):
		return needAdministrator // also to read
	case method == http.MethodGet && (strings.HasSuffix(rest, "/console") || strings.HasSuffix(rest, "/vnc")):
		return needOperator // who types into a guest changes it
	case method == http.MethodGet && strings.HasSuffix(rest, "/qemu"):
		return needOperator // what is said to a guest's devices may be a guest's
	case method == http.MethodGet, path == base+"ha/simulate":
		return needViewer
	case strings.HasSuffix(rest, "/agent/exec"):
		return needAdministrator // root in the guest, mostly
	case slices.Contains([]string{"vms", "images", "volumes", "alerts", "tasks"}, kind):
		return needOperator
	}
	return needAdministrator
}

func TestEveryRouteChecksTheRole(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	roles := []api.Role{"", api.RoleViewer, api.RoleOperator, api.RoleAdministrator}
	for _, rt := range f.servers["m1"].routes() {
		if got := wantNeed(rt.method, rt.path); rt.need != got {
			t.Errorf("%s %s needs access %d, the policy says %d", rt.method, rt.path, rt.need, got)
		}
		path := strings.NewReplacer("{name}", "no-such", "{key}", "no/such", "{snapshot}", "no-such").Replace(rt.path)
		for _, role := range roles {
			allowed := rt.need == needNothing || rt.need != needLocal && rank[role] >= rt.need || rt.need == needLoopback
			check := func(how string, status int) {
				t.Helper()
				refused := status == http.StatusForbidden || status == http.StatusUnauthorized
				if rt.path == base+"cluster/admit" {
					refused = false // it refuses wrong tokens in the same words
				}
				if refused == allowed {
					t.Errorf("%s %s as %q %s: status %d, allowed is %v", rt.method, path, role, how, status, allowed)
				}
			}
			c := call{method: rt.method, path: path, role: role, body: "{}"}
			if rt.method == http.MethodGet {
				c.body = nil
			}
			if role == "" {
				c.token = "none"
			}
			check("by token", f.do(c).status)
			if role == "" {
				continue
			}
			rec := httptest.NewRecorder()
			r := httptest.NewRequest(rt.method, path, strings.NewReader("{}"))
			r.RemoteAddr = "192.0.2.7:4711"
			if rt.need != needLoopback {
				f.servers["m1"].SessionHandler("user:ann", role).ServeHTTP(rec, r)
				check("in a session", rec.Code)
			}
		}
	}
}

// TestAWatchShowsOnlyWhatMayBeRead: of every kind there is.
func TestAWatchShowsOnlyWhatMayBeRead(t *testing.T) {
	f := newFixture(t)
	s := f.servers["m1"]
	for _, name := range s.kindNames() {
		kind := api.Kind(name)
		if want := wantNeed(http.MethodGet, base+kind.Plural()); s.kinds[kind].access() != want {
			t.Errorf("a watch of %s needs access %d, the policy says %d", name, s.kinds[kind].access(), want)
		}
		for role, has := range rank {
			q := &request{s: s, r: httptest.NewRequest(http.MethodGet, base+"watch?kinds="+name, nil), who: caller{role: role}}
			_, err := q.watchKinds()
			if allowed := has >= s.kinds[kind].access(); (err == nil) != allowed {
				t.Errorf("a %s watching %s: %v", role, name, err)
			}
			q.r = httptest.NewRequest(http.MethodGet, base+"watch", nil)
			all, err := q.watchKinds()
			if _, shown := all[kind]; err != nil || shown != (has >= s.kinds[kind].access()) {
				t.Errorf("a %s watching everything sees %s: %v, %v", role, name, shown, err)
			}
		}
	}
}

// unaudited are the routes that change nothing here, or whose event the test
// below looks at.
var unaudited = map[string]string{
	"POST " + base + "cluster/init":               "see below",
	"POST " + base + "cluster/join":               "it happens at the member: admit",
	"POST " + base + "cluster/admit":              "see below",
	"POST " + base + "vms/{name}/vnc":             "a ticket; opening the console with it is audited",
	"POST " + base + "vms/{name}/console":         "a ticket; opening the console with it is audited",
	"POST " + base + "receivers/{name}/test":      "sends a message and changes nothing",
	"POST " + base + "ha/simulate":                "it changes nothing",
	"POST " + base + "cluster/reboot/plan":        "it changes nothing",
	"POST " + base + "nodes/{name}/reboot/plan":   "it changes nothing",
	"POST " + base + "nodes/{name}/shutdown/plan": "it changes nothing",
	"POST " + base + "cluster/restore":            "its event is in the database that it founds",
	"POST " + base + "cluster/recover":            "its event is in the database of the next life",
}

func TestTheBeginningOfAClusterAndEachJoinAreAudited(t *testing.T) {
	f := newFixture(t)
	admit := api.AdmitRequest{TokenID: "0198", Secret: "wrong", CSR: "c", Node: "m9", Address: "a:1"}
	f.do(call{method: "POST", path: "cluster/admit", body: admit, token: "none"})
	admit.Secret = "right"
	f.do(call{method: "POST", path: "cluster/admit", body: admit, token: "none"})
	rec := httptest.NewRecorder()
	f.servers["m1"].LocalHandler().ServeHTTP(rec, httptest.NewRequest(http.MethodPost, base+"cluster/init", strings.NewReader(`{"name":"prod"}`)))
	if rec.Code != http.StatusOK {
		t.Fatalf("init: %d %s", rec.Code, rec.Body)
	}
	for typ, want := range map[string]api.EventSpec{
		"audit.node.join":    {Actor: "token:0198", Source: "127.0.0.1", Target: "m9"},
		"audit.cluster.init": {Actor: localActor, Source: "unix socket", Target: "prod"},
	} {
		got := f.audits(typ)
		if len(got) != 1 || got[0].Spec.Actor != want.Actor || got[0].Spec.Source != want.Source || got[0].Spec.Target != want.Target {
			t.Errorf("events %s: %+v", typ, got)
		}
	}
}

// step is one change, by its route.
type step struct {
	route, path, body string
}

// changes are one for each route that changes something, in an order in which
// all of them work.
func changes(f *fixture) []step {
	alert := f.addAlert()
	withCluster(f)
	f.newVM("web1", api.VMStopped)
	f.newVM("web3", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.newVM("web4", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.newVM("web6", api.VMStopped, api.VMDisk{Size: api.GiB, Pool: "local"})
	f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"free"},"spec":{"size":"1G","pool":"shared"}}`})
	f.readyDisks()
	f.movableVM("mover")
	f.canary("canary")
	begun := f.begin()
	if vm, err := configdb.VMs.Find(f.db.Local(), "", "web1"); err == nil {
		f.console.rings[vm.Meta.ID] = []byte("x")
	}
	return []step{
		{"POST vms", "vms", `{"meta":{"name":"web2"},"spec":{"cpus":1,"memory":"64M"}}`},
		{"PATCH vms/{name}", "vms/web1", `{"meta":{"labels":{"a":"b"}}}`},
		{"POST config/revert", "config/revert", fmt.Sprintf(`{"to":%d,"objects":["vm/web1"]}`, begun)},
		{"PATCH config/retention", "config/retention", `{"maxBytes":"4M"}`},
		{"PUT vms/{name}", "vms/web1", `{"spec":{"cpus":2,"memory":"512M"}}`},
		{"POST vms/{name}/start", "vms/web1/start", ``},
		{"POST vms/{name}/pause", "vms/web1/pause", ``},
		{"POST vms/{name}/resume", "vms/web1/resume", ``},
		{"POST vms/{name}/reboot", "vms/web1/reboot", ``},
		{"POST vms/{name}/agent/exec", "vms/web1/agent/exec", `{"command":["uname"]}`},
		{"POST vms/{name}/agent/password", "vms/web1/agent/password", `{"user":"root","password":"s3cret"}`},
		{"POST vms/{name}/agent/freeze", "vms/web1/agent/freeze", ``},
		{"POST vms/{name}/agent/thaw", "vms/web1/agent/thaw", ``},
		{"POST vms/{name}/stop", "vms/web1/stop", ``},
		{"POST vms/{name}/snapshots", "vms/web3/snapshots", `{"name":"a"}`},
		{"DELETE vms/{name}/snapshots/{snapshot}", "vms/web3/snapshots/a", ``},
		{"POST vms/{name}/snapshots/{snapshot}/revert", "vms/web3/snapshots/a/revert", ``},
		{"POST vms/{name}/clone", "vms/web3/clone", `{"name":"web5","snapshot":"a"}`},
		{"POST vms/{name}/suspend", "vms/web4/suspend", ``},
		{"POST vms/{name}/drill", "vms/canary/drill", ``},
		{"POST vms/{name}/migrate", "vms/mover/migrate", ``},
		{"POST tasks/{name}/cancel", "tasks/MIGRATION/cancel", ``},
		{"POST volumes/{name}/move", "volumes/free/move", `{"pool":"local","node":"m2"}`},
		{"POST vms/{name}/move", "vms/web6/move", `{"pool":"shared"}`},
		{"DELETE vms/{name}", "vms/web2", ``},
		{"POST volumes", "volumes", `{"meta":{"name":"data"},"spec":{"size":"1G","pool":"shared"}}`},
		{"PATCH volumes/{name}", "volumes/data", `{"meta":{"labels":{"a":"b"}}}`},
		{"PUT volumes/{name}", "volumes/data", `VOLUME`},
		{"DELETE volumes/{name}", "volumes/data", ``},
		{"POST images", "images", `{"meta":{"name":"deb"}}`},
		{"PUT images/{name}/content", "images/deb/content", `the content`},
		{"PATCH images/{name}", "images/tiny", `{"meta":{"labels":{"a":"b"}}}`},
		{"PUT images/{name}", "images/tiny", `{"spec":{"pool":"shared","node":"m1"}}`},
		{"DELETE images/{name}", "images/tiny", ``},
		{"POST pools", "pools", `{"meta":{"name":"nfs"},"spec":{"type":"shared","path":"/srv/nfs"}}`},
		{"PATCH pools/{name}", "pools/nfs", `{"meta":{"labels":{"a":"b"}}}`},
		{"PUT pools/{name}", "pools/nfs", `{"spec":{"type":"shared","path":"/srv/nfs"}}`},
		{"DELETE pools/{name}", "pools/nfs", ``},
		{"PATCH nodes/{name}", "nodes/m2", `{"spec":{"maintenance":true}}`},
		{"PUT nodes/{name}", "nodes/m2", `{"spec":{"role":"voter","accelerator":"tcg"}}`},
		{"POST cluster/reboot", "cluster/reboot", `{}`},
		{"POST nodes/{name}/reboot", "nodes/m2/reboot", `{}`},
		{"POST nodes/{name}/shutdown", "nodes/m2/shutdown", `{}`},
		{"POST nodes/{name}/evacuate", "nodes/m2/evacuate", `{"level":"live"}`},
		{"DELETE nodes/{name}", "nodes/m2", ``},
		{"POST networks", "networks", `{"meta":{"name":"lab"},"spec":{"type":"vxlan","vni":7}}`},
		{"PATCH networks/{name}", "networks/lab", `{"meta":{"labels":{"a":"b"}}}`},
		{"PUT networks/{name}", "networks/lab", `{"spec":{"type":"vxlan","vni":7}}`},
		{"POST ippools", "ippools", `{"meta":{"name":"lab"},"spec":{"network":"lab","cidr":"10.0.0.0/24"}}`},
		{"PATCH ippools/{name}", "ippools/lab", `{"spec":{"gateway":"10.0.0.1"}}`},
		{"PUT ippools/{name}", "ippools/lab", `{"spec":{"network":"lab","cidr":"10.0.0.0/24"}}`},
		{"DELETE ippools/{name}", "ippools/lab", ``},
		{"DELETE networks/{name}", "networks/lab", ``},
		{"POST uplinks", "uplinks", `{"meta":{"name":"up"},"spec":{"node":"m1","nic":"eth1"}}`},
		{"PATCH uplinks/{name}", "uplinks/up", `{"spec":{"nic":"eth2"}}`},
		{"PUT uplinks/{name}", "uplinks/up", `{"spec":{"node":"m1","nic":"eth3"}}`},
		{"DELETE uplinks/{name}", "uplinks/up", ``},
		{"POST tokens", "tokens", `{"meta":{"name":"ci"},"spec":{"role":"viewer"}}`},
		{"DELETE tokens/{name}", "tokens/ci", ``},
		{"POST cluster/tokens", "cluster/tokens", `{"role":"voter"}`},
		{"POST cluster/transfer", "cluster/transfer", `{"node":"m2"}`},
		{"PATCH cluster/ca", "cluster/ca", `{"certificateSeconds":3600}`},
		{"POST cluster/ca/rotate", "cluster/ca/rotate", `{"action":"start"}`},
		{"POST nodes/{name}/renew-certificate", "nodes/m1/renew-certificate", ``},
		{"POST cluster/backup", "cluster/backup", `{"passphrase":"correct horse battery"}`},
		{"PATCH cluster/settings", "cluster/settings", `{"backup":{"keep":3}}`},
		{"POST users", "users", `{"meta":{"name":"bob"},"spec":{"role":"viewer"}}`},
		{"PATCH users/{name}", "users/bob", `{"spec":{"role":"operator"}}`},
		{"PUT users/{name}", "users/bob", `{"spec":{"role":"viewer"}}`},
		{"DELETE users/{name}", "users/bob", ``},
		{"POST rules", "rules", `{"meta":{"name":"full"},"spec":{"check":"pool-full"}}`},
		{"PATCH rules/{name}", "rules/full", `{"spec":{"threshold":80}}`},
		{"PUT rules/{name}", "rules/full", `{"spec":{"check":"pool-full","threshold":70}}`},
		{"DELETE rules/{name}", "rules/full", ``},
		{"POST receivers", "receivers", `{"meta":{"name":"ops"},"spec":{"type":"webhook","address":"http://h/"}}`},
		{"PATCH receivers/{name}", "receivers/ops", `{"spec":{"secret":"s3cret-key"}}`},
		{"PUT receivers/{name}", "receivers/ops", `{"spec":{"type":"webhook","address":"http://i/"}}`},
		{"DELETE receivers/{name}", "receivers/ops", ``},
		{"POST powerdevices", "powerdevices", `{"meta":{"name":"bmc1"},"spec":{"node":"m1","driver":"ipmi","address":"10.0.0.9","password":"pw"}}`},
		{"PATCH powerdevices/{name}", "powerdevices/bmc1", `{"spec":{"order":1}}`},
		{"PUT powerdevices/{name}", "powerdevices/bmc1", `{"spec":{"node":"m1","driver":"ipmi","address":"10.0.0.9"}}`},
		{"POST nodes/{name}/power", "nodes/m2/power", `{"action":"off","confirm":"m2"}`},
		{"DELETE powerdevices/{name}", "powerdevices/bmc1", ``},
		{"POST alerts/{name}/acknowledge", "alerts/" + alert + "/acknowledge", ``},
		{"PUT raw/{key}", "raw/mine/key", `a value`},
		{"DELETE raw/{key}", "raw/mine/key", ``},
	}
}

func TestEveryRouteThatChangesSomethingIsAudited(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	left := map[string]bool{}
	for _, rt := range f.servers["m1"].routes() {
		if name := rt.method + " " + rt.path; rt.method != http.MethodGet && unaudited[name] == "" {
			left[name] = true
		}
	}
	shell := f.servers["m1"].SessionHandler("user:ann", api.RoleAdministrator)
	known := map[string]bool{}
	fresh := func() (out []api.Event) {
		all, err := configdb.Events.List(f.db.Local())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			if !known[e.Meta.ID] && strings.HasPrefix(e.Spec.Type, "audit.") {
				out = append(out, e)
			}
			known[e.Meta.ID] = true
		}
		return out
	}
	for _, st := range changes(f) {
		method, route, _ := strings.Cut(st.route, " ")
		f.settleFor(st.route)
		if st.body == "VOLUME" { // as it is, with another label
			st.body = f.volumeBody("data")
		}
		st.path = strings.Replace(st.path, "MIGRATION", f.migrationTask("mover"), 1)
		fresh()
		rec := httptest.NewRecorder()
		r := httptest.NewRequest(method, base+st.path, strings.NewReader(st.body))
		r.RemoteAddr = "192.0.2.7:4711"
		shell.ServeHTTP(rec, r)
		if rec.Code >= 300 {
			t.Errorf("%s: status %d: %s", st.route, rec.Code, rec.Body)
			continue
		}
		got := fresh()
		if len(got) != 1 {
			t.Errorf("%s made %d audit events", st.route, len(got))
			continue
		}
		e := got[0].Spec
		if e.Actor != "user:ann" || e.Source != "192.0.2.7" || e.Node != "m1" || e.Details["method"] != method || e.Details["path"] != base+st.path || e.Details["role"] != "administrator" {
			t.Errorf("%s: the event does not say who, from where and what: %+v", st.route, e)
		}
		if e.Target == "" && e.TargetID == "" || !strings.HasPrefix(e.Message, "user:ann: ") {
			t.Errorf("%s: the event does not say of what: %+v", st.route, e)
		}
		delete(left, method+" "+base+route)
	}
	for name := range left {
		t.Errorf("%s is not tried: does it leave an audit event?", name)
	}
}

// settleFor does what nodes do between two changes.
func (f *fixture) settleFor(route string) {
	switch route {
	case "POST vms/{name}/snapshots":
		f.reportNamed("web3", api.VMStopped)
	case "POST vms/{name}/clone", "DELETE vms/{name}/snapshots/{snapshot}", "POST vms/{name}/snapshots/{snapshot}/revert":
		f.endOperation("web3")
		f.takenSnapshot("web3", "a")
	case "POST nodes/{name}/evacuate", "POST nodes/{name}/shutdown":
		f.endReboots()
	case "POST nodes/{name}/reboot":
		f.endRolling()
	case "POST vms/{name}/suspend":
		f.do(call{method: "POST", path: "vms/web4/start"})
		f.reportNamed("web4", api.VMRunning)
	}
	phase := map[string]api.VMPhase{
		"POST vms/{name}/pause": api.VMRunning, "POST vms/{name}/resume": api.VMPaused, "POST vms/{name}/reboot": api.VMRunning, "POST vms/{name}/stop": api.VMRunning,
	}[route]
	if phase == "" {
		return
	}
	vm, err := configdb.VMs.Find(f.db.Local(), "", "web1")
	if err != nil {
		f.t.Fatal(err)
	}
	f.report(vm.Meta.ID, phase)
}

func (f *fixture) volumeBody(name string) string {
	vol, err := configdb.Volumes.Find(f.db.Local(), "", name)
	if err != nil {
		f.t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"meta": map[string]any{"labels": map[string]string{"a": "c"}}, "spec": vol.Spec})
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b)
}

// addAlert makes an alert that fires and returns its ID.
func (f *fixture) addAlert() string {
	f.t.Helper()
	a := api.Alert{Meta: api.NewMeta(api.KindAlert, "", ""), Spec: api.AlertSpec{Rule: "node-lost", Severity: api.SeverityCritical}}
	a.Meta.Name, a.Status.Phase = a.Meta.ID, api.AlertFiring
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Alerts.CreateUnnamed(tx, &a) })
	return a.Meta.ID
}

// TestAnUpdatesEventSaysWhatChanged: names only, values may be secrets.
func TestAnUpdatesEventSaysWhatChanged(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	f.do(call{method: "POST", path: "users", body: userBody("bob", newPublicKey(t))})
	f.do(call{method: "POST", path: "receivers", body: `{"meta":{"name":"ops"},"spec":{"type":"webhook","address":"http://h/","secret":"the-old-key"}}`})
	for _, tc := range []struct{ path, body, kind, changed string }{
		{"users/bob", `{"spec":{"role":"administrator","disabled":true}}`, "user", "spec.disabled, spec.role"},
		{"users/bob", `{"spec":{"sshKeys":[]},"meta":{"labels":{"team":"a"}}}`, "user", "meta.labels.team, spec.sshKeys"},
		{"receivers/ops", `{"spec":{"secret":"the-new-key"}}`, "receiver", "spec.secret"},
		{"receivers/ops", `{"spec":{"address":"http://i/"}}`, "receiver", "spec.address"},
	} {
		before := len(f.audits("audit." + tc.kind + ".update"))
		if a := f.do(call{method: "PATCH", path: tc.path, body: tc.body}); a.status != 200 {
			t.Fatalf("%s: %d %s", tc.path, a.status, a.body)
		}
		all := f.audits("audit." + tc.kind + ".update")
		if len(all) != before+1 {
			t.Fatalf("%s: %d events", tc.body, len(all)-before)
		}
		e := all[before].Spec
		if e.Details["changed"] != tc.changed || !strings.HasSuffix(e.Message, " ("+tc.changed+")") || strings.Contains(e.Message, "key\"") {
			t.Errorf("%s: %q, details %v", tc.body, e.Message, e.Details)
		}
	}
}
