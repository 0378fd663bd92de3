// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// A deletion does not give back volumes that a revert of the VM still writes to:
// whoever attaches one next would write to it, too.
func TestDeletionWaitsForWorkOnTheDisks(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{})
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.done(id, api.ActionVMSnapshot, "one", false)
	block := make(chan struct{})
	e.snaps.mu.Lock()
	e.snaps.block = block
	e.snaps.mu.Unlock()
	e.request(id, api.ActionVMRevert, "one", false)
	e.until("the disks are written", func() bool {
		e.snaps.mu.Lock()
		defer e.snaps.mu.Unlock()
		return len(e.snaps.calls) > 0 && e.snaps.calls[len(e.snaps.calls)-1][:5] == "apply"
	}, nothing)
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
	must(t, err)
	e.change(id, func(vm *api.VM) { now := time.Now(); vm.Meta.DeletingAt = &now })
	held := func() bool { return len(configdb.Volumes.Referrers(e.db.Local(), vol.Meta.ID)) > 0 }
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	for ctx.Err() == nil && held() {
		e.h.Wake()
		_, _ = e.db.WaitRevision(ctx, e.db.Local().Revision()+1)
	}
	if !held() {
		t.Error("the volume was given back while the revert wrote to it")
	}
	e.snaps.mu.Lock()
	e.snaps.block = nil
	e.snaps.mu.Unlock()
	close(block)
	e.until("given back", func() bool { return !held() }, nothing)
}
