// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"

	"github.com/gorilla/mux"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type snapshotResource struct {
	resource[api.SnapshotSpec, api.SnapshotStatus]
	vms *vmResource
}

func newSnapshots(vms *vmResource) *snapshotResource {
	return &snapshotResource{resource: resource[api.SnapshotSpec, api.SnapshotStatus]{table: configdb.Snapshots, need: needViewer, show: showSnapshot}, vms: vms}
}

// showSnapshot tells readers of a snapshot whose node was lost over it.
func showSnapshot(v *configdb.View, o *api.Snapshot) {
	if o.Status.Phase != api.SnapshotCreating && o.Status.Phase != api.SnapshotDeleting {
		return
	}
	if _, busy := v.Get(configdb.Operations.SpecKey(o.Spec.VMID)); !busy {
		o.Status.Phase = api.SnapshotFailed
		o.Status.Message = "it was interrupted, because the node of the VM was lost; remove it with muster vm snapshot rm " + o.Spec.VM + " " + o.Meta.Name
	}
}

// SnapshotRequest is the body of POST /vms/{name}/snapshots.
type SnapshotRequest struct {
	Name        string `json:"name" doc:"DNS label, unique among the snapshots of the VM" maxLength:"63"`
	Memory      bool   `json:"memory,omitempty" doc:"with the memory of a running or paused VM"`
	Description string `json:"description,omitempty" maxLength:"1024"`
}

// RevertRequest is the body of POST /vms/{name}/snapshots/{snapshot}/revert.
type RevertRequest struct {
	Force bool `json:"force,omitempty" doc:"end a running VM at once first, like pulling the plug; throw saved memory away"`
	Start bool `json:"start,omitempty" doc:"start the VM after a revert to a snapshot without memory"`
}

