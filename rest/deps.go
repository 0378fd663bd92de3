// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Bootstrap makes this host a member of a cluster. Both calls fail with
// api.CodeRefused when it is one already.
type Bootstrap interface {
	Init(ctx context.Context, r api.InitRequest) (api.InitResult, error)
	Join(ctx context.Context, r api.JoinRequest) (api.JoinResult, error)
}

// Cluster is the membership of the cluster that this host belongs to.
type Cluster interface {
	Status(ctx context.Context) (api.ClusterStatus, error)
	CreateJoinToken(ctx context.Context, actor string, r api.JoinTokenRequest) (api.JoinToken, error)
	// Admit takes in a node that shows a join token.
	Admit(ctx context.Context, r api.AdmitRequest) (api.AdmitResult, error)
	// Transfer lets another voter, by name or the one that suits best, lead.
	Transfer(ctx context.Context, node string) (api.TransferResult, error)
	// RemoveNode takes a node out for good, for the actor of the audit event that it
	// writes with it; force is for one that is dead.
	RemoveNode(ctx context.Context, audit api.Event, name string, force bool) error
}

// Placer decides where VMs may run.
type Placer interface {
	// Choose returns a node for a VM. vm.Spec.Disks names existing volumes
	// only; newDisks are those that will be made with it, with their pool
	// filled in. If only is not empty, that node (by name) is the one
	// candidate. It fails with api.CodeUnplaceable and the reasons.
	Choose(v *configdb.View, vm api.VM, newDisks []api.VMDisk, only string) (nodeID, node string, err error)
	// Check fails if no node could ever run the VM, whatever else runs there: it
	// asks for more memory than any has, or for a CPU model that none knows.
	Check(v *configdb.View, vm api.VM) error
	// ChooseOther is Choose for a VM that is to leave its node. The nodes in exclude,
	// by ID with the reason, are no candidates. The volumes in copied go along.
	ChooseOther(v *configdb.View, vm api.VM, exclude map[string]string, only string, copied []string) (nodeID, node string, err error)
	// Reserve adds to a transaction what makes it conflict with any other that
	// takes memory on the same node since v.
	Reserve(v *configdb.View, tx *configdb.Txn, nodeID string)
}

// Images is this node's storage.
type Images interface {
	// Upload stores the content of an image whose spec.node is this node and
	// returns the image when it is ready. length is -1 when unknown, sha256
	// empty when the client gave none. It fails with api.CodeIncomplete when r
	// ends early, leaving the image ready for another try.
	Upload(ctx context.Context, imageID string, r io.Reader, length int64, sha256 string) (api.Image, error)
	// HasPool reports whether a pool, by name, is ready on this node.
	HasPool(v *configdb.View, pool string) bool
}

// Consoles are the serial consoles and screens of the VMs that this node is bound to.
type Consoles interface {
	// History returns at most the last n bytes of a VM's console. It fails
	// with api.CodeRefused when there is nothing to show.
	History(vmID string, n int) ([]byte, error)
	// Attach joins a console; its output begins with at most history bytes of
	// the past. It fails with api.CodeRefused when the VM does not run.
	Attach(ctx context.Context, vmID string, history int) (Console, error)
	// Display joins a VM's screen, which speaks RFB. It fails with
	// api.CodeRefused when there is none.
	Display(ctx context.Context, vmID string) (Console, error)
	// Screenshot returns what is on the screen, as PNG. It fails as Display does.
	Screenshot(ctx context.Context, vmID string) ([]byte, error)
	// Guest returns the agent in a guest, whether or not it answers. It fails
	// with api.CodeRefused when the VM does not run.
	Guest(vmID string) (Guest, error)
}

// Guest is the agent in one guest.
type Guest interface {
	GuestFacts
	GuestControl
}

// GuestFacts is what a guest says of itself.
type GuestFacts interface {
	// Refresh asks anew, unless it has just been asked.
	Refresh(ctx context.Context) error
	Known() api.GuestAgent
	FileSystems(ctx context.Context) ([]api.GuestFileSystem, error)
}

// GuestControl changes a guest. It fails with api.CodeUnsupported when the agent
// cannot, and api.CodeRefused when there is none or the state does not allow it.
type GuestControl interface {
	Exec(ctx context.Context, e api.GuestExec) (api.GuestExecResult, error)
	SetPassword(ctx context.Context, user, password string) error
	// Freeze returns how many file systems were frozen and when they are thawed
	// at the latest.
	Freeze(ctx context.Context, most time.Duration) (n int, until time.Time, err error)
	Thaw(ctx context.Context) (n int, err error)
}

// Console is one attachment.
type Console interface {
	// Output is closed when the VM ends or the reader fell too far behind.
	Output() <-chan []byte
	Write(ctx context.Context, p []byte) error
	Close()
}

// Backups are backups of the configuration database.
type Backups interface {
	// Prepare decides on the state to back up: the newest, or with stale what
	// this node has. It fails with api.CodeNoQuorum if nobody confirms that it
	// is the newest. write then delivers the backup.
	Prepare(ctx context.Context, stale bool, passphrase string) (revision uint64, write func(io.Writer) error, err error)
	// Local are those that this node keeps by itself.
	Local() (api.LocalBackups, error)
}

// Disaster is what helps when a cluster, or its majority, is lost.
type Disaster interface {
	// Restore founds a cluster on this host from a backup. It fails with
	// api.CodeRefused when the host is in a cluster.
	Restore(ctx context.Context, r api.RestoreRequest) (api.RestoreResult, error)
	// RecoveryPlan says whether the cluster may be recovered from this node.
	RecoveryPlan(ctx context.Context) (api.RecoveryPlan, error)
	// Recover begins the next life of the cluster with this node alone.
	Recover(ctx context.Context, r api.RecoveryRequest) (api.RecoveryResult, error)
}

// Peers reaches the other nodes.
type Peers interface {
	// Proxy returns a transport to a node, by name, that shows this node's
	// certificate and checks the other's, and the base URL to use with it. It
	// must speak HTTP/1.1, because consoles upgrade the connection.
	Proxy(node string) (http.RoundTripper, *url.URL, error)
}
