// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func names(l List[api.VM]) string {
	var out []string
	for _, vm := range l.Items {
		out = append(out, vm.Meta.Name)
	}
	slices.Sort(out) // of the same millisecond, any may come first
	return strings.Join(out, " ")
}

func TestListSelectsAndPages(t *testing.T) {
	f := newFixture(t)
	for i := range 5 {
		body := vmBody(fmt.Sprintf("vm%d", i))
		meta := body["meta"].(map[string]any)
		meta["labels"] = map[string]string{"odd": fmt.Sprint(i % 2), "all": "yes"}
		if i == 4 {
			meta["project"] = "dev"
		}
		want[any](t, f.do(call{method: "POST", path: "vms", body: body}), 202)
	}
	for query, expect := range map[string]string{
		"":                                   "vm0 vm1 vm2 vm3",
		"?project=dev":                       "vm4",
		"?project=*":                         "vm0 vm1 vm2 vm3 vm4",
		"?labels=odd=1":                      "vm1 vm3",
		"?labels=odd=1,all=yes":              "vm1 vm3",
		"?labels=odd=2":                      "",
		"?fields=status.phase=creating":      "vm0 vm1 vm2 vm3",
		"?fields=status.phase=running":       "",
		"?fields=meta.name=vm2,spec.ha=none": "vm2",
		"?fields=spec.memory=536870912":      "vm0 vm1 vm2 vm3",
		"?fields=status.message=":            "vm0 vm1 vm2 vm3",
		"?fields=spec.reboots=0":             "vm0 vm1 vm2 vm3",
		"?fields=spec.forceStop=false":       "vm0 vm1 vm2 vm3",
		"?fields=spec.forceStop=true":        "",
		"?fields=meta.labels.odd=1":          "vm1 vm3",
		"?fields=meta.labels.none=":          "vm0 vm1 vm2 vm3",
		"?fields=status.startedAt=x":         "",
		"?limit=1000&consistency=stale":      "vm0 vm1 vm2 vm3",
	} {
		l := want[List[api.VM]](t, f.do(call{method: "GET", path: "vms" + query}), 200)
		if names(l) != expect || l.Kind != "vmList" || l.Revision == 0 || l.Continue != "" {
			t.Errorf("%s: %q, want %q (%s %d)", query, names(l), expect, l.Kind, l.Revision)
		}
	}
	var got []string
	next, pages := "", 0
	for {
		l := want[List[api.VM]](t, f.do(call{method: "GET", path: "vms?project=*&limit=2&continue=" + next}), 200)
		got = append(got, strings.Fields(names(l))...)
		pages++
		if next = l.Continue; next == "" {
			break
		}
	}
	slices.Sort(got)
	if strings.Join(got, " ") != "vm0 vm1 vm2 vm3 vm4" || pages != 3 {
		t.Errorf("pages %q", got)
	}
	if a := f.do(call{method: "GET", path: "images?labels=no=such"}); !strings.Contains(string(a.body), `"items":[]`) {
		t.Errorf("an empty list is not []: %s", a.body)
	}
	for query, field := range map[string]string{
		"limit=0": "limit", "limit=1001": "limit", "limit=x": "limit", "labels=a": "labels", "labels==b": "labels", "fields=spec.cpuz=1": "fields",
		"fields=spec=1": "fields", "continue=%21": "continue", "project=../x": "project", "consistency=perfect": "consistency", "minRevision=-1": "minRevision",
		"labels=" + strings.Repeat("a=b,", 40): "labels",
	} {
		wantProblem(t, f.do(call{method: "GET", path: "vms?" + query}), 422, api.CodeInvalid, field)
	}
}

func TestGetByNameOrID(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	for _, name := range []string{"web1", vm.Meta.ID} {
		got := want[api.VM](t, f.do(call{method: "GET", path: "vms/" + name, node: "m2"}), 200)
		if got.Meta.ID != vm.Meta.ID || got.Meta.Revision == 0 || got.Meta.StatusRevision == 0 {
			t.Errorf("%+v", got.Meta)
		}
	}
	for _, path := range []string{"vms/nope", "vms/" + api.NewID(), "vms/web1?project=dev", "vms/..%2F..%2Fetc", "vms/../tokens/x", "vms/", "nothing", "vms/web1/explode"} {
		wantProblem(t, f.do(call{method: "GET", path: path}), 404, api.CodeNotFound, "")
	}
	a := f.do(call{method: "POST", path: "vms/web1"})
	wantProblem(t, a, 405, api.CodeUnsupported, "")
	if a.header.Get("Allow") != "DELETE, GET, PATCH, PUT" {
		t.Errorf("Allow: %s", a.header.Get("Allow"))
	}
	if a := f.do(call{method: "HEAD", path: "vms/web1"}); a.status != 200 || a.header.Get("ETag") == "" {
		t.Errorf("HEAD: %d", a.status)
	}
}

