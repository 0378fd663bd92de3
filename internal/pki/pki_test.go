// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"
)

type authority struct{ cert, key []byte }

func newAuthority(t *testing.T) authority {
	t.Helper()
	cert, key, err := NewCA("c", "id")
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func newCSR(t *testing.T) (*x509.CertificateRequest, []byte) {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewCSR(key, "n")
	if err != nil {
		t.Fatal(err)
	}
	r, err := ParseCSR(b)
	if err != nil {
		t.Fatal(err)
	}
	return r, key
}

func (a authority) pool(t *testing.T) *x509.CertPool {
	t.Helper()
	c, err := ParseCert(a.cert)
	if err != nil {
		t.Fatal(err)
	}
	p := x509.NewCertPool()
	p.AddCert(c)
	return p
}

func TestNodeCertificate(t *testing.T) {
	ca := newAuthority(t)
	csr, _ := newCSR(t)
	for host, ips := range map[string]int{"10.1.2.3": 3, "fd00::1": 3, "host.example.org": 2, "": 2} {
		b, err := SignNode(ca.cert, ca.key, csr, "node-id", "n1", host)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseCert(b)
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := NodeIDOf(c); !ok || id != "node-id" {
			t.Errorf("%q: node %q", host, id)
		}
		if c.IsCA || len(c.IPAddresses) != ips || c.Subject.CommonName != "n1" || c.SerialNumber.Sign() <= 0 {
			t.Errorf("%q: %+v", host, c)
		}
		for _, name := range []string{NodeDNSName("node-id"), "n1", "localhost", "127.0.0.1", "::1", host} {
			for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
				o := x509.VerifyOptions{Roots: ca.pool(t), KeyUsages: []x509.ExtKeyUsage{use}}
				if name != "" && net.ParseIP(name) == nil {
					o.DNSName = name
				}
				if _, err := c.Verify(o); err != nil {
					t.Errorf("%q as %q: %v", host, name, err)
				}
			}
		}
		if c.VerifyHostname(NodeDNSName("other-id")) == nil {
			t.Errorf("%q: passes for another node", host)
		}
		// Life: from a tolerated past to a bounded future.
		if now := time.Now(); c.NotBefore.After(now) || c.NotAfter.After(now.Add(NodeCertLife+time.Minute)) || c.NotAfter.Before(now.Add(NodeCertLife-time.Hour)) {
			t.Errorf("valid from %v to %v", c.NotBefore, c.NotAfter)
		}
		other := x509.VerifyOptions{Roots: newAuthority(t).pool(t)}
		if _, err := c.Verify(other); err == nil {
			t.Error("another cluster's authority accepts it")
		}
	}
}

// A joining node chooses its name and address; neither may make it pass for
// another node.
func TestNodeNamesAreReserved(t *testing.T) {
	ca := newAuthority(t)
	csr, _ := newCSR(t)
	victim := NodeDNSName("victim")
	for _, n := range []string{victim, strings.ToUpper(victim), victim + ".", "*" + nodeDomain, "*" + nodeDomain + ".", nodeDomain, "a.b" + nodeDomain} {
		if _, err := SignNode(ca.cert, ca.key, csr, "me", "n1", n); err == nil {
			t.Errorf("host %q was signed", n)
		}
		if _, err := SignNode(ca.cert, ca.key, csr, "me", n, "10.0.0.1"); err == nil {
			t.Errorf("name %q was signed", n)
		}
	}
	for _, host := range []string{"ümlaut", "a\x00b", "\xff"} {
		b, err := SignNode(ca.cert, ca.key, csr, "me", "n1", host)
		if err != nil {
			continue
		}
		if c, err := ParseCert(b); err == nil && c.VerifyHostname(victim) == nil {
			t.Errorf("host %q passes for another node", host)
		}
	}
}

// Only the public key of a request is used.
func TestRequestsAskForNothing(t *testing.T) {
	ca := newAuthority(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "evil"}, DNSNames: []string{NodeDNSName("victim")}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 9)},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ParseCSR(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	b, err := SignNode(ca.cert, ca.key, csr, "me", "n1", "")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseCert(b)
	if err != nil {
		t.Fatal(err)
	}
	if c.IsCA || c.VerifyHostname(NodeDNSName("victim")) == nil || len(c.IPAddresses) != 2 || c.Subject.CommonName != "n1" {
		t.Errorf("the request got what it asked for: %+v", c)
	}
}

