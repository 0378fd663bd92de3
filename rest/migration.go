// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// Migration begins migrations, for requests and for the evacuation of nodes.
type Migration struct {
	Placer Placer
	Actor  string
	Now    time.Time
	// Reserve takes memory on a node, in the transaction of Begin.
	Reserve func(nodeID string) error
}

// beginning is one attempt on one view.
type beginning struct {
	Migration
	v       *configdb.View
	vm      api.VM
	binding api.Binding
}

// Begin adds to a transaction what begins the migration of a VM, and returns the
// ID of its task. It fails, with the reason, if the VM cannot be moved as wished.
func (m Migration) Begin(v *configdb.View, tx *configdb.Txn, vm api.VM, in *api.MigrateRequest) (task string, err error) {
	b := &beginning{Migration: m, v: v, vm: vm}
	to, copied, err := b.decide(in)
	if err != nil {
		return "", err
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(vm.Meta.ID), b.binding.Meta.Revision)
	if err := undrilled(v, &vm); err != nil {
		return "", err
	}
	if err := m.Reserve(to.Meta.ID); err != nil {
		return "", err
	}
	return b.write(tx, in, to, copied)
}

// decide finds the target and what goes along, or the reason against it.
func (b *beginning) decide(in *api.MigrateRequest) (to api.Node, copied []string, err error) {
	v, vm := b.v, &b.vm
	if vm.Meta.Deleting() {
		return to, nil, api.Errorf(api.CodeRefused, "vm %s is being deleted", vm.Meta.Name)
	}
	if b.binding, err = configdb.Bindings.Get(v, vm.Meta.ID); err != nil {
		return to, nil, fmt.Errorf("vm %s has no binding: %w", vm.Meta.Name, err)
	}
	if op, err := configdb.Operations.Get(v, vm.Meta.ID); err == nil {
		return to, nil, busy(vm, &op)
	}
	if !feature.Migration.InForce(v) {
		return to, nil, api.Errorf(api.CodeRefused, "vms can be migrated when all nodes know how: the feature level of the cluster has to be %d, it is %d; upgrade the nodes that muster cluster status names", feature.Migration.Level(), feature.Level(v))
	}
	if err := b.mayLeave(); err != nil {
		return to, nil, err
	}
	if copied, err = b.nodeBound(in); err != nil {
		return to, nil, err
	}
	if in.PostCopy && len(copied) > 0 {
		return to, nil, &api.Error{Code: api.CodeRefused, Field: "postCopy", Detail: fmt.Sprintf(
			"vm %s has disks that only node %s has; post-copy is for VMs whose disks stay where they are", vm.Meta.Name, b.binding.Spec.Node)}
	}
	to, err = b.chooseTarget(in, copied)
	return to, copied, err
}

// busy says what works on a VM.
func busy(vm *api.VM, op *api.Operation) error {
	return api.Errorf(api.CodeRefused, "vm %s is being %s; wait for task %s", vm.Meta.Name, op.Spec.Doing(), op.Spec.TaskID)
}

// write adds operation, arrival and task.
func (b *beginning) write(tx *configdb.Txn, in *api.MigrateRequest, to api.Node, copied []string) (string, error) {
	vm, at := &b.vm, b.binding.Spec
	task := api.NewTask(api.ActionVMMigrate, api.KindVM, vm.Meta, b.Actor, vmOperationDeadline, b.Now)
	task.Spec.TargetEpoch = at.Epoch
	op := api.Operation{
		Meta: api.NewMeta(api.KindOperation, vm.Meta.Project, vm.Meta.Name),
		Spec: api.OperationSpec{
			Action: api.ActionVMMigrate, VM: vm.Meta.Name, TaskID: task.Meta.ID, NodeID: at.NodeID, Epoch: at.Epoch,
			Migration: &api.MigrationSpec{
				NodeID: to.Meta.ID, Node: to.Meta.Name, MaxDowntimeMillis: in.MaxDowntimeMillis, Bandwidth: in.Bandwidth, Volumes: copied,
				Channels: in.WishedChannels(), PostCopy: in.PostCopy,
			},
		},
		Status: api.OperationStatus{Phase: api.TaskPending},
	}
	arr := api.Arrival{
		Meta:   api.NewMeta(api.KindArrival, vm.Meta.Project, vm.Meta.Name),
		Spec:   api.ArrivalSpec{TaskID: task.Meta.ID, NodeID: to.Meta.ID, Epoch: at.Epoch + 1},
		Status: api.ArrivalStatus{Phase: api.ArrivalPending},
	}
	op.Meta.ID, arr.Meta.ID = vm.Meta.ID, vm.Meta.ID
	if err := configdb.Tasks.CreateUnnamed(tx, &task); err != nil {
		return "", err
	}
	if err := configdb.Operations.CreateUnnamed(tx, &op); err != nil {
		return "", err
	}
	return task.Meta.ID, configdb.Arrivals.CreateUnnamed(tx, &arr)
}

