// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// drillDeadline is that of a drill's task. Its steps have shorter ones of their own.
const drillDeadline = 15 * time.Minute

// Drill begins drills, for people and for the schedule. The failure cases are in
// ha/DESIGN.md.
type Drill struct {
	Placer Placer
	Actor  string
	Now    time.Time
	// Due is when the schedule wanted it; nil for a person.
	Due *time.Time
	// Promise is what is known of the promise to survive failures.
	Promise func() (api.HAAdmission, time.Duration, bool)
}

// Begin adds a drill and its task to a transaction, if the VM and the cluster are fit
// for it.
func (o Drill) Begin(v *configdb.View, tx *configdb.Txn, vm *api.VM) (task string, err error) {
	b, err := o.fit(v, tx, vm)
	if err != nil {
		return "", err
	}
	if err := Unwell(v); err != nil {
		return "", err
	}
	a, _, known := o.Promise()
	if !known {
		return "", api.Errorf(api.CodeRefused, "this node has not computed yet whether the promise to survive failures holds; try again in a moment")
	}
	if a.Admission != api.AdmissionOff && !a.Kept {
		return "", api.Errorf(api.CodeRefused, "%d VMs would not restart if %d nodes died together; free memory first (muster ha status), so that no drill makes that worse, or set muster ha set --admission off", a.RefusedVMs, a.Failures)
	}
	_, _, err = o.Placer.ChooseOther(v, *vm, map[string]string{b.Spec.NodeID: "runs it now"}, "", nil)
	if err != nil {
		return "", err
	}
	t := api.NewTask(api.ActionVMDrill, api.KindVM, vm.Meta, o.Actor, drillDeadline, o.Now)
	if err := configdb.Tasks.CreateUnnamed(tx, &t); err != nil {
		return "", err
	}
	return t.Meta.ID, PutDrill(v, tx, vm, api.DrillSpec{
		TaskID: t.Meta.ID, VM: vm.Meta.Name, NodeID: b.Spec.NodeID, Node: b.Spec.Node, Epoch: b.Spec.Epoch, Generation: vm.Meta.Generation,
		Schedule: vm.Spec.Recovery.Drill, Due: o.Due, BegunAt: o.Now.UTC(), Actor: o.Actor,
	}, api.DrillStatus{Phase: api.TaskPending})
}

// PutDrill replaces the drill of a VM, which must be there still.
func PutDrill(v *configdb.View, tx *configdb.Txn, vm *api.VM, spec api.DrillSpec, status api.DrillStatus) error {
	tx.RequireExists(configdb.VMs.SpecKey(vm.Meta.ID))
	d, err := configdb.Drills.Get(v, vm.Meta.ID)
	if err != nil {
		if api.IgnoreNotFound(err) != nil {
			return err
		}
		d = api.Drill{Meta: api.NewMeta(api.KindDrill, vm.Meta.Project, vm.Meta.Name), Spec: spec, Status: status}
		d.Meta.ID = vm.Meta.ID
		return configdb.Drills.CreateUnnamed(tx, &d)
	}
	status.SucceededAt = d.Status.SucceededAt
	d.Spec, d.Status = spec, status
	if err := configdb.Drills.UpdateSpec(v, tx, &d); err != nil {
		return err
	}
	return configdb.Drills.UpdateStatus(v, tx, &d)
}

// fit says whether the VM can be drilled as it is.
func (o Drill) fit(v *configdb.View, tx *configdb.Txn, vm *api.VM) (b api.Binding, err error) {
	name := vm.Meta.Name
	if !feature.Drills.InForce(v) {
		return b, api.Errorf(api.CodeRefused, "drills need feature level %d, and the cluster is at %d; upgrade the nodes that muster cluster status names", feature.Drills.Level(), feature.Level(v))
	}
	switch {
	case vm.Meta.Deleting():
		return b, api.Errorf(api.CodeRefused, "vm %s is being deleted", name)
	case vm.Spec.HA != api.HARestart:
		return b, api.Errorf(api.CodeRefused, "vm %s is not protected, so nothing restarts it elsewhere; muster vm set %s --ha restart", name, name)
	case !vm.Spec.Drilled():
		return b, api.Errorf(api.CodeRefused, "vm %s is not meant for drills, which end it as a power cut would; allow them: muster vm set %s --drill manual", name, name)
	}
	if b, err = configdb.Bindings.Get(v, vm.Meta.ID); err != nil {
		return b, fmt.Errorf("vm %s has no binding: %w", name, err)
	}
	s := &vm.Status
	if vm.Spec.Power != api.PowerRunning || s.Phase != api.VMRunning || s.Epoch != b.Spec.Epoch || s.PID == 0 {
		return b, api.Errorf(api.CodeRefused, "vm %s is %s; only a running vm is drilled", name, phaseText(vm))
	}
	if !b.Spec.Protected {
		return b, api.Errorf(api.CodeRefused, "node %s does not protect vm %s yet; try again soon", b.Spec.Node, name)
	}
	tx.RequireRevision(configdb.Bindings.SpecKey(vm.Meta.ID), b.Meta.Revision)
	tx.RequireRevision(configdb.VMs.SpecKey(vm.Meta.ID), vm.Meta.Revision)
	return b, idle(v, tx, vm)
}

