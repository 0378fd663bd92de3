// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// vmsPerTxn is how many VMs are created in one transaction.
	vmsPerTxn = 20
	// attempts of a report that meets another change of its object.
	attempts = 8
	memory   = 4 * api.GiB
	diskSize = 40 * api.GiB
)

// vm is what the simulation remembers of a VM.
type vm struct {
	id   string
	node int // that it is bound to
}

// fleet is the VMs by the node that they are bound to.
type fleet [][]vm

// bind spreads VMs over the nodes.
func bind(vms, nodes int) fleet {
	f := make(fleet, nodes)
	for i := range vms {
		f[i%nodes] = append(f[i%nodes], vm{id: api.NewID(), node: i % nodes})
	}
	return f
}

// createNode adds a node's own object.
func createNode(ctx context.Context, n *node) error {
	o := api.Node{Meta: api.NewMeta(api.KindNode, "", n.name()), Spec: api.NodeSpec{Address: address(n.index)}}
	o.Meta.ID = n.id
	o.Status = api.NodeStatus{ObservedGeneration: 1, Phase: api.NodeReady, Version: "0.1.0", CPUs: 64, Memory: 512 * api.GiB, GuardLevel: "hardware watchdog"}
	if err := o.Prepare(); err != nil {
		return err
	}
	tx := &configdb.Txn{Actor: "node:" + n.name()}
	if err := configdb.Nodes.Create(tx, &o); err != nil {
		return err
	}
	_, err := n.Txn(ctx, tx)
	return err
}

// createVMs adds VMs with all that belongs to them: the disk's volume and the
// binding, names, references and history.
func createVMs(ctx context.Context, n *node, vms []vm) error {
	tx := &configdb.Txn{Actor: "user:admin"}
	for _, x := range vms {
		short := x.id[len(x.id)-12:]
		vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "vm-"+short+"-disk0"), Spec: api.VolumeSpec{Pool: "local", Size: diskSize, Node: n.name()}}
		vol.Status = api.VolumeStatus{ObservedGeneration: 1, Phase: api.StorageReady, Format: "qcow2", Size: diskSize}
		m := api.VM{Meta: api.NewMeta(api.KindVM, "", "vm-"+short), Spec: api.VMSpec{
			CPUs: 2, Memory: memory, HA: api.HARestart, Power: api.PowerRunning, Disks: []api.VMDisk{{Volume: vol.Meta.Name}}, NICs: []api.VMNIC{{Network: "servers"}},
		}}
		m.Meta.ID = x.id
		m.Meta.Labels = map[string]string{"team": "a" + short[:2], "tier": "web"}
		m.Status = status(n, 0)
		b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", m.Meta.Name), Spec: api.BindingSpec{NodeID: n.id, Node: n.name(), Epoch: 1, Protected: true}}
		b.Meta.ID = x.id
		for _, prepare := range []func() error{vol.Prepare, m.Prepare, b.Prepare} {
			if err := prepare(); err != nil {
				return err
			}
		}
		for _, err := range []error{configdb.Volumes.Create(tx, &vol), configdb.VMs.Create(tx, &m), configdb.Bindings.CreateUnnamed(tx, &b)} {
			if err != nil {
				return err
			}
		}
		// Refer would require the volume before it is there.
		tx.Put(configdb.Volumes.RefPrefix(vol.Meta.ID)+string(api.KindVM)+"/"+m.Meta.ID, nil)
	}
	_, err := n.Txn(ctx, tx)
	return err
}

// status is what a node says of a VM for the k-th time.
func status(n *node, k int) api.VMStatus {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(k) * time.Minute)
	return api.VMStatus{
		ObservedGeneration: 1, Phase: api.VMRunning, Node: n.name(), Epoch: 1, PID: 4000 + k, StartedAt: &began, Accelerator: "kvm", RebootsDone: uint64(k), //nolint:gosec // small
		Conditions: []api.Condition{{Type: "Protected", OK: true, Reason: "GuardArmed", Message: fmt.Sprintf("the guard of node %s holds the lease (report %d)", n.name(), k), Since: began}},
	}
}

// report writes one change of a VM's status, as its node does.
func report(ctx context.Context, n *node, x vm, k int) error {
	_, err := configdb.Transact(ctx, n, "node:"+n.name(), attempts, func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, x.id)
		if err != nil {
			return err
		}
		o.Status = status(n, k)
		return configdb.VMs.UpdateStatus(v, tx, &o)
	})
	if err != nil {
		return fmt.Errorf("%s reports on %s: %w", n.name(), strings.ToLower(x.id), err)
	}
	return nil
}