// mayLeave refuses unless the VM runs, or is paused, and its owner says so.
func (b *beginning) mayLeave() error {
	vm, at := &b.vm, b.binding.Spec
	s := &vm.Status
	_, err := configdb.SavedStates.Get(b.v, vm.Meta.ID)
	switch runs := vm.Spec.Power == api.PowerRunning || vm.Spec.Power == api.PowerPaused; {
	case err == nil, api.IgnoreNotFound(err) != nil:
		return errors.Join(api.IgnoreNotFound(err), api.Errorf(api.CodeRefused, "vm %s goes on from memory that is saved on disk; migrate it when it runs, or start it on another node", vm.Meta.Name))
	case !runs, s.PID == 0, s.Phase != api.VMRunning && s.Phase != api.VMPaused:
		return api.Errorf(api.CodeRefused, "vm %s is not running, it is %s; only a VM that runs or is paused can be migrated; muster vm move %s --node NODE moves a stopped one with its disks", vm.Meta.Name, phaseText(vm), vm.Meta.Name)
	case s.Epoch != at.Epoch, s.Hardware == nil:
		return api.Errorf(api.CodeRefused, "node %s has not reported on vm %s yet; try again in a moment", at.Node, vm.Meta.Name)
	}
	if why := rooted(s.Hardware); why != "" {
		return api.Errorf(api.CodeRefused, "vm %s %s, so it cannot be moved while it runs; stop it first", vm.Meta.Name, why)
	}
	owner, err := configdb.Nodes.Get(b.v, at.NodeID)
	switch {
	case api.CodeOf(err) == api.CodeNotFound && err != nil:
		return api.Errorf(api.CodeRefused, "node %s of vm %s is not in the cluster any more", at.Node, vm.Meta.Name)
	case err != nil:
		return err
	case owner.Status.Phase != api.NodeReady:
		return api.Errorf(api.CodeRefused, "node %s of vm %s is %s, so the VM cannot be migrated", at.Node, vm.Meta.Name, owner.Status.Phase)
	}
	return nil
}

// rooted says what of a guest's hardware does not move, "" if all of it does.
func rooted(hw *api.VMSpec) string {
	switch {
	case len(hw.HostDevices) > 0:
		return "has devices of its host (hostDevices)"
	case hw.TPM != nil:
		return "has a TPM, whose state is a process of its host and does not move in this version"
	case len(hw.ExtraArgs) > 0:
		return "has extra arguments of QEMU (extraArgs), of which nobody knows what they mean on another node"
	case hw.Vsock != nil:
		return "has a vsock, whose connections end at its host"
	}
	return ""
}

// nodeBound returns the volumes that have to be copied along because they are in
// a pool of the present node alone.
func (b *beginning) nodeBound(in *api.MigrateRequest) (ids []string, err error) {
	var names []string
	hw := b.vm.Status.Hardware
	volumes := hw.StateVolumes()
	for _, d := range hw.Disks {
		volumes = append(volumes, d.Volume)
	}
	for _, name := range volumes {
		vol, err := configdb.Volumes.Find(b.v, b.vm.Meta.Project, name)
		if err != nil {
			return nil, err
		}
		pool, err := configdb.Pools.Find(b.v, "", vol.Spec.Pool)
		if err != nil {
			return nil, err
		}
		if pool.Spec.Type != api.PoolDir {
			continue
		}
		if err := b.copyable(&vol); err != nil {
			return nil, err
		}
		ids, names = append(ids, vol.Meta.ID), append(names, vol.Meta.Name)
	}
	if err := b.leftBehind(volumes); err != nil {
		return nil, err
	}
	if len(ids) > 0 && !in.WithStorage {
		return nil, &api.Error{Code: api.CodeRefused, Field: "withStorage", Detail: fmt.Sprintf(
			"vm %s has disks that only node %s has (%s); they can be copied along, which takes its time: --with-storage (\"withStorage\": true)",
			b.vm.Meta.Name, b.binding.Spec.Node, strings.Join(names, ", "))}
	}
	return ids, nil
}

// leftBehind refuses a move that would leave behind what the VM gets at its next
// start, because only the present node has it.
func (b *beginning) leftBehind(running []string) error {
	wished := b.vm.Spec.StateVolumes()
	for _, d := range b.vm.Spec.Disks {
		wished = append(wished, d.Volume)
	}
	for _, name := range wished {
		if slices.Contains(running, name) {
			continue
		}
		vol, err := configdb.Volumes.Find(b.v, b.vm.Meta.Project, name)
		if err != nil {
			return err
		}
		pool, err := configdb.Pools.Find(b.v, "", vol.Spec.Pool)
		if err != nil {
			return err
		}
		if pool.Spec.Type == api.PoolDir {
			return api.Errorf(api.CodeRefused, "vm %s gets volume %s at its next start, and only node %s has it, so it would be left behind; stop and start the vm first, or take that change back", b.vm.Meta.Name, name, b.binding.Spec.Node)
		}
	}
	return nil
}

