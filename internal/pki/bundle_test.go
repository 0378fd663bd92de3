// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func parsed(t *testing.T, certPEM []byte) *x509.Certificate {
	t.Helper()
	c, err := ParseCert(certPEM)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// rotation is an old and a new authority, the bridge, and a leaf of each.
type rotation struct {
	old, fresh, bridge, oldLeaf, freshLeaf []byte
}

func newRotation(t *testing.T) rotation {
	t.Helper()
	a, b := newAuthority(t), newAuthority(t)
	bridge, err := Bridge(a.cert, a.key, b.cert)
	if err != nil {
		t.Fatal(err)
	}
	csr, _ := newCSR(t)
	r := rotation{old: a.cert, fresh: b.cert, bridge: bridge}
	for _, x := range []struct {
		ca   authority
		into *[]byte
	}{{a, &r.oldLeaf}, {b, &r.freshLeaf}} {
		if *x.into, err = SignNode(x.ca.cert, x.ca.key, csr, "id", "n1", "10.0.0.1"); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// What each kind of trust makes of each kind of chain during a rotation.
func TestBridge(t *testing.T) {
	r := newRotation(t)
	stranger := newAuthority(t)
	for _, c := range []struct {
		name              string
		leaf, trust, with []byte
		good              bool
	}{
		{"old file, old certificate", r.oldLeaf, r.old, nil, true},
		{"old file, new certificate, bridge shown", r.freshLeaf, r.old, r.bridge, true},
		{"old file, new certificate, no bridge", r.freshLeaf, r.old, r.fresh, false},
		{"new file, new certificate", r.freshLeaf, r.fresh, r.bridge, true},
		{"new file, old certificate", r.oldLeaf, r.fresh, r.bridge, false},
		{"stranger's file", r.freshLeaf, stranger.cert, r.bridge, false},
	} {
		with := PoolOf()
		if c.with != nil {
			with.AddCert(parsed(t, c.with))
		}
		_, err := parsed(t, c.leaf).Verify(x509.VerifyOptions{Roots: PoolOf(parsed(t, c.trust)), Intermediates: with, DNSName: NodeDNSName("id")})
		if (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	b := parsed(t, r.bridge)
	if b.MaxPathLen != 0 || !b.MaxPathLenZero {
		t.Error("the bridge may make authorities of its own")
	}
	if b.NotAfter.After(parsed(t, r.old).NotAfter) {
		t.Error("the bridge outlives the authority that signed it")
	}
}

// Other implementations of TLS verify the same chains, in the order in which a
// node shows them.
func TestBridgeWithOpenSSL(t *testing.T) {
	r := newRotation(t)
	dir := t.TempDir()
	file := func(name string, texts ...[]byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, JoinPEM(texts...), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	leaf, shown := file("leaf", r.freshLeaf), file("shown", r.bridge, r.fresh, r.old)
	for name, ca := range map[string]string{"old": file("old", r.old), "new": file("new", r.fresh), "both": file("both", r.fresh, r.old)} {
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", ca, "-untrusted", shown, leaf).CombinedOutput()
		if err != nil {
			t.Errorf("openssl with the %s ca.crt (package openssl is needed): %v\n%s", name, err, out)
		}
	}
}

func TestNoBridgeFromAnAuthorityThatSignsNoSuccessor(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	early := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "early"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, early, early, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	_, err = Bridge(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), newAuthority(t).cert)
	if !errors.Is(err, ErrNoBridge) {
		t.Errorf("a bridge that nobody can use: %v", err)
	}
}

func TestRenewalTime(t *testing.T) {
	ca := newAuthority(t)
	csr, _ := newCSR(t)
	now := time.Now()
	for _, life := range []time.Duration{time.Minute, 20 * time.Minute, time.Hour, 90 * time.Minute, 10 * time.Hour, 24 * time.Hour, 100 * time.Hour, 10 * 24 * time.Hour, NodeCertLife} {
		seen := map[int64]bool{}
		for range 20 {
			b, err := Issue(ca.cert, ca.key, csr.PublicKey, TermsFrom(now, life, "id", "n", ""))
			if err != nil {
				t.Fatal(err)
			}
			c := parsed(t, b)
			if d := Life(c) - life; d.Abs() > 2*time.Second { // certificates count whole seconds
				t.Fatalf("%v: read back as %v", life, Life(c))
			}
			if c.NotBefore.After(now.Add(-skewOf(life) + 2*time.Second)) {
				t.Errorf("%v: a clock that goes after does not take it", life)
			}
			at := RenewAt(c)
			if !at.Equal(RenewAt(parsed(t, b))) {
				t.Error("a restart changes the time")
			}
			if part := float64(at.Sub(now)) / float64(life); part < 0.60 || part > 0.72 {
				t.Errorf("%v: renewed after %.2f of it", life, part)
			}
			seen[at.UnixMilli()] = true
		}
		if len(seen) < 10 {
			t.Errorf("%v: nodes of one age renew together: %d times of 20", life, len(seen))
		}
	}
}

// A host whose clock is read in the wrong time zone is up to 14 hours late.
func TestALateClockTakesNewCertificates(t *testing.T) {
	ca := newAuthority(t)
	csr, _ := newCSR(t)
	b, err := SignNode(ca.cert, ca.key, csr, "id", "n", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, late := range []time.Duration{0, time.Hour, 14 * time.Hour, 23 * time.Hour} {
		o := x509.VerifyOptions{Roots: ca.pool(t), CurrentTime: time.Now().Add(-late)}
		if _, err := parsed(t, b).Verify(o); err != nil {
			t.Errorf("%v late: %v", late, err)
		}
	}
}

func TestCertificatesEndWithTheirAuthority(t *testing.T) {
	ca := newAuthority(t)
	csr, _ := newCSR(t)
	end := parsed(t, ca.cert).NotAfter
	b, err := Issue(ca.cert, ca.key, csr.PublicKey, TermsFrom(end.Add(-time.Hour), NodeCertLife, "id", "n", ""))
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed(t, b).NotAfter; got.After(end) {
		t.Errorf("ends %v, the authority %v", got, end)
	}
	for _, after := range []time.Duration{time.Second, 2 * time.Hour} {
		if _, err := Issue(ca.cert, ca.key, csr.PublicKey, TermsFrom(end.Add(after), NodeCertLife, "id", "n", "")); err == nil || !strings.Contains(err.Error(), "rotate") {
			t.Errorf("an authority that ended signs, or no remedy is named: %v", err)
		}
	}
}

func TestProof(t *testing.T) {
	csr, key := newCSR(t)
	want, err := KeyHash(csr.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewProof(key, "renew", []byte("message"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Check("renew", []byte("message")); err != nil || got != want {
		t.Errorf("%s, %v; want %s", got, err, want)
	}
	_, other := newCSR(t)
	q, err := NewProof(other, "renew", []byte("message"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		p       Proof
		label   string
		message string
	}{
		"another message":     {p, "renew", "massage"},
		"another purpose":     {p, "join", "message"},
		"moved boundary":      {p, "renewm", "essage"},
		"key of another":      {Proof{q.PublicKey, p.Signature}, "renew", "message"},
		"no key":              {Proof{nil, p.Signature}, "renew", "message"},
		"no signature":        {Proof{p.PublicKey, nil}, "renew", "message"},
		"signature of zeroes": {Proof{p.PublicKey, make([]byte, 64)}, "renew", "message"},
	} {
		if _, err := c.p.Check(c.label, []byte(c.message)); err == nil {
			t.Errorf("%s: passes", name)
		}
	}
}

func TestBundles(t *testing.T) {
	a, b := newAuthority(t), newAuthority(t)
	csr, key := newCSR(t)
	leaf, err := SignNode(a.cert, a.key, csr, "id", "n", "")
	if err != nil {
		t.Fatal(err)
	}
	both := JoinPEM(a.cert, b.cert, a.cert, nil)
	list, err := ParseBundle(both)
	if err != nil || len(list) != 2 || CAHash(list[0]) != CAHash(parsed(t, a.cert)) {
		t.Errorf("%d authorities, %v", len(list), err)
	}
	if ca, ok := SignerOf(parsed(t, leaf), list); !ok || CAHash(ca) != CAHash(list[0]) {
		t.Error("the signer is not found")
	}
	if _, ok := SignerOf(parsed(t, leaf), list[1:]); ok {
		t.Error("another authority passes for the signer")
	}
	for name, text := range map[string][]byte{
		"empty": nil, "no PEM": []byte("hello"), "a key": key, "a node's certificate": leaf, "an authority and a node's": JoinPEM(a.cert, leaf),
		"an authority and junk": append(JoinPEM(a.cert), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"...),
	} {
		if _, err := ParseBundle(text); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	cert, _, err := NewCA("c", "id")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := ParseBundle(text)
		if (err == nil) != (len(list) > 0) {
			t.Errorf("%d authorities and %v", len(list), err)
		}
	})
}

// What another node sends may be anything; without the key it proves nothing.
func FuzzParseRenewal(f *testing.F) {
	key, err := NewKey()
	if err != nil {
		f.Fatal(err)
	}
	csr, err := NewCSR(key, "x")
	if err != nil {
		f.Fatal(err)
	}
	r, err := NewRenewal(key, "c", "n", csr)
	if err != nil {
		f.Fatal(err)
	}
	good, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"nodeID":"n","csr":"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRenewal(b)
		if err != nil {
			return
		}
		csr, present, err := r.Check("c")
		if err == nil {
			pub, perr := x509.ParsePKIXPublicKey(r.Proof.PublicKey)
			if perr != nil || csr == nil {
				t.Fatalf("passes without a key: %v", perr)
			}
			if hash, herr := KeyHash(pub); herr != nil || present != hash {
				t.Errorf("passes with key %q, which is not that of the proof: %v", present, herr)
			}
		}
		if _, _, err := r.Check("another"); err == nil {
			t.Error("passes in another cluster")
		}
		r.NodeID += "x"
		if _, _, err := r.Check("c"); err == nil {
			t.Error("passes for another node")
		}
	})
}
