// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// flakyDB can lose its quorum.
type flakyDB struct {
	configdb.DB
	alone atomic.Bool
	asked atomic.Int64 // views refused
}

func (f *flakyDB) View(ctx context.Context) (*configdb.View, error) {
	if f.alone.Load() {
		f.asked.Add(1)
		return nil, configdb.ErrNoQuorum
	}
	return f.DB.View(ctx)
}

func (f *flakyDB) Txn(ctx context.Context, t *configdb.Txn) (uint64, error) {
	if f.alone.Load() {
		return 0, configdb.ErrNoQuorum
	}
	return f.DB.Txn(ctx, t)
}

// fixture is a cluster of nodes m1 and m2 on one store.
type fixture struct {
	t       *testing.T
	db      *flakyDB
	servers map[string]*Server
	urls    map[string]string
	tokens  map[api.Role]string
	nodeIDs map[string]string
	cluster *fakeCluster
	images  *fakeImages
	console *fakeConsoles
	stops   []func() // end the servers
	placer  *fakePlacer
	backups *fakeBackups
	ha      *fakeHA
	member  atomic.Bool
	skew    atomic.Int64 // nanoseconds added to the clock
}

const testPeer = "X-Test-Peer" // stands for a verified certificate

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return newFixtureOn(t, storetest.New(t))
}

func newFixtureOn(t *testing.T, db configdb.DB) *fixture {
	t.Helper()
	f := &fixture{
		t: t, db: &flakyDB{DB: db}, servers: map[string]*Server{}, urls: map[string]string{},
		tokens: map[api.Role]string{}, nodeIDs: map[string]string{},
	}
	f.cluster = &fakeCluster{db: f.db}
	f.member.Store(true)
	f.images = &fakeImages{db: f.db, without: map[string]bool{}}
	f.console = &fakeConsoles{rings: map[string][]byte{}}
	f.placer = &fakePlacer{capacity: 4 * api.GiB}
	f.backups = &fakeBackups{db: f.db, content: []byte("a backup")}
	f.ha = &fakeHA{}
	f.seed()
	for _, node := range []string{"m1", "m2"} {
		s, err := New(Config{
			Version: "test", Node: func() string { return node },
			DB:        func() (configdb.DB, bool) { return f.db, f.member.Load() },
			Bootstrap: f.cluster, Cluster: f.cluster, Authority: f.cluster, Placer: f.placer, Images: nodeImages{f.images, node},
			Consoles: f.console, Machines: fakeMachines{node}, Peers: fakePeers{f, node}, Backups: nodeBackups{f.backups, node}, Disaster: f.backups, HA: f.ha, Forecaster: fakeForecaster{},
			Services: func() []api.ServiceStatus {
				return []api.ServiceStatus{{Node: node, Name: "lease", State: api.ServiceRunning}}
			},
			PeerName: func(r *http.Request) (string, bool) { p := r.Header.Get(testPeer); return p, p != "" },
			Log:      slog.New(slog.NewTextHandler(t.Output(), nil)),
			Now:      func() time.Time { return time.Now().Add(time.Duration(f.skew.Load())) },
		})
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(s.Handler())
		srv.Config = s.HTTPServer(s.Handler())
		srv.Start()
		t.Cleanup(srv.Close)
		f.stops = append(f.stops, srv.Close)
		f.servers[node], f.urls[node] = s, srv.URL
	}
	return f
}

func (f *fixture) seed() {
	f.t.Helper()
	for _, name := range []string{"m1", "m2"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Spec: api.NodeSpec{Address: name + ":7600"}}
		n.Status.Phase, n.Status.HostBoot = api.NodeReady, "boot"
		f.nodeIDs[name] = n.Meta.ID
		create(f, configdb.Nodes, &n)
	}
	for name, spec := range map[string]api.PoolSpec{"local": {}, "shared": {Type: api.PoolShared, Path: "/srv/shared"}} {
		p := api.Pool{Meta: api.NewMeta(api.KindPool, "", name), Spec: spec}
		create(f, configdb.Pools, &p)
		for node, id := range f.nodeIDs {
			st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", "x"), Spec: api.PoolStateSpec{PoolID: p.Meta.ID, NodeID: id}}
			st.Meta.ID = p.Meta.ID + "." + id
			st.Status = api.PoolStateStatus{Node: node, Ready: true}
			f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.PoolStates.CreateUnnamed(tx, &st) })
		}
	}
	img := api.Image{Meta: api.NewMeta(api.KindImage, "", "tiny"), Spec: api.ImageSpec{Pool: "shared", Node: "m1"}}
	img.Status = api.ImageStatus{Phase: api.StorageReady, VirtualSize: 64 * api.MiB}
	create(f, configdb.Images, &img)
	for _, role := range []api.Role{api.RoleAdministrator, api.RoleOperator, api.RoleViewer} {
		f.tokens[role] = f.addToken(string(role), api.TokenSpec{Role: role})
	}
}

func (f *fixture) addToken(name string, spec api.TokenSpec) string {
	secret := strings.Repeat(name[:1], tokenSecretLength)
	sum := sha256.Sum256([]byte(secret))
	spec.Hash = hex.EncodeToString(sum[:])
	tok := api.Token{Meta: api.NewMeta(api.KindToken, "", name), Spec: spec}
	create(f, configdb.Tokens, &tok)
	return tokenPrefix + tok.Meta.ID + "_" + secret
}

