// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backup

import (
	"errors"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
)

// readError names the cause of a state that could not be read.
func readError(h *Header, err error) error {
	if errors.Is(err, fsm.ErrUnknownFormat) {
		return api.Errorf(api.CodeUnsupported, "%w (%s): its state has a form that this version does not know; use version %s or a later one", backupfile.ErrNewer, h.Version, h.Version)
	}
	return fmt.Errorf("take the state out of the backup: %w", err)
}
