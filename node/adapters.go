// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"io"
	"net"
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/placement"
	"github.com/muster-vm/muster/rest"
)

// This file supplies to each module the interfaces that it declared.

// recoveryPlacer is placement as ha sees it.
type recoveryPlacer struct{}

// Load implements ha.Placer.
func (recoveryPlacer) Load(s *plan.State) (plan.Fleet, error) {
	f, err := placement.LoadFleet(s.View, s.All, s.VMs, s.Broken)
	return planFleet{f}, err
}

// planFleet is placement's fleet as ha/plan sees it.
type planFleet struct{ *placement.Fleet }

// Fork implements plan.Fleet.
func (f planFleet) Fork() plan.Fleet { return planFleet{f.Fleet.Fork()} }

// restPlacer is placement as rest sees it.
type restPlacer struct{}

// Reserve implements rest.Placer.
func (restPlacer) Reserve(v *configdb.View, tx *configdb.Txn, nodeID string) {
	placement.Reserve(v, tx, nodeID)
}

// Choose implements rest.Placer.
func (restPlacer) Choose(v *configdb.View, vm api.VM, newDisks []api.VMDisk, only string) (nodeID, node string, err error) {
	vm = vm.Clone()
	vm.Spec.Disks = append(vm.Spec.Disks, newDisks...)
	d, err := placement.Choose(v, placement.Request{VM: vm, Only: only})
	return d.NodeID, d.Node, err
}

// Check implements rest.Placer.
func (restPlacer) Check(v *configdb.View, vm api.VM) error { return placement.Check(v, &vm) }

// ChooseOther implements rest.Placer.
func (restPlacer) ChooseOther(v *configdb.View, vm api.VM, exclude map[string]string, only string, copied []string) (nodeID, node string, err error) {
	d, err := placement.Choose(v, placement.Request{VM: vm, Only: only, Copied: copied, Exclude: exclude})
	return d.NodeID, d.Node, err
}

// clusterOf is the current membership as rest sees it.
type clusterOf struct{ d *Daemon }

// Status implements rest.Cluster.
func (c clusterOf) Status(ctx context.Context) (api.ClusterStatus, error) {
	m := c.d.current()
	if m == nil {
		return api.ClusterStatus{}, notMember()
	}
	return m.Status(ctx)
}

// CreateJoinToken implements rest.Cluster.
func (c clusterOf) CreateJoinToken(ctx context.Context, actor string, r api.JoinTokenRequest) (api.JoinToken, error) {
	m := c.d.current()
	if m == nil {
		return api.JoinToken{}, notMember()
	}
	return m.CreateJoinToken(ctx, actor, r)
}

// Admit implements rest.Cluster.
func (c clusterOf) Admit(ctx context.Context, r api.AdmitRequest) (api.AdmitResult, error) {
	m := c.d.current()
	if m == nil {
		return api.AdmitResult{}, notMember()
	}
	return m.Admit(ctx, r)
}

// Transfer implements rest.Cluster.
func (c clusterOf) Transfer(ctx context.Context, node string) (api.TransferResult, error) {
	m := c.d.current()
	if m == nil {
		return api.TransferResult{}, notMember()
	}
	return m.Transfer(ctx, node)
}

// RemoveNode implements rest.Cluster.
func (c clusterOf) RemoveNode(ctx context.Context, audit api.Event, name string, force bool) error {
	m := c.d.current()
	if m == nil {
		return notMember()
	}
	return m.RemoveNode(ctx, audit, name, force)
}

// backupsOf are the backups of this node as rest sees them.
type backupsOf struct{ d *Daemon }

// Prepare implements rest.Backups.
func (b backupsOf) Prepare(ctx context.Context, stale bool, passphrase string) (uint64, func(io.Writer) error, error) {
	m := b.d.current()
	if m == nil {
		return 0, nil, notMember()
	}
	return m.backups.prepare(ctx, stale, passphrase)
}

