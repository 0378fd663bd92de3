// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/history"
)

// past is what a revert does with objects of a kind. What it leaves out is done
// as PUT does it.
type past[S, T any] struct {
	// keep puts into want the fields of now that are no configuration: what runs,
	// where, and what never changes. docs/history.md lists them.
	keep func(now, want *api.Object[S, T])
	// restore takes the place of the kind's update.
	restore func(c *change, old, want *api.Object[S, T]) (*effect, error)
	// remake brings back an object that is gone, under its old ID. Without it,
	// noRemake says why that is not possible.
	remake   func(c *change, o *api.Object[S, T]) (*effect, error)
	noRemake string
	// unmake adds to a transaction what goes with an object that was not there
	// yet, or refuses. Without it, noUnmake says why it stays.
	unmake   func(c *change, o *api.Object[S, T]) error
	noUnmake string
}

// reverter is a kind whose objects a revert can bring back.
type reverter interface {
	// bring makes an object what it was, in c's transaction: was is the stored
	// form of then, nil if there was none.
	bring(c *change, o history.Object, was []byte) (*effect, error)
}

// bring implements reverter.
func (rs *resource[S, T]) bring(c *change, o history.Object, was []byte) (*effect, error) {
	now, err := rs.table.Get(c.v, o.ID)
	gone := err != nil && api.CodeOf(err) == api.CodeNotFound
	if err != nil && !gone {
		return nil, err
	}
	var want api.Object[S, T]
	if was != nil {
		newer, err := want.Decode(was, nil)
		if err != nil {
			return nil, err
		}
		if newer {
			return nil, fmt.Errorf("%s %s: %w", rs.table.Kind, want.Meta.Name, api.ErrNewerSchema)
		}
	}
	switch {
	case gone && was == nil:
		return &effect{}, nil
	case gone:
		return rs.bringBack(c, o, &want)
	case now.Meta.Deleting():
		return nil, api.Errorf(api.CodeRefused, "it is being deleted, and that cannot be stopped")
	case was == nil:
		if rs.past.unmake == nil {
			return nil, api.Errorf(api.CodeRefused, "it was not there yet, and %s", rs.past.noUnmake)
		}
		if err := rs.past.unmake(c, &now); err != nil {
			return nil, err
		}
		rs.table.Delete(c.tx, &now)
		return &effect{kind: rs.table.Kind, id: now.Meta.ID}, nil
	}
	return rs.bringTo(c, &now, &want)
}

// bringTo changes an object that is there, by the rules of PUT.
func (rs *resource[S, T]) bringTo(c *change, now, then *api.Object[S, T]) (*effect, error) {
	want := now.Clone()
	want.Meta.Labels, want.Spec = then.Meta.Labels, then.Spec
	if rs.past.keep != nil {
		rs.past.keep(now, &want)
	}
	if err := want.Prepare(); err != nil {
		return nil, err
	}
	if rs.past.restore != nil {
		return rs.past.restore(c, now, &want)
	}
	return rs.update(c, now, &want)
}

// bringBack makes an object again that is gone, by the rules of POST.
func (rs *resource[S, T]) bringBack(c *change, o history.Object, want *api.Object[S, T]) (*effect, error) {
	if rs.past.remake == nil {
		return nil, api.Errorf(api.CodeRefused, "it was deleted, and %s", rs.past.noRemake)
	}
	last, ok := history.Last(c.v, o)
	if !ok {
		return nil, fmt.Errorf("%s %s has no history", o.Kind, o.ID)
	}
	want.Meta.DeletingAt, want.Meta.Finalizers = nil, nil
	want.Meta.Generation++
	if err := want.Prepare(); err != nil {
		return nil, err
	}
	again := *c
	again.after = last.Revision()
	return rs.past.remake(&again, want)
}

// firstEpoch is the epoch of the first binding of a VM. One that is brought back
// may have left a process somewhere under an epoch that nobody remembers: each
// of them took at least one revision, so this one is above them all.
func (c *change) firstEpoch() uint64 {
	if c.after > 0 {
		return c.v.Revision()
	}
	return 1
}

// isGlobal reports whether the kind belongs to no project.
func (rs *resource[S, T]) isGlobal() bool { return rs.global }

// Power and place of a VM are what it does, not what it is: a revert neither
// starts, stops nor moves one.
func (r *vmResource) reverts() past[api.VMSpec, api.VMStatus] {
	return past[api.VMSpec, api.VMStatus]{
		keep: func(now, want *api.VM) {
			want.Spec.Power, want.Spec.ForceStop, want.Spec.Reboots = now.Spec.Power, now.Spec.ForceStop, now.Spec.Reboots
		},
		remake: func(c *change, o *api.VM) (*effect, error) {
			o.Spec.Power, o.Spec.ForceStop, o.Spec.Reboots = api.PowerStopped, false, 0
			for i, d := range o.Spec.Disks {
				if _, err := configdb.Volumes.Find(c.v, o.Meta.Project, d.Volume); err != nil {
					return nil, api.Errorf(api.CodeRefused, "its volume %q (spec.disks[%d]) is gone, and its data with it", d.Volume, i)
				}
			}
			return r.make(c, o)
		},
		noUnmake: "its disks would be lost: remove it with muster vm rm",
	}
}

