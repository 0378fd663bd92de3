// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func TestLogin(t *testing.T) {
	f := newFixture(t)
	good := f.tokens[api.RoleAdministrator]
	expired := f.addToken("xpired", api.TokenSpec{Role: api.RoleAdministrator, ExpiresAt: time.Now().Add(-time.Minute)})
	join := f.addToken("join", api.TokenSpec{Use: api.TokenJoin})
	for name, token := range map[string]string{
		"no token": "none", "not ours": "abc", "wrong secret": good[:len(good)-1] + "x", "unknown id": tokenPrefix + api.NewID() + "_" + strings.Repeat("a", tokenSecretLength),
		"cut short": good[:len(good)-2], "expired": expired, "a join token": join, "id with ../": tokenPrefix + "../" + "_" + strings.Repeat("a", tokenSecretLength),
	} {
		t.Run(name, func(t *testing.T) {
			a := f.do(call{method: "GET", path: "vms", token: token})
			wantProblem(t, a, 401, api.CodeUnauthorized, "")
			if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer") {
				t.Error("no WWW-Authenticate")
			}
		})
	}
	want[any](t, f.do(call{method: "GET", path: "vms", token: good}), 200)
}

// A node that has no quorum cannot say that a token which it does not have is
// no token of the cluster; the client would give up for good.
func TestAnUnknownTokenWithoutAQuorum(t *testing.T) {
	f := newFixture(t)
	unknown := tokenPrefix + api.NewID() + "_" + strings.Repeat("a", tokenSecretLength)
	f.db.alone.Store(true)
	a := f.do(call{method: "GET", path: "vms", token: unknown})
	wantProblem(t, a, 503, api.CodeNoQuorum, "")
	if h := a.header.Get("WWW-Authenticate"); h != "" {
		t.Errorf("WWW-Authenticate: %s", h)
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms", token: "abc"}), 401, api.CodeUnauthorized, "")
	f.db.alone.Store(false)
	wantProblem(t, f.do(call{method: "GET", path: "vms", token: unknown}), 401, api.CodeUnauthorized, "")
}

func TestRoles(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	tests := []struct {
		role   api.Role
		method string
		path   string
		body   string
		ok     bool
	}{
		{api.RoleViewer, "GET", "vms", "", true},
		{api.RoleViewer, "GET", "vms/web1", "", true},
		{api.RoleViewer, "GET", "tasks", "", true},
		{api.RoleViewer, "GET", "cluster", "", true},
		{api.RoleViewer, "GET", "openapi.json", "", true},
		{api.RoleViewer, "GET", "tokens", "", false},
		{api.RoleViewer, "GET", "raw/x", "", false},
		{api.RoleViewer, "POST", "vms", "{}", false},
		{api.RoleViewer, "POST", "vms/web1/start", "", false},
		{api.RoleViewer, "PATCH", "vms/web1", "{}", false},
		{api.RoleViewer, "DELETE", "vms/web1", "", false},
		{api.RoleViewer, "GET", "vms/web1/console", "", false},
		{api.RoleViewer, "GET", "watch?kinds=token", "", false},
		{api.RoleOperator, "POST", "vms/web1/stop", "", true},
		{api.RoleOperator, "PATCH", "vms/web1", "{}", true},
		{api.RoleOperator, "PATCH", "nodes/m1", "{}", false},
		{api.RoleOperator, "DELETE", "nodes/m1", "", false},
		{api.RoleOperator, "POST", "pools", "{}", false},
		{api.RoleOperator, "POST", "tokens", "{}", false},
		{api.RoleOperator, "POST", "cluster/tokens", "{}", false},
		{api.RoleOperator, "PUT", "raw/x", "v", false},
		{api.RoleOperator, "POST", "images", `{"meta":{"name":"i"},"spec":{"path":"/etc/shadow"}}`, false},
		{api.RoleAdministrator, "GET", "tokens", "", true},
		{api.RoleAdministrator, "PUT", "raw/x", "v", true},
		{api.RoleAdministrator, "POST", "cluster/init", "{}", false},
		{api.RoleAdministrator, "POST", "cluster/join", "{}", false},
	}
	for _, tt := range tests {
		t.Run(string(tt.role)+" "+tt.method+" "+tt.path, func(t *testing.T) {
			a := f.do(call{method: tt.method, path: tt.path, body: tt.body, role: tt.role})
			if tt.ok {
				if a.status >= 300 {
					t.Fatalf("%d %s", a.status, a.body)
				}
				return
			}
			wantProblem(t, a, 403, api.CodeForbidden, "")
		})
	}
}

// forwarded headers open nothing without a peer's certificate.
func TestForwardedHeadersNeedAPeer(t *testing.T) {
	f := newFixture(t)
	h := map[string]string{headerBy: "m2", headerActor: "admin", headerRole: "administrator"}
	wantProblem(t, f.do(call{method: "GET", path: "tokens", token: "none", header: h}), 401, api.CodeUnauthorized, "")
	wantProblem(t, f.do(call{method: "GET", path: "tokens", role: api.RoleViewer, header: h}), 403, api.CodeForbidden, "")
	h[testPeer] = "m2"
	want[any](t, f.do(call{method: "GET", path: "tokens", token: "none", header: h}), 200)
	h[headerBy] = "m1" // not what the certificate says
	wantProblem(t, f.do(call{method: "GET", path: "tokens", token: "none", header: h}), 403, api.CodeForbidden, "")
	h[headerBy], h[headerRole] = "m2", "emperor"
	wantProblem(t, f.do(call{method: "GET", path: "tokens", token: "none", header: h}), 403, api.CodeForbidden, "")
	// A peer's certificate alone is no login either.
	wantProblem(t, f.do(call{method: "GET", path: "tokens", token: "none", header: map[string]string{testPeer: "m2"}}), 401, api.CodeUnauthorized, "")
}

// overSocket returns a client of m1's unix socket.
func (f *fixture) overSocket() *http.Client {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		f.t.Fatal(err)
	}
	s := f.servers["m1"]
	srv := s.HTTPServer(s.LocalHandler())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	f.t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	f.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestLocalSocketAndHostOutsideACluster(t *testing.T) {
	f := newFixture(t)
	f.member.Store(false)
	c := f.overSocket()
	tests := []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/healthz", "", 200},
		{"GET", "/readyz", "", 503},
		{"GET", base + "vms", "", 503},
		{"GET", base + "cluster", "", 503},
		{"POST", base + "cluster/tokens", "{}", 503},
		{"POST", base + "cluster/admit", "{}", 503},
		{"POST", base + "cluster/init", `{"name":"../x"}`, 422},
		{"POST", base + "cluster/init", `{"nam":"x"}`, 422},
		{"POST", base + "cluster/init", `{"name":"home"}`, 200},
		{"POST", base + "cluster/join", `{}`, 422},
		{"POST", base + "cluster/join", `{"token":"used"}`, 409},
		{"POST", base + "cluster/join", `{"token":"t"}`, 200},
	}
	for _, tt := range tests {
		r, _ := http.NewRequestWithContext(t.Context(), tt.method, "http://muster"+tt.path, strings.NewReader(tt.body))
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != tt.status {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, resp.StatusCode, tt.status)
		}
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms"}), 503, api.CodeNotMember, "")
	f.member.Store(true)
	r, _ := http.NewRequestWithContext(t.Context(), "POST", "http://muster"+base+"vms", strings.NewReader(`{"meta":{"name":"a"}}`))
	resp, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	tasks, _ := configdb.Tasks.List(f.db.Local())
	if resp.StatusCode != 202 || tasks[0].Spec.Actor != localActor {
		t.Errorf("%d, actor %s", resp.StatusCode, tasks[0].Spec.Actor)
	}
}

