// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/pki"
)

// lone is a founded cluster of one node whose services are not run: the test
// takes each look of the certificate service itself.
func lone(t *testing.T) *member {
	t.Helper()
	d := newDaemon(t)
	if _, err := d.Init(t.Context(), api.InitRequest{Name: "c"}); err != nil {
		t.Fatal(err)
	}
	m := d.current()
	m.certs.look(t.Context())
	return m
}

func (m *member) spec(t *testing.T) api.ClusterSpec {
	t.Helper()
	c, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	return c.Spec
}

func leafOf(t *testing.T, c credentials) string {
	t.Helper()
	leaf, err := c.shown().Check()
	if err != nil {
		t.Fatal(err)
	}
	return pki.Serial(leaf)
}

func record(t *testing.T, m *member) certificateRecord {
	t.Helper()
	r, _, err := certificateOf(m.store.Local(), m.info.NodeID)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRenewalReplacesKeyAndCertificateTogether(t *testing.T) {
	m := lone(t)
	before := m.certs.current()
	if r := record(t, m); r.Serial != leafOf(t, before) || len(r.Keys) != 1 {
		t.Fatalf("the founder's certificate is not on record: %+v", r)
	}
	if _, err := m.RenewCertificate(t.Context(), "test", m.info.Node); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	after := m.certs.current()
	if leafOf(t, after) == leafOf(t, before) || slices.Equal(after.Key, before.Key) {
		t.Error("not renewed, or with the old key")
	}
	m.certs.look(t.Context()) // and no second time
	if leafOf(t, m.certs.current()) != leafOf(t, after) {
		t.Error("renewed twice for one word")
	}
	hash, err := pki.KeyHashOf(after.Key)
	if err != nil {
		t.Fatal(err)
	}
	if r := record(t, m); !slices.Equal(r.Keys, []string{hash}) {
		t.Errorf("the old key may still renew: %+v", r)
	}
	if pki.Serial(m.identity.Leaf()) != leafOf(t, after) {
		t.Error("the new certificate is not shown")
	}
	info, err := loadMembership(m.cfg.DataDir)
	if err != nil || leafOf(t, info.held()) != leafOf(t, after) {
		t.Errorf("a restart has another: %v", err)
	}
	n, err := configdb.Nodes.Get(m.store.Local(), m.info.NodeID)
	if err != nil || n.Status.Certificate == nil || n.Status.Certificate.Serial != leafOf(t, after) {
		t.Errorf("status %+v, %v", n.Status.Certificate, err)
	}
}

// Monitoring looks at the certificate that is shown, not at that of the start.
func TestProbeFollowsTheRenewal(t *testing.T) {
	m := lone(t)
	probe := func() (p struct {
		CertNotAfter time.Time     `json:"certNotAfter"`
		CertLife     time.Duration `json:"certLife"`
	}) {
		b, err := m.meter.ServeProbe(t.Context(), []byte("{}"))
		if err == nil {
			err = json.Unmarshal(b, &p)
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if p := probe(); !p.CertNotAfter.Equal(m.identity.Leaf().NotAfter) || p.CertLife < 89*24*time.Hour {
		t.Errorf("%+v", p)
	}
	if err := m.SetAuthority(t.Context(), "test", api.AuthoritySettings{CertificateSeconds: 7200}); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if p := probe(); time.Until(p.CertNotAfter) > 2*time.Hour || p.CertLife > 2*time.Hour+time.Minute {
		t.Errorf("after the renewal: %+v", p)
	}
}

func TestAuthorityThatComesToItsEnd(t *testing.T) {
	m := lone(t)
	spec := m.spec(t)
	if err := m.certs.ending(&spec); err != nil {
		t.Error(err)
	}
	m.certs.now = func() time.Time { return time.Now().Add(pki.CALife - 300*24*time.Hour) }
	if err := m.certs.ending(&spec); err == nil || !strings.Contains(err.Error(), "muster cluster ca rotate") {
		t.Errorf("%v", err)
	}
}

func TestTimeOfRenewal(t *testing.T) {
	m := lone(t)
	leaf := m.identity.Leaf()
	v, spec := m.store.Local(), m.spec(t)
	for at, want := range map[time.Duration]string{0: "", 50 * 24 * time.Hour: "", 70 * 24 * time.Hour: "its time has come", 91 * 24 * time.Hour: "it has ended"} {
		m.certs.now = func() time.Time { return leaf.NotBefore.Add(time.Hour + at) }
		if got, err := m.certs.due(v, &spec); err != nil || got != want {
			t.Errorf("after %v: %q, %v; want %q", at, got, err, want)
		}
	}
	m.certs.now = time.Now
	spec.CertificateSeconds = 3600
	if got, _ := m.certs.due(v, &spec); got != "certificates live shorter now" {
		t.Errorf("a shorter life: %q", got)
	}
	spec.CertificateSeconds = 200 * 24 * 3600
	if got, _ := m.certs.due(v, &spec); got != "" {
		t.Errorf("a longer life: %q", got)
	}
}

// A crash at any write leaves the old set or the new one.
func TestCrashWhileCredentialsAreWritten(t *testing.T) {
	m := lone(t)
	old := m.certs.current()
	if _, err := m.RenewCertificate(t.Context(), "test", m.info.Node); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	fresh := m.certs.current()
	id, err := os.ReadFile(filepath.Join(m.cfg.DataDir, identityFile))
	if err != nil {
		t.Fatal(err)
	}
	recordText, err := json.Marshal(fresh)
	if err != nil {
		t.Fatal(err)
	}
	// The writes of save, in order.
	type write struct {
		name string
		data []byte
	}
	steps := []write{{redoFile + ".new", recordText[:len(recordText)/2]}, {redoFile + ".new", recordText}, {redoFile, recordText}}
	for _, f := range fresh.files() {
		steps = append(steps, write{f.name + ".new", f.data[:len(f.data)/2]}, write{f.name, f.data})
	}
	for crash := range len(steps) + 1 {
		dir := t.TempDir()
		all := append([]write{{identityFile, id}, {clusterKeyFile, m.info.clusterKey}}, steps[:crash]...)
		for _, f := range old.files() {
			all = slices.Insert(all, 0, write{f.name, f.data})
		}
		for _, w := range all {
			if err := os.WriteFile(filepath.Join(dir, w.name), w.data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		info, err := loadMembership(dir)
		if err != nil {
			t.Fatalf("crash at step %d: %v", crash, err)
		}
		want := old
		if crash >= 3 {
			want = fresh
		}
		if got := info.held(); leafOf(t, got) != leafOf(t, want) {
			t.Errorf("crash at step %d: the wrong set", crash)
		}
		if _, err := info.identity(time.Now()); err != nil {
			t.Errorf("crash at step %d: %v", crash, err)
		}
		if _, err := os.Stat(filepath.Join(dir, redoFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("crash at step %d: the record stays", crash)
		}
	}
}

func TestFullDiskKeepsTheOldCertificate(t *testing.T) {
	m := lone(t)
	before := m.certs.current()
	// A directory in the place of the record: the write fails, for root too.
	if err := os.Mkdir(filepath.Join(m.cfg.DataDir, redoFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.cfg.DataDir, redoFile, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.RenewCertificate(t.Context(), "test", m.info.Node); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if leafOf(t, m.certs.current()) != leafOf(t, before) || pki.Serial(m.identity.Leaf()) != leafOf(t, before) {
		t.Error("a certificate is in use that a restart would not have")
	}
	n, err := configdb.Nodes.Get(m.store.Local(), m.info.NodeID)
	if err != nil || !strings.Contains(n.Status.Certificate.Message, redoFile) {
		t.Errorf("nobody is told: %+v, %v", n.Status.Certificate, err)
	}
	if err := os.RemoveAll(filepath.Join(m.cfg.DataDir, redoFile)); err != nil {
		t.Fatal(err)
	}
	m.certs.retryAt = time.Time{}
	m.certs.look(t.Context())
	if leafOf(t, m.certs.current()) == leafOf(t, before) {
		t.Error("not renewed when there is room again")
	}
	m.certs.look(t.Context())
	if n, _ := configdb.Nodes.Get(m.store.Local(), m.info.NodeID); n.Status.Certificate.Message != "" {
		t.Errorf("still says %q", n.Status.Certificate.Message)
	}
}

// certify asks as a node with a key would.
func certify(t *testing.T, m *member, caller, nodeID string, present []byte) (certifyResult, error) {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.NewCSR(key, "whatever")
	if err != nil {
		t.Fatal(err)
	}
	renewal, err := pki.NewRenewal(present, m.info.ClusterID, nodeID, csr)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(renewal)
	if err != nil {
		t.Fatal(err)
	}
	var r certifyResult
	out, err := m.serveCertify(t.Context(), caller, b)
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	return r, err
}

func TestWhoMayRenew(t *testing.T) {
	m := lone(t)
	me, held := m.info.NodeID, m.certs.current()
	stranger, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	r, err := certify(t, m, me, me, held.Key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := pki.ParseCert([]byte(r.Cert))
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := pki.NodeIDOf(leaf); id != me || leaf.Subject.CommonName != m.info.Node {
		t.Errorf("the request decided what is in it: %v", leaf.DNSNames)
	}
	if _, err := certify(t, m, me, me, held.Key); err != nil {
		t.Errorf("the answer was lost, and the same key may not ask again: %v", err)
	}
	for name, c := range map[string]struct {
		caller, node string
		key          []byte
		says         string
	}{
		"another node's":      {api.NewID(), me, held.Key, "asked for a certificate of node"},
		"with a strange key":  {me, me, stranger, "superseded"},
		"of a node not known": {"x", "x", held.Key, "not"},
	} {
		if _, err := certify(t, m, c.caller, c.node, c.key); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m.certs.look(t.Context()) // somebody renewed with its key: it renews at once
	m.certs.look(t.Context())
	now := m.certs.current()
	if slices.Equal(now.Key, held.Key) {
		t.Fatal("it did not notice that its key was used")
	}
	if _, err := certify(t, m, me, me, held.Key); err == nil || !strings.Contains(err.Error(), "superseded") || api.CodeOf(err) != api.CodeRefused {
		t.Errorf("an older key renews: %v", err)
	}
	tx := &configdb.Txn{}
	tx.Put(removedPrefix+me, []byte(m.info.Node))
	if _, err := m.store.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	if _, err := certify(t, m, me, me, now.Key); err == nil || !strings.Contains(err.Error(), "removed") {
		t.Errorf("a removed node renews: %v", err)
	}
	for name, text := range map[string]string{"no JSON": "{", "no request": `{"nodeID":"` + me + `"}`, "another's proof": `{"nodeID":"` + me + `","csr":"x"}`} {
		if _, err := m.serveCertify(t.Context(), me, []byte(text)); err == nil {
			t.Errorf("%s: answered", name)
		}
	}
}

// The node is removed between the look at the database and the write.
func TestRenewalOfANodeThatIsRemovedMeanwhile(t *testing.T) {
	m := lone(t)
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m2"), Spec: api.NodeSpec{Address: "10.0.0.2:7600"}}
	tx := &configdb.Txn{}
	if err := configdb.Nodes.Create(tx, &n); err != nil {
		t.Fatal(err)
	}
	if _, err := m.store.Txn(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	leaf := m.identity.Leaf()
	v := m.store.Local() // before the removal
	n, err := configdb.Nodes.Get(v, n.Meta.ID)
	if err != nil {
		t.Fatal(err)
	}
	tx = &configdb.Txn{}
	tx.RequireExists(configdb.Nodes.SpecKey(n.Meta.ID))
	if _, err := m.issue(v, tx, &n, leaf.PublicKey, ""); err != nil {
		t.Fatal(err)
	}
	gone := &configdb.Txn{}
	configdb.Nodes.Delete(gone, &n)
	gone.Put(removedPrefix+n.Meta.ID, []byte("m2"))
	gone.Delete(certificateKey(n.Meta.ID))
	if _, err := m.store.Txn(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	if _, err := m.store.Txn(t.Context(), tx); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("a certificate was made good for a removed node: %v", err)
	}
}

// A signer whose replica has not seen that the authority was replaced must not
// issue under the old one.
func TestIssueUnderAReplacedAuthority(t *testing.T) {
	m := lone(t)
	v := m.store.Local()
	n, err := configdb.Nodes.Get(v, m.info.NodeID)
	if err != nil {
		t.Fatal(err)
	}
	tx := &configdb.Txn{}
	if _, err := m.issue(v, tx, &n, m.identity.Leaf().PublicKey, ""); err != nil {
		t.Fatal(err)
	}
	if err := m.RotateAuthority(t.Context(), "test", api.RotateRequest{Action: api.RotateStart}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.store.Txn(t.Context(), tx); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("issued: %v", err)
	}
}

func TestWrongClocks(t *testing.T) {
	m := lone(t)
	leaf, held := m.identity.Leaf(), m.certs.current()
	shown := func() string { return pki.Serial(m.identity.Leaf()) }
	disk := func() string { return leafOf(t, m.certs.current()) }

	t.Run("set back to 1970", func(t *testing.T) {
		m.certs.now = func() time.Time { return time.Unix(0, 0) }
		m.certs.look(t.Context())
		if shown() != pki.Serial(leaf) || disk() != pki.Serial(leaf) {
			t.Error("it gave up its certificate")
		}
		if !strings.Contains(m.certs.message, "clock of this host says 1970-01-01") {
			t.Errorf("it says %q", m.certs.message)
		}
	})
	t.Run("years ahead", func(t *testing.T) {
		m.certs.now = func() time.Time { return leaf.NotAfter.AddDate(1, 0, 0) }
		m.certs.look(t.Context())
		if shown() == pki.Serial(leaf) {
			t.Error("no interim certificate")
		}
		if interim := m.identity.Leaf(); !interim.NotBefore.Equal(leaf.NotBefore) {
			t.Errorf("it begins %v: who has the right clock does not take it", interim.NotBefore)
		}
		if disk() != pki.Serial(leaf) {
			t.Error("it wrote the interim certificate")
		}
		if !strings.Contains(m.certs.message, "set the clock that is wrong") {
			t.Errorf("a certificate from the future is in use, or nothing is said: %q", m.certs.message)
		}
	})
	t.Run("right again", func(t *testing.T) {
		m.certs.now, m.certs.retryAt = time.Now, time.Time{}
		m.certs.look(t.Context())
		m.certs.look(t.Context())
		if shown() != disk() || m.certs.message != "" {
			t.Errorf("shows %s, has %s, says %q", shown(), disk(), m.certs.message)
		}
	})
	t.Run("an answer that is not valid here", func(t *testing.T) {
		r, err := certify(t, m, m.info.NodeID, m.info.NodeID, m.certs.current().Key)
		if err != nil {
			t.Fatal(err)
		}
		m.certs.now = func() time.Time { return time.Now().Add(-2 * time.Hour) }
		spec := m.spec(t)
		if err := m.certs.acceptable(held.Key, &spec, r); err == nil {
			t.Error("a certificate for another key is taken")
		}
	})
}

func TestInterimCertificates(t *testing.T) {
	m := lone(t)
	leaf, held := m.identity.Leaf(), m.certs.current()
	late := leaf.NotAfter.Add(time.Hour)
	got, err := m.info.interim(&held, late)
	if err != nil {
		t.Fatal(err)
	}
	interim, err := got.Check()
	if err != nil {
		t.Fatal(err)
	}
	if !interim.NotAfter.Equal(late.Add(interimLife).UTC().Truncate(time.Second)) {
		t.Errorf("ends %v", interim.NotAfter)
	}
	if id, _ := pki.NodeIDOf(interim); id != m.info.NodeID || !slices.Equal(got.Key, held.Key) {
		t.Error("another node or another key")
	}
	other := lone(t)
	theirs := other.certs.current()
	for name, c := range map[string]credentials{
		"another cluster's authority":     {Key: held.Key, Cert: held.Cert, CA: held.CA, Authority: theirs.Authority},
		"another node's certificate":      {Key: theirs.Key, Cert: theirs.Cert, CA: theirs.CA, Authority: held.Authority},
		"a key that is not its":           {Key: theirs.Key, Cert: held.Cert, CA: held.CA, Authority: held.Authority},
		"no copy of the authority":        {Key: held.Key, Cert: held.Cert, CA: held.CA},
		"a damaged copy":                  {Key: held.Key, Cert: held.Cert, CA: held.CA, Authority: []byte("{")},
		"an authority that it trusts not": {Key: held.Key, Cert: held.Cert, CA: theirs.CA, Authority: held.Authority},
	} {
		if _, err := m.info.interim(&c, late); err == nil {
			t.Errorf("%s: issued", name)
		}
	}
	if _, err := m.info.interim(&held, leaf.NotBefore.Add(-time.Hour)); err == nil || !strings.Contains(err.Error(), "set the clock") {
		t.Errorf("a clock before the certificate: %v", err)
	}
	// What a start does with the same.
	info := *m.info
	info.authority = held.Authority // as a start reads it
	id, err := info.identity(late)
	if err != nil || pki.Serial(id.Leaf()) == pki.Serial(leaf) {
		t.Errorf("a start after the end shows the ended certificate: %v", err)
	}
	info.authority = nil
	if id, err := info.identity(late); err != nil || pki.Serial(id.Leaf()) != pki.Serial(leaf) {
		t.Errorf("without a copy: %v", err)
	}
	info.ca = theirs.CA
	if _, err := info.identity(late); err == nil || !strings.Contains(err.Error(), "one backup") {
		t.Errorf("an authority of another cluster: %v", err)
	}
}

// A replica that is still catching up after a restart must not bring back what
// was replaced.
func TestOldReplicaBringsNothingBack(t *testing.T) {
	m := lone(t)
	old, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.RotateAuthority(t.Context(), "test", api.RotateRequest{Action: api.RotateStart}); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	held := m.certs.current()
	a, err := held.authority()
	if err != nil {
		t.Fatal(err)
	}
	if !a.older(&old) {
		t.Error("the old cluster object passes for newer than what the node has")
	}
	now, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil || a.older(&now) {
		t.Errorf("the present one passes for older: %v", err)
	}
	// The same through a look: the node has seen a later state than its replica.
	a.Revision += 1000
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	held.Authority, held.CA = b, pki.JoinPEM([]byte(old.Spec.CACert)) // a rotation that was aborted, say
	if err := m.certs.store(held); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if got := m.certs.current(); !slices.Equal(got.CA, held.CA) {
		t.Error("an old replica changed what is trusted")
	}
	recovered := old
	recovered.Spec.Life++ // from another life of the cluster: revisions may have gone back
	if a.older(&recovered) {
		t.Error("a recovered cluster is not followed")
	}
}

func TestTightenModes(t *testing.T) {
	m := lone(t)
	dir := m.cfg.DataDir
	for _, name := range []string{keyFile, clusterKeyFile, authorityFile} {
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var log strings.Builder
	if err := tightenModes(dir, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{keyFile, clusterKeyFile, authorityFile, identityFile} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 3 {
		t.Errorf("%d warnings of 3:\n%s", n, &log)
	}
	if st, err := os.Stat(filepath.Join(dir, caFile)); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("ca.crt is for everybody: %v, %v", st.Mode(), err)
	}
}

func joinTokenFor(t *testing.T, m *member) *pki.JoinToken {
	t.Helper()
	jt, err := m.CreateJoinToken(context.Background(), "test", api.JoinTokenRequest{Role: api.RoleVoter})
	if err != nil {
		t.Fatal(err)
	}
	p, err := pki.ParseJoinToken(jt.Token)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A member comes back with a join token only if token and key are right.
func TestReadmission(t *testing.T) {
	m := lone(t)
	me, held := m.info.NodeID, m.certs.current()
	newKey := func() []byte {
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	askFor := func(jt *pki.JoinToken, nodeID string, key, fresh []byte) (api.AdmitResult, error) {
		csr, err := pki.NewCSR(fresh, "x")
		if err != nil {
			t.Fatal(err)
		}
		renewal, err := pki.NewRenewal(key, m.info.ClusterID, me, csr)
		if err != nil {
			t.Fatal(err)
		}
		return m.Admit(t.Context(), api.AdmitRequest{
			TokenID: jt.TokenID, Secret: jt.Secret, CSR: string(csr), Node: "m1", Address: m.info.Address,
			NodeID: nodeID, ProofKey: renewal.Proof.PublicKey, ProofSignature: renewal.Proof.Signature, FeatureLevels: new(feature.Supported()),
		})
	}
	ask := func(jt *pki.JoinToken, nodeID string, key []byte) (api.AdmitResult, error) {
		return askFor(jt, nodeID, key, newKey())
	}
	stranger := newKey()
	wrong := *joinTokenFor(t, m)
	wrong.Secret = "guess"
	for name, c := range map[string]struct {
		token *pki.JoinToken
		node  string
		key   []byte
		says  string
	}{
		"a wrong token":          {&wrong, me, held.Key, "not known"},
		"a strange key":          {joinTokenFor(t, m), me, stranger, "superseded"},
		"proof for another node": {joinTokenFor(t, m), api.NewID(), held.Key, "wrong signature"},
	} {
		if _, err := ask(c.token, c.node, c.key); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := joinTokenFor(t, m)
	fresh := newKey()
	if _, err := askFor(good, me, held.Key, fresh); err != nil {
		t.Fatal(err)
	}
	a, err := askFor(good, me, held.Key, fresh) // the answer was lost
	if err != nil || a.NodeID != me {
		t.Fatalf("%+v, %v", a, err)
	}
	if leaf, err := pki.ParseCert([]byte(a.Cert)); err != nil || record(t, m).Serial != pki.Serial(leaf) {
		t.Errorf("not on record: %v", err)
	}
	if _, err := ask(good, me, held.Key); err == nil || !strings.Contains(err.Error(), "used already") {
		t.Errorf("a used token: %v", err)
	}
	if nodes, _ := configdb.Nodes.List(m.store.Local()); len(nodes) != 1 {
		t.Errorf("%d nodes", len(nodes))
	}
}

func TestJoinTokensOfARotationNameBothAuthorities(t *testing.T) {
	m := lone(t)
	before := joinTokenFor(t, m)
	if before.OtherCAHash != "" {
		t.Error("another authority without a rotation")
	}
	if err := m.RotateAuthority(t.Context(), "test", api.RotateRequest{Action: api.RotateStart}); err != nil {
		t.Fatal(err)
	}
	during := joinTokenFor(t, m)
	if during.CAHash != before.CAHash || during.OtherCAHash == "" {
		t.Errorf("%+v", during)
	}
	if err := m.RotateAuthority(t.Context(), "test", api.RotateRequest{Action: api.RotateAbort}); err != nil {
		t.Fatal(err)
	}
	if after := joinTokenFor(t, m); after.CAHash != before.CAHash || after.OtherCAHash != "" {
		t.Errorf("%+v", after)
	}
}

// A whole rotation of a lone node, each step taken by hand; the steps that must
// not be taken yet are refused.
func TestRotationOfALoneNode(t *testing.T) {
	m := lone(t)
	term := m.store.Term()
	do := func(a api.RotateAction, force bool) error {
		return m.RotateAuthority(t.Context(), "ann", api.RotateRequest{Action: a, Force: force})
	}
	refused := func(a api.RotateAction, words string) {
		t.Helper()
		if err := do(a, false); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", a, err)
		}
	}
	ready := func() { // lone has no registrar
		_, err := configdb.Transact(t.Context(), m.store, "test", 4, func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, m.info.NodeID)
			n.Status.Phase = api.NodeReady
			return errors.Join(err, configdb.Nodes.UpdateStatus(v, tx, &n))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	ready()
	first := m.spec(t).CACert
	refused(api.RotateFinish, "no rotation")
	refused(api.RotateAbort, "no rotation")
	if err := do("dance", false); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("an unknown action: %v", err)
	}

	if err := do(api.RotateStart, false); err != nil {
		t.Fatal(err)
	}
	refused(api.RotateStart, "under way already (phase trust, begun by ann")
	refused(api.RotateFinish, "do not all trust")
	if err := m.rotateOnce(t.Context(), term); err != nil || m.spec(t).Rotation.Phase != api.CATrust {
		t.Fatalf("it went on before the node trusts: %v", err)
	}
	m.certs.look(t.Context())
	if err := m.rotateOnce(t.Context(), term+1); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("a deposed leader's step: %v", err)
	}
	if err := m.rotateOnce(t.Context(), term); err != nil || m.spec(t).Rotation.Phase != api.CARenew {
		t.Fatalf("phase %s, %v", m.spec(t).Rotation.Phase, err)
	}
	second := m.spec(t).CACert
	if second == first || m.spec(t).Rotation.CACert != first {
		t.Error("the new authority does not sign")
	}
	refused(api.RotateFinish, "has not renewed")
	m.certs.look(t.Context())
	if m.identity.Leaf().Issuer.String() != mustParse(t, second).Subject.String() {
		t.Error("not renewed under the new authority")
	}
	if err := do(api.RotateFinish, false); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if held := m.certs.current(); string(held.CA) != string(pki.JoinPEM([]byte(second))) {
		t.Error("the old authority is still trusted")
	}

	// Back, after the renewal.
	if err := do(api.RotateStart, false); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if err := m.rotateOnce(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if err := do(api.RotateAbort, false); err != nil {
		t.Fatal(err)
	}
	refused(api.RotateAbort, "aborted already")
	if err := m.rotateOnce(t.Context(), term); err != nil || m.spec(t).Rotation == nil {
		t.Fatalf("over before the node is back: %v", err)
	}
	m.certs.look(t.Context())
	if err := m.rotateOnce(t.Context(), term); err != nil || m.spec(t).Rotation != nil || m.spec(t).CACert != second {
		t.Fatalf("not back: %+v, %v", m.spec(t).Rotation, err)
	}
	m.certs.look(t.Context())
	if m.identity.Leaf().Issuer.String() != mustParse(t, second).Subject.String() || len(trusts(m.certs.current().CA)) != 1 {
		t.Error("the node is not back")
	}

	// Finished by force before the node has renewed: it follows by itself.
	if err := do(api.RotateStart, false); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	if err := m.rotateOnce(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	if err := do(api.RotateFinish, true); err != nil {
		t.Fatal(err)
	}
	m.certs.look(t.Context())
	m.certs.look(t.Context())
	if third := m.spec(t).CACert; third == second || pki.Serial(m.identity.Leaf()) != leafOf(t, m.certs.current()) || m.certs.message != "" {
		t.Errorf("the node did not follow: %q", m.certs.message)
	}
}

func mustParse(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	c, err := pki.ParseCert([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}
