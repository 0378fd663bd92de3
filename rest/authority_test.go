// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

func (c *fakeCluster) Authority(context.Context) (api.AuthorityStatus, uint64, error) {
	return api.AuthorityStatus{Cluster: "c", Authorities: []api.Authority{{Fingerprint: "ab", Signs: true, Cert: "PEM"}}, WaitingFor: []string{}, Away: []string{}}, 9, nil
}

func (c *fakeCluster) did(actor string, what ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, actor+" "+strings.TrimSpace(fmt.Sprintln(what...)))
}

func (c *fakeCluster) RotateAuthority(_ context.Context, actor string, r api.RotateRequest) error {
	if r.Action == api.RotateFinish && !r.Force {
		return api.Errorf(api.CodeRefused, "node m2 has not renewed")
	}
	c.did(actor, "rotate", r.Action, r.Force)
	return nil
}

func (c *fakeCluster) SetAuthority(_ context.Context, actor string, s api.AuthoritySettings) error {
	c.did(actor, "set", s.CertificateSeconds)
	return nil
}

func (c *fakeCluster) RenewCertificate(_ context.Context, actor, node string) (api.Node, error) {
	if node != "m1" {
		return api.Node{}, api.Errorf(api.CodeNotFound, "node %q does not exist", node)
	}
	c.did(actor, "renew", node)
	return api.Node{Meta: api.Meta{Name: "m1"}}, nil
}

func TestAuthorityRoutes(t *testing.T) {
	f := newFixture(t)
	admin, viewer := f.tokens[api.RoleAdministrator], f.tokens[api.RoleViewer]
	for _, c := range []struct {
		name, method, path, token, body string
		status                          int
		says, does                      string
	}{
		{"a viewer looks", "GET", "cluster/ca", viewer, "", 200, `"fingerprint":"ab"`, ""},
		{"a viewer may not rotate", "POST", "cluster/ca/rotate", viewer, `{"action":"start"}`, 403, "administrator", ""},
		{"start", "POST", "cluster/ca/rotate", admin, `{"action":"start"}`, 200, `"cluster":"c"`, "administrator rotate start false"},
		{"finish is refused", "POST", "cluster/ca/rotate", admin, `{"action":"finish"}`, 409, "m2", ""},
		{"finish by force", "POST", "cluster/ca/rotate", admin, `{"action":"finish","force":true}`, 200, "", "administrator rotate finish true"},
		{"abort", "POST", "cluster/ca/rotate", admin, `{"action":"abort"}`, 200, "", "administrator rotate abort false"},
		{"no action", "POST", "cluster/ca/rotate", admin, `{}`, 422, "start, finish or abort", ""},
		{"no body", "POST", "cluster/ca/rotate", admin, ``, 400, "", ""},
		{"an unknown field", "POST", "cluster/ca/rotate", admin, `{"action":"start","now":true}`, 422, "now", ""},
		{"life", "PATCH", "cluster/ca", admin, `{"certificateSeconds":3600}`, 200, "", "administrator set 3600"},
		{"a life too short", "PATCH", "cluster/ca", admin, `{"certificateSeconds":59}`, 422, "60", ""},
		{"a life too long", "PATCH", "cluster/ca", admin, `{"certificateSeconds":71280001}`, 422, "71280000", ""},
		{"a viewer may not choose", "PATCH", "cluster/ca", viewer, `{"certificateSeconds":3600}`, 403, "", ""},
		{"renew", "POST", "nodes/m1/renew-certificate", admin, "", 202, `"name":"m1"`, "administrator renew m1"},
		{"renew an unknown node", "POST", "nodes/m9/renew-certificate", admin, "", 404, "m9", ""},
		{"a viewer may not renew", "POST", "nodes/m1/renew-certificate", viewer, "", 403, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.cluster.mu.Lock()
			f.cluster.asked = nil
			f.cluster.mu.Unlock()
			r := f.do(call{method: c.method, path: c.path, token: c.token, body: c.body})
			f.cluster.mu.Lock()
			did := strings.Join(f.cluster.asked, "; ")
			f.cluster.mu.Unlock()
			if r.status != c.status || !strings.Contains(string(r.body), c.says) || did != c.does {
				t.Errorf("%d %s; did %q, want %d, %q and %q", r.status, r.body, did, c.status, c.says, c.does)
			}
		})
	}
	// Who did it is on record.
	r := f.do(call{method: "GET", path: "events?fields=spec.type=audit.cluster.rotate", token: viewer})
	if n := strings.Count(string(r.body), `"actor":"administrator"`); n != 3 || !strings.Contains(string(r.body), "rotate cluster authority, finish by force") {
		t.Errorf("%d events of 3 rotations: %s", n, r.body)
	}
}
