// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"crypto/hkdf"
	"crypto/sha256"

	"github.com/muster-vm/muster/api"
)

// poolKeysOf seals the keys of pools as rest needs it.
type poolKeysOf struct{ d *Daemon }

// SealPoolKey implements rest.PoolKeys.
func (o poolKeysOf) SealPoolKey(poolID, key string) ([]byte, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return (sealer{m.info.clusterKey}).Seal(api.KeyLabel(poolID), []byte(key))
}

// noteKey is the key of the nodes' notes in pools (storage.Config), the same on every
// node: nobody makes a note who has not got the cluster's key.
func noteKey(clusterKey []byte) []byte {
	key, err := hkdf.Key(sha256.New, clusterKey, nil, "muster notes in pools", sha256.Size)
	if err != nil {
		return nil // not for this length
	}
	return key
}
