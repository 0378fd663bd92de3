// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/goodturn"
)

func named(name string, spec map[string]any) map[string]any {
	return map[string]any{"meta": map[string]any{"name": name}, "spec": spec}
}

// addNetwork makes a network with a pool of addresses, if it has a CIDR.
func (f *fixture) addNetwork(name string, spec, pool map[string]any) api.Network {
	f.t.Helper()
	n := want[api.Network](f.t, f.do(call{method: "POST", path: "networks", body: named(name, spec)}), http.StatusCreated)
	if pool != nil {
		pool["network"] = name
		want[api.IPPool](f.t, f.do(call{method: "POST", path: "ippools", body: named(name, pool)}), http.StatusCreated)
	}
	return n
}

func vmOn(name string, nics ...map[string]any) map[string]any {
	b := vmBody(name)
	b["spec"].(map[string]any)["nics"] = nics
	return b
}

// claims counts the keys of claims, which must all be gone in the end.
func (f *fixture) claims() int {
	n := 0
	for e := range f.db.Local().Scan(configdb.Root+"claim/", "") {
		if !strings.HasPrefix(e.Key, poolPathPrefix) {
			n++
		}
	}
	return n
}

func TestNetworksAndWhatIsRefused(t *testing.T) {
	f := newFixture(t)
	f.addNetwork("lab", map[string]any{"type": "vxlan", "vni": 100}, map[string]any{"cidr": "10.20.0.0/24"})
	f.addNetwork("office", map[string]any{"type": "vlan", "vlan": 20}, nil)
	f.addNetwork("lone", map[string]any{}, nil)
	want[api.Uplink](t, f.do(call{method: "POST", path: "uplinks", body: named("up1", map[string]any{"node": "m1", "nic": "eth1"})}), http.StatusCreated)
	for name, c := range map[string]struct {
		path   string
		spec   map[string]any
		status int
		code   api.Code
		field  string
		words  string
	}{
		"the same VLAN tag":          {"networks", map[string]any{"type": "vlan", "vlan": 20}, 409, api.CodeRefused, "spec.vlan", "network office"},
		"the same VNI":               {"networks", map[string]any{"type": "vxlan", "vni": 100}, 409, api.CodeRefused, "spec.vni", "network lab"},
		"a tag out of range":         {"networks", map[string]any{"type": "vlan", "vlan": 4095}, 422, api.CodeInvalid, "spec.vlan", "4094"},
		"no VNI":                     {"networks", map[string]any{"type": "vxlan"}, 422, api.CodeInvalid, "spec.vni", ""},
		"a tag without a meaning":    {"networks", map[string]any{"type": "isolated", "vlan": 5}, 422, api.CodeInvalid, "spec.vlan", ""},
		"an unknown type":            {"networks", map[string]any{"type": "token-ring"}, 422, api.CodeInvalid, "spec.type", ""},
		"a second, overlapping pool": {"ippools", map[string]any{"network": "lab", "cidr": "10.20.0.128/25"}, 409, api.CodeRefused, "spec.network", "overlaps"},
		"a second pool":              {"ippools", map[string]any{"network": "lab", "cidr": "10.21.0.0/24"}, 409, api.CodeRefused, "spec.network", "has one"},
		"a pool of no network":       {"ippools", map[string]any{"network": "gone", "cidr": "10.21.0.0/24"}, 404, api.CodeNotFound, "spec.network", ""},
		"a host for a subnet":        {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.1/24"}, 422, api.CodeInvalid, "spec.cidr", ""},
		"a gateway elsewhere":        {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.0/24", "gateway": "10.22.0.1"}, 422, api.CodeInvalid, "spec.gateway", ""},
		"a gateway for all":          {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.0/24", "gateway": "10.21.0.255"}, 422, api.CodeInvalid, "spec.gateway", ""},
		"nothing to hand out":        {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.0/24", "gateway": "10.21.0.7", "start": "10.21.0.7", "end": "10.21.0.7"}, 422, api.CodeInvalid, "spec.start", ""},
		"an end before the start":    {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.0/24", "start": "10.21.0.9", "end": "10.21.0.7"}, 422, api.CodeInvalid, "spec.end", ""},
		"IPv6":                       {"ippools", map[string]any{"network": "office", "cidr": "fd00::/64"}, 422, api.CodeInvalid, "spec.cidr", ""},
		"five servers":               {"ippools", map[string]any{"network": "office", "cidr": "10.21.0.0/24", "dns": []string{"1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4", "1.1.1.5"}}, 422, api.CodeInvalid, "spec.dns", ""},
		"a second uplink":            {"uplinks", map[string]any{"node": "m1", "nic": "eth2"}, 409, api.CodeRefused, "spec.node", "uplink up1"},
		"an uplink of no node":       {"uplinks", map[string]any{"node": "m9", "nic": "eth2"}, 404, api.CodeNotFound, "spec.node", ""},
		"a NIC that is a path":       {"uplinks", map[string]any{"node": "m2", "nic": "../../x"}, 422, api.CodeInvalid, "spec.nic", ""},
		"a NIC with a long name":     {"uplinks", map[string]any{"node": "m2", "nic": "0123456789abcdef"}, 422, api.CodeInvalid, "spec.nic", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := wantProblem(t, f.do(call{method: "POST", path: c.path, body: named("x", c.spec)}), c.status, c.code, c.field)
			if !strings.Contains(p.Detail, c.words) {
				t.Errorf("says %q, want %q", p.Detail, c.words)
			}
		})
	}
	wantProblem(t, f.do(call{method: "POST", path: "networks", role: api.RoleOperator, body: named("x", nil)}), 403, api.CodeForbidden, "")
	wantProblem(t, f.do(call{method: "PATCH", path: "networks/lab", body: map[string]any{"spec": map[string]any{"vni": 7}}}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "PATCH", path: "ippools/lab", body: map[string]any{"spec": map[string]any{"cidr": "10.0.0.0/8"}}}), 422, api.CodeInvalid, "spec.cidr")
	if p := wantProblem(t, f.do(call{method: "DELETE", path: "networks/lab"}), 409, api.CodeRefused, ""); !strings.Contains(p.Detail, "ippool lab") {
		t.Errorf("says %q", p.Detail)
	}
	for _, path := range []string{"ippools/lab", "networks/lab", "networks/office", "networks/lone", "uplinks/up1"} {
		if a := f.do(call{method: "DELETE", path: path}); a.status != http.StatusNoContent {
			t.Errorf("delete %s: %d %s", path, a.status, a.body)
		}
	}
	if n := f.claims(); n != 0 {
		t.Errorf("%d claims are left over", n)
	}
	f.addNetwork("again", map[string]any{"type": "vlan", "vlan": 20}, nil)
}

func TestNetworkCardsOfVMs(t *testing.T) {
	f := newFixture(t)
	lab := f.addNetwork("lab", map[string]any{"type": "vxlan", "vni": 100}, map[string]any{"cidr": "10.20.0.0/29", "gateway": "10.20.0.1"})
	f.addNetwork("lone", map[string]any{}, nil)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn("web1", map[string]any{"network": lab.Meta.ID}, map[string]any{"network": "lone"})}), 202)
	first, second := r.Object.Spec.NICs[0], r.Object.Spec.NICs[1]
	if first.Network != "lab" || !strings.HasPrefix(first.MAC, "52:54:00:") || !netip.MustParsePrefix("10.20.0.0/29").Contains(netip.MustParseAddr(first.Address)) || first.Address == "10.20.0.1" {
		t.Fatalf("the card is %+v", first)
	}
	if second.Address != "" || second.MAC == first.MAC {
		t.Fatalf("the second card is %+v", second)
	}
	for name, c := range map[string]struct {
		nic    map[string]any
		status int
		code   api.Code
		field  string
	}{
		"an address that is taken":   {map[string]any{"network": "lab", "address": first.Address}, 409, api.CodeRefused, "spec.nics[0].address"},
		"a MAC that is taken":        {map[string]any{"network": "lone", "mac": first.MAC}, 409, api.CodeRefused, "spec.nics[0].mac"},
		"the gateway":                {map[string]any{"network": "lab", "address": "10.20.0.1"}, 409, api.CodeRefused, "spec.nics[0].address"},
		"an address elsewhere":       {map[string]any{"network": "lab", "address": "10.21.0.1"}, 422, api.CodeInvalid, "spec.nics[0].address"},
		"the subnet itself":          {map[string]any{"network": "lab", "address": "10.20.0.0"}, 422, api.CodeInvalid, "spec.nics[0].address"},
		"an address without a pool":  {map[string]any{"network": "lone", "address": "10.20.0.2"}, 409, api.CodeRefused, "spec.nics[0].address"},
		"a network that is not":      {map[string]any{"network": "gone"}, 404, api.CodeNotFound, "spec.nics[0].network"},
		"no network":                 {map[string]any{}, 422, api.CodeInvalid, "spec.nics[0].network"},
		"a multicast MAC":            {map[string]any{"network": "lab", "mac": "01:00:5e:00:00:01"}, 422, api.CodeInvalid, "spec.nics[0].mac"},
		"a MAC that hides an option": {map[string]any{"network": "lab", "mac": "52:54:00:00:00:01,x=y"}, 422, api.CodeInvalid, "spec.nics[0].mac"},
	} {
		t.Run(name, func(t *testing.T) {
			wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmOn("x", c.nic)}), c.status, c.code, c.field)
		})
	}
	twice := map[string]any{"network": "lab", "address": "10.20.0.6"}
	if first.Address == "10.20.0.6" {
		twice["address"] = "10.20.0.5"
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmOn("x", twice, twice)}), 422, api.CodeInvalid, "spec.nics[1].address")

	// 10.20.0.2-6 are five; the sixth VM finds none.
	for _, name := range []string{"web2", "web3", "web4", "web5"} {
		want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn(name, map[string]any{"network": "lab"})}), 202)
	}
	if p := wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmOn("web6", map[string]any{"network": "lab"})}), 409, api.CodeRefused, ""); !strings.Contains(p.Detail, "exhausted") {
		t.Errorf("says %q", p.Detail)
	}
	if pool := want[api.IPPool](t, f.do(call{method: "GET", path: "ippools/lab"}), 200); pool.Status != (api.IPPoolStatus{Total: 5, Used: 5}) {
		t.Errorf("the pool says %+v", pool.Status)
	}
	if p := wantProblem(t, f.do(call{method: "DELETE", path: "networks/lone"}), 409, api.CodeRefused, ""); !strings.Contains(p.Detail, "vm web1") {
		t.Errorf("says %q", p.Detail)
	}
	if p := wantProblem(t, f.do(call{method: "DELETE", path: "ippools/lab"}), 409, api.CodeRefused, ""); !strings.Contains(p.Detail, "vm web") {
		t.Errorf("says %q", p.Detail)
	}
}

