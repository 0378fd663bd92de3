// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
)

// ClusterKeyBytes is the length of the key that seals secrets in the database.
const ClusterKeyBytes = 32

// NewSecret returns n random bytes.
func NewSecret(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// HashSecret is what is stored of a random secret: its SHA-256 in hexadecimal.
// The secrets have 256 random bits, so no slow hash is needed.
func HashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// Seal encrypts with AES-256-GCM (NIST SP 800-38D) and a random nonce. The
// label says what the secret is for; Open needs the same one.
func Seal(key []byte, label string, plain []byte) ([]byte, error) {
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	nonce := NewSecret(aead.NonceSize())
	return aead.Seal(nonce, nonce, plain, []byte(label)), nil
}

// Open decrypts what Seal returned.
func Open(key []byte, label string, sealed []byte) ([]byte, error) {
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	if len(sealed) < aead.NonceSize() {
		return nil, errors.New("sealed secret is too short")
	}
	n := aead.NonceSize()
	plain, err := aead.Open(nil, sealed[:n], sealed[n:], []byte(label))
	if err != nil {
		return nil, fmt.Errorf("open secret %q: %w", label, err)
	}
	return plain, nil
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	if len(key) != ClusterKeyBytes {
		return nil, fmt.Errorf("cluster key has %d bytes, want %d", len(key), ClusterKeyBytes)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