// idle refuses what another piece of work on the VM excludes, and makes the
// transaction conflict with one that begins meanwhile.
func idle(v *configdb.View, tx *configdb.Txn, vm *api.VM) error {
	if op, err := configdb.Operations.Get(v, vm.Meta.ID); err == nil {
		return busy(vm, &op)
	}
	tx.RequireRevision(configdb.Operations.SpecKey(vm.Meta.ID), 0)
	return undrilled(v, vm)
}

// undrilled refuses what a drill of the VM excludes. Of what begins at the same moment
// as a drill the owner lets the drill be.
func undrilled(v *configdb.View, vm *api.VM) error {
	d, err := configdb.Drills.Get(v, vm.Meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	if err == nil && !d.Status.Over() {
		return api.Errorf(api.CodeRefused, "vm %s is being drilled; wait for task %s", vm.Meta.Name, d.Spec.TaskID)
	}
	return nil
}

// Unwell says why the cluster is not whole: a node that is not well, or being emptied.
func Unwell(v *configdb.View) error {
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return err
	}
	for i := range nodes {
		n := &nodes[i]
		is := ""
		switch {
		case n.Status.Phase != api.NodeReady:
			is = string(n.Status.Phase)
		case n.Status.Fencing != "":
			is = "being switched off"
		case n.Status.CutOff != nil:
			is = "cut off"
		case n.Status.Stopping:
			is = "stopping"
		case n.Spec.Maintenance:
			is = "in maintenance"
		case n.Meta.Deleting():
			is = "leaving the cluster"
		default:
			if e, err := configdb.Evacuations.Get(v, n.Meta.ID); err == nil && !e.Status.Phase.Final() {
				is = "being evacuated"
			}
		}
		if is != "" {
			return api.Errorf(api.CodeRefused, "node %s is %s; wait until every node is well (muster node ls)", n.Meta.Name, is)
		}
	}
	return nil
}

// drill answers POST /vms/{name}/drill.
func (r *vmResource) drill(q *request) error {
	out, err := q.change(nil, func(c *change) (*effect, error) {
		vm, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		o := Drill{Placer: q.s.cfg.Placer, Actor: q.who.actor, Now: q.s.cfg.Now(), Promise: q.s.cfg.HA.Promise}
		task, err := o.Begin(c.v, c.tx, &vm)
		return &effect{status: http.StatusAccepted, kind: api.KindVM, id: vm.Meta.ID, task: task, object: &vm}, err
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// cancelDrill gives up a drill whose VM was not bound to another node yet.
func (c *change) cancelDrill(t *api.Task, d *api.Drill) (*effect, error) {
	if d.Status.Epoch != 0 {
		return nil, api.Errorf(api.CodeRefused, "vm %s is bound to node %s already and starts there", d.Spec.VM, d.Status.Node)
	}
	c.tx.RequireRevision(configdb.Drills.StatusKey(d.Meta.ID), d.Meta.StatusRevision)
	d.Spec.Cancel = true
	return cancelled(t), configdb.Drills.UpdateSpec(c.v, c.tx, d)
}

// drillRoutes are about drills that were.
func (s *Server) drillRoutes() []route {
	drills := &resource[api.DrillSpec, api.DrillStatus]{table: configdb.Drills, need: needViewer}
	s.kinds[api.KindDrill] = drills
	return reads(drills)
}

// drillMetrics render the last drill of every VM.
func drillMetrics(v *configdb.View, b *strings.Builder) {
	all, err := configdb.Drills.List(v)
	if err != nil || len(all) == 0 {
		return
	}
	each := func(name, help string, value func(*api.Drill) (float64, bool)) {
		header(b, name, "gauge", help)
		for i := range all {
			if n, ok := value(&all[i]); ok {
				fmt.Fprintf(b, "%s{project=%q,vm=%q} %g\n", name, all[i].Meta.Project, all[i].Spec.VM, n)
			}
		}
	}
	each("muster_ha_drill_succeeded", "1 if the last drill of the VM that is over ended well, 0 if it failed or was left out.", func(d *api.Drill) (float64, bool) {
		return truth(d.Status.Phase == api.TaskSucceeded), d.Status.Over()
	})
	each("muster_ha_drill_success_timestamp_seconds", "When a drill of the VM ended well last.", func(d *api.Drill) (float64, bool) {
		at := d.Status.SucceededAt
		if at == nil {
			return 0, false
		}
		return float64(at.Unix()), true
	})
	each("muster_ha_drill_seconds", "From the end of QEMU until it ran on the other node, of a last drill that ended well.", func(d *api.Drill) (float64, bool) {
		took := d.Status.Took()
		return took.Seconds(), took > 0
	})
}