func TestAuthorityIsNarrow(t *testing.T) {
	a, b := newAuthority(t), newAuthority(t)
	c, err := ParseCert(a.cert)
	if err != nil {
		t.Fatal(err)
	}
	if !c.IsCA || c.MaxPathLen != 1 || c.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
		t.Errorf("authority %+v", c)
	}
	d, err := ParseCert(b.cert)
	if err != nil {
		t.Fatal(err)
	}
	if CAHash(c) == CAHash(d) || len(CAHash(c)) != 64 {
		t.Error("two authorities have one hash")
	}
	csr, key := newCSR(t)
	if _, err := SignNode(a.cert, b.key, csr, "me", "n", ""); err == nil {
		t.Error("the key of another authority signs")
	}
	// A node's certificate cannot sign another.
	node, err := SignNode(a.cert, a.key, csr, "me", "n", "")
	if err != nil {
		t.Fatal(err)
	}
	sub, err := SignNode(node, key, csr, "victim", "n", "")
	if err != nil {
		return
	}
	leaf, err := ParseCert(sub)
	if err != nil {
		t.Fatal(err)
	}
	mid := x509.NewCertPool()
	mid.AppendCertsFromPEM(node)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.pool(t), Intermediates: mid}); err == nil {
		t.Error("a node made a certificate for another")
	}
}

func TestBrokenPEM(t *testing.T) {
	ca := newAuthority(t)
	csr, key := newCSR(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaDER, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	goodCSR, err := NewCSR(key, "n")
	if err != nil {
		t.Fatal(err)
	}
	tampered := flipPEM(t, goodCSR)
	block := func(typ string) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: []byte("junk")}) }
	for name, err := range map[string]error{
		"certificate empty":     second(ParseCert(nil)),
		"certificate junk":      second(ParseCert([]byte("hello"))),
		"certificate is a key":  second(ParseCert(key)),
		"certificate of junk":   second(ParseCert(block("CERTIFICATE"))),
		"request empty":         second(ParseCSR(nil)),
		"request is a cert":     second(ParseCSR(ca.cert)),
		"request of junk":       second(ParseCSR(block("CERTIFICATE REQUEST"))),
		"request tampered":      second(ParseCSR(tampered)),
		"key empty":             second(NewCSR(nil, "n")),
		"key of junk":           second(NewCSR(block("PRIVATE KEY"), "n")),
		"key is RSA":            second(NewCSR(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: rsaDER}), "n")),
		"sign without a CA":     second(SignNode(nil, ca.key, csr, "i", "n", "")),
		"sign without a key":    second(SignNode(ca.cert, nil, csr, "i", "n", "")),
		"hash of no public key": second(KeyHash("key")),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	a, err := KeyHash(csr.PublicKey)
	if err != nil || len(a) != 64 {
		t.Errorf("key hash %q, %v", a, err)
	}
	other, _ := newCSR(t)
	if b, err := KeyHash(other.PublicKey); err != nil || a == b {
		t.Errorf("two keys have one hash %q, %v", b, err)
	}
}

func second[T any](_ T, err error) error { return err }

// flipPEM changes the last byte of a signature.
func flipPEM(t *testing.T, b []byte) []byte {
	t.Helper()
	p, _ := pem.Decode(b)
	p.Bytes[len(p.Bytes)-1] ^= 1
	return pem.EncodeToMemory(p)
}

func TestSealedSecrets(t *testing.T) {
	key := NewSecret(ClusterKeyBytes)
	for _, plain := range [][]byte{nil, []byte("s"), bytes.Repeat([]byte{7}, 5000)} {
		sealed, err := Seal(key, "ca", plain)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Open(key, "ca", sealed); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("opened %d of %d bytes, %v", len(got), len(plain), err)
		}
		if len(plain) > 4 && bytes.Contains(sealed, plain[:5]) {
			t.Error("the secret is readable")
		}
		for i := range min(len(sealed), 64) {
			bad := bytes.Clone(sealed)
			bad[i] ^= 1
			if _, err := Open(key, "ca", bad); err == nil {
				t.Fatalf("byte %d was changed unnoticed", i)
			}
			if _, err := Open(key, "ca", sealed[:i]); i < len(sealed) && err == nil {
				t.Fatalf("cut to %d bytes unnoticed", i)
			}
		}
		for name, err := range map[string]error{
			"other label": second(Open(key, "cb", sealed)),
			"other key":   second(Open(NewSecret(ClusterKeyBytes), "ca", sealed)),
			"short key":   second(Open(key[1:], "ca", sealed)),
			"more bytes":  second(Open(key, "ca", append(bytes.Clone(sealed), 0))),
			"no bytes":    second(Open(key, "ca", nil)),
		} {
			if err == nil {
				t.Errorf("%s: opened", name)
			}
		}
	}
	if _, err := Seal([]byte("short"), "ca", nil); err == nil {
		t.Error("sealed with a short key")
	}
	a, _ := Seal(key, "l", []byte("x"))
	b, _ := Seal(key, "l", []byte("x"))
	if bytes.Equal(a, b) {
		t.Error("two seals are equal: the nonce repeats")
	}
	if HashSecret("a") == HashSecret("b") || len(HashSecret("a")) != 64 || bytes.Equal(NewSecret(32), NewSecret(32)) {
		t.Error("secrets and their hashes repeat")
	}
}

