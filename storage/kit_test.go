// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// patience bounds every wait of a test; nothing waits that long when it works.
const patience = 2 * time.Minute

// kit is a cluster of storage services on one database.
type kit struct {
	t     *testing.T
	db    *storetest.Mem
	nodes map[string]*host
}

type host struct {
	id, dir string
	*Service
	stop func()
}

func newKit(t *testing.T, names ...string) *kit {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Fatal("qemu-img is missing: install qemu-utils")
	}
	k := &kit{t: t, db: storetest.New(t), nodes: map[string]*host{}}
	for _, n := range names {
		k.addNode(n)
	}
	return k
}

func (k *kit) txn(f func(v *configdb.View, tx *configdb.Txn) error) {
	k.t.Helper()
	if _, err := configdb.Transact(k.t.Context(), k.db, "test", 10, f); err != nil {
		k.t.Fatal(err)
	}
}

// serviceDir is a folder that goes with the test. A service writes there, and its Run
// does not wait for calls that may hang, so one may write for a moment longer.
func serviceDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "storage")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if err := os.RemoveAll(dir); err == nil {
				return
			} else if time.Now().After(end) {
				t.Error(err)
				return
			}
		}
	})
	return dir
}

func (k *kit) addNode(name string) *host {
	k.t.Helper()
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Status: api.NodeStatus{Phase: api.NodeReady}}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
	h := &host{id: n.Meta.ID, dir: serviceDir(k.t)}
	k.nodes[name] = h
	h.Service = New(k.config(name))
	return h
}

func (k *kit) config(name string) Config {
	h := k.nodes[name]
	var log io.Writer = io.Discard
	if testing.Verbose() {
		log = os.Stderr
	}
	return Config{DB: k.db, NodeID: h.id, NodeName: name, DataDir: h.dir, RunDir: filepath.Join(h.dir, "run"), Log: slog.New(slog.NewTextHandler(log, nil)).With("node", name)}
}

// start runs a node's service until the test or stop ends it.
func (k *kit) start(names ...string) {
	for _, name := range names {
		h := k.nodes[name]
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		s := h.Service
		go func() { done <- s.Run(ctx) }()
		h.stop = sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				k.t.Errorf("node %s: %v", name, err)
			}
		})
		k.t.Cleanup(h.stop)
	}
}

// restart is a new daemon on the same host.
func (k *kit) restart(name string, change func(*Service)) {
	h := k.nodes[name]
	h.stop()
	mounts := h.mounts
	h.Service = New(k.config(name))
	h.Service.mounts = mounts
	if change != nil {
		change(h.Service)
	}
	k.start(name)
}

func (k *kit) setPhase(name string, phase api.NodePhase) {
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", name)
		if err != nil {
			return err
		}
		n.Status.Phase = phase
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

func (k *kit) pool(name string, spec api.PoolSpec) api.Pool {
	k.t.Helper()
	p := api.Pool{Meta: api.NewMeta(api.KindPool, "", name), Spec: spec}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Pools.Create(tx, &p) })
	return p
}

func (k *kit) image(name string, spec api.ImageSpec) api.Image {
	k.t.Helper()
	i := api.Image{Meta: api.NewMeta(api.KindImage, "", name), Spec: spec}
	if err := i.Prepare(); err != nil {
		k.t.Fatal(err)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		pool, err := configdb.Pools.Find(v, "", i.Spec.Pool)
		if err != nil {
			return err
		}
		configdb.Pools.Refer(tx, pool.Meta.ID, api.KindImage, i.Meta.ID)
		return configdb.Images.Create(tx, &i)
	})
	return i
}

func (k *kit) volume(name string, spec api.VolumeSpec) api.Volume {
	k.t.Helper()
	o := api.Volume{Meta: api.NewMeta(api.KindVolume, "", name), Spec: spec}
	if err := o.Prepare(); err != nil {
		k.t.Fatal(err)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		pool, err := configdb.Pools.Find(v, "", o.Spec.Pool)
		if err != nil {
			return err
		}
		configdb.Pools.Refer(tx, pool.Meta.ID, api.KindVolume, o.Meta.ID)
		if img, err := configdb.Images.Find(v, "", o.Spec.Image); err == nil {
			configdb.Images.Refer(tx, img.Meta.ID, api.KindVolume, o.Meta.ID)
		}
		return configdb.Volumes.Create(tx, &o)
	})
	return o
}

