// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// State is what a plan is made of, read from one view. It is not changed after
// Read, so that many plans may be made of it at once.
type State struct {
	View     *configdb.View
	Nodes    map[string]*api.Node
	Bindings []api.Binding // those whose VM and node are known, in order of creation
	// All bindings, as they are.
	All []api.Binding
	VMs map[string]*api.VM
	// Broken are VMs that cannot be read, by ID.
	Broken map[string]error
	// later are lost nodes that live on in a later life of the cluster.
	later map[string]bool
}

// Read reads the state. What cannot be read is left out and reported; the state
// is good for the rest.
func Read(v *configdb.View) (*State, error) {
	s := &State{View: v, Nodes: map[string]*api.Node{}, VMs: map[string]*api.VM{}, Broken: map[string]error{}, later: map[string]bool{}}
	nodes, err := configdb.Nodes.List(v)
	for i := range nodes {
		id := nodes[i].Meta.ID
		s.Nodes[id] = &nodes[i]
		if _, later := v.Get(configdb.LaterLifeKey(id)); later {
			s.later[id] = true
		}
	}
	bindings, err2 := configdb.Bindings.List(v)
	s.All = bindings
	errs := []error{err, err2}
	for i := range bindings {
		id := bindings[i].Meta.ID
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			if api.CodeOf(err) != api.CodeNotFound {
				s.Broken[id] = err
				errs = append(errs, fmt.Errorf("vm %s: %w", id, err))
			}
			continue
		}
		s.VMs[id] = &vm
		if s.Nodes[bindings[i].Spec.NodeID] != nil {
			s.Bindings = append(s.Bindings, bindings[i])
		}
	}
	return s, errors.Join(errs...)
}

// lost reports whether the node is lost in the database and its VMs with it.
func (s *State) lost(nodeID string) bool {
	n := s.Nodes[nodeID]
	return n != nil && n.Status.Phase == api.NodeLost && !s.later[nodeID]
}

// gone reports whether the owner of a binding is lost, or locked out of all that
// its VM writes.
func (s *State) gone(b *api.Binding) bool {
	return s.lost(b.Spec.NodeID) || s.lockedOut(b)
}

// lockedOut reports whether a guarded VM has been taken from its node.
func (s *State) lockedOut(b *api.Binding) bool {
	pools := b.Spec.Guarding()
	return len(pools) > 0 && !s.later[b.Spec.NodeID] && s.Nodes[b.Spec.NodeID].Status.LockedOut(pools)
}

// AnyGone reports whether a VM is bound to a node that cannot run it any more.
func (s *State) AnyGone() bool {
	return slices.ContainsFunc(s.Bindings, func(b api.Binding) bool { return s.gone(&b) })
}

// Find returns the node with a name or ID.
func (s *State) Find(nameOrID string) (*api.Node, error) {
	if n := s.Nodes[nameOrID]; n != nil {
		return n, nil
	}
	for _, n := range s.Nodes {
		if n.Meta.Name == nameOrID {
			return n, nil
		}
	}
	return nil, api.Errorf(api.CodeNotFound, "node %q does not exist", nameOrID)
}

// Names of the nodes with these IDs, in order.
func (s *State) Names(ids []string) []string {
	out := make([]string, 0, len(ids))
	for _, id := range ids {
		if n := s.Nodes[id]; n != nil {
			out = append(out, n.Meta.Name)
		}
	}
	slices.SortFunc(out, strings.Compare)
	return out
}

// Running counts the VMs that are meant to run, by the ID of their node.
func (s *State) Running() (protected, unprotected map[string]int) {
	protected, unprotected = map[string]int{}, map[string]int{}
	for i := range s.Bindings {
		b := &s.Bindings[i]
		switch {
		case !WantsRun(s.VMs[b.Meta.ID]):
		case b.Spec.Protected:
			protected[b.Spec.NodeID]++
		default:
			unprotected[b.Spec.NodeID]++
		}
	}
	return protected, unprotected
}
