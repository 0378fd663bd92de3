// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakePlacer gives each node the same memory.
type fakePlacer struct {
	mu       sync.Mutex
	capacity api.Size
	full     map[string]bool
	asked    []api.VMDisk
	last     api.VM // that a node was chosen for
}

func (p *fakePlacer) setFull(node string, full bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.full == nil {
		p.full = map[string]bool{}
	}
	p.full[node] = full
}

func used(v *configdb.View, nodeID, except string) api.Size {
	var sum api.Size
	vms, _ := configdb.VMs.List(v)
	for _, vm := range vms {
		b, err := configdb.Bindings.Get(v, vm.Meta.ID)
		if err == nil && b.Spec.NodeID == nodeID && vm.Spec.Power != api.PowerStopped && vm.Meta.ID != except {
			sum += vm.Spec.Memory
		}
	}
	return sum
}

func (p *fakePlacer) Choose(v *configdb.View, vm api.VM, newDisks []api.VMDisk, only string) (string, string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked, p.last = newDisks, vm
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return "", "", err
	}
	for _, n := range nodes {
		if only != "" && n.Meta.Name != only || n.Status.Phase != api.NodeReady || p.full[n.Meta.Name] {
			continue
		}
		if vm.Spec.Power != api.PowerStopped && used(v, n.Meta.ID, vm.Meta.ID)+vm.Spec.Memory > p.capacity {
			continue
		}
		return n.Meta.ID, n.Meta.Name, nil
	}
	return "", "", api.Errorf(api.CodeUnplaceable, "no node fits vm %s", vm.Meta.Name)
}

func (p *fakePlacer) Check(_ *configdb.View, vm api.VM) error {
	if m := vm.Spec.CPUModel(); m == "Quantum" {
		return api.Invalid("spec.cpu.model", "no node knows %q", m)
	}
	return nil
}

func (p *fakePlacer) ChooseOther(v *configdb.View, vm api.VM, exclude map[string]string, only string, _ []string) (string, string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return "", "", err
	}
	for _, n := range nodes {
		if why := exclude[n.Meta.ID]; why != "" && n.Meta.Name == only {
			return "", "", api.Errorf(api.CodeUnplaceable, "node %s: %s", only, why)
		}
		if exclude[n.Meta.ID] == "" && (only == "" || n.Meta.Name == only) && n.Status.Phase == api.NodeReady && !p.full[n.Meta.Name] {
			return n.Meta.ID, n.Meta.Name, nil
		}
	}
	return "", "", api.Errorf(api.CodeUnplaceable, "no node fits vm %s", vm.Meta.Name)
}

func (p *fakePlacer) Reserve(v *configdb.View, tx *configdb.Txn, nodeID string) {
	key := "test/reserve/" + nodeID
	e, _ := v.Get(key)
	tx.RequireRevision(key, e.Revision)
	tx.Put(key, nil)
}

// fakeMachines run every VM with the same arguments.
type fakeMachines struct{ node string }

func (m fakeMachines) QEMU(_ context.Context, vmID string, log int) (api.VMQEMU, error) {
	out := api.VMQEMU{Node: m.node, PID: 42, Argv: []string{"qemu", "-uuid", vmID}}
	for range log {
		out.Log = append(out.Log, api.QEMULogEntry{Kind: "event", Name: "RESUME"})
	}
	return out, nil
}

func (m fakeMachines) MigrationTransfer(context.Context, string) (*api.MigrationTransfer, error) {
	return &api.MigrationTransfer{State: "active", MemoryTotal: api.GiB, MemoryLeft: api.MiB}, nil
}

func (m fakeMachines) DirtyRate(context.Context, string) (api.Size, error) { return 3 * api.MiB, nil }

type fakeImages struct {
	db      configdb.DB
	mu      sync.Mutex
	without map[string]bool
	got     map[string]string // image ID → node that stored it
}

type nodeImages struct {
	*fakeImages
	node string
}

func (i nodeImages) HasPool(_ *configdb.View, pool string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return !i.without[i.node+"/"+pool]
}

func (i nodeImages) Upload(ctx context.Context, id string, r io.Reader, length int64, sum string) (api.Image, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return api.Image{}, fmt.Errorf("store image: %w", err)
	}
	if length >= 0 && int64(len(b)) != length {
		return api.Image{}, api.Errorf(api.CodeIncomplete, "got %d of %d bytes", len(b), length)
	}
	is := sha256.Sum256(b)
	if sum != "" && hex.EncodeToString(is[:]) != sum {
		return api.Image{}, api.Errorf(api.CodeChecksum, "the content is not what was announced")
	}
	i.mu.Lock()
	if i.got == nil {
		i.got = map[string]string{}
	}
	i.got[id] = i.node
	i.mu.Unlock()
	var img api.Image
	_, err = configdb.Transact(ctx, i.db, "test", maxAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		if img, err = configdb.Images.Get(v, id); err != nil {
			return err
		}
		img.Status.Phase, img.Status.Size = api.StorageReady, api.Size(len(b))
		return configdb.Images.UpdateStatus(v, tx, &img)
	})
	return img, err
}

type fakeConsoles struct {
	mu    sync.Mutex
	rings map[string][]byte
	guest fakeGuest
}

func (c *fakeConsoles) History(id string, n int) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.rings[id]
	if !ok {
		return nil, api.Errorf(api.CodeRefused, "the VM has not run here")
	}
	return b[max(0, len(b)-n):], nil
}

