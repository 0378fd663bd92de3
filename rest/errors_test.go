// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// "No quorum" promises that nothing was changed. A transaction that a leader
// proposed before it lost its majority may take effect all the same.
func TestAnUncertainOutcomeIsNotCalledNoQuorum(t *testing.T) {
	noQuorum := fmt.Errorf("%w: %w", configdb.ErrNoQuorum, fmt.Errorf("propose: leadership lost"))
	for _, c := range []struct {
		name string
		err  error
		want api.Code
	}{
		{"nothing was proposed", noQuorum, api.CodeNoQuorum},
		{"it was handed on, then there was no quorum", fmt.Errorf("%w (%w)", configdb.ErrUncertain, noQuorum), api.CodeTimeout},
		{"it was handed on, then the node was shut down", fmt.Errorf("%w (%w)", configdb.ErrUncertain, configdb.ErrClosed), api.CodeTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := classify(c.err).Code; got != c.want {
				t.Errorf("code %s, want %s", got, c.want)
			}
		})
	}
}
