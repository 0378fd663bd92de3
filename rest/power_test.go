// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakePower speaks for one node.
type fakePower struct {
	node string

	mu   sync.Mutex
	done []api.PowerAction
}

func (p *fakePower) SealPassword(id, password string) ([]byte, error) {
	return []byte("sealed:" + id + ":" + strings.ToUpper(password)), nil
}

func (p *fakePower) Check(_ context.Context, n api.Node) (api.PowerReport, error) {
	return api.PowerReport{Checks: []api.PowerCheck{{Device: "bmc-of-" + n.Meta.Name, OK: true, State: "on", Identity: api.IdentityUnknown}}}, nil
}

func (p *fakePower) Do(_ context.Context, _ api.Node, a api.PowerAction) (api.PowerAction, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = append(p.done, a)
	api.EndPowerAction(&a, api.PowerActionConfirmed, "read back", nil, time.Now())
	return a, nil
}

func device(spec map[string]any) map[string]any {
	out := map[string]any{"node": "m1", "driver": "redfish", "address": "10.0.0.9", "user": "fence", "password": "hunter2-hunter2"}
	for k, v := range spec {
		out[k] = v
	}
	return map[string]any{"meta": map[string]any{"name": "bmc1"}, "spec": out}
}

func TestPasswordsOfPowerDevicesAreSealedAndNeverShown(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	f.begin()
	made := f.do(call{method: "POST", path: "powerdevices", body: device(nil)})
	d := want[api.PowerDevice](t, made, http.StatusCreated)
	if !d.Spec.PasswordSet || d.Spec.NodeID == "" || d.Spec.TimeoutSeconds != 8 {
		t.Errorf("made: %+v", d.Spec)
	}
	shown := []answer{made, f.do(call{method: "GET", path: "powerdevices/bmc1"}), f.do(call{method: "GET", path: "powerdevices"}),
		f.do(call{method: "PATCH", path: "powerdevices/bmc1", body: `{"spec":{"order":3}}`}),
		f.do(call{method: "GET", path: "config/log"}), f.do(call{method: "GET", path: "events"}),
	}
	for _, a := range shown {
		if a.status >= 300 || strings.Contains(strings.ToLower(string(a.body)), "hunter2") || strings.Contains(string(a.body), "c2VhbGVk") {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	stored := func() api.PowerDevice {
		t.Helper()
		o, err := configdb.PowerDevices.Find(f.db.Local(), "", "bmc1")
		if err != nil || o.Spec.Password != "" || o.Spec.PasswordSet {
			t.Fatalf("stored %+v, %v", o.Spec, err)
		}
		return o
	}
	sealed := "sealed:" + d.Meta.ID + ":HUNTER2-HUNTER2"
	var doc map[string]any
	if err := json.Unmarshal(shown[1].body, &doc); err != nil {
		t.Fatal(err)
	}
	want[api.PowerDevice](t, f.do(call{method: "PUT", path: "powerdevices/bmc1", body: doc}), http.StatusOK)
	f.do(call{method: "PATCH", path: "powerdevices/bmc1", body: `{"spec":{"sealedPassword":"AAAA","nodeID":"x"}}`})
	if o := stored(); string(o.Spec.SealedPassword) != sealed || o.Spec.NodeID != d.Spec.NodeID {
		t.Errorf("after what was shown was put back: %+v", o.Spec)
	}
	// Whoever may change a device must not have its password sent to himself.
	for field, value := range map[string]string{
		"address": `"10.6.6.6"`, "port": `4443`, "user": `"other"`, "driver": `"ipmi"`, "fingerprint": `"` + strings.Repeat("ab", 32) + `"`,
	} {
		a := f.do(call{method: "PATCH", path: "powerdevices/bmc1", body: `{"spec":{"` + field + `":` + value + `}}`})
		wantProblem(t, a, http.StatusUnprocessableEntity, api.CodeInvalid, "spec.password")
	}
	want[api.PowerDevice](t, f.do(call{method: "PATCH", path: "powerdevices/bmc1", body: `{"spec":{"address":"10.0.0.10","password":"new"}}`}), http.StatusOK)
	if o := stored(); string(o.Spec.SealedPassword) != "sealed:"+d.Meta.ID+":NEW" {
		t.Errorf("after a new password: %+v", o.Spec)
	}
	for _, role := range []api.Role{api.RoleViewer, api.RoleOperator} {
		wantProblem(t, f.do(call{method: "GET", path: "powerdevices/bmc1", role: role}), http.StatusForbidden, api.CodeForbidden, "")
	}
	if a := f.do(call{method: "GET", path: "raw/" + configdb.PowerDevices.SpecKey(d.Meta.ID)}); a.status == http.StatusOK {
		t.Errorf("the raw key is shown: %s", a.body)
	}
}

func TestBadPowerDevices(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	for _, c := range []struct {
		spec  map[string]any
		field string
	}{
		{map[string]any{"node": "m9"}, "spec.node"},
		{map[string]any{"node": ""}, "spec.node"},
		{map[string]any{"driver": "ilo"}, "spec.driver"},
		{map[string]any{"address": "10.0.0.9:443"}, "spec.address"},
		{map[string]any{"address": "https://bmc"}, "spec.address"},
		{map[string]any{"port": 70000}, "spec.port"},
		{map[string]any{"order": -1}, "spec.order"},
		{map[string]any{"timeoutSeconds": 61}, "spec.timeoutSeconds"},
		{map[string]any{"password": ""}, "spec.password"},
		{map[string]any{"user": ""}, "spec.user"},
		{map[string]any{"fingerprint": "xy"}, "spec.fingerprint"},
		{map[string]any{"caCert": "no pem"}, "spec.caCert"},
		{map[string]any{"cipherSuite": 3}, "spec.cipherSuite"},
		{map[string]any{"driver": "ipmi", "cipherSuite": 0, "systemID": "1"}, "spec.systemID"},
		{map[string]any{"driver": "ipmi", "cipherSuite": 1}, "spec.cipherSuite"},
		{map[string]any{"driver": "ipmi", "privilege": "root"}, "spec.privilege"},
		{map[string]any{"driver": "ipmi", "password": strings.Repeat("x", 21)}, "spec.password"},
	} {
		a := f.do(call{method: "POST", path: "powerdevices", body: device(c.spec)})
		wantProblem(t, a, http.StatusUnprocessableEntity, api.CodeInvalid, c.field)
	}
}

func TestSwitchingANodeNeedsItsNameAndGoesThroughTheLeader(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	for body, field := range map[string]string{
		`{"action":"off"}`: "confirm", `{"action":"off","confirm":"m1"}`: "confirm", `{"action":"reset","confirm":"m2"}`: "action",
	} {
		wantProblem(t, f.do(call{method: "POST", path: "nodes/m2/power", body: body}), http.StatusUnprocessableEntity, api.CodeInvalid, field)
	}
	wantProblem(t, f.do(call{method: "POST", path: "nodes/m1/power?via=m1", body: `{"action":"off","confirm":"m1"}`}), http.StatusConflict, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "nodes/m1/power?via=m9", body: `{"action":"off","confirm":"m1"}`}), http.StatusUnprocessableEntity, api.CodeInvalid, "via")
	a := want[api.PowerAction](t, f.do(call{method: "POST", path: "nodes/m2/power", body: `{"action":"off","confirm":"m2","reason":"new memory"}`}), http.StatusOK)
	if a.Spec.Via == "m2" || a.Spec.Via == "" || a.Spec.Actor == "" || a.Spec.Reason != "new memory" || a.Status.Phase != api.PowerActionConfirmed {
		t.Errorf("action: %+v %+v", a.Spec, a.Status)
	}
	r := want[api.PowerReport](t, f.do(call{method: "GET", path: "nodes/m1/power?via=m2"}), http.StatusOK)
	if r.Via != "m2" || r.Node != "m1" || len(r.Checks) != 1 {
		t.Errorf("report: %+v", r)
	}
	for _, role := range []api.Role{api.RoleViewer, api.RoleOperator} {
		wantProblem(t, f.do(call{method: "POST", path: "nodes/m2/power", body: `{"action":"off","confirm":"m2"}`, role: role}), http.StatusForbidden, api.CodeForbidden, "")
	}
}

func TestPowerActionsAreBounded(t *testing.T) {
	f := newFixture(t)
	n, err := configdb.Nodes.Find(f.db.Local(), "", "m1")
	if err != nil {
		t.Fatal(err)
	}
	var last string
	for range api.KeptPowerActions + 3 {
		a := api.NewPowerAction(&n, api.PowerOff, api.TriggerHA, time.Now())
		last = a.Meta.ID
		f.txn(func(v *configdb.View, tx *configdb.Txn) error { return configdb.PutPowerAction(v, tx, &a) })
	}
	all, err := configdb.PowerActions.List(f.db.Local())
	if err != nil || len(all) != api.KeptPowerActions || all[len(all)-1].Meta.ID != last {
		t.Errorf("%d actions are kept, %v", len(all), err)
	}
}