func patchNICs(nics ...map[string]any) map[string]any {
	if nics == nil {
		nics = []map[string]any{}
	}
	return map[string]any{"spec": map[string]any{"nics": nics}}
}

func TestNetworkCardsAreReplacedWhileStopped(t *testing.T) {
	f := newFixture(t)
	f.addNetwork("lab", map[string]any{"type": "vxlan", "vni": 100}, map[string]any{"cidr": "10.20.0.0/24"})
	f.addNetwork("lone", map[string]any{}, nil)
	before := f.claims()
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn("web1", map[string]any{"network": "lab"})}), 202)
	card := r.Object.Spec.NICs[0]
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: patchNICs(map[string]any{"network": "lab"})}), 200) // nothing new
	f.report(r.Object.Meta.ID, api.VMStopped)

	vm := want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: patchNICs(map[string]any{"network": "lone"}, map[string]any{"network": "lab"})}), 200)
	if vm.Spec.NICs[1] != card || vm.Spec.NICs[0].Network != "lone" || vm.Spec.NICs[0].MAC == "" {
		t.Fatalf("the cards are %+v, the first was %+v", vm.Spec.NICs, card)
	}
	wantProblem(t, f.do(call{method: "DELETE", path: "networks/lone"}), 409, api.CodeRefused, "")
	vm = want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: patchNICs(map[string]any{"network": "lab", "address": "10.20.0.77"})}), 200)
	if vm.Spec.NICs[0].Address != "10.20.0.77" || vm.Spec.NICs[0].MAC == "" {
		t.Fatalf("the card is %+v", vm.Spec.NICs[0])
	}
	if _, taken := f.db.Local().Get(configdb.MACKey(card.MAC)); taken && vm.Spec.NICs[0].MAC != card.MAC {
		t.Error("the MAC address that was given up is still reserved")
	}
	if a := f.do(call{method: "DELETE", path: "networks/lone"}); a.status != 204 {
		t.Errorf("a network that nobody uses any more: %d %s", a.status, a.body)
	}
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/web1", body: patchNICs()}), 200)
	if n := f.claims(); n != before {
		t.Errorf("%d claims, %d before the cards", n, before)
	}
}