func TestReadsWithoutQuorum(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	a := f.do(call{method: "GET", path: "vms/web1"})
	if a.header.Get(headerConsistency) != "" {
		t.Error("a linearizable answer says it is stale")
	}
	a = f.do(call{method: "GET", path: "vms/web1?consistency=stale"})
	if a.header.Get(headerConsistency) != "stale" || a.header.Get(headerAge) != "0.000" {
		t.Errorf("%v", a.header)
	}
	f.db.alone.Store(true)
	a = f.do(call{method: "GET", path: "vms"})
	if a.status != 200 || a.header.Get(headerConsistency) != "stale" {
		t.Errorf("%d %v", a.status, a.header)
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms?consistency=linearizable"}), 503, api.CodeNoQuorum, "")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/start"}), 503, api.CodeNoQuorum, "")
	wantProblem(t, f.do(call{method: "GET", path: "raw/x"}), 503, api.CodeNoQuorum, "")
	wantProblem(t, f.do(call{method: "PUT", path: "raw/x", body: "v"}), 503, api.CodeNoQuorum, "")
	wantProblem(t, f.do(call{method: "GET", path: "raw/x?consistency=stale"}), 404, api.CodeNotFound, "")
}

func TestMinRevisionWaits(t *testing.T) {
	f := newFixture(t)
	rev := f.db.Local().Revision()
	done := make(chan answer)
	go func() {
		a, _ := f.try(call{method: "GET", path: fmt.Sprintf("vms?minRevision=%d", rev+1)})
		done <- a
	}()
	f.newVM("web1", api.VMStopped)
	if l := want[List[api.VM]](t, <-done, 200); l.Revision <= rev || names(l) != "web1" {
		t.Errorf("revision %d, items %q", l.Revision, names(l))
	}
	// A client that leaves does not hold the request.
	ctx, cancel := context.WithCancel(t.Context())
	r, _ := http.NewRequestWithContext(ctx, "GET", f.urls["m1"]+base+"vms?minRevision=99999999", nil)
	r.Header.Set("Authorization", "Bearer "+f.tokens[api.RoleViewer])
	go cancel()
	if resp, err := http.DefaultClient.Do(r); err == nil {
		_ = resp.Body.Close()
		t.Error("an answer without the revision")
	}
}

func TestIdempotencyKey(t *testing.T) {
	f := newFixture(t)
	key := map[string]string{headerIdemKey: "k-1"}
	post := call{method: "POST", path: "vms", body: vmBody("web1", api.VMDisk{Size: 64 * api.MiB}), header: key}
	first := want[vmReply](t, f.do(post), 202)
	post.node = "m2" // through any node
	a := f.do(post)
	again := want[vmReply](t, a, 202)
	if again.Task.Meta.ID != first.Task.Meta.ID || again.Object.Meta.ID != first.Object.Meta.ID || again.Revision != first.Revision || a.header.Get(headerReplayed) != "true" {
		t.Fatalf("%+v\n%+v", again, first)
	}
	post.path = "vms?wait=1ms" // how long to wait is not part of the wish
	want[vmReply](t, f.do(post), 202)
	post.path, post.body = "vms", vmBody("web2")
	wantProblem(t, f.do(post), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/start", header: key}), 409, api.CodeRefused, "")
	post.role = api.RoleOperator // the key of another token is another key
	want[vmReply](t, f.do(post), 202)

	start := call{method: "POST", path: "vms/web1/start", header: map[string]string{headerIdemKey: "k-2"}}
	one, two := want[vmReply](t, f.do(start), 202), want[vmReply](t, f.do(start), 202)
	if one.Task.Meta.ID != two.Task.Meta.ID {
		t.Error("the action was done twice")
	}
	pool := call{method: "POST", path: "pools", body: `{"meta":{"name":"fast"},"spec":{"path":"/srv/fast"}}`, header: map[string]string{headerIdemKey: "k-3"}}
	if a, b := want[api.Pool](t, f.do(pool), 201), want[api.Pool](t, f.do(pool), 201); a.Meta.ID != b.Meta.ID {
		t.Error("the pool was made twice")
	}
	token := call{method: "POST", path: "tokens", body: `{"meta":{"name":"ci"}}`, header: map[string]string{headerIdemKey: "k-4"}}
	want[TokenReply](t, f.do(token), 201)
	wantProblem(t, f.do(token), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmBody("x"), header: map[string]string{headerIdemKey: strings.Repeat("k", 129)}}), 422, api.CodeInvalid, headerIdemKey)
	// A request that failed leaves no record.
	bad := call{method: "POST", path: "vms", body: vmBody("web1"), header: map[string]string{headerIdemKey: "k-5"}}
	wantProblem(t, f.do(bad), 409, api.CodeExists, "")
	bad.body = vmBody("web9")
	want[vmReply](t, f.do(bad), 202)
}

