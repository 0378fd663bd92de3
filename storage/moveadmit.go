// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// admit checks that a node may have the volume that it asks for: this node has it,
// and an operation that is that node's moves it there.
func (s *Service) admit(hello streamHello, peer string) (*api.Volume, *api.VolumeMove, error) {
	v := s.cfg.DB.Local()
	op, err := configdb.Operations.Get(v, hello.Operation)
	if err != nil || op.Spec.Move == nil || op.Spec.TaskID != hello.Task || op.Status.Phase.Final() {
		// It may have begun a moment ago.
		return nil, nil, brokenError{api.Errorf(api.CodeNotFound, "node %s knows no move in task %s", s.cfg.NodeName, clip(hello.Task))}
	}
	if op.Spec.NodeID != peer {
		return nil, nil, api.Errorf(api.CodeForbidden, "the move in task %s is not one to the node that asks", op.Spec.TaskID)
	}
	i := slices.IndexFunc(op.Spec.Move.Volumes, func(o api.VolumeMove) bool { return o.ID == hello.Volume })
	if i < 0 {
		return nil, nil, api.Errorf(api.CodeForbidden, "the move in task %s does not have volume %s", op.Spec.TaskID, clip(hello.Volume))
	}
	vol, err := configdb.Volumes.Get(v, hello.Volume)
	if err != nil {
		return nil, nil, err
	}
	if vol.Spec.Node != s.cfg.NodeName {
		return nil, nil, api.Errorf(api.CodeConflict, "volume %s is on node %s", vol.Meta.Name, vol.Spec.Node)
	}
	if inUse(v, &vol) {
		return nil, nil, brokenError{api.Errorf(api.CodeConflict, "volume %s is in use by its vm", vol.Meta.Name)}
	}
	return &vol, &op.Spec.Move.Volumes[i], nil
}

// findNode returns the ID of a node by its name.
func findNode(v *configdb.View, name string) (string, error) {
	n, err := configdb.Nodes.Find(v, "", name)
	return n.Meta.ID, err
}