func TestANetworkThatGetsItsPoolLaterGivesAddressesAtTheStart(t *testing.T) {
	f := newFixture(t)
	f.addNetwork("lone", map[string]any{}, nil)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms", body: vmOn("web1", map[string]any{"network": "lone"})}), 202)
	f.report(r.Object.Meta.ID, api.VMStopped)
	want[api.IPPool](t, f.do(call{method: "POST", path: "ippools", body: named("p", map[string]any{"network": "lone", "cidr": "10.20.0.0/24"})}), 201)
	r = want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	if nic := r.Object.Spec.NICs[0]; nic.Address == "" || nic.MAC == "" {
		t.Errorf("the card is %+v", nic)
	}
}

func TestConcurrentCreationsShareNoAddress(t *testing.T) {
	f := newFixture(t)
	f.addNetwork("lab", map[string]any{"type": "vxlan", "vni": 100}, map[string]any{"cidr": "10.20.0.0/28"})
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]string{}
	for i := range 14 {
		wg.Go(func() {
			name := "web" + string(rune('a'+i))
			a, err := f.try(call{method: "POST", path: "vms", node: []string{"m1", "m2"}[i%2], body: vmOn(name, map[string]any{"network": "lab"})})
			if err != nil || a.status != 202 {
				t.Errorf("%s: %v %d %s", name, err, a.status, a.body)
				return
			}
			nic := want[vmReply](t, a, 202).Object.Spec.NICs[0]
			mu.Lock()
			defer mu.Unlock()
			for _, x := range []string{nic.Address, nic.MAC} {
				if other := seen[x]; other != "" {
					t.Errorf("%s belongs to %s and %s", x, other, name)
				}
				seen[x] = name
			}
		})
	}
	wg.Wait()
}

