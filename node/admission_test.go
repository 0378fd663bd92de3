// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/pki"
)

const (
	secret = "s3cret"
	keyOne = "hash-of-key-one"
)

func joinToken(t *testing.T, db configdb.DB, change func(*api.Token)) api.Token {
	t.Helper()
	k := api.Token{Meta: api.NewMeta(api.KindToken, "", "join-"+api.NewID()), Spec: api.TokenSpec{
		Use: api.TokenJoin, JoinRole: api.RoleWitness, Hash: pki.HashSecret(secret), ExpiresAt: time.Now().Add(time.Hour),
	}}
	change(&k)
	tx := &configdb.Txn{}
	if err := configdb.Tokens.Create(tx, &k); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
	return k
}

// admit runs the transaction of Admit.
func admit(db configdb.DB, r api.AdmitRequest, keyHash string) (n api.Node, err error) {
	m := &member{info: &membership{Cluster: "test"}}
	_, err = configdb.Transact(context.Background(), db, "test", 1, func(v *configdb.View, tx *configdb.Txn) (err error) {
		n, err = m.admission(v, tx, r, keyHash)
		return err
	})
	return n, err
}

func request(k api.Token, node, address string) api.AdmitRequest {
	return api.AdmitRequest{TokenID: k.Meta.ID, Secret: secret, Node: node, Address: address, Version: "test"}
}

func TestAdmissionChecksTheToken(t *testing.T) {
	db := storetest.New(t)
	good := joinToken(t, db, func(*api.Token) {})
	expired := joinToken(t, db, func(k *api.Token) { k.Spec.ExpiresAt = time.Now().Add(-time.Second) })
	login := joinToken(t, db, func(k *api.Token) { k.Spec.Use, k.Spec.JoinRole, k.Spec.Role = api.TokenAPI, "", api.RoleAdministrator })
	wrong := request(good, "m1", "10.0.0.1:7600")
	wrong.Secret = "guess"
	unknown := request(good, "m1", "10.0.0.1:7600")
	unknown.TokenID = api.NewID()
	for name, c := range map[string]struct {
		r     api.AdmitRequest
		words string
	}{
		"unknown":      {unknown, "not known"},
		"wrong secret": {wrong, "not known"},
		"expired":      {request(expired, "m1", "10.0.0.1:7600"), "expired at"},
		"for the API":  {request(login, "m1", "10.0.0.1:7600"), "not known"},
	} {
		_, err := admit(db, c.r, keyOne)
		if api.CodeOf(err) != api.CodeUnauthorized || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "muster cluster token create") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if nodes, _ := configdb.Nodes.List(db.Local()); len(nodes) != 0 {
		t.Errorf("refused admissions left %d nodes", len(nodes))
	}
}

func TestAdmissionWorksOnceAndMayBeFinished(t *testing.T) {
	db := storetest.New(t)
	k := joinToken(t, db, func(*api.Token) {})
	n, err := admit(db, request(k, "m1", "10.0.0.1:7600"), keyOne)
	if err != nil || n.Spec.Role != api.RoleWitness || n.Status.Phase != api.NodeJoining {
		t.Fatalf("admission: %+v, %v", n, err)
	}
	again, err := admit(db, request(k, "m1", "10.0.0.1:7600"), keyOne)
	if err != nil || again.Meta.ID != n.Meta.ID {
		t.Errorf("the same node could not finish an interrupted join: %v", err)
	}
	if _, err := admit(db, request(k, "m2", "10.0.0.2:7600"), "another key"); err == nil || !strings.Contains(err.Error(), "used already") {
		t.Errorf("a used token in other hands: %v", err)
	}
}

func TestAdmissionRefusesATakenNameOrAddress(t *testing.T) {
	db := storetest.New(t)
	if _, err := admit(db, request(joinToken(t, db, func(*api.Token) {}), "m1", "10.0.0.1:7600"), keyOne); err != nil {
		t.Fatal(err)
	}
	k := joinToken(t, db, func(*api.Token) {})
	for _, r := range []api.AdmitRequest{request(k, "m1", "10.0.0.2:7600"), request(k, "m2", "10.0.0.1:7600")} {
		if _, err := admit(db, r, "key two"); api.CodeOf(err) != api.CodeExists {
			t.Errorf("%s at %s: %v", r.Node, r.Address, err)
		}
	}
	if _, err := admit(db, request(k, "m2", "10.0.0.2:7600"), "key two"); err != nil {
		t.Errorf("the token was burnt by a refusal: %v", err)
	}
}