func create[S, T any](f *fixture, table configdb.Table[S, T], o *api.Object[S, T]) {
	f.t.Helper()
	if err := o.Prepare(); err != nil {
		f.t.Fatal(err)
	}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error { return table.Create(tx, o) })
}

func (f *fixture) txn(change func(*configdb.View, *configdb.Txn) error) {
	f.t.Helper()
	if _, err := configdb.Transact(f.t.Context(), f.db, "test", maxAttempts, change); err != nil {
		f.t.Fatal(err)
	}
}

// call is one request and its answer.
type call struct {
	method, path string
	body         any // string, []byte, io.Reader or a value for JSON
	node         string
	token        string
	role         api.Role
	header       map[string]string
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (f *fixture) do(c call) answer {
	f.t.Helper()
	a, err := f.try(c)
	if err != nil {
		f.t.Fatal(err)
	}
	return a
}

func (f *fixture) try(c call) (answer, error) {
	var body io.Reader
	switch b := c.body.(type) {
	case nil:
	case string:
		body = strings.NewReader(b)
	case []byte:
		body = bytes.NewReader(b)
	case io.Reader:
		body = b
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			return answer{}, err
		}
		body = bytes.NewReader(raw)
	}
	if c.node == "" {
		c.node = "m1"
	}
	path := c.path
	if !strings.HasPrefix(path, "/") {
		path = base + path
	}
	r, err := http.NewRequestWithContext(f.t.Context(), c.method, f.urls[c.node]+path, body)
	if err != nil {
		return answer{}, err
	}
	switch {
	case c.token == "none":
	case c.token != "":
		r.Header.Set("Authorization", "Bearer "+c.token)
	case c.role != "":
		r.Header.Set("Authorization", "Bearer "+f.tokens[c.role])
	default:
		r.Header.Set("Authorization", "Bearer "+f.tokens[api.RoleAdministrator])
	}
	for k, v := range c.header {
		r.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, b}, err
}

// want fails the test unless the answer has a status, and decodes it.
func want[T any](t *testing.T, a answer, status int) T {
	t.Helper()
	var v T
	if a.status != status {
		t.Fatalf("status %d, want %d: %s", a.status, status, a.body)
	}
	if len(a.body) > 0 {
		if err := json.Unmarshal(a.body, &v); err != nil {
			t.Fatalf("decode %q: %v", a.body, err)
		}
	}
	return v
}

// wantProblem fails the test unless the answer is this problem document.
func wantProblem(t *testing.T, a answer, status int, code api.Code, field string) Problem {
	t.Helper()
	p := want[Problem](t, a, status)
	if p.Code != code || p.Field != field || p.Status != status || p.Type != problemType+string(code) || p.Title == "" || p.Detail == "" {
		t.Fatalf("problem %+v, want code %s and field %q", p, code, field)
	}
	if ct := a.header.Get("Content-Type"); ct != "application/problem+json" {
		t.Fatalf("content type %q", ct)
	}
	return p
}

type vmReply struct {
	Task     api.Task `json:"task"`
	Object   api.VM   `json:"object"`
	Revision uint64   `json:"revision"`
}

// vmBody is the body of a POST /vms.
func vmBody(name string, disks ...api.VMDisk) map[string]any {
	spec := map[string]any{"cpus": 1, "memory": "512M"}
	if disks != nil {
		spec["disks"] = disks
	}
	return map[string]any{"meta": map[string]any{"name": name}, "spec": spec}
}

// newVM creates a VM and, as its owner, reports it in a phase.
func (f *fixture) newVM(name string, phase api.VMPhase, disks ...api.VMDisk) api.VM {
	f.t.Helper()
	r := want[vmReply](f.t, f.do(call{method: "POST", path: "vms", body: vmBody(name, disks...)}), http.StatusAccepted)
	return f.report(r.Object.Meta.ID, phase)
}

// report does what the owner does: it observes the spec.
func (f *fixture) report(id string, phase api.VMPhase) api.VM {
	f.t.Helper()
	var vm api.VM
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		var err error
		if vm, err = configdb.VMs.Get(v, id); err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, id)
		if err != nil {
			return err
		}
		vm.Status.Phase, vm.Status.ObservedGeneration = phase, vm.Meta.Generation
		vm.Status.Node, vm.Status.Epoch, vm.Status.PID = b.Spec.Node, b.Spec.Epoch, 0
		if phase == api.VMRunning || phase == api.VMPaused {
			vm.Status.PID = 4711
		}
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	return vm
}

func (f *fixture) binding(id string) api.Binding {
	f.t.Helper()
	b, err := configdb.Bindings.Get(f.db.Local(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *fixture) setNodePhase(node string, phase api.NodePhase) {
	f.setNode(node, func(n *api.Node) { n.Status.Phase = phase })
}

// setNode changes a node as its owner, a user or the leader does.
func (f *fixture) setNode(node string, change func(*api.Node)) {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", node)
		if err != nil {
			return err
		}
		change(&n)
		if err := configdb.Nodes.UpdateSpec(v, tx, &n); err != nil {
			return err
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

func (f *fixture) endTask(id string, phase api.TaskPhase) {
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		task, err := configdb.Tasks.Get(v, id)
		if err != nil {
			return err
		}
		task.Status.Phase, task.Status.Progress = phase, 100
		return configdb.Tasks.UpdateStatus(v, tx, &task)
	})
}
