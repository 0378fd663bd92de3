// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import "github.com/muster-vm/muster/api"

// PutPowerAction adds the record of a new action to a transaction and takes out
// the oldest ones beyond those that are kept. Actions have no claim of a name:
// it is their ID, which grows with time.
func PutPowerAction(v *View, tx *Txn, a *api.PowerAction) error {
	ids := idsOf(v, PowerActions)
	for len(ids) >= api.KeptPowerActions {
		tx.Delete(PowerActions.SpecKey(ids[0]))
		tx.Delete(PowerActions.StatusKey(ids[0]))
		ids = ids[1:]
	}
	return PowerActions.CreateUnnamed(tx, a)
}
