// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Machines tells of the QEMUs that run on this node.
type Machines interface {
	// QEMU returns what the QEMU of a VM was started with and at most the last log
	// messages on its monitor. It fails with api.CodeRefused when the VM does not
	// run here.
	QEMU(ctx context.Context, vmID string, log int) (api.VMQEMU, error)
	// MigrationTransfer is what flows of a VM that leaves this node, nil if nothing
	// does.
	MigrationTransfer(ctx context.Context, vmID string) (*api.MigrationTransfer, error)
	// DirtyRate measures for dirtyMillis how many bytes of its memory a guest changes
	// in a second.
	DirtyRate(ctx context.Context, vmID string) (api.Size, error)
}

// facts answers GET /nodes/{name}/facts.
func (r *nodeResource) facts(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	n, err := r.find(q, v)
	if err != nil {
		return err
	}
	f, err := configdb.NodeFacts.Get(v, n.Meta.ID)
	if err != nil && api.CodeOf(err) == api.CodeNotFound {
		return api.Errorf(api.CodeNotFound, "node %s has not told its facts yet; a witness has none", n.Meta.Name)
	}
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, v.Revision(), &f)
	return nil
}

// defaultQEMULog is how many messages are shown unless asked otherwise.
const defaultQEMULog = 20

// qemu answers GET /vms/{name}/qemu, on the node that runs the VM.
func (r *vmResource) qemu(q *request) error {
	n, err := q.intParam("log", defaultQEMULog, 0, api.MaxQEMULog)
	if err != nil {
		return err
	}
	vm, node, err := r.consoleOwner(q)
	if err != nil {
		return err
	}
	if node != q.s.cfg.Node() {
		return q.proxy(node)
	}
	out, err := q.s.cfg.Machines.QEMU(q.ctx(), vm.Meta.ID, n)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, q.db.Local().Revision(), out)
	return nil
}
