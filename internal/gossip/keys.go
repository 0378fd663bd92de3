// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/hashicorp/memberlist"
)

// KeyBytes is the length of a key: AES-256.
const KeyBytes = 32

// maxKeys is the most keys at a time: the one in use and those that come before
// and after it.
const maxKeys = 3

// Keys are those in force.
type Keys struct {
	// Primary encrypts what this node sends.
	Primary []byte
	// Others are accepted too: the next primary, or the last one.
	Others [][]byte
}

func (k Keys) all() [][]byte { return append([][]byte{k.Primary}, k.Others...) }

func (k Keys) validate() error {
	if n := 1 + len(k.Others); n > maxKeys {
		return fmt.Errorf("gossip keys: %d are given, at most %d", n, maxKeys)
	}
	for _, one := range k.all() {
		if len(one) != KeyBytes {
			return fmt.Errorf("gossip key: has %d bytes, want %d", len(one), KeyBytes)
		}
	}
	return nil
}

// DeriveKey makes a key from a secret of the cluster (HKDF with SHA-256, RFC
// 5869). scope tells clusters apart that have the same secret, such as one that
// was restored from a backup of the other.
func DeriveKey(secret []byte, scope string) ([]byte, error) {
	if len(secret) < KeyBytes {
		return nil, errors.New("gossip secret: is too short")
	}
	return hkdf.Key(sha256.New, secret, []byte(scope), "muster gossip", KeyBytes)
}

// ring is memberlist's keyring with the ciphers to read what this node sends.
type ring struct {
	*memberlist.Keyring
	aeads []cipher.AEAD // guarded by Service.mu
}

func newRing(k Keys) (*ring, error) {
	r := &ring{}
	var err error
	if r.aeads, err = newAEADs(k.all()); err != nil {
		return nil, err
	}
	r.Keyring, err = memberlist.NewKeyring(k.Others, k.Primary)
	return r, err
}

// install brings the keyring in line. What is not wanted is moved to the end
// before it is removed: memberlist's removal changes the list in place, while
// others read it, unless the key is the last one.
func (r *ring) install(k Keys) error {
	aeads, err := newAEADs(append(k.all(), r.GetKeys()...)) // a packet may be on its way out
	if err != nil {
		return err
	}
	r.aeads = aeads
	want := k.all()
	for _, one := range want {
		if err := r.AddKey(one); err != nil {
			return fmt.Errorf("gossip keys: %w", err)
		}
	}
	for i := len(want) - 1; i >= 0; i-- {
		if err := r.UseKey(want[i]); err != nil {
			return fmt.Errorf("gossip keys: %w", err)
		}
	}
	for {
		have := r.GetKeys()
		last := have[len(have)-1]
		if contains(want, last) {
			return nil
		}
		if err := r.RemoveKey(last); err != nil {
			return fmt.Errorf("gossip keys: %w", err)
		}
	}
}

func contains(list [][]byte, key []byte) bool {
	for _, k := range list {
		if bytes.Equal(k, key) {
			return true
		}
	}
	return false
}

// same reports whether two sets of keys are the same, in the same order.
func (k Keys) same(other Keys) bool {
	a, b := k.all(), other.all()
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
