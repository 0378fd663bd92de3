// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"

	"golang.org/x/crypto/ssh"
)

// NewHostKey makes the key by which clients know the cluster, as PEM to be
// kept sealed.
func NewHostKey() ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the host key of the shell: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(key, "muster")
	if err != nil {
		return nil, fmt.Errorf("encode the host key of the shell: %w", err)
	}
	return pem.EncodeToMemory(block), nil
}

// ParseHostKey reads what NewHostKey made.
func ParseHostKey(b []byte) (ssh.Signer, error) {
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("read the host key of the shell: %w", err)
	}
	return key, nil
}