func TestClusterCalls(t *testing.T) {
	f := newFixture(t)
	st := want[api.ClusterStatus](t, f.do(call{method: "GET", path: "cluster"}), 200)
	if st.Leader != "m1" {
		t.Error(st)
	}
	jt := want[api.JoinToken](t, f.do(call{method: "POST", path: "cluster/tokens", body: `{"role":"witness","ttlSeconds":60}`}), 201)
	if jt.Token != "join-witness" || f.cluster.actor != "administrator" {
		t.Error(jt, f.cluster.actor)
	}
	want[api.JoinToken](t, f.do(call{method: "POST", path: "cluster/tokens"}), 201)
	wantProblem(t, f.do(call{method: "POST", path: "cluster/tokens", body: `{"role":"king"}`}), 422, api.CodeInvalid, "role")
	wantProblem(t, f.do(call{method: "POST", path: "cluster/tokens", body: `{"ttlSeconds":5}`}), 422, api.CodeInvalid, "ttlSeconds")
	admit := api.AdmitRequest{TokenID: "t", Secret: "right", CSR: "c", Node: "m9", Address: "a:1"}
	want[api.AdmitResult](t, f.do(call{method: "POST", path: "cluster/admit", body: admit, token: "none"}), 200)
	admit.Secret = "used"
	wantProblem(t, f.do(call{method: "POST", path: "cluster/admit", body: admit, token: "none"}), 401, api.CodeUnauthorized, "")
	admit.Node = "../m9"
	wantProblem(t, f.do(call{method: "POST", path: "cluster/admit", body: admit, token: "none"}), 422, api.CodeInvalid, "node")
	want[any](t, f.do(call{method: "DELETE", path: "nodes/m2?force=true"}), 204)
	if len(f.cluster.removed) != 1 || f.cluster.removed[0] != "m2true" {
		t.Error(f.cluster.removed)
	}
}

