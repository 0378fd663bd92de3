// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
)

// passDrill is the leader's part of "Drills", DESIGN.md, for a VM that its owner gave up
// for one: it binds it to the chosen node, or lets the owner start it again. The drill gets
// its last word elsewhere.
func (c *lossCase) passDrill(v *configdb.View, tx *configdb.Txn, term uint64, fleet plan.Fleet, nodeID, node string, none error) error {
	d, err := configdb.Drills.Get(v, c.vm.Meta.ID)
	if api.IgnoreNotFound(err) != nil {
		return err
	}
	at := time.Now().UTC()
	switch {
	case err != nil || d.Status.Over() || d.Status.Ended == nil || d.Status.Epoch != 0 || d.Spec.Epoch != c.binding.Spec.Epoch:
		return c.takeBack(v, tx, "the drill is over")
	case d.Spec.Cancel:
		return c.takeBack(v, tx, "the drill was cancelled")
	case none != nil:
		d.Status.Refusal = none.Error()
		err = c.takeBack(v, tx, "no other node could take it in a drill")
	default:
		from := c.binding.Spec
		c.binding.Spec.RecoveredFrom = from.Recovered(&c.node, nodeID)
		err = c.passOn(v, tx, nil, nodeID, node, fmt.Sprintf("failed over from node %s in a drill", c.node.Meta.Name))
		if err == nil {
			err = fleet.Reserve(tx, nodeID)
		}
		m := api.NewFailoverMove(d.Status.Failover, &c.vm, at)
		m.Spec.Outcome, m.Spec.Term = api.HARestarts, term
		m.Spec.FromNodeID, m.Spec.FromEpoch = from.NodeID, from.Epoch
		m.Spec.NodeID, m.Spec.Node, m.Spec.Epoch = nodeID, node, c.binding.Spec.Epoch
		if err == nil {
			err = configdb.FailoverMoves.CreateUnnamed(tx, &m)
		}
		d.Status.NodeID, d.Status.Node, d.Status.Epoch, d.Status.MovedAt = nodeID, node, c.binding.Spec.Epoch, &at
		d.Status.Message = fmt.Sprintf("node %s starts it", node)
	}
	if err != nil {
		return err
	}
	tx.RequireRevision(configdb.Drills.SpecKey(d.Meta.ID), d.Meta.Revision)
	return configdb.Drills.UpdateStatus(v, tx, &d)
}

// takeBack lets the owner start a VM that it gave up for a drill.
func (c *lossCase) takeBack(v *configdb.View, tx *configdb.Txn, why string) error {
	c.vm.Status.Tries = nil
	c.vm.Status.Message = fmt.Sprintf("node %s starts it again: %s", c.node.Meta.Name, why)
	return configdb.VMs.UpdateStatus(v, tx, &c.vm)
}
