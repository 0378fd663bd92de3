// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import "github.com/muster-vm/muster/api"

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