// copyable refuses a volume of which a copy would lack something: what is inside
// its file beside the present content stays behind.
func (b *beginning) copyable(vol *api.Volume) error {
	if f := vol.Status.Format; f != "" && f != "qcow2" {
		return api.Errorf(api.CodeRefused, "volume %s has the format %s; only qcow2 volumes can be copied along", vol.Meta.Name, f)
	}
	if vol.Spec.Size > vol.Status.Size {
		return api.Errorf(api.CodeRefused, "volume %s is being enlarged; migrate vm %s when that is done", vol.Meta.Name, b.vm.Meta.Name)
	}
	all, err := configdb.Snapshots.List(b.v)
	if err != nil {
		return err
	}
	for i := range all {
		if slices.ContainsFunc(all[i].Status.Disks, func(d api.SnapshotDisk) bool { return d.VolumeID == vol.Meta.ID }) {
			return api.Errorf(api.CodeRefused, "volume %s, which only node %s has, holds snapshot %s of vm %s, and snapshots are not copied along; delete it, or stop the vm and move it with everything: muster vm move %s --node NODE",
				vol.Meta.Name, b.binding.Spec.Node, all[i].Meta.Name, all[i].Spec.VM, b.vm.Meta.Name)
		}
	}
	return nil
}

// chooseTarget finds the node to move to: that of the request, or the best one
// where the guest can run on as it is.
func (b *beginning) chooseTarget(in *api.MigrateRequest, copied []string) (api.Node, error) {
	at := b.binding.Spec
	owner, err := configdb.Nodes.Get(b.v, at.NodeID)
	if err != nil {
		return owner, err
	}
	if in.To == owner.Meta.Name || in.To == owner.Meta.ID {
		return owner, &api.Error{Code: api.CodeRefused, Field: "to", Detail: fmt.Sprintf("vm %s is on node %s already", b.vm.Meta.Name, owner.Meta.Name)}
	}
	vm := b.vm.Clone()
	vm.Spec = vm.Spec.WithHardware(vm.Status.Hardware) // what runs is what has to fit
	exclude, err := b.unlike(&owner, in.PostCopy)
	if err != nil {
		return owner, err
	}
	id, _, err := b.Placer.ChooseOther(b.v, vm, exclude, in.To, copied)
	if err != nil {
		return owner, atField(err, "to")
	}
	return configdb.Nodes.Get(b.v, id)
}

// unlike are the nodes whose QEMU would not take the guest as it is, with the
// reasons; the present node is one of them.
func (b *beginning) unlike(owner *api.Node, postCopy bool) (map[string]string, error) {
	out := map[string]string{owner.Meta.ID: "it is there now"}
	nodes, err := configdb.Nodes.List(b.v)
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		if n := &nodes[i]; n.Meta.ID != owner.Meta.ID {
			why := b.unlikeNode(owner, n)
			if why == "" && postCopy {
				why = b.noPostCopy(n)
			}
			if why != "" {
				out[n.Meta.ID] = why
			}
		}
	}
	return out, nil
}

// noPostCopy says why a node cannot run a guest whose memory is not all there.
// The node that it leaves needs nothing for that.
func (b *beginning) noPostCopy(n *api.Node) string {
	facts, err := configdb.NodeFacts.Get(b.v, n.Meta.ID)
	if err != nil {
		return "it is not known whether it can do post-copy"
	}
	return facts.Status.Missing[api.FeaturePostCopy]
}

func (b *beginning) unlikeNode(from, to *api.Node) string {
	has, wants := string(to.Status.Accelerator), b.vm.Status.Accelerator
	switch {
	case has == "" || to.Status.QEMUVersion == "":
		return "" // placement says what is wrong with it
	case wants != "" && wants != has:
		return fmt.Sprintf("the vm runs with %s, it has %s", wants, has)
	case from.Status.QEMUVersion != to.Status.QEMUVersion:
		return fmt.Sprintf("it has QEMU %s, node %s has %s; they must be the same", to.Status.QEMUVersion, from.Meta.Name, from.Status.QEMUVersion)
	case wants == string(api.AccelKVM):
		return b.otherCPU(from, to)
	}
	return ""
}

// otherCPU says what of the guest's CPU a node lacks. Under TCG it is QEMU's own.
func (b *beginning) otherCPU(from, to *api.Node) string {
	here, herr := configdb.NodeFacts.Get(b.v, from.Meta.ID)
	there, terr := configdb.NodeFacts.Get(b.v, to.Meta.ID)
	if herr != nil || terr != nil {
		return "it is not known whether its CPU is like that of node " + from.Meta.Name
	}
	h, t := &here.Status, &there.Status
	if h.CPU.Vendor != t.CPU.Vendor {
		return fmt.Sprintf("its CPU is of %s, that of node %s of %s", t.CPU.Vendor, from.Meta.Name, h.CPU.Vendor)
	}
	if b.vm.Status.Hardware.CPUModel() != api.CPUHost {
		return "" // QEMU itself refuses to start with less than the model
	}
	lacks := t.FeaturesLacking(h.GuestFeatures)
	switch {
	case h.CPU.Name != t.CPU.Name:
		return fmt.Sprintf("the vm has the CPU of its host (%s), and this one is %s; start it with the CPU model cluster to move it between different hosts", h.CPU.Name, t.CPU.Name)
	case len(lacks) > 0:
		return "its CPU lacks " + strings.Join(lacks, ", ") + ", which the guest has"
	}
	return ""
}
