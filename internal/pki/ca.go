// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"
)

// Lifetimes and tolerance.
const (
	CALife = 20 * 365 * 24 * time.Hour
	// NodeCertLife is the default; a cluster may choose another within the bounds.
	NodeCertLife    = 90 * 24 * time.Hour
	MinNodeCertLife = time.Minute // a life below a day is for tests
	MaxNodeCertLife = 825 * 24 * time.Hour
	// clockSkew is how far before its issue a certificate begins, for nodes whose clocks
	// are late: a clock that was read in another time zone is wrong by up to 14 hours.
	// Of a short life it is a tenth, but at least leastSkew.
	clockSkew = 24 * time.Hour
	leastSkew = time.Hour
)

// nodeDomain is the suffix of the DNS name that carries a node's ID.
const nodeDomain = ".node.muster.internal"

// NodeDNSName is the name in the certificate of the node with an ID.
func NodeDNSName(nodeID string) string { return nodeID + nodeDomain }

// NodeIDOf returns the node ID in a verified certificate.
func NodeIDOf(c *x509.Certificate) (string, bool) {
	for _, n := range c.DNSNames {
		if id, ok := strings.CutSuffix(n, nodeDomain); ok {
			return id, true
		}
	}
	return "", false
}

// NewKey returns a private key (ECDSA P-256), PEM.
func NewKey() ([]byte, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseKey(keyPEM []byte) (*ecdsa.PrivateKey, error) {
	b, _ := pem.Decode(keyPEM)
	if b == nil {
		return nil, errors.New("private key is not PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse private key: %w", err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("private key is not ECDSA")
	}
	return ec, nil
}

// ParseCert reads one PEM certificate.
func ParseCert(certPEM []byte) (*x509.Certificate, error) {
	b, _ := pem.Decode(certPEM)
	if b == nil || b.Type != "CERTIFICATE" {
		return nil, errors.New("certificate is not PEM")
	}
	return x509.ParseCertificate(b.Bytes)
}

// CAHash identifies an authority in a join token: SHA-256 of its certificate.
func CAHash(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// KeyHash is the SHA-256 of a public key in hexadecimal.
func KeyHash(pub any) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// NewCA returns the certificate and key of a new authority, PEM. Its name is
// its own, though the cluster's is in it; it may sign one bridge to a successor.
func NewCA(cluster, clusterID string) (certPEM, keyPEM []byte, err error) {
	if keyPEM, err = NewKey(); err != nil {
		return nil, nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial(),
		Subject: pkix.Name{
			CommonName: "Muster cluster " + cluster, OrganizationalUnit: []string{clusterID}, SerialNumber: fmt.Sprintf("%x", NewSecret(8)),
		},
		NotBefore:             time.Now().Add(-clockSkew),
		NotAfter:              time.Now().Add(CALife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLen:            1,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, nil, fmt.Errorf("create authority: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), keyPEM, nil
}

func serial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}

// NewCSR returns a certificate request for a key, PEM.
func NewCSR(keyPEM []byte, node string) ([]byte, error) {
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: node}}, key)
	if err != nil {
		return nil, fmt.Errorf("create certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ParseCSR reads a certificate request and checks its signature.
func ParseCSR(csrPEM []byte) (*x509.CertificateRequest, error) {
	b, _ := pem.Decode(csrPEM)
	if b == nil || b.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("certificate request is not PEM")
	}
	r, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return r, nil
}