func (c *fakeConsoles) Attach(_ context.Context, id string, n int) (Console, error) {
	b, err := c.History(id, n)
	if err != nil {
		return nil, err
	}
	e := &echo{out: make(chan []byte, 16)}
	if len(b) > 0 {
		e.out <- b
	}
	return e, nil
}

func (c *fakeConsoles) Display(_ context.Context, id string) (Console, error) {
	b, err := c.History(id, 12)
	if err != nil {
		return nil, err
	}
	e := &echo{out: make(chan []byte, 16)}
	e.out <- b
	return e, nil
}

func (c *fakeConsoles) Screenshot(_ context.Context, id string) ([]byte, error) {
	return c.History(id, 4)
}

func (c *fakeConsoles) Guest(id string) (Guest, error) {
	if _, err := c.History(id, 1); err != nil {
		return nil, err
	}
	return &c.guest, nil
}

// fakeGuest is an agent that can everything; fail is what all calls answer.
type fakeGuest struct {
	fail     error
	password string
	ran      api.GuestExec
	frozen   bool
}

func (g *fakeGuest) Refresh(context.Context) error { return g.fail }
func (g *fakeGuest) Known() api.GuestAgent {
	return api.GuestAgent{Connected: true, Answering: g.fail == nil, Version: "7.2"}
}
func (g *fakeGuest) FileSystems(context.Context) ([]api.GuestFileSystem, error) {
	return []api.GuestFileSystem{{Mount: "/", Used: api.MiB, Total: api.GiB}}, g.fail
}
func (g *fakeGuest) Exec(_ context.Context, e api.GuestExec) (api.GuestExecResult, error) {
	g.ran = e
	return api.GuestExecResult{ExitCode: 3, Stdout: []byte("hello\n")}, g.fail
}
func (g *fakeGuest) SetPassword(_ context.Context, user, password string) error {
	g.password = user + ":" + password
	return g.fail
}
func (g *fakeGuest) Freeze(_ context.Context, most time.Duration) (int, time.Time, error) {
	if g.frozen {
		return 0, time.Time{}, api.Errorf(api.CodeRefused, "frozen already")
	}
	g.frozen = true
	return 2, time.Now().Add(most), g.fail
}
func (g *fakeGuest) Thaw(context.Context) (int, error) {
	g.frozen = false
	return 2, g.fail
}

// echo is a console whose guest repeats what is typed and ends on "bye".
type echo struct{ out chan []byte }

func (e *echo) Output() <-chan []byte { return e.out }
func (e *echo) Close()                {}
func (e *echo) Write(ctx context.Context, p []byte) error {
	if string(p) == "bye" {
		close(e.out)
		return nil
	}
	select {
	case e.out <- bytes.Clone(p):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

type fakeCluster struct {
	db      configdb.DB
	members []api.MemberStatus
	mu      sync.Mutex
	removed []string
	actor   string
	asked   []string
}

func (c *fakeCluster) Init(_ context.Context, r api.InitRequest) (api.InitResult, error) {
	return api.InitResult{Cluster: r.Name, Token: "muster_x"}, nil
}

func (c *fakeCluster) Join(_ context.Context, r api.JoinRequest) (api.JoinResult, error) {
	if r.Token == "used" {
		return api.JoinResult{}, api.Errorf(api.CodeRefused, "the join token was used already; create another")
	}
	return api.JoinResult{Node: "m1"}, nil
}

func (c *fakeCluster) Status(context.Context) (api.ClusterStatus, error) {
	return api.ClusterStatus{Cluster: "c", Node: "m1", Leader: "m1", Term: 7, Revision: 9, Quorum: true, Members: c.members}, nil
}

func (c *fakeCluster) CreateJoinToken(_ context.Context, actor string, r api.JoinTokenRequest) (api.JoinToken, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.actor = actor
	return api.JoinToken{Token: "join-" + string(r.Role), ExpiresAt: time.Now().Add(time.Duration(r.TTLSeconds) * time.Second)}, nil
}

func (c *fakeCluster) Admit(_ context.Context, r api.AdmitRequest) (api.AdmitResult, error) {
	if r.Secret != "right" {
		return api.AdmitResult{}, api.Errorf(api.CodeUnauthorized, "the join token is unknown, expired or used")
	}
	return api.AdmitResult{NodeID: "id"}, nil
}

func (c *fakeCluster) Transfer(_ context.Context, node string) (api.TransferResult, error) {
	if node == "replica" {
		return api.TransferResult{}, api.Errorf(api.CodeRefused, "node replica has no vote")
	}
	return api.TransferResult{Leader: node, Term: 2}, nil
}

// RemoveNode writes the event, as the real one does with the removal.
func (c *fakeCluster) RemoveNode(ctx context.Context, audit api.Event, name string, force bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removed = append(c.removed, fmt.Sprint(name, force))
	tx := &configdb.Txn{Actor: audit.Spec.Actor}
	if err := configdb.PutEvent(tx, &audit); err != nil {
		return err
	}
	_, err := c.db.Txn(ctx, tx)
	return err
}

// fakePeers marks requests as coming from a node, as its certificate would.
type fakePeers struct {
	f    *fixture
	from string
}

type peerTransport struct{ from string }

func (p peerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(testPeer, p.from)
	return http.DefaultTransport.RoundTrip(r)
}

func (p fakePeers) Proxy(node string) (http.RoundTripper, *url.URL, error) {
	u, ok := p.f.urls[node]
	if !ok {
		return nil, nil, errors.New("no such node")
	}
	parsed, err := url.Parse(u)
	return peerTransport{p.from}, parsed, err
}
