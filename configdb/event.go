// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import "github.com/muster-vm/muster/api"

// PutEvent adds an event to a transaction. It has no status and no claim of its
// name, which is its ID: one key per event.
func PutEvent(tx *Txn, e *api.Event) error {
	b, err := e.EncodeSpec()
	if err != nil {
		return err
	}
	tx.Put(Events.SpecKey(e.Meta.ID), b)
	return nil
}
