// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakeHA answers without looking at anything.
type fakeHA struct {
	warn   string
	refuse bool
	broken bool // the promise
	mu     sync.Mutex
	asked  []string // VMs that would run after a change and did not before
}

func running(v *configdb.View) map[string]api.Size {
	out := map[string]api.Size{}
	vms, _ := configdb.VMs.List(v)
	for _, vm := range vms {
		if vm.Spec.Power != api.PowerStopped {
			out[vm.Meta.Name] = vm.Spec.Memory
		}
	}
	return out
}

func (h *fakeHA) Admit(before, after *configdb.View) (string, error) {
	was := running(before)
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, memory := range running(after) {
		if memory > was[name] {
			h.asked = append(h.asked, name)
		}
	}
	if h.refuse {
		return "", api.Errorf(api.CodeRefused, "this breaks the promise")
	}
	return h.warn, nil
}

func (*fakeHA) Status(context.Context) (*api.HAStatus, error) {
	return &api.HAStatus{Node: "m1", Revision: 7, Nodes: []api.HANode{{Node: "m1"}}}, nil
}

func (*fakeHA) Simulate(_ context.Context, kill []string) (*api.HALoss, error) {
	if len(kill) == 0 {
		return nil, api.Invalid("kill", "names no node; give one or more")
	}
	return &api.HALoss{Killed: kill, Revision: 7, Steps: []api.HAStep{}}, nil
}

func (h *fakeHA) Promise() (api.HAAdmission, time.Duration, bool) {
	return api.HAAdmission{HASettings: api.HASettings{Failures: 2, Admission: api.AdmissionWarn}, RefusedVMs: 3, Kept: !h.broken}, time.Second, true
}

func TestOutlookIsServed(t *testing.T) {
	f := newFixture(t)
	f.ha.broken = true
	st := want[api.HAStatus](t, f.do(call{method: "GET", path: "ha/status", role: api.RoleViewer}), http.StatusOK)
	if st.Node != "m1" || len(st.Nodes) != 1 {
		t.Errorf("status: %+v", st)
	}
	l := want[api.HALoss](t, f.do(call{method: "POST", path: "ha/simulate", role: api.RoleViewer, body: api.HASimulateRequest{Kill: []string{"m1"}}}), http.StatusOK)
	if len(l.Killed) != 1 || l.Revision != 7 {
		t.Errorf("simulation: %+v", l)
	}
	wantProblem(t, f.do(call{method: "POST", path: "ha/simulate", body: "{}"}), http.StatusUnprocessableEntity, api.CodeInvalid, "kill")
	for _, body := range []string{"", "{", `{"kill":"m1"}`, `{"dead":["m1"]}`} {
		if a := f.do(call{method: "POST", path: "ha/simulate", body: body}); a.status != http.StatusUnprocessableEntity && a.status != http.StatusBadRequest {
			t.Errorf("body %q: %d %s", body, a.status, a.body)
		}
	}
	text := string(f.do(call{method: "GET", path: "/metrics"}).body)
	for _, line := range []string{"muster_ha_promise_kept 0", "muster_ha_promise_failures 2", "muster_ha_promise_refused_vms 3", `muster_ha_admission{mode="warn"} 1`} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("/metrics lacks %q", line)
		}
	}
}

func TestThePromiseIsASetting(t *testing.T) {
	f := newFixture(t)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", Life: 1, FeatureLevel: 2}}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &c) })
	s := want[api.ClusterSettings](t, f.do(call{method: "GET", path: "cluster/settings"}), http.StatusOK)
	if s.HA != (api.HASettings{Failures: 1, Admission: api.AdmissionWarn, StorageHeartbeat: api.HeartbeatOn}) {
		t.Errorf("before it is set: %+v", s.HA)
	}
	s = want[api.ClusterSettings](t, f.patch("cluster/settings", map[string]any{"ha": map[string]any{"failures": 2, "admission": "refuse", "storageHeartbeat": "off"}}), http.StatusOK)
	if s.HA != (api.HASettings{Failures: 2, Admission: api.AdmissionRefuse, StorageHeartbeat: api.HeartbeatOff}) {
		t.Errorf("set: %+v", s.HA)
	}
	for field, ha := range map[string]map[string]any{"ha.failures": {"failures": 5}, "ha.admission": {"admission": "maybe"}, "ha.storageHeartbeat": {"storageHeartbeat": "perhaps"}} {
		wantProblem(t, f.do(call{method: "PATCH", path: "cluster/settings", body: map[string]any{"ha": ha}}), http.StatusUnprocessableEntity, api.CodeInvalid, field)
	}
}

// Whatever makes a VM run, or run with more memory, is judged with all that it
// does, and nothing else is.
func TestWhatMakesAVMRunIsJudged(t *testing.T) {
	f := newFixture(t)
	f.ha.warn = "this breaks \"it\": möglich"
	body := vmBody("web1")
	body["spec"].(map[string]any)["power"] = "running"
	a := f.do(call{method: "POST", path: "vms", body: body})
	want[vmReply](t, a, http.StatusAccepted)
	if w := a.header.Get("Warning"); w != `299 muster "this breaks \"it\": m\u00f6glich"` {
		t.Errorf("warning %q", w)
	}
	f.newVM("web2", api.VMStopped)
	f.do(call{method: "POST", path: "vms/web2/start"})
	f.do(call{method: "POST", path: "vms/web2/start"}) // runs already
	f.newVM("web3", api.VMStopped)
	f.do(call{method: "PATCH", path: "vms/web3", body: map[string]any{"meta": map[string]any{"labels": map[string]string{"a": "b"}}}})
	a = f.do(call{method: "PATCH", path: "vms/web3", body: map[string]any{"spec": map[string]any{"power": "running"}}})
	if a.header.Get("Warning") == "" {
		t.Error("a PATCH is not warned of")
	}
	if got := strings.Join(f.ha.asked, " "); got != "web1 web2 web3" {
		t.Errorf("judged: %s", got)
	}
	f.newVM("web4", api.VMStopped)
	f.ha.refuse = true
	wantProblem(t, f.do(call{method: "POST", path: "vms/web4/start"}), http.StatusConflict, api.CodeRefused, "")
	if vm, err := configdb.VMs.Find(f.db.Local(), "", "web4"); err != nil || vm.Spec.Power != api.PowerStopped {
		t.Errorf("after the refusal: %+v %v", vm.Spec.Power, err)
	}
	for _, name := range []string{"web1", "web2"} {
		want[vmReply](t, f.do(call{method: "POST", path: "vms/" + name + "/stop"}), http.StatusAccepted)
	}
}
