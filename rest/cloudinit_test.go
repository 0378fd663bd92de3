// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"net/http"
	"strings"
	"testing"

	"github.com/GehirnInc/crypt/sha512_crypt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func withCloudInit(name string, c map[string]any) map[string]any {
	body := vmBody(name)
	body["spec"].(map[string]any)["cloudInit"] = c
	return body
}

// TestPasswordOfCloudInitIsHashedAndNeverShown: only the hash is stored, readers
// see neither, and what they write back keeps it.
func TestPasswordOfCloudInitIsHashedAndNeverShown(t *testing.T) {
	f := newFixture(t)
	key := newPublicKey(t)
	a := f.do(call{method: "POST", path: "vms", header: map[string]string{headerIdemKey: "k1"}, body: withCloudInit("web1", map[string]any{"user": "ops", "password": "correct horse", "sshKeys": []string{key}})})
	vm := want[vmReply](t, a, http.StatusAccepted).Object
	hash := func() string {
		t.Helper()
		o, err := configdb.VMs.Get(f.db.Local(), vm.Meta.ID)
		if err != nil || o.Spec.CloudInit == nil || o.Spec.CloudInit.Password != "" {
			t.Fatalf("%+v, %v", o.Spec.CloudInit, err)
		}
		return o.Spec.CloudInit.PasswordHash
	}
	first := hash()
	if err := sha512_crypt.New().Verify(first, []byte("correct horse")); err != nil {
		t.Errorf("hash %q: %v", first, err)
	}
	shown := func(a answer) api.VM {
		t.Helper()
		if bytes.Contains(a.body, []byte("horse")) || bytes.Contains(a.body, []byte("$6$")) || bytes.Contains(a.body, []byte("passwordHash")) {
			t.Errorf("shown: %s", a.body)
		}
		return want[api.VM](t, a, 200)
	}
	if bytes.Contains(a.body, []byte("$6$")) || bytes.Contains(a.body, []byte("horse")) {
		t.Errorf("shown: %s", a.body)
	}
	f.report(vm.Meta.ID, api.VMStopped)
	now := shown(f.do(call{method: "GET", path: "vms/web1"}))
	if now.Spec.CloudInit == nil || now.Spec.CloudInit.User != "ops" || now.Spec.CloudInit.SSHKeys[0] != key {
		t.Errorf("%+v", now.Spec.CloudInit)
	}
	shown(f.do(call{method: "PUT", path: "vms/web1", body: map[string]any{"spec": now.Spec}}))
	if hash() != first {
		t.Error("writing back what was read changed the password")
	}
	patch := func(body string) answer {
		return f.do(call{method: "PATCH", path: "vms/web1", body: body, header: map[string]string{"Content-Type": "application/merge-patch+json"}})
	}
	shown(patch(`{"spec":{"cloudInit":{"userData":"#!/bin/sh\n"}}}`))
	if hash() != first {
		t.Error("another field changed the password")
	}
	shown(patch(`{"spec":{"cloudInit":{"password":"battery staple"}}}`))
	if err := sha512_crypt.New().Verify(hash(), []byte("battery staple")); err != nil {
		t.Error(err)
	}
	shown(patch(`{"spec":{"cloudInit":{"user":"other"}}}`))
	if hash() != "" {
		t.Error("one user's password became another's")
	}
	shown(patch(`{"spec":{"cloudInit":null}}`))
	for e := range f.db.Local().Scan(configdb.Root, "") {
		if bytes.Contains(e.Value, []byte("horse")) || bytes.Contains(e.Value, []byte("staple")) {
			t.Errorf("%s has a password in clear", e.Key)
		}
	}
}

func TestCloudInitRefusals(t *testing.T) {
	f := newFixture(t)
	for name, tc := range map[string]struct {
		c     map[string]any
		field string
	}{
		"format":           {map[string]any{"format": "floppy"}, "format"},
		"network":          {map[string]any{"network": "ipx"}, "network"},
		"hostname":         {map[string]any{"hostname": "a_b"}, "hostname"},
		"user":             {map[string]any{"user": "a b"}, "user"},
		"key":              {map[string]any{"sshKeys": []string{"ssh-rsa nonsense"}}, "sshKeys[0]"},
		"key that is none": {map[string]any{"sshKeys": []string{"hello"}}, "sshKeys[0]"},
		"key in two lines": {map[string]any{"sshKeys": []string{newPublicKey(t) + "\nx"}}, "sshKeys[0]"},
		"nobody's":         {map[string]any{"password": "x"}, "password"},
		"no hash":          {map[string]any{"user": "a", "passwordHash": "clear"}, "passwordHash"},
		"hash for Windows": {map[string]any{"user": "a", "password": "x", "format": "configdrive"}, "password"},
		"large":            {map[string]any{"userData": strings.Repeat("x", api.MaxUserData+1)}, "userData"},
		"no text":          {map[string]any{"vendorData": "a\x00b"}, "vendorData"},
		"unknown":          {map[string]any{"keys": 1}, "keys"},
	} {
		t.Run(name, func(t *testing.T) {
			wantProblem(t, f.do(call{method: "POST", path: "vms", body: withCloudInit("web1", tc.c)}), 422, api.CodeInvalid, "spec.cloudInit."+tc.field)
		})
	}
}
