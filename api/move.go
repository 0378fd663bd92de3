// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// MoveSpec is the wish of an operation that moves volumes which no guest uses: those
// of a stopped VM (vm.move), or one that no VM has (volume.move, whose operation has
// the ID of the volume). The node that the volumes come to owns the operation.
type MoveSpec struct {
	// Node is the name of the node that the VM and its volumes come to.
	Node string `json:"node"`
	// FromNodeID and From name the node that the VM is bound to, if it has one.
	FromNodeID string `json:"fromNodeID,omitempty"`
	From       string `json:"from,omitempty"`
	// Volumes are those whose files move. None: the VM is bound elsewhere only.
	Volumes []VolumeMove `json:"volumes,omitempty"`
}

// VolumeMove is one volume on its way.
type VolumeMove struct {
	ID string `json:"id"`
	// Pool is the name of the pool that it comes to.
	Pool string `json:"pool"`
	// Whole: it is a clone of an image that stays behind, and becomes independent of
	// it.
	Whole bool `json:"whole,omitempty"`
}

// MoveRequest is the body of POST /vms/{name}/move and /volumes/{name}/move.
type MoveRequest struct {
	// Node is the name of a node; the present one when empty.
	Node string `json:"node,omitempty" doc:"node to move to; the present one when left out"`
	// Pool is the name of a pool; each volume's own when empty.
	Pool string `json:"pool,omitempty" doc:"pool to move to; that of each volume when left out"`
}

// Validate checks the names.
func (r *MoveRequest) Validate() error {
	if r.Node == "" && r.Pool == "" {
		return Invalid("pool", "is missing; give a pool, a node or both to move to")
	}
	if r.Node != "" {
		if err := ValidName("node", r.Node); err != nil {
			return err
		}
	}
	if r.Pool != "" {
		return ValidName("pool", r.Pool)
	}
	return nil
}
