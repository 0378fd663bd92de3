// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// maxBundle is how many authorities a bundle may have: one, or two during a
// rotation, with room for a person's own additions.
const maxBundle = 16

// ParseBundle reads the certificates of a file ca.crt. All must be authorities.
func ParseBundle(bundle []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := bundle; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := ParseCert(pem.EncodeToMemory(b))
		if err != nil {
			return nil, fmt.Errorf("authority: %w", err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("authority: the certificate of %q is not that of an authority", c.Subject.CommonName)
		}
		if out = append(out, c); len(out) > maxBundle {
			return nil, fmt.Errorf("authority: more than %d certificates", maxBundle)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("authority: certificate is not PEM")
	}
	return out, nil
}

// JoinPEM puts PEM texts one after the other, each once and on lines of its own.
func JoinPEM(texts ...[]byte) []byte {
	var out []byte
	for i, t := range texts {
		t = bytes.TrimSpace(t)
		seen := func(o []byte) bool { return bytes.Equal(bytes.TrimSpace(o), t) }
		again := false
		for _, o := range texts[:i] {
			again = again || seen(o)
		}
		if len(t) > 0 && !again {
			out = append(append(out, t...), '\n')
		}
	}
	return out
}

// PoolOf returns the certificates as a pool.
func PoolOf(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// SignerOf returns which of some authorities signed a certificate.
func SignerOf(c *x509.Certificate, authorities []*x509.Certificate) (*x509.Certificate, bool) {
	for _, ca := range authorities {
		if bytes.Equal(c.RawIssuer, ca.RawSubject) && c.CheckSignatureFrom(ca) == nil {
			return ca, true
		}
	}
	return nil, false
}

// ErrNoBridge is returned for an authority that must not sign another.
var ErrNoBridge = errors.New("this authority was made by a version that lets it sign no successor")

// Bridge returns the certificate of a new authority, signed by an old one, PEM:
// who trusts the old one only can verify by it what the new one signed.
func Bridge(oldCertPEM, oldKeyPEM, newCertPEM []byte) ([]byte, error) {
	old, err := ParseCert(oldCertPEM)
	if err != nil {
		return nil, fmt.Errorf("old authority: %w", err)
	}
	key, err := parseKey(oldKeyPEM)
	if err != nil {
		return nil, fmt.Errorf("old authority: %w", err)
	}
	fresh, err := ParseCert(newCertPEM)
	if err != nil {
		return nil, fmt.Errorf("new authority: %w", err)
	}
	if old.MaxPathLen == 0 {
		return nil, ErrNoBridge
	}
	end := fresh.NotAfter
	if end.After(old.NotAfter) {
		end = old.NotAfter
	}
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               fresh.Subject,
		RawSubject:            fresh.RawSubject,
		SubjectKeyId:          fresh.SubjectKeyId,
		NotBefore:             time.Now().Add(-clockSkew),
		NotAfter:              end,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              fresh.KeyUsage,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, old, fresh.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("sign the bridge to the new authority: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// KeyHashOf is KeyHash of the public half of a private key, PEM.
func KeyHashOf(keyPEM []byte) (string, error) {
	k, err := parseKey(keyPEM)
	if err != nil {
		return "", err
	}
	return KeyHash(k.Public())
}
