// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

func (r *vmResource) migrationReads() []route {
	return []route{{
		method: http.MethodGet, path: base + "vms/{name}/migration", need: needViewer, handle: r.migrationProgress,
		summary: "How far the migration of a VM is", params: oneParams, out: typeOf[api.MigrationProgress](), status: http.StatusOK,
	}, {
		method: http.MethodGet, path: base + "vms/{name}/migration/plan", need: needViewer, handle: r.migrationPlan,
		summary: "Where a VM would be migrated to, what would go along and how long it would take; changes nothing",
		params:  append(append([]string{}, oneParams...), "target", "withStorage", "bandwidth", "maxDowntimeMillis", "channels", "postCopy"), out: typeOf[api.MigrationPlan](), status: http.StatusOK,
	}}
}

// migrationProgress answers GET /vms/{name}/migration. The node that the VM
// leaves knows what flows.
func (r *vmResource) migrationProgress(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	vm, err := r.find(q, v)
	if err != nil {
		return err
	}
	op, err := configdb.Operations.Get(v, vm.Meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	if err != nil || op.Spec.Migration == nil {
		return api.Errorf(api.CodeNotFound, "vm %s is not being migrated", vm.Meta.Name)
	}
	out := api.MigrationProgress{
		VM: vm.Meta.Name, Task: op.Spec.TaskID, To: op.Spec.Migration.Node,
		Phase: op.Status.Phase, Progress: op.Status.Progress, Message: op.Status.Message,
	}
	from, err := configdb.Nodes.Get(v, op.Spec.NodeID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	if err == nil {
		out.From = from.Meta.Name
		if from.Status.Phase == api.NodeReady && out.From != q.s.cfg.Node() {
			return q.proxy(out.From)
		}
	}
	if out.From == q.s.cfg.Node() {
		if out.Transfer, err = q.s.cfg.Machines.MigrationTransfer(q.ctx(), vm.Meta.ID); err != nil {
			return err
		}
	}
	q.reply(http.StatusOK, v.Revision(), out)
	return nil
}

// migrationPlan answers GET /vms/{name}/migration/plan. The node that the VM runs
// on measures how fast the guest changes its memory.
func (r *vmResource) migrationPlan(q *request) error {
	in, err := planRequest(q)
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
	v := q.db.Local()
	m := Migration{Placer: q.s.cfg.Placer, Actor: q.who.actor, Now: q.s.cfg.Now()}
	plan, err := m.Plan(v, vm, in)
	if err != nil {
		return err
	}
	rate, err := q.s.cfg.Machines.DirtyRate(q.ctx(), vm.Meta.ID)
	if err != nil {
		return err
	}
	plan.DirtyRate, plan.MeasuredMillis = rate, dirtyMillis
	plan.Forecast(in.MaxDowntimeMillis)
	q.reply(http.StatusOK, v.Revision(), plan)
	return nil
}

// dirtyMillis is how long Machines.DirtyRate samples.
const dirtyMillis = 1000

func planRequest(q *request) (*api.MigrateRequest, error) {
	in := &api.MigrateRequest{To: q.r.URL.Query().Get("target")}
	var err error
	if in.WithStorage, err = q.boolParam("withStorage"); err != nil {
		return nil, err
	}
	if in.PostCopy, err = q.boolParam("postCopy"); err != nil {
		return nil, err
	}
	if in.MaxDowntimeMillis, err = q.intParam("maxDowntimeMillis", 0, 0, api.MaxDowntimeMillis); err != nil {
		return nil, err
	}
	if in.Channels, err = q.intParam("channels", 0, 0, api.MaxMigrationChannels); err != nil {
		return nil, err
	}
	if b := q.r.URL.Query().Get("bandwidth"); b != "" {
		if in.Bandwidth, err = api.ParseSize(b); err != nil {
			return nil, api.Invalid("bandwidth", "%v", err)
		}
	}
	return in, in.Validate()
}

// Plan says what Begin would do.
func (m Migration) Plan(v *configdb.View, vm api.VM, in *api.MigrateRequest) (*api.MigrationPlan, error) {
	b := &beginning{Migration: m, v: v, vm: vm}
	to, copied, err := b.decide(in)
	if err != nil {
		return nil, err
	}
	from, err := configdb.Nodes.Get(v, b.binding.Spec.NodeID)
	if err != nil {
		return nil, err
	}
	p := &api.MigrationPlan{VM: vm.Meta.Name, From: from.Meta.Name, To: to.Meta.Name, Memory: vm.Status.Hardware.Memory, Bandwidth: in.Bandwidth, Channels: in.WishedChannels()}
	version, _, _ := strings.Cut(from.Status.QEMUVersion, ".")
	major, _ := strconv.Atoi(version)
	p.Halted = major > 0 && api.HaltsToMigrate(api.Accelerator(vm.Status.Accelerator), major)
	if balloon := vm.Status.Memory; balloon != nil {
		p.Memory = min(p.Memory, balloon.Target)
	}
	if most := from.Spec.MigrationBandwidth; most > 0 && (p.Bandwidth == 0 || most < p.Bandwidth) {
		p.Bandwidth = most
	}
	for _, id := range copied {
		vol, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return nil, err
		}
		p.Volumes = append(p.Volumes, api.PlannedVolume{Name: vol.Meta.Name, Size: vol.Status.Size})
	}
	return p, nil
}
