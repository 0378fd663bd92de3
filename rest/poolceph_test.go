// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type fakePoolKeys struct{}

func (fakePoolKeys) SealPoolKey(id, key string) ([]byte, error) {
	return []byte("sealed:" + id + ":" + strings.ToLower(key)), nil
}

const (
	cephKey      = "AQBXrRlnAAAAABAA4iz5Cw0+0YcB7bfzTMGrKw=="
	otherCephKey = "AQCFaRlnAAAAABAAw6pJ5pX0TfNbpOXtSQtZfw=="
)

func TestTheKeyOfAPoolInCephIsNeverShown(t *testing.T) {
	f := newFixture(t)
	for _, s := range f.servers {
		s.cfg.PoolKeys = fakePoolKeys{}
	}
	spec := func(more string) string {
		return `{"meta":{"name":"ceph"},"spec":{"type":"rbd","ceph":{"pool":"vms","monitors":["10.0.0.1"],"user":"muster"` + more + `}}}`
	}
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: spec("")}), 422, api.CodeInvalid, "spec.ceph.key")
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: spec(`,"sealedKey":"AAAA"`)}), 422, api.CodeInvalid, "spec.ceph.key")
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: spec(`,"key":"secret"`)}), 422, api.CodeInvalid, "spec.ceph.key")
	made := f.do(call{method: "POST", path: "pools", body: spec(`,"key":"` + cephKey + `"`)})
	p := want[api.Pool](t, made, 201)
	stored := func() api.CephSpec {
		t.Helper()
		now, err := configdb.Pools.Get(f.db.Local(), p.Meta.ID)
		if err != nil {
			t.Fatal(err)
		}
		if now.Spec.Ceph.Key != "" {
			t.Errorf("the key is stored as it is: %+v", now.Spec.Ceph)
		}
		return *now.Spec.Ceph
	}
	sealed := func(key string) string { return "sealed:" + p.Meta.ID + ":" + strings.ToLower(key) }
	if got := string(stored().SealedKey); got != sealed(cephKey) {
		t.Errorf("stored is %q", got)
	}
	read := f.do(call{method: "GET", path: "pools/ceph"})
	shown := want[api.Pool](t, read, 200)
	if c := shown.Spec.Ceph; !c.KeySet || c.Monitors[0] != "10.0.0.1:3300" || len(shown.Status.Capabilities) == 0 {
		t.Errorf("shown is %+v, %v", c, shown.Status)
	}
	for _, a := range []answer{made, read, f.do(call{method: "GET", path: "pools"})} {
		if bytes.Contains(a.body, []byte(cephKey)) || bytes.Contains(a.body, []byte("sealedKey")) {
			t.Errorf("the key is shown: %s", a.body)
		}
	}

	patch := func(ceph string) call {
		return call{method: "PATCH", path: "pools/ceph", body: `{"spec":{"ceph":` + ceph + `}}`}
	}
	want[api.Pool](t, f.do(patch(`{"monitors":["10.0.0.2"]}`)), 200)
	if now := stored(); string(now.SealedKey) != sealed(cephKey) || now.Monitors[0] != "10.0.0.2:3300" {
		t.Errorf("after a change of the monitors: %+v", now)
	}
	wantProblem(t, f.do(patch(`{"user":"other"}`)), 422, api.CodeInvalid, "spec.ceph.key")
	wantProblem(t, f.do(patch(`{"pool":"other"}`)), 422, api.CodeInvalid, "spec.ceph.pool")
	wantProblem(t, f.do(patch(`{"namespace":"other"}`)), 422, api.CodeInvalid, "spec.ceph.namespace")
	want[api.Pool](t, f.do(patch(`{"user":"other","key":"`+otherCephKey+`"}`)), 200)
	if now := stored(); string(now.SealedKey) != sealed(otherCephKey) || now.User != "other" {
		t.Errorf("after a change of the user: %+v", now)
	}
	want[any](t, f.do(call{method: "DELETE", path: "pools/ceph"}), 204)
}