// Node is where the storage work of an image or volume is done: place, too.
func (r *imageResource) reverts() past[api.ImageSpec, api.ImageStatus] {
	return past[api.ImageSpec, api.ImageStatus]{
		keep:     func(now, want *api.Image) { want.Spec.Node = now.Spec.Node },
		noRemake: "its content is gone: import or upload it again",
		noUnmake: "its content would be lost: remove it with muster image rm",
	}
}

func (r *volumeResource) reverts() past[api.VolumeSpec, api.VolumeStatus] {
	return past[api.VolumeSpec, api.VolumeStatus]{
		keep:     func(now, want *api.Volume) { want.Spec.Node = now.Spec.Node },
		noRemake: "its data is gone",
		noUnmake: "its data would be lost: remove it with muster volume rm",
	}
}

// The address of a node is where it is, and whether it is in maintenance says
// where VMs may be placed now.
func (r *nodeResource) reverts() past[api.NodeSpec, api.NodeStatus] {
	return past[api.NodeSpec, api.NodeStatus]{
		keep: func(now, want *api.Node) {
			want.Spec.Address, want.Spec.Maintenance = now.Spec.Address, now.Spec.Maintenance
		},
		noRemake: "a node comes back by joining: muster cluster join",
		noUnmake: "a node leaves by muster node remove",
	}
}

func (r *poolResource) reverts() past[api.PoolSpec, api.PoolStatus] {
	return past[api.PoolSpec, api.PoolStatus]{remake: r.make, unmake: r.unmake}
}

func (r *networkResource) reverts() past[api.NetworkSpec, api.NetworkStatus] {
	return past[api.NetworkSpec, api.NetworkStatus]{remake: r.make, unmake: r.unmake}
}

func (r *ippoolResource) reverts() past[api.IPPoolSpec, api.IPPoolStatus] {
	return past[api.IPPoolSpec, api.IPPoolStatus]{remake: r.make, unmake: r.unmake}
}

func (r *uplinkResource) reverts() past[api.UplinkSpec, api.UplinkStatus] {
	return past[api.UplinkSpec, api.UplinkStatus]{remake: r.make, unmake: r.unmake}
}

func (r *userResource) reverts() past[api.UserSpec, api.UserStatus] {
	return past[api.UserSpec, api.UserStatus]{remake: r.make, unmake: r.unmake}
}

// plainReverts are those of kinds that hold nothing but themselves.
func plainReverts[S, T any](rs *resource[S, T], most int) past[S, T] {
	return past[S, T]{
		remake: func(c *change, o *api.Object[S, T]) (*effect, error) { return makePlain(c, rs, most, o) },
		unmake: func(*change, *api.Object[S, T]) error { return nil },
	}
}

// A receiver gets back the secret that it had then, sealed as it is.
func (r *receiverResource) reverts() past[api.ReceiverSpec, api.ReceiverStatus] {
	p := plainReverts(&r.resource, maxReceivers)
	p.restore = func(c *change, _, want *api.Receiver) (*effect, error) { return r.store(c, want) }
	return p
}

// A power device gets back the password that it had then, with the address that
// it was for.
func (r *powerDeviceResource) reverts() past[api.PowerDeviceSpec, struct{}] {
	p := plainReverts(&r.resource, maxPowerDevices)
	p.restore = func(c *change, _, want *api.PowerDevice) (*effect, error) { return r.store(c, want) }
	return p
}

// clusterReverter brings back the settings of the cluster. Everything else of
// that object is the cluster's own.
func clusterReverter() reverter {
	rs := &resource[api.ClusterSpec, struct{}]{table: configdb.Clusters, global: true}
	rs.past = past[api.ClusterSpec, struct{}]{
		keep: func(now, want *api.Cluster) {
			settings := want.Spec.History
			want.Spec = now.Spec
			want.Spec.History = settings
		},
		noRemake: "a cluster is not made again", noUnmake: "a cluster is not removed",
	}
	rs.update = func(c *change, _, want *api.Cluster) (*effect, error) {
		checked := want.Spec.History
		checked.SetDefaults()
		if err := checked.Validate(); err != nil {
			return nil, err
		}
		return rs.store(c, want)
	}
	return rs
}

// reverterOf returns what brings back objects of a kind.
func (s *Server) reverterOf(kind api.Kind) (reverter, error) {
	if kind == api.KindCluster {
		return clusterReverter(), nil
	}
	if r, ok := s.kinds[kind].(reverter); ok {
		return r, nil
	}
	return nil, fmt.Errorf("kind %s has a history and no way back", kind)
}