func TestLoopbackPathsNeedNoLogin(t *testing.T) {
	f := newFixture(t)
	for path, has := range map[string]string{"/healthz": "ok", "/readyz": "ok", "/metrics": "muster_raft_is_leader 1"} {
		a := f.do(call{method: "GET", path: path, token: "none"})
		if a.status != 200 || !strings.Contains(string(a.body), has) {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	if isLoopback("10.1.2.3:5") || !isLoopback("127.0.0.1:5") || !isLoopback("[::1]:5") || isLoopback("") {
		t.Error("loopback is not told apart")
	}
	a := f.do(call{method: "GET", path: "/metrics"})
	if !strings.Contains(string(a.body), `muster_http_requests_total{route="/healthz",method="GET",code="200"} 1`) {
		t.Errorf("requests are not counted: %s", a.body)
	}
	f.db.alone.Store(true)
	wantProblem(t, f.do(call{method: "GET", path: "/readyz", token: "none"}), 503, api.CodeNoQuorum, "")
	if a := f.do(call{method: "GET", path: "/metrics"}); a.status != 200 {
		t.Errorf("metrics need a quorum: %d", a.status)
	}
}

func TestTokens(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "POST", path: "tokens", body: `{"meta":{"name":"ci"},"spec":{"role":"operator"}}`})
	r := want[TokenReply](t, a, 201)
	if r.Object.Spec.Hash != "" || r.Object.Spec.Role != api.RoleOperator || strings.Contains(string(a.body), "hash") {
		t.Fatalf("%s", a.body)
	}
	want[any](t, f.do(call{method: "GET", path: "vms", token: r.Token, node: "m2"}), 200)
	wantProblem(t, f.do(call{method: "GET", path: "tokens", token: r.Token}), 403, api.CodeForbidden, "")
	for _, path := range []string{"tokens", "tokens/ci"} {
		if a := f.do(call{method: "GET", path: path}); a.status != 200 || strings.Contains(string(a.body), `"hash"`) {
			t.Errorf("%s shows a hash: %s", path, a.body)
		}
	}
	wantProblem(t, f.do(call{method: "POST", path: "tokens", body: `{"meta":{"name":"ci"}}`}), 409, api.CodeExists, "")
	for body, field := range map[string]string{
		`{"meta":{"name":"x"},"spec":{"use":"join"}}`:                            "spec.use",
		`{"meta":{"name":"x"},"spec":{"role":"king"}}`:                           "spec.role",
		`{"meta":{"name":"x"},"spec":{"expiresAt":"2001-01-01T00:00:00Z"}}`:      "spec.expiresAt",
		`{"meta":{"name":"x"},"spec":{"expiresAt":"tomorrow"}}`:                  "spec.expiresAt",
		`{"meta":{"name":"x","project":"dev"},"spec":{}}`:                        "meta.project",
		`{"meta":{"name":"x"},"spec":{"joinRole":"voter"}}`:                      "spec.joinRole",
		`{"meta":{"name":"x","labels":{"../":"x"}},"spec":{"role":"viewer"}}`:    "meta.labels",
		`{"meta":{"name":"x","labels":{"a":["b"]}},"spec":{"role":"viewer"}}`:    "meta.labels.a",
		`{"meta":{"name":"x"},"spec":{"role":"viewer","hash":"0","secret":"s"}}`: "spec.secret",
	} {
		wantProblem(t, f.do(call{method: "POST", path: "tokens", body: body}), 422, api.CodeInvalid, field)
	}
	// What a node knows of a token from an earlier call does not outlive a change.
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Tokens.Find(v, "", "ci")
		if err != nil {
			return err
		}
		o.Spec.Role = api.RoleAdministrator
		return configdb.Tokens.UpdateSpec(v, tx, &o)
	})
	want[any](t, f.do(call{method: "GET", path: "tokens", token: r.Token}), 200)
	want[any](t, f.do(call{method: "DELETE", path: "tokens/ci"}), 204)
	wantProblem(t, f.do(call{method: "GET", path: "vms", token: r.Token}), 401, api.CodeUnauthorized, "")
}