func (r *snapshotResource) routes() []route {
	all, one := base+"vms/{name}/snapshots", base+"vms/{name}/snapshots/{snapshot}"
	out := reads(&r.resource)
	return append(out,
		route{method: http.MethodGet, path: all, need: needViewer, handle: r.listOf, summary: "List the snapshots of a VM", operation: "listVMSnapshots",
			params: oneParams, out: typeOf[List[api.Snapshot]](), status: http.StatusOK},
		route{method: http.MethodGet, path: one, need: needViewer, handle: r.getOf, summary: "Show one snapshot of a VM", operation: "getVMSnapshot",
			params: oneParams, out: typeOf[api.Snapshot](), status: http.StatusOK},
		route{method: http.MethodPost, path: all, need: needOperator, handle: r.create, summary: "Take a snapshot of a VM", operation: "createVMSnapshot", verb: "snapshot",
			params: longParams, in: typeOf[SnapshotRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted},
		route{method: http.MethodPost, path: one + "/revert", need: needOperator, handle: r.revert, summary: "Take a VM back to a snapshot", operation: "revertVMSnapshot", verb: "revert",
			params: longParams, in: typeOf[RevertRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted},
		route{method: http.MethodDelete, path: one, need: needOperator, handle: r.remove, summary: "Delete a snapshot of a VM", operation: "deleteVMSnapshot",
			params: longParams, out: typeOf[TaskReply](), status: http.StatusAccepted})
}

// snapshot is the name or ID in the path.
func (q *request) snapshot() string { return mux.Vars(q.r)["snapshot"] }

// listOf answers GET /vms/{name}/snapshots.
func (r *snapshotResource) listOf(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	vm, err := r.vms.find(q, v)
	if err != nil {
		return err
	}
	all, err := configdb.SnapshotsOf(v, vm.Meta.ID)
	if err != nil {
		q.s.log.Error("snapshots left out of a list", "vm", vm.Meta.ID, "err", err)
	}
	page := List[api.Snapshot]{Kind: string(api.KindSnapshot) + "List", Items: []api.Snapshot{}, Revision: v.Revision()}
	for i := range all {
		r.shown(v, &all[i])
		page.Items = append(page.Items, all[i])
	}
	q.reply(http.StatusOK, v.Revision(), page)
	return nil
}

// getOf answers GET /vms/{name}/snapshots/{snapshot}.
func (r *snapshotResource) getOf(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	vm, err := r.vms.find(q, v)
	if err != nil {
		return err
	}
	o, err := configdb.FindSnapshot(v, &vm.Meta, q.snapshot())
	if err != nil {
		return err
	}
	r.shown(v, &o)
	q.w.Header().Set("ETag", etag(o.Meta.Revision))
	q.reply(http.StatusOK, v.Revision(), &o)
	return nil
}

// body reads a body that may be left out.
func optionalBody[T any](q *request) (in T, body []byte, err error) {
	if body, err = q.body(); err == nil && len(body) > 0 {
		err = decode(body, &in)
	}
	return in, body, err
}

// create answers POST /vms/{name}/snapshots.
func (r *snapshotResource) create(q *request) error {
	in, body, err := optionalBody[SnapshotRequest](q)
	if err != nil {
		return err
	}
	if err := api.ValidName("name", in.Name); err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		st, err := r.vms.loaded(c)
		if err != nil {
			return nil, err
		}
		return r.make(c, st, in, false)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (r *snapshotResource) make(c *change, st *vmState, in SnapshotRequest, temporary bool) (*effect, error) {
	vm := &st.vm
	if err := c.maySave(); err != nil {
		return nil, err
	}
	all, err := configdb.SnapshotsOf(c.v, vm.Meta.ID)
	if err != nil {
		return nil, err
	}
	if _, taken := c.v.Get(configdb.SnapshotNameKey(vm.Meta.ID, in.Name)); taken {
		return nil, api.Errorf(api.CodeExists, "vm %s has a snapshot %q already; remove it, or choose another name", vm.Meta.Name, in.Name)
	}
	if len(all) >= api.MaxSnapshots {
		return nil, api.Errorf(api.CodeRefused, "vm %s has %d snapshots, the most that are allowed; remove one", vm.Meta.Name, len(all))
	}
	if err := c.quiet(st); err != nil {
		return nil, err
	}
	live := vm.Status.Phase == api.VMRunning || vm.Status.Phase == api.VMPaused
	switch {
	case atRest(vm) && vm.Status.Phase == api.VMCreating, !atRest(vm) && !(live && vm.Spec.Power != api.PowerStopped):
		return nil, api.Errorf(api.CodeRefused, "vm %s is %s; a snapshot is taken of a running, paused or stopped vm", vm.Meta.Name, phaseText(vm))
	case in.Memory && !live:
		return nil, api.Errorf(api.CodeRefused, "vm %s is %s and has no memory to keep; leave memory out", vm.Meta.Name, phaseText(vm))
	}
	if in.Memory {
		err = needSavable(vm)
	} else if !temporary && (vm.Spec.TPM != nil || vm.Status.Hardware != nil && vm.Status.Hardware.TPM != nil) {
		err = api.Errorf(api.CodeRefused, api.TPMNeedsMemory, vm.Meta.Name)
	}
	if err == nil {
		err = c.mayTouchDisks(vm)
	}
	if err != nil {
		return nil, err
	}
	o := api.Snapshot{Meta: api.NewMeta(api.KindSnapshot, vm.Meta.Project, in.Name), Spec: api.SnapshotSpec{VM: vm.Meta.Name, VMID: vm.Meta.ID, Memory: in.Memory, Description: in.Description, Temporary: temporary}}
	o.Meta.Owner = string(api.KindVM) + "/" + vm.Meta.ID
	o.Status.Phase = api.SnapshotCreating
	for i := range all {
		if all[i].Status.Current {
			o.Spec.Parent = all[i].Meta.Name
		}
	}
	if err := o.Prepare(); err != nil {
		return nil, err
	}
	if err := configdb.CreateSnapshot(c.tx, &o); err != nil {
		return nil, err
	}
	return r.work(c, st, api.ActionVMSnapshot, &o, false)
}

// mayTouchDisks refuses work on disks that hold a mixture or cannot have
// snapshots.
func (c *change) mayTouchDisks(vm *api.VM) error {
	if name := configdb.UnfinishedRevert(c.v, vm.Meta.ID); name != "" {
		return api.Errorf(api.CodeRefused, "a revert of vm %s to snapshot %s was interrupted; revert again first: muster vm snapshot revert %s %s", vm.Meta.Name, name, vm.Meta.Name, name)
	}
	return c.needQcow2(vm)
}

// work begins an operation about a snapshot.
func (r *snapshotResource) work(c *change, st *vmState, action api.Action, o *api.Snapshot, start bool) (*effect, error) {
	task, err := c.begin(st, action, func(s *api.OperationSpec) { s.SnapshotID, s.Start = o.Meta.ID, start })
	return &effect{status: http.StatusAccepted, kind: api.KindSnapshot, id: o.Meta.ID, task: task, object: o}, err
}

// one finds the VM and the snapshot of the request.
func (r *snapshotResource) one(c *change) (*vmState, *api.Snapshot, error) {
	st, err := r.vms.loaded(c)
	if err != nil {
		return nil, nil, err
	}
	if st.vm.Meta.Deleting() {
		return nil, nil, api.Errorf(api.CodeRefused, "vm %s is being deleted", st.vm.Meta.Name)
	}
	o, err := configdb.FindSnapshot(c.v, &st.vm.Meta, c.q.snapshot())
	return st, &o, err
}

// remove answers DELETE /vms/{name}/snapshots/{snapshot}.
func (r *snapshotResource) remove(q *request) error {
	out, err := q.change(nil, func(c *change) (*effect, error) {
		st, o, err := r.one(c)
		if err != nil {
			return nil, err
		}
		if saved, has := c.saved(st.vm.Meta.ID); has && saved.Spec.SnapshotID == o.Meta.ID {
			return nil, errSuspended(&st.vm, "the snapshot that its memory belongs to is not deleted")
		}
		if by, busy := configdb.CopyOf(c.v, o.Meta.ID); busy {
			return nil, api.Errorf(api.CodeRefused, "%s is being copied from snapshot %s of vm %s; wait for it, or remove it", by, o.Meta.Name, st.vm.Meta.Name)
		}
		if o.Status.Phase == api.SnapshotReverting {
			return nil, api.Errorf(api.CodeRefused, "a revert of vm %s to snapshot %s is not finished; revert again first", st.vm.Meta.Name, o.Meta.Name)
		}
		return r.work(c, st, api.ActionVMForget, o, false)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// revert answers POST /vms/{name}/snapshots/{snapshot}/revert.
func (r *snapshotResource) revert(q *request) error {
	in, body, err := optionalBody[RevertRequest](q)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) { return r.goBack(c, in) })
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (r *snapshotResource) goBack(c *change, in RevertRequest) (*effect, error) {
	st, o, err := r.one(c)
	if err != nil {
		return nil, err
	}
	vm := &st.vm
	if err := c.maySave(); err != nil {
		return nil, err
	}
	switch o.Status.Phase {
	case api.SnapshotReady, api.SnapshotReverting:
	default:
		return nil, api.Errorf(api.CodeRefused, "snapshot %s of vm %s is %s; only a ready one can be reverted to", o.Meta.Name, vm.Meta.Name, o.Status.Phase)
	}
	if err := c.idle(vm); err != nil {
		return nil, err
	}
	if err := c.disksOfThen(vm, o); err != nil {
		return nil, err
	}
	if differs := vm.Spec.ClaimedDiffers(o.Status.Hardware); o.Spec.Memory && len(differs) > 0 {
		// Before anything is ended for it; the node looks again.
		return nil, api.Errorf(api.CodeRefused, "vm %s has another %s now than when snapshot %s was taken, and its memory goes on in the machine of then only; make it what it was first", vm.Meta.Name, strings.Join(differs, ", "), o.Meta.Name)
	}
	_, saved := c.saved(vm.Meta.ID)
	if (saved || !atRest(vm)) && !in.Force {
		return nil, api.Errorf(api.CodeRefused, "vm %s is %s, and a revert throws away what it did since %s; stop it first, or force the revert (--force), which ends it at once", vm.Meta.Name, phaseText(vm), o.Meta.Name)
	}
	if in.Start && o.Spec.Memory {
		return nil, api.Invalid("start", "is for snapshots without memory; after a revert to %s the VM is what it was then: %s", o.Meta.Name, o.Status.Power)
	}
	if o.Spec.Memory || in.Start {
		if err := c.roomFor(st, o); err != nil {
			return nil, err
		}
	}
	c.discardSaved(vm)
	if !atRest(vm) {
		vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true
		if _, err := r.vms.store(c, vm); err != nil {
			return nil, err
		}
	}
	return r.work(c, st, api.ActionVMRevert, o, in.Start)
}

// roomFor asks the node of the VM for the memory that the VM had then.
func (c *change) roomFor(st *vmState, o *api.Snapshot) error {
	then := st.vm.Clone()
	then.Spec = then.Spec.WithHardware(o.Status.Hardware)
	then.Spec.Power = api.PowerRunning
	nodeID, _, err := c.q.s.cfg.Placer.Choose(c.v, then, nil, st.binding.Spec.Node)
	if err != nil {
		return err
	}
	return c.reserve(nodeID)
}

// disksOfThen refuses a revert whose disks are gone, changed their size or belong
// to another VM. The node looks again before it touches anything.
func (c *change) disksOfThen(vm *api.VM, o *api.Snapshot) error {
	if o.Status.Hardware == nil || len(o.Status.Disks) == 0 {
		return api.Errorf(api.CodeRefused, "snapshot %s of vm %s does not say what the vm was then", o.Meta.Name, vm.Meta.Name)
	}
	for _, d := range o.Status.Disks {
		vol, err := configdb.Volumes.Get(c.v, d.VolumeID)
		switch {
		case err != nil || vol.Meta.Name != d.Volume || vol.Meta.Deleting():
			return api.Errorf(api.CodeRefused, "volume %s, which vm %s had when snapshot %s was taken, is gone", d.Volume, vm.Meta.Name, o.Meta.Name)
		case max(vol.Status.Size, vol.Spec.Size) != d.Size:
			return api.Errorf(api.CodeRefused, "volume %s had %s when snapshot %s was taken and has %s now; a revert does not change the size of a volume", d.Volume, d.Size, o.Meta.Name, max(vol.Status.Size, vol.Spec.Size))
		}
		for _, by := range configdb.Volumes.Referrers(c.v, d.VolumeID) {
			if by != string(api.KindVM)+"/"+vm.Meta.ID {
				return api.Errorf(api.CodeRefused, "volume %s, which was a disk of vm %s, is attached to %s now; detach it there first", d.Volume, vm.Meta.Name, c.names([]string{by}))
			}
		}
	}
	return configdb.ClaimNICs(c.v, &configdb.Txn{}, &vm.Meta, o.Status.Hardware.NICs)
}