func someToken() JoinToken {
	return JoinToken{
		ClusterID: "c", CAHash: strings.Repeat("ab", 32), TokenID: "t", Secret: "s", Addresses: []string{"10.0.0.1:7600", "[fd00::1]:7600"},
		ExpiresAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

func TestJoinTokens(t *testing.T) {
	want := someToken()
	word, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(word, " \n\t+/=\"'$") {
		t.Errorf("%q is not one word for a shell", word)
	}
	for _, s := range []string{word, " " + word + "\n", "\t" + word + "\r\n"} {
		if got, err := ParseJoinToken(s); err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%q came back as %+v, %v", s, got, err)
		}
	}
	enc := func(s string) string { return joinPrefix + base64.RawURLEncoding.EncodeToString([]byte(s)) }
	missing := func(f func(*JoinToken)) string {
		x := someToken()
		f(&x)
		w, err := x.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	for name, s := range map[string]string{
		"empty":         "",
		"prefix only":   joinPrefix,
		"an API token":  "muster_0193_abcdef",
		"other format":  strings.Replace(word, "join1", "join2", 1),
		"cut":           word[:len(word)-5],
		"not base64":    joinPrefix + "!!!!",
		"not JSON":      enc("hello"),
		"a list":        enc("[]"),
		"null":          enc("null"),
		"wrong type":    enc(`{"c":1}`),
		"empty object":  enc("{}"),
		"no cluster":    missing(func(t *JoinToken) { t.ClusterID = "" }),
		"no hash":       missing(func(t *JoinToken) { t.CAHash = "" }),
		"no token":      missing(func(t *JoinToken) { t.TokenID = "" }),
		"no secret":     missing(func(t *JoinToken) { t.Secret = "" }),
		"no address":    missing(func(t *JoinToken) { t.Addresses = nil }),
		"endless":       joinPrefix + strings.Repeat("A", 1<<20),
		"many":          missing(func(t *JoinToken) { t.Addresses = make([]string, 4000) }),
		"words between": word[:20] + " " + word[20:],
	} {
		if got, err := ParseJoinToken(s); !errors.Is(err, ErrBadJoinToken) || got != nil {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	x := someToken()
	word, err := x.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(word)
	f.Add(joinPrefix)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseJoinToken(s)
		if err != nil {
			return
		}
		word, err := got.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseJoinToken(word); err == nil && again.Secret != got.Secret {
			t.Fatalf("%+v came back as %+v", got, again)
		}
	})
}

// Whatever a host that joins or renews sends as its request, the authority
// refuses it or signs what others can read.
func FuzzParseCSR(f *testing.F) {
	ca, caKey, err := NewCA("test", "c")
	if err != nil {
		f.Fatal(err)
	}
	key, err := NewKey()
	if err != nil {
		f.Fatal(err)
	}
	good, err := NewCSR(key, "n1")
	if err != nil {
		f.Fatal(err)
	}
	block, _ := pem.Decode(good)
	f.Add(block.Bytes, "n1", "10.0.0.1")
	f.Add([]byte{0x30, 0x80}, "", "")
	f.Fuzz(func(t *testing.T, der []byte, node, host string) {
		csr, err := ParseCSR(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
		if err != nil {
			return
		}
		cert, err := SignNode(ca, caKey, csr, "id", node, host)
		if err != nil {
			return
		}
		c, err := ParseCert(cert)
		if err != nil {
			t.Fatalf("what was signed cannot be read: %v", err)
		}
		if id, ok := NodeIDOf(c); !ok || id != "id" {
			t.Fatalf("signed for %q", id)
		}
	})
}
