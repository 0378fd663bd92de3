// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package sshkey

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"math/big"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func line(t *testing.T, key any) string {
	t.Helper()
	pub, err := ssh.NewPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
}

// wire encodes a key by hand, for those that the library would not make.
func wire(keyType string, parts ...[]byte) string {
	b := ssh.Marshal(struct{ T string }{keyType})
	for _, p := range parts {
		b = append(b, ssh.Marshal(struct{ P []byte }{p})...)
	}
	return keyType + " " + base64.StdEncoding.EncodeToString(b)
}

func rsaLine(bits int) string {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	n.SetBit(n, 0, 1)
	return wire("ssh-rsa", []byte{1, 0, 1}, append([]byte{0}, n.Bytes()...))
}

func TestGoodKeys(t *testing.T) {
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range []string{line(t, ed), line(t, &ec.PublicKey), line(t, &strong.PublicKey), line(t, ed) + " ann@example.org work", "  " + line(t, ed) + "\t"} {
		k, err := Parse(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		again, err := Parse(k.Line())
		if err != nil || again.Hash() != k.Hash() || again.Comment != k.Comment || len(k.Hash()) != 64 {
			t.Errorf("%s: does not survive storing: %v", in, err)
		}
	}
}

func TestBadKeys(t *testing.T) {
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	good := line(t, ed)
	for name, c := range map[string]struct{ in, want string }{
		"nothing":             {"", "no public key"},
		"words":               {"hello world", "no public key"},
		"a comment only":      {"# ann", "no public key"},
		"cut off":             {good[:40], "no public key"},
		"options":             {`command="rm -rf /" ` + good, "options"},
		"from option":         {`from="10.0.0.1",no-pty ` + good, "options"},
		"two keys":            {good + "\n" + good, "control characters"},
		"an escape":           {good + " \x1b]0;x\x07", "control characters"},
		"a private key":       {"-----BEGIN OPENSSH PRIVATE KEY-----", "private key"},
		"short RSA":           {rsaLine(1024), "1024 bits"},
		"RSA one bit short":   {rsaLine(2047), "2047 bits"},
		"huge RSA":            {rsaLine(16385), ""},
		"type and key differ": {"ssh-rsa " + strings.Fields(good)[1], ""},
		"DSA":                 {wire("ssh-dss", append([]byte{0x80}, make([]byte, 127)...), []byte{1}, []byte{2}, []byte{3}), ""},
		"a certificate":       {wire("ssh-ed25519-cert-v01@openssh.com", []byte("x")), ""},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse(c.in); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q: %v, want %q", c.in, err, c.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHk= x")
	f.Add(rsaLine(1024))
	f.Fuzz(func(t *testing.T, s string) {
		k, err := Parse(s)
		if err != nil {
			return
		}
		again, err := Parse(k.Line())
		if err != nil || again.Hash() != k.Hash() {
			t.Errorf("%q: stored as %q: %v", s, k.Line(), err)
		}
	})
}