func TestMembershipIsSavedWhole(t *testing.T) {
	dir := t.TempDir()
	if m, err := loadMembership(dir); m != nil || err != nil {
		t.Fatalf("an empty directory: %v, %v", m, err)
	}
	m := &membership{ClusterID: "c", NodeID: "n", key: []byte("k"), cert: []byte("c"), ca: []byte("a"), clusterKey: []byte("s")}
	if err := m.save(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{keyFile, clusterKeyFile, identityFile} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
	if err := os.Remove(filepath.Join(dir, certFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := loadMembership(dir); err == nil {
		t.Error("a membership without its certificate was loaded")
	}
	if err := forget(dir); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 0 {
		t.Errorf("left after forget: %v", left)
	}
}

func TestConfigurationIsCompletedAndChecked(t *testing.T) {
	for name, c := range map[string]struct {
		cfg   Config
		words string
	}{
		"no port":               {Config{Listen: "10.0.0.1"}, "listen"},
		"port out of range":     {Config{Listen: "10.0.0.1:70000"}, "65535"},
		"unreachable address":   {Config{Listen: "127.0.0.1:7600", Advertise: "0.0.0.0:7600"}, "advertise"},
		"bad name":              {Config{Listen: "127.0.0.1:7600", NodeName: "Bad_Name"}, "--node-name"},
		"bad level":             {Config{Listen: "127.0.0.1:7600", NodeName: "n", LogLevel: "loud"}, "logLevel"},
		"relative run dir":      {Config{Listen: "127.0.0.1:7600", NodeName: "n", RunDir: "run"}, "runDir"},
		"an agent for nobody":   {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPListen: ":161"}, "snmpCommunity"},
		"an agent without port": {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPListen: "here", SNMPCommunity: "c"}, "snmpListen"},
		"a short pass phrase":   {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPListen: ":161", SNMPUser: "u", SNMPSecret: "short"}, "snmpSecret"},
		"a secret twice":        {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPListen: ":161", SNMPUser: "u", SNMPSecret: "long enough", SNMPSecretFile: "/etc/x"}, "snmpSecretFile"},
		"no such secret file":   {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPListen: ":161", SNMPUser: "u", SNMPSecretFile: "/nonexistent"}, "snmpSecretFile"},
		"an agent nowhere":      {Config{Listen: "127.0.0.1:7600", NodeName: "n", SNMPCommunity: "c"}, "snmpListen"},
		"no socket of OVS":      {Config{Listen: "127.0.0.1:7600", NodeName: "n", OVSDB: "tcp:127.0.0.1:6640"}, "ovsdb"},
	} {
		if err := c.cfg.Complete(); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want something about %q", name, err, c.words)
		}
	}
	ok := Config{Listen: "10.0.0.1:7600", NodeName: "n", DataDir: "/srv/m"}
	if err := ok.Complete(); err != nil || ok.Advertise != "10.0.0.1:7600" || len(ok.RunDir) > 30 || ok.RunDir == DefaultRunDir {
		t.Errorf("completed: %+v, %v", ok, err)
	}
}

func TestSecretsOfTheConfigurationComeFromFilesAndAreNotShown(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"community": "not public\n", "phrase": "a long pass phrase\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "musterd.yaml")
	text := "listen: 10.0.0.1:7600\nnodeName: n\nsnmpListen: :161\nsnmpUser: ann\nsnmpCommunityFile: " + dir + "/community\nsnmpSecretFile: " + dir + "/phrase\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var cfg Config
	if err := cfg.LoadFile(file); err != nil {
		t.Fatal(err)
	}
	if err := cfg.Complete(); err != nil {
		t.Fatal(err)
	}
	if cfg.SNMPCommunity != "not public" || cfg.SNMPSecret != "a long pass phrase" {
		t.Errorf("read %q and %q", cfg.SNMPCommunity, cfg.SNMPSecret)
	}
	shown, err := cfg.Show()
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"not public", "pass phrase"} {
		if strings.Contains(shown, secret) {
			t.Errorf("the configuration that is shown has %q:\n%s", secret, shown)
		}
	}
	if !strings.Contains(shown, "snmpUser: ann\n") || !strings.Contains(shown, "snmpSecretFile: "+dir+"/phrase\n") {
		t.Errorf("shown:\n%s", shown)
	}
	// What is shown can be used, where the secrets are in files.
	if err := os.WriteFile(file, []byte(shown), 0o600); err != nil {
		t.Fatal(err)
	}
	var again Config
	if err := again.LoadFile(file); err != nil {
		t.Fatal(err)
	}
	if err := again.Complete(); err != nil || again.SNMPSecret != cfg.SNMPSecret || again.SNMPCommunity != cfg.SNMPCommunity {
		t.Errorf("read again: %v", err)
	}
}
