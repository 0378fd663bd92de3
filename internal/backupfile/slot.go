// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backupfile

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"golang.org/x/crypto/scrypt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/pki"
)

// Bounds of a pass phrase, in bytes. A slot can be attacked without any limit by
// whoever has the file, so that a short one is refused.
const (
	MinPassphrase = 12
	MaxPassphrase = 1024
)

// Cost of a new slot (RFC 7914 section 2): 64 MiB and about a quarter of a second.
const (
	scryptN = 1 << 16
	scryptR = 8
	scryptP = 1
	// Bounds of the cost of a slot that is read.
	minScryptN     = 1 << 14
	maxScryptBytes = 1 << 30 // 128 × N × r
	maxScryptP     = 4
	minSlotSalt    = 16
	maxSlotSalt    = 64
)

const (
	slotKDF   = "scrypt"
	slotLabel = "backup/cluster-key"
	keyIDText = "muster backup key id\x00"
	fileInfo  = "muster backup state 1"
)

// Slot is the cluster key, sealed with a key derived from a pass phrase.
type Slot struct {
	KDF  string `json:"kdf"`
	N    int    `json:"n"`
	R    int    `json:"r"`
	P    int    `json:"p"`
	Salt []byte `json:"salt"`
	Key  []byte `json:"key"`
}

// KeyID recognises a cluster key and tells nothing of it.
func KeyID(clusterKey []byte) string {
	sum := sha256.Sum256(append([]byte(keyIDText), clusterKey...))
	return hex.EncodeToString(sum[:8])
}

// CheckPassphrase refuses what protects nothing.
func CheckPassphrase(p string) error {
	if len(p) < MinPassphrase || len(p) > MaxPassphrase {
		return api.Invalid("passphrase", "has %d bytes; give %d to %d: whoever has the file can try any number of them", len(p), MinPassphrase, MaxPassphrase)
	}
	return nil
}

// NewSlot seals a cluster key with a pass phrase.
func NewSlot(clusterKey []byte, passphrase string) (*Slot, error) {
	return newSlot(clusterKey, passphrase, scryptN)
}

func newSlot(clusterKey []byte, passphrase string, n int) (*Slot, error) {
	if err := CheckPassphrase(passphrase); err != nil {
		return nil, err
	}
	s := &Slot{KDF: slotKDF, N: n, R: scryptR, P: scryptP, Salt: pki.NewSecret(saltBytes)}
	k, err := s.derive(passphrase)
	if err != nil {
		return nil, err
	}
	s.Key, err = pki.Seal(k, slotLabel, clusterKey)
	return s, err
}

// Open returns the cluster key.
func (s *Slot) Open(passphrase string) ([]byte, error) {
	if s == nil {
		return nil, api.Errorf(api.CodeInvalid, "%w with a pass phrase: it was made without one; give the cluster's key, the file cluster.key in the data directory of any of its nodes", ErrKey)
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	k, err := s.derive(passphrase)
	if err != nil {
		return nil, err
	}
	key, err := pki.Open(k, slotLabel, s.Key)
	if err != nil {
		return nil, api.Errorf(api.CodeInvalid, "%w: the pass phrase is wrong", ErrKey)
	}
	return key, nil
}

func (s *Slot) derive(passphrase string) ([]byte, error) {
	k, err := scrypt.Key([]byte(passphrase), s.Salt, s.N, s.R, s.P, pki.ClusterKeyBytes)
	if err != nil {
		return nil, fmt.Errorf("derive key from pass phrase: %w", err)
	}
	return k, nil
}

// check bounds what a slot that was read may cost.
func (s *Slot) check() error {
	if s == nil {
		return nil
	}
	switch {
	case s.KDF != slotKDF:
		return api.Errorf(api.CodeUnsupported, "%w: its pass phrase is derived by %q, which this version does not know", ErrNewer, s.KDF)
	case s.N < minScryptN || s.N&(s.N-1) != 0 || s.R < 1 || s.P < 1 || s.P > maxScryptP || s.N > maxScryptBytes/128/s.R:
		return damaged("the cost of its pass phrase (%d, %d, %d) is out of bounds", s.N, s.R, s.P)
	case len(s.Salt) < minSlotSalt || len(s.Salt) > maxSlotSalt || len(s.Key) > MaxPassphrase:
		return damaged("its sealed key is malformed")
	}
	return nil
}

// fileKey is the key of one file.
func fileKey(clusterKey, salt []byte) ([]byte, error) {
	if len(clusterKey) != pki.ClusterKeyBytes {
		return nil, api.Errorf(api.CodeInvalid, "%w: a cluster key has %d bytes, this one %d; give the file cluster.key of a node's data directory", ErrKey, pki.ClusterKeyBytes, len(clusterKey))
	}
	return hkdf.Key(sha256.New, clusterKey, salt, fileInfo, pki.ClusterKeyBytes)
}