func TestIdempotencyRecordsEnd(t *testing.T) {
	f := newFixture(t)
	records := func() (n int) {
		for range f.db.Local().Scan(idemPrefix, "") {
			n++
		}
		return n
	}
	f.newVM("web1", api.VMStopped)
	const old = 40
	for i := range old {
		want[any](t, f.do(call{method: "POST", path: "vms/web1/stop", header: map[string]string{headerIdemKey: fmt.Sprint("old", i)}}), 202)
	}
	f.skew.Store(int64(idemLife) * 2)
	a := want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/stop", header: map[string]string{headerIdemKey: "old0"}}), 202)
	if a.Task.Spec.Action != api.ActionVMStop {
		t.Error(a.Task.Spec)
	}
	for i := range 60 {
		want[any](t, f.do(call{method: "POST", path: "vms/web1/stop", header: map[string]string{headerIdemKey: fmt.Sprint("new", i)}}), 202)
	}
	if n := records(); n > 61+old/4 {
		t.Errorf("%d records, of which 61 are young", n)
	}
}

func TestNodes(t *testing.T) {
	f := newFixture(t)
	n := want[api.Node](t, f.do(call{method: "PATCH", path: "nodes/m1", body: `{"spec":{"maintenance":true,"accelerator":"tcg","reservedMemory":"1G"}}`}), 200)
	if !n.Spec.Maintenance || n.Spec.Accelerator != api.AccelTCG || n.Spec.ReservedMemory != api.GiB || n.Spec.Address != "m1:7600" {
		t.Errorf("%+v", n.Spec)
	}
	wantProblem(t, f.do(call{method: "PATCH", path: "nodes/m1", body: `{"spec":{"address":"x:1"}}`}), 422, api.CodeInvalid, "spec.address")
	wantProblem(t, f.do(call{method: "PATCH", path: "nodes/m1", body: `{"spec":{"role":"witness"}}`}), 422, api.CodeInvalid, "spec.role")
	wantProblem(t, f.do(call{method: "PATCH", path: "nodes/m1", body: `{"spec":{"accelerator":"warp"}}`}), 422, api.CodeInvalid, "spec.accelerator")
	wantProblem(t, f.do(call{method: "DELETE", path: "nodes/m9"}), 404, api.CodeNotFound, "")
	wantProblem(t, f.do(call{method: "POST", path: "nodes", body: `{}`}), 405, api.CodeUnsupported, "")
	l := want[List[api.Node]](t, f.do(call{method: "GET", path: "nodes?project=dev"}), 200)
	if len(l.Items) != 2 {
		t.Errorf("nodes belong to the cluster, listed %d", len(l.Items))
	}
}

func TestObjectOfANewerVersionIsNotRewritten(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		e, _ := v.Get(configdb.VMs.SpecKey(vm.Meta.ID))
		tx.Put(e.Key, []byte(strings.Replace(string(e.Value), `"schema":1`, `"schema":2`, 1)))
		return nil
	})
	want[api.VM](t, f.do(call{method: "GET", path: "vms/web1"}), 200)
	wantProblem(t, f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"ha":"restart"}}`}), 501, api.CodeUnsupported, "")
}

func TestServicesOfEveryNodeFromAnyNode(t *testing.T) {
	f := newFixture(t)
	for _, at := range []string{"m1", "m2"} {
		all := want[ServiceList](t, f.do(call{method: "GET", path: "services", node: at, role: api.RoleViewer}), 200)
		one := want[ServiceList](t, f.do(call{method: "GET", path: "services?node=m2", node: at, role: api.RoleViewer}), 200)
		if len(all.Items) != 2 || all.Items[0].Node != "m1" || all.Items[1].Node != "m2" || len(one.Items) != 1 || one.Items[0].Node != "m2" {
			t.Errorf("services at %s: all %+v, of m2 %+v", at, all, one)
		}
	}
	wantProblem(t, f.do(call{method: "GET", path: "services?node=none"}), 404, api.CodeNotFound, "")
}
