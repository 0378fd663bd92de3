// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func publicKey(t *testing.T, key any) string {
	t.Helper()
	pub, err := ssh.NewPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
}

func newPublicKey(t *testing.T) string {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return publicKey(t, pub)
}

func userBody(name string, keys ...string) map[string]any {
	return map[string]any{"meta": map[string]any{"name": name}, "spec": map[string]any{"role": "operator", "sshKeys": keys}}
}

// keyClaims returns whose keys are claimed.
func (f *fixture) keyClaims() map[string]int {
	out := map[string]int{}
	for e := range f.db.Local().Scan(sshKeyPrefix, "") {
		u, err := configdb.Users.Get(f.db.Local(), string(e.Value))
		if err != nil {
			f.t.Errorf("claim %s of nobody: %v", e.Key, err)
		}
		out[u.Meta.Name]++
	}
	return out
}

func TestUserLife(t *testing.T) {
	f := newFixture(t)
	one, two := newPublicKey(t), newPublicKey(t)
	u := want[api.User](t, f.do(call{method: "POST", path: "users", body: userBody("ann", "  "+one+"  ann@home")}), 201)
	if u.Spec.SSHKeys[0] != one+" ann@home" || u.Spec.Role != api.RoleOperator || u.Meta.ID == "" {
		t.Fatalf("%+v", u)
	}
	patch := func(name, body string) answer {
		return f.do(call{method: "PATCH", path: "users/" + name, body: body, header: map[string]string{"Content-Type": "application/merge-patch+json"}})
	}
	want[api.User](t, patch("ann", fmt.Sprintf(`{"spec":{"sshKeys":[%q,%q]}}`, two, one)), 200)
	if c := f.keyClaims(); c["ann"] != 2 {
		t.Errorf("claims %v", c)
	}
	p := wantProblem(t, f.do(call{method: "POST", path: "users", body: userBody("bob", newPublicKey(t), two+" other comment")}), 409, api.CodeRefused, "spec.sshKeys[1]")
	if !strings.Contains(p.Detail, "user ann") {
		t.Error(p.Detail)
	}
	want[api.User](t, patch("ann", fmt.Sprintf(`{"spec":{"sshKeys":[%q],"disabled":true}}`, one)), 200)
	want[api.User](t, f.do(call{method: "POST", path: "users", body: userBody("bob", two)}), 201) // ann has let it go
	wantProblem(t, patch("bob", fmt.Sprintf(`{"spec":{"sshKeys":[%q]}}`, one)), 409, api.CodeRefused, "spec.sshKeys[0]")
	if a := f.do(call{method: "DELETE", path: "users/ann"}); a.status != 204 {
		t.Fatalf("%d: %s", a.status, a.body)
	}
	want[api.User](t, patch("bob", fmt.Sprintf(`{"spec":{"sshKeys":[%q]}}`, one)), 200)
	if c := f.keyClaims(); len(c) != 1 || c["bob"] != 1 {
		t.Errorf("claims %v", c)
	}
	wantProblem(t, f.do(call{method: "POST", path: "users", body: userBody("bob")}), 409, api.CodeExists, "")
}

func TestUserKeysAreChecked(t *testing.T) {
	f := newFixture(t)
	good := newPublicKey(t)
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		keys  []string
		field string
		words string
	}{
		"no key":        {[]string{good, "hello"}, "spec.sshKeys[1]", "public key"},
		"options":       {[]string{`from="10.0.0.1" ` + good}, "spec.sshKeys[0]", "options"},
		"short RSA":     {[]string{good, newPublicKey(t), publicKey(t, &short.PublicKey)}, "spec.sshKeys[2]", "1024 bits"},
		"the same key":  {[]string{good, good + " again"}, "spec.sshKeys[1]", "same key as spec.sshKeys[0]"},
		"a private key": {[]string{"-----BEGIN OPENSSH PRIVATE KEY-----"}, "spec.sshKeys[0]", "private"},
		"two lines":     {[]string{good + "\n" + good}, "spec.sshKeys", "one line"},
		"too many":      {make([]string, api.MaxSSHKeys+1), "spec.sshKeys", ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := f.do(call{method: "POST", path: "users", body: userBody("ann", c.keys...)})
			if p := wantProblem(t, a, 422, api.CodeInvalid, c.field); !strings.Contains(p.Detail, c.words) {
				t.Error(p.Detail)
			}
		})
	}
	if c := f.keyClaims(); len(c) != 0 {
		t.Errorf("claims are left: %v", c)
	}
}

func TestUsersAreForAdministrators(t *testing.T) {
	f := newFixture(t)
	want[api.User](t, f.do(call{method: "POST", path: "users", body: userBody("ann", newPublicKey(t))}), 201)
	for _, role := range []api.Role{api.RoleViewer, api.RoleOperator} {
		for _, c := range []call{
			{method: "GET", path: "users"}, {method: "GET", path: "users/ann"}, {method: "POST", path: "users", body: userBody("eve")},
			{method: "PATCH", path: "users/ann", body: `{"spec":{"role":"administrator"}}`}, {method: "DELETE", path: "users/ann"},
			{method: "GET", path: "watch?kinds=user", header: map[string]string{"Accept": "text/event-stream"}},
		} {
			c.role = role
			if a := f.do(c); a.status != 403 {
				t.Errorf("%s: %s %s: %d", role, c.method, c.path, a.status)
			}
		}
	}
}