func (k *kit) deleteImage(id string) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Images.Get(v, id)
		if err != nil {
			return err
		}
		now := time.Now()
		o.Meta.DeletingAt = &now
		return configdb.Images.UpdateSpec(v, tx, &o)
	})
}

func (k *kit) deleteVolume(id string) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.Volumes.Get(v, id)
		if err != nil {
			return err
		}
		now := time.Now()
		o.Meta.DeletingAt = &now
		return configdb.Volumes.UpdateSpec(v, tx, &o)
	})
}

// until waits for a state of the database.
func (k *kit) until(what string, ok func(v *configdb.View) bool) *configdb.View {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), patience)
	defer cancel()
	v := k.db.Local()
	for !ok(v) {
		next, err := k.db.WaitRevision(ctx, v.Revision()+1)
		if err != nil {
			k.dump()
			k.t.Fatalf("%s did not happen within %s", what, patience)
		}
		v = next
	}
	return v
}

func (k *kit) dump() {
	for e := range k.db.Local().Scan("muster/status/", "") {
		k.t.Logf("%s = %s", e.Key, e.Value)
	}
}

func (k *kit) state(v *configdb.View, pool api.Pool, node string) api.PoolStateStatus {
	st, err := configdb.PoolStates.Get(v, pool.Meta.ID+"."+k.nodes[node].id)
	if err != nil {
		return api.PoolStateStatus{}
	}
	return st.Status
}

func (k *kit) untilReady(pool api.Pool, nodes ...string) {
	k.t.Helper()
	for _, n := range nodes {
		k.until("pool "+pool.Meta.Name+" ready on "+n, func(v *configdb.View) bool { return k.state(v, pool, n).Ready })
	}
}

func (k *kit) untilNotReady(pool api.Pool, node, reason string) {
	k.t.Helper()
	k.until("pool not ready on "+node+" because of "+reason, func(v *configdb.View) bool {
		st := k.state(v, pool, node)
		return !st.Ready && strings.Contains(st.Reason, reason)
	})
}

func (k *kit) untilImage(id string, phase api.StoragePhase) api.Image {
	k.t.Helper()
	var out api.Image
	k.until("image "+string(phase), func(v *configdb.View) bool {
		o, err := configdb.Images.Get(v, id)
		out = o
		return err == nil && o.Status.Phase == phase
	})
	return out
}

func (k *kit) untilVolume(id string, phase api.StoragePhase) api.Volume {
	k.t.Helper()
	var out api.Volume
	k.until("volume "+string(phase), func(v *configdb.View) bool {
		o, err := configdb.Volumes.Get(v, id)
		out = o
		return err == nil && o.Status.Phase == phase
	})
	return out
}

func (k *kit) untilGone(key string) {
	k.t.Helper()
	k.until(key+" gone", func(v *configdb.View) bool {
		_, ok := v.Get(key)
		return !ok
	})
}

// qemu runs qemu-img to make test files.
func qemu(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// content returns a qcow2 with some data in it.
func content(t testing.TB, size string) []byte {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "i.qcow2")
	if err := os.WriteFile(raw, bytes.Repeat([]byte("muster! "), 200_000), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "convert", "-f", "raw", "-O", "qcow2", raw, path)
	qemu(t, "resize", "-f", "qcow2", path, size)
	return read(t, path)
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// files lists what is below a folder of a pool.
func files(t testing.TB, parts ...string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func wantCode(t testing.TB, err error, code api.Code, words ...string) {
	t.Helper()
	if err == nil || api.CodeOf(err) != code {
		t.Fatalf("got error %v (code %s), want code %s", err, api.CodeOf(err), code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