// Local implements rest.Backups.
func (b backupsOf) Local() (api.LocalBackups, error) {
	m := b.d.current()
	if m == nil {
		return api.LocalBackups{}, notMember()
	}
	return m.backups.local()
}

// imagesOf is the storage of this node as rest sees it.
type imagesOf struct{ d *Daemon }

// Upload implements rest.Images.
func (i imagesOf) Upload(ctx context.Context, imageID string, r io.Reader, length int64, sha256 string) (api.Image, error) {
	m := i.d.current()
	if m == nil {
		return api.Image{}, notMember()
	}
	return m.storage.Upload(ctx, imageID, r, length, sha256)
}

// HasPool implements rest.Images.
func (i imagesOf) HasPool(v *configdb.View, pool string) bool {
	m := i.d.current()
	return m != nil && m.storage.HasPool(v, pool)
}

// machinesOf are the QEMUs of this node as rest sees them.
type machinesOf struct{ d *Daemon }

// QEMU implements rest.Machines.
func (o machinesOf) QEMU(ctx context.Context, vmID string, log int) (api.VMQEMU, error) {
	m := o.d.current()
	if m == nil {
		return api.VMQEMU{}, notMember()
	}
	return m.hyper.QEMU(ctx, vmID, log)
}

// MigrationTransfer implements rest.Machines.
func (o machinesOf) MigrationTransfer(ctx context.Context, vmID string) (*api.MigrationTransfer, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.hyper.MigrationTransfer(ctx, vmID)
}

// DirtyRate implements rest.Machines.
func (o machinesOf) DirtyRate(ctx context.Context, vmID string) (api.Size, error) {
	m := o.d.current()
	if m == nil {
		return 0, notMember()
	}
	return m.hyper.DirtyRate(ctx, vmID)
}

// consolesOf are the consoles of this node as rest sees them.
type consolesOf struct{ d *Daemon }

// History implements rest.Consoles.
func (c consolesOf) History(vmID string, n int) ([]byte, error) {
	m := c.d.current()
	if m == nil {
		return nil, notMember()
	}
	con, err := m.hyper.Console(vmID)
	if err != nil {
		return nil, err
	}
	return con.History(n), nil
}

// Attach implements rest.Consoles.
func (c consolesOf) Attach(_ context.Context, vmID string, history int) (rest.Console, error) {
	m := c.d.current()
	if m == nil {
		return nil, notMember()
	}
	con, err := m.hyper.Console(vmID)
	if err != nil {
		return nil, err
	}
	out, cancel, err := con.Subscribe(history)
	if err != nil {
		return nil, err
	}
	return attachment{con, out, cancel}, nil
}

// Display implements rest.Consoles.
func (c consolesOf) Display(ctx context.Context, vmID string) (rest.Console, error) {
	m := c.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.hyper.Display(ctx, vmID)
}

// Screenshot implements rest.Consoles.
func (c consolesOf) Screenshot(ctx context.Context, vmID string) ([]byte, error) {
	m := c.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.hyper.Screenshot(ctx, vmID)
}

// Guest implements rest.Consoles.
func (c consolesOf) Guest(vmID string) (rest.Guest, error) {
	m := c.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.hyper.GuestAgent(vmID)
}

type consoleWriter interface {
	Write(ctx context.Context, p []byte) error
}

type attachment struct {
	consoleWriter
	out    <-chan []byte
	cancel func()
}

// Output implements rest.Console.
func (a attachment) Output() <-chan []byte { return a.out }

// Close implements rest.Console.
func (a attachment) Close() { a.cancel() }

// peerTransport returns the transport for requests that are sent on to a node.
// It is kept, so that its connections are used again.
func (m *member) peerTransport(n api.Node) http.RoundTripper {
	m.peersMu.Lock()
	defer m.peersMu.Unlock()
	key := n.Meta.ID + "@" + n.Spec.Address
	if t := m.peers[key]; t != nil {
		return t
	}
	t := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return m.identity.Dial(ctx, n.Meta.ID, n.Spec.Address, clusternet.ProtoH1)
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 16,
	}
	m.peers[key] = t
	return t
}