func TestANewNetworkIsAwaited(t *testing.T) {
	f := newFixture(t)
	report := func(node string, st api.SwitchStateStatus) {
		o := api.SwitchState{Meta: api.NewMeta(api.KindSwitchState, "", node), Spec: api.SwitchStateSpec{NodeID: f.nodeIDs[node]}, Status: st}
		o.Meta.ID = f.nodeIDs[node]
		f.txn(func(v *configdb.View, tx *configdb.Txn) error {
			if old, err := configdb.SwitchStates.Get(v, o.Meta.ID); err == nil {
				old.Status = st
				return configdb.SwitchStates.UpdateStatus(v, tx, &old)
			}
			return configdb.SwitchStates.CreateUnnamed(tx, &o)
		})
	}
	report("m1", api.SwitchStateStatus{Node: "m1", Ready: true})
	report("m2", api.SwitchStateStatus{Node: "m2", Reason: "Open vSwitch does not run"}) // not waited for
	var n api.Network
	goodturn.Take(t, func(i int) error {
		name, done := fmt.Sprint("lone", i), make(chan struct{})
		go func() {
			defer close(done)
			w := f.db.Watch(configdb.Networks.SpecPrefix(), 0)
			for {
				if _, err := w.Next(t.Context()); err != nil {
					return
				}
				if _, err := configdb.Networks.Find(f.db.Local(), "", name); err == nil {
					report("m1", api.SwitchStateStatus{Node: "m1", Ready: true, Networks: []string{name}})
					return
				}
			}
		}()
		began := time.Now()
		n = f.addNetwork(name, map[string]any{}, nil)
		took := time.Since(began)
		<-done
		if took >= networkWait {
			return fmt.Errorf("it took %s", took)
		}
		return nil
	})
	if len(n.Status.Nodes) != 2 || !n.Status.Nodes[0].Ready || n.Status.Nodes[1].Ready || n.Status.Nodes[1].Reason != "Open vSwitch does not run" {
		t.Errorf("the answer says %+v", n.Status.Nodes)
	}
}
