// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

func (r *vmResource) moveRoute() route {
	return route{
		method: http.MethodPost, path: base + "vms/{name}/move", need: needOperator, handle: r.move,
		summary: "Move a stopped VM with its volumes to another node or pool", params: longParams,
		in: typeOf[api.MoveRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted,
	}
}

func (r *volumeResource) moveRoute() route {
	return route{
		method: http.MethodPost, path: base + "volumes/{name}/move", need: needOperator, handle: r.move,
		summary: "Move a volume that no guest uses to another pool or node", params: longParams,
		in: typeOf[api.MoveRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted,
	}
}

// move answers POST /vms/{name}/move.
func (r *vmResource) move(q *request) error {
	return q.move(func(c *change, m *Move, in *api.MoveRequest) (*effect, error) {
		vm, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		task, err := m.Begin(c.v, c.tx, vm, in)
		return &effect{status: http.StatusAccepted, kind: api.KindVM, id: vm.Meta.ID, task: task}, err
	})
}

// move answers POST /volumes/{name}/move.
func (r *volumeResource) move(q *request) error {
	return q.move(func(c *change, m *Move, in *api.MoveRequest) (*effect, error) {
		vol, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		task, err := m.BeginVolume(c.v, c.tx, vol, in)
		return &effect{status: http.StatusAccepted, kind: api.KindVolume, id: vol.Meta.ID, task: task}, err
	})
}

func (q *request) move(begin func(c *change, m *Move, in *api.MoveRequest) (*effect, error)) error {
	var in api.MoveRequest
	body, err := q.wish(&in)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		return begin(c, &Move{Placer: q.s.cfg.Placer, Actor: q.who.actor, deadlines: q.s.cfg.Now}, &in)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

// nodeOf finds a node that has to be ready.
func nodeOf(v *configdb.View, name, field string) (api.Node, error) {
	n, err := configdb.Nodes.Find(v, api.DefaultProject, name)
	if err != nil {
		return n, atField(err, field)
	}
	return n, takesPart(&n)
}

func takesPart(n *api.Node) error {
	if n.Status.Phase != api.NodeReady {
		return api.Errorf(api.CodeRefused, "node %s is %s, and it takes part in the move", n.Meta.Name, n.Status.Phase)
	}
	return nil
}

// readyOn refuses a pool that a node cannot use now.
func readyOn(v *configdb.View, pool *api.Pool, n *api.Node) error {
	st, err := configdb.PoolStateOf(v, pool.Meta.ID, n.Meta.ID)
	if err != nil || !st.Status.Ready {
		return api.Errorf(api.CodeRefused, "pool %s is not ready on node %s; see muster pool show %s", pool.Meta.Name, n.Meta.Name, pool.Meta.Name)
	}
	return nil
}

// BeginVolume adds to a transaction what begins the move of one volume, alone, and
// returns the ID of its task.
func (m Move) BeginVolume(v *configdb.View, tx *configdb.Txn, vol api.Volume, in *api.MoveRequest) (string, error) {
	if id := vmOf(v, vol.Meta.ID); id != "" {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return "", err
		}
		return m.beginAttached(v, tx, vm, vol, in)
	}
	b := &moving{Move: m, v: v, tx: tx, project: vol.Meta.Project}
	if err := b.known(); err != nil {
		return "", err
	}
	if op, err := configdb.Operations.Get(v, vol.Meta.ID); err == nil {
		return "", api.Errorf(api.CodeRefused, "volume %s is being %s; wait for task %s", vol.Meta.Name, op.Spec.Doing(), op.Spec.TaskID)
	}
	if by := configdb.Volumes.Referrers(v, vol.Meta.ID); len(by) > 0 {
		return "", api.Errorf(api.CodeRefused, "volume %s is being copied into an image; wait for that", vol.Meta.Name)
	}
	tx.RequireEmpty(configdb.Volumes.RefPrefix(vol.Meta.ID))
	node, err := b.freeNode(&vol, in)
	if err != nil {
		return "", err
	}
	if b.to, err = nodeOf(v, node, "node"); err != nil {
		return "", err
	}
	if err := b.add(&vol, in.Pool); err != nil {
		return "", err
	}
	if len(b.volumes) == 0 {
		return "", alreadyThere("volume "+vol.Meta.Name, in)
	}
	configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindOperation, vol.Meta.ID)
	return b.write(api.ActionVolumeMove, api.KindVolume, vol.Meta, api.OperationSpec{})
}

// freeNode chooses the node that a volume of no VM comes to: the one of the request,
// else the one that it is on, or if a pool of all nodes is left a node that has both
// pools.
func (b *moving) freeNode(vol *api.Volume, in *api.MoveRequest) (string, error) {
	if in.Node != "" {
		return in.Node, nil
	}
	from, err := configdb.Pools.Find(b.v, api.DefaultProject, vol.Spec.Pool)
	if err != nil {
		return "", err
	}
	to, err := configdb.Pools.Find(b.v, api.DefaultProject, in.Pool)
	if err != nil {
		return "", atField(err, "pool")
	}
	if from.Spec.Type == api.PoolDir {
		return vol.Spec.Node, nil
	}
	if to.Spec.Type == api.PoolDir {
		return "", &api.Error{Code: api.CodeRefused, Field: "node", Detail: fmt.Sprintf("pool %s is another on each node; say to which volume %s is to move", to.Meta.Name, vol.Meta.Name)}
	}
	for _, st := range poolStates(b.v, to.Meta.ID) {
		n, err := configdb.Nodes.Get(b.v, st.Spec.NodeID)
		if err == nil && st.Status.Ready && n.Status.Phase == api.NodeReady && readyOn(b.v, &from, &n) == nil {
			return n.Meta.Name, nil
		}
	}
	return "", api.Errorf(api.CodeRefused, "no node has both pool %s and pool %s ready; see muster pool ls", from.Meta.Name, to.Meta.Name)
}

// beginAttached moves one volume of a stopped VM to another pool of the VM's node.
func (m Move) beginAttached(v *configdb.View, tx *configdb.Txn, vm api.VM, vol api.Volume, in *api.MoveRequest) (string, error) {
	b, err := m.stopped(v, tx, vm)
	if err != nil {
		return "", err
	}
	if in.Pool == "" || in.Node != "" && in.Node != b.from.Meta.Name && in.Node != b.from.Meta.ID {
		return "", &api.Error{Code: api.CodeRefused, Field: "node", Detail: fmt.Sprintf("volume %s belongs to vm %s, and goes to another node with it: muster vm move %s --node NODE", vol.Meta.Name, vm.Meta.Name, vm.Meta.Name)}
	}
	b.to = b.from
	if err := b.add(&vol, in.Pool); err != nil {
		return "", err
	}
	if len(b.volumes) == 0 {
		return "", alreadyThere("volume "+vol.Meta.Name, in)
	}
	return b.writeVM()
}

func alreadyThere(what string, in *api.MoveRequest) error {
	field := "pool"
	if in.Pool == "" {
		field = "node"
	}
	return &api.Error{Code: api.CodeRefused, Field: field, Detail: what + " is there already"}
}

// moved names the operation that moves a volume, for what must wait for it.
func moved(v *configdb.View, vol *api.Volume) (api.Operation, bool) {
	for _, id := range []string{vol.Meta.ID, vmOf(v, vol.Meta.ID)} {
		op, err := configdb.Operations.Get(v, id)
		if id != "" && err == nil && op.Spec.Move != nil &&
			slices.ContainsFunc(op.Spec.Move.Volumes, func(m api.VolumeMove) bool { return m.ID == vol.Meta.ID }) {
			return op, true
		}
	}
	return api.Operation{}, false
}

// stays refuses to change a volume that is on its way.
func (c *change) stays(vol *api.Volume) error {
	if op, ok := moved(c.v, vol); ok {
		return api.Errorf(api.CodeRefused, "volume %s is being moved; wait for task %s", vol.Meta.Name, op.Spec.TaskID)
	}
	for _, id := range []string{vol.Meta.ID, vmOf(c.v, vol.Meta.ID)} {
		if id != "" {
			e, _ := c.v.Get(configdb.Operations.SpecKey(id))
			c.tx.RequireRevision(configdb.Operations.SpecKey(id), e.Revision)
		}
	}
	return nil
}

// mayMove refuses what an older node would not respect.
func mayMove(v *configdb.View) error {
	if f := feature.Moves; !f.InForce(v) {
		return api.Errorf(api.CodeRefused, "moves of volumes and images made of them need feature level %d, and the cluster is at %d; upgrade the nodes that muster cluster status names", f.Level(), max(1, feature.Level(v)))
	}
	return nil
}
