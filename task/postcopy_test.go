// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// The loss of the node that a guest left is no success if memory may have been
// there, although the VM runs at the target.
func TestLostSourceOfAPostCopyIsNoSuccess(t *testing.T) {
	for name, c := range map[string]struct {
		postCopying, lost bool
		phase             api.TaskPhase
		says              string
	}{
		"all of the memory came":       {false, true, api.TaskSucceeded, ""},
		"it may have been there":       {true, true, api.TaskFailed, "it starts anew on node m2"},
		"the source lives and decides": {true, false, api.TaskRunning, ""},
	} {
		op := &api.Operation{Spec: api.OperationSpec{TaskID: "t", Epoch: 3, Migration: &api.MigrationSpec{Node: "m2"}}, Status: api.OperationStatus{PostCopying: c.postCopying}}
		vm := &api.VM{Status: api.VMStatus{Epoch: 4, PID: 7}}
		got := judgeMigration(api.TaskSpec{Target: "web1"}, target{operation: op, vm: vm, epoch: 4, broughtBy: "t", ownerLost: c.lost})
		if got.phase != c.phase || !strings.Contains(got.message, c.says) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
