// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
)

// Renewal is a node's request for another certificate: a request for a fresh
// key, and the proof that it has the present one.
type Renewal struct {
	NodeID string `json:"nodeID"`
	// CSR is a certificate request, PEM (PKCS #10), of which only the key counts.
	CSR   string `json:"csr"`
	Proof Proof  `json:"proof"`
}

// renewalLabel binds the proof to this purpose; the digit is its format.
const renewalLabel = "muster renew 1"

// NewRenewal makes a request with the present key.
func NewRenewal(presentKeyPEM []byte, clusterID, nodeID string, csr []byte) (Renewal, error) {
	r := Renewal{NodeID: nodeID, CSR: string(csr)}
	var err error
	r.Proof, err = NewProof(presentKeyPEM, renewalLabel, r.message(clusterID))
	return r, err
}

// ParseRenewal reads a request as it was sent.
func ParseRenewal(b []byte) (Renewal, error) {
	var r Renewal
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("malformed request: %w", err)
	}
	return r, nil
}

// Check returns the request for the fresh key, and the hash of the present key
// that its maker has, as KeyHash.
func (r Renewal) Check(clusterID string) (csr *x509.CertificateRequest, present string, err error) {
	if csr, err = ParseCSR([]byte(r.CSR)); err != nil {
		return nil, "", err
	}
	if present, err = r.Proof.Check(renewalLabel, r.message(clusterID)); err != nil {
		return nil, "", err
	}
	return csr, present, nil
}

func (r Renewal) message(clusterID string) []byte {
	return []byte(clusterID + "\n" + r.NodeID + "\n" + r.CSR)
}

// Proof shows that its maker has a private key. It is bound to a message.
type Proof struct {
	// PublicKey is PKIX, Signature ECDSA over SHA-256, ASN.1.
	PublicKey []byte `json:"publicKey"`
	Signature []byte `json:"signature"`
}

// NewProof signs a message.
func NewProof(keyPEM []byte, label string, message []byte) (Proof, error) {
	k, err := parseKey(keyPEM)
	if err != nil {
		return Proof{}, err
	}
	pub, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		return Proof{}, fmt.Errorf("encode public key: %w", err)
	}
	sum := proofSum(label, message)
	sig, err := ecdsa.SignASN1(rand.Reader, k, sum[:])
	if err != nil {
		return Proof{}, fmt.Errorf("sign: %w", err)
	}
	return Proof{PublicKey: pub, Signature: sig}, nil
}

// Check returns the hash of the key that signed the message, as KeyHash.
func (p Proof) Check(label string, message []byte) (keyHash string, err error) {
	pub, err := x509.ParsePKIXPublicKey(p.PublicKey)
	if err != nil {
		return "", errors.New("proof of the present key: malformed public key")
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	sum := proofSum(label, message)
	if !ok || !ecdsa.VerifyASN1(ec, sum[:], p.Signature) {
		return "", errors.New("proof of the present key: wrong signature")
	}
	return KeyHash(ec)
}

func proofSum(label string, message []byte) [sha256.Size]byte {
	return sha256.Sum256(append(append([]byte(label), 0), message...))
}
