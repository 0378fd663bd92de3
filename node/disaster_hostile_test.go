// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/thejerf/suture/v4"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/internal/freeport"
	"github.com/muster-vm/muster/internal/pki"
)

// oldWorld fills a database with three nodes and what hangs on them: on n1 a
// protected VM that runs, on n2 one that its owner reported stopped.
type oldWorld struct {
	db    configdb.DB
	nodes map[string]api.Node
	vms   map[string]api.VM
}

func newOldWorld(t *testing.T, db configdb.DB) *oldWorld {
	t.Helper()
	w := &oldWorld{db: db, nodes: map[string]api.Node{}, vms: map[string]api.VM{}}
	for _, name := range []string{"n1", "n2", "n3"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Spec: api.NodeSpec{Address: "10.0.0." + name[1:] + ":7600"}, Status: api.NodeStatus{Phase: api.NodeReady}}
		commit(t, db, func(tx *configdb.Txn) error { return errors.Join(n.Prepare(), configdb.Nodes.Create(tx, &n)) })
		w.nodes[name] = n
		st := api.PoolState{Meta: api.NewMeta(api.KindPoolState, "", "p"), Spec: api.PoolStateSpec{PoolID: "pool", NodeID: n.Meta.ID}, Status: api.PoolStateStatus{Node: name, Ready: true, Stamp: "s"}}
		st.Meta.ID = "pool." + n.Meta.ID
		commit(t, db, func(tx *configdb.Txn) error { return configdb.PoolStates.CreateUnnamed(tx, &st) })
	}
	w.vm(t, "runs", "n1", api.PowerRunning, api.VMStatus{Phase: api.VMRunning, PID: 42, RebootsDone: 2}, true)
	w.vm(t, "halted", "n2", api.PowerStopped, api.VMStatus{Phase: api.VMStopped}, false)
	for name, spec := range map[string]api.TokenSpec{
		"admin": {Use: api.TokenAPI, Role: api.RoleAdministrator, Hash: "h"}, "join": {Use: api.TokenJoin, JoinRole: api.RoleVoter, ExpiresAt: time.Now().Add(time.Hour)},
	} {
		k := api.Token{Meta: api.NewMeta(api.KindToken, "", name), Spec: spec}
		commit(t, db, func(tx *configdb.Txn) error { return configdb.Tokens.Create(tx, &k) })
	}
	commit(t, db, func(tx *configdb.Txn) error {
		tx.Put(idempotencyPrefix+"x", []byte("{}"))
		tx.Put(removedPrefix+"long-gone", []byte("n0"))
		return nil
	})
	return w
}

func (w *oldWorld) vm(t *testing.T, name, node string, power api.PowerState, st api.VMStatus, protected bool) {
	t.Helper()
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{Power: power, HA: api.HARestart}, Status: st}
	vm.Status.Node, vm.Status.Epoch, vm.Status.ObservedGeneration = node, 3, 1
	b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", name), Spec: api.BindingSpec{NodeID: w.nodes[node].Meta.ID, Node: node, Epoch: 3, Protected: protected}}
	b.Meta.ID = vm.Meta.ID
	commit(t, w.db, func(tx *configdb.Txn) error {
		return errors.Join(vm.Prepare(), configdb.VMs.Create(tx, &vm), configdb.Bindings.CreateUnnamed(tx, &b))
	})
	w.vms[name] = vm
}

// now returns a VM and its binding as they are.
func (w *oldWorld) now(t *testing.T, name string) (api.VM, api.BindingSpec) {
	t.Helper()
	vm, err := configdb.VMs.Get(w.db.Local(), w.vms[name].Meta.ID)
	if err != nil {
		t.Fatal(err)
	}
	b, err := configdb.Bindings.Get(w.db.Local(), w.vms[name].Meta.ID)
	if err != nil {
		t.Fatal(err)
	}
	return vm, b.Spec
}

func nodeNames(t *testing.T, db configdb.DB) map[string]api.NodePhase {
	t.Helper()
	nodes, err := configdb.Nodes.List(db.Local())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]api.NodePhase{}
	for i := range nodes {
		out[nodes[i].Meta.Name] = nodes[i].Status.Phase
	}
	return out
}

// raise restores a world on a host of the name self.
func raise(t *testing.T, self string, r api.RestoreRequest) (*oldWorld, *resurrection, api.RestoreResult, error) {
	t.Helper()
	db := newOffline(t)
	c := withCluster(t, db)
	w := newOldWorld(t, db)
	key := pki.NewSecret(pki.ClusterKeyBytes)
	sealed, err := pki.Seal(key, hostKeyLabel, []byte("host key"))
	if err != nil {
		t.Fatal(err)
	}
	commit(t, db, func(tx *configdb.Txn) error { tx.Put(hostKeyKey, sealed); return nil })
	db.SetTerm(9)
	info, caKey, err := (&Daemon{cfg: &Config{NodeName: self, Advertise: "10.9.9.9:7600"}}).foundership("again")
	if err != nil {
		t.Fatal(err)
	}
	info.clusterKey, info.Life = key, 2
	h := &backup.Header{ClusterID: c.Meta.ID, Cluster: "prod", Life: 1, Revision: db.Local().Revision(), Time: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)}
	s := &resurrection{r: &r, h: h, info: info, caKey: caKey, db: db, log: quiet}
	out, err := s.run(context.Background())
	return w, s, out, err
}

func (s *resurrection) host(t *testing.T, name string) api.Node {
	t.Helper()
	n, err := configdb.Nodes.Find(s.db.Local(), "", name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// remove is the word that a host is switched off for good, as the leader carries it out.
func (s *resurrection) remove(t *testing.T, name string) {
	t.Helper()
	r := expelRequest{NodeID: s.host(t, name).Meta.ID, Actor: "test", Force: true}
	if err := takeOver(t.Context(), s.db, s.log, r, s.db.Term(), heirOf(r.NodeID)); err != nil {
		t.Fatal(err)
	}
	if err := deleteNode(t.Context(), s.db, r, s.db.Term()); err != nil {
		t.Fatal(err)
	}
}

// The old cluster may be alive. Whatever the backup says, no VM of it may be
// started, moved by ha, or taken for stopped.
func TestRestoredVMsBelongToNobody(t *testing.T) {
	w, s, out, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"runs", "halted"} {
		vm, b := w.now(t, name)
		if vm.Status.Phase != api.VMUnknown || vm.Status.PID != 0 || vm.Status.Epoch != 3 || b.Epoch != 3 || b.Protected || b.NodeID != w.nodes[b.Node].Meta.ID ||
			!strings.Contains(vm.Status.Message, "muster node remove "+b.Node+" --force") || !strings.Contains(vm.Status.Message, "2026-02-03 04:05 UTC") {
			t.Errorf("%s: %+v, bound %+v", name, vm.Status, b)
		}
		if vm.Spec.Power != w.vms[name].Spec.Power {
			t.Errorf("%s: the wish is %s", name, vm.Spec.Power)
		}
	}
	want := map[string]api.NodePhase{"n1": api.NodeLost, "n2": api.NodeLost, "n3": api.NodeLost, "fresh": api.NodeReady}
	if got := nodeNames(t, s.db); !maps.Equal(got, want) {
		t.Errorf("nodes %v", got)
	}
	if !maps.Equal(out.Waiting, map[string]int{"n1": 1, "n2": 1, "n3": 0}) || out.TakenOver != 0 {
		t.Errorf("%+v", out)
	}
	v := s.db.Local()
	if states, _ := configdb.PoolStates.List(v); len(states) != 0 {
		t.Errorf("pools that nobody can prove: %+v", states)
	}
	if _, ok := v.Get(idempotencyPrefix + "x"); ok {
		t.Error("requests of the old cluster are remembered")
	}
	if _, ok := v.Get(removedPrefix + "long-gone"); !ok {
		t.Error("a node that was removed before is forgotten")
	}
}

func TestARestoredClusterIsAnother(t *testing.T) {
	_, s, out, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := backup.Cluster(s.db.Local())
	if err != nil {
		t.Fatal(err)
	}
	if c.Meta.ID != s.info.ClusterID || c.Meta.ID == s.h.ClusterID || c.Meta.Name != "again" || c.Spec.Life != 2 || c.Spec.CACert != string(s.info.ca) ||
		c.Spec.RestoredFrom == nil || c.Spec.RestoredFrom.ClusterID != s.h.ClusterID || c.Spec.RestoredFrom.Revision != s.h.Revision {
		t.Errorf("%+v %+v", c.Meta, c.Spec)
	}
	if plain, err := pki.Open(s.info.clusterKey, caKeyLabel, c.Spec.SealedCAKey); err != nil || !bytes.Equal(plain, s.caKey) {
		t.Errorf("the authority's key: %q, %v", plain, err)
	}
	tokens, err := configdb.Tokens.List(s.db.Local())
	if err != nil || len(tokens) != 1 || tokens[0].Meta.Name != "admin" || tokens[0].Spec.Hash == "h" {
		t.Fatalf("tokens %+v, %v", tokens, err)
	}
	id, secret, ok := strings.Cut(strings.TrimPrefix(out.Token, "muster_"), "_")
	if !ok || id != tokens[0].Meta.ID || pki.HashSecret(secret) != tokens[0].Spec.Hash {
		t.Errorf("token %q is not %+v", out.Token, tokens[0])
	}
	events, _ := configdb.Events.List(s.db.Local())
	if !slices.ContainsFunc(events, func(e api.Event) bool { return e.Spec.Type == "cluster.restored" }) {
		t.Error("no event tells of it")
	}

	_, s, _, err = raise(t, "fresh", api.RestoreRequest{KeepTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	tokens, _ = configdb.Tokens.List(s.db.Local())
	if len(tokens) != 2 || slices.ContainsFunc(tokens, func(k api.Token) bool { return isJoinToken(&k) }) {
		t.Errorf("with the tokens kept: %+v", tokens)
	}
}

// Whoever adds a field to the cluster decides whether a restored one has it. A
// field that makes it trust the old cluster must not be inherited.
func TestRestoreDecidesAboutEveryFieldOfTheCluster(t *testing.T) {
	decided := []string{"CACert", "SealedCAKey", "Life", "RestoredFrom", "Backup", "Gossip", "CertificateSeconds", "Rotation", "History", "FeatureLevel", "FeatureLevelHold", "HA"}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[api.ClusterSpec]()) {
		if !slices.Contains(decided, f.Name) {
			t.Errorf("resurrection.found says nothing of ClusterSpec.%s: set it there, or leave it empty on purpose, and name it here", f.Name)
		}
	}
}

// The backup is old, and the old cluster may have moved any VM to any of its hosts.
func TestTheWordAboutOneHostFreesNoVMs(t *testing.T) {
	w, s, out, err := raise(t, "n1", api.RestoreRequest{SwitchedOff: []string{"n1", "n3"}})
	if err != nil {
		t.Fatal(err)
	}
	vm, b := w.now(t, "runs")
	if vm.Status.Phase != api.VMUnknown || b.NodeID != w.nodes["n2"].Meta.ID || b.Node != "n2" || b.Epoch != 4 || vm.Status.Epoch != 4 || b.Protected {
		t.Errorf("of a host that is off: %+v, bound %+v", vm.Status, b)
	}
	if vm, b := w.now(t, "halted"); vm.Status.Phase != api.VMUnknown || b.Node != "n2" {
		t.Errorf("of another: %+v, bound %+v", vm.Status, b)
	}
	if got := nodeNames(t, s.db); !maps.Equal(got, map[string]api.NodePhase{"n1": api.NodeReady, "n2": api.NodeLost}) {
		t.Errorf("nodes %v", got)
	}
	if n, err := configdb.Nodes.Find(s.db.Local(), "", "n1"); err != nil || n.Meta.ID != s.info.NodeID {
		t.Errorf("n1 is %+v, %v", n.Meta, err)
	}
	if out.TakenOver != 0 || !maps.Equal(out.Waiting, map[string]int{"n2": 2}) {
		t.Errorf("%+v", out)
	}
	if _, ok := s.db.Local().Get(removedPrefix + w.nodes["n1"].Meta.ID); !ok {
		t.Error("the old n1 is not remembered as removed")
	}
}

func TestTheWordAboutAllHostsFreesTheVMs(t *testing.T) {
	w, s, out, err := raise(t, "n1", api.RestoreRequest{SwitchedOff: []string{"n1", "n2", "n3"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, epoch := range map[string]uint64{"runs": 4, "halted": 0} {
		vm, b := w.now(t, name)
		if vm.Status.Phase != api.VMStopped || vm.Spec.Power != api.PowerStopped || b.NodeID != s.info.NodeID || b.Node != "n1" || epoch > 0 && b.Epoch != epoch || vm.Status.Epoch != b.Epoch {
			t.Errorf("%s: %+v, bound %+v", name, vm.Status, b)
		}
	}
	if out.TakenOver != 2 || len(out.Waiting) > 0 {
		t.Errorf("%+v", out)
	}
}

// In the restored cluster the same holds: the VMs wait at one host of the old cluster
// after the other, until the last is said to be off. A host that joined this cluster, and
// is lost, is none of those.
func TestRemovedHostsOfAnOldClusterLeaveTheirVMsToTheOthers(t *testing.T) {
	_, s, _, err := raise(t, "fresh", api.RestoreRequest{})
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) (api.VM, api.BindingSpec) {
		t.Helper()
		vm, err := configdb.VMs.Find(s.db.Local(), api.DefaultProject, name)
		if err != nil {
			t.Fatal(err)
		}
		b, err := configdb.Bindings.Get(s.db.Local(), vm.Meta.ID)
		if err != nil {
			t.Fatal(err)
		}
		return vm, b.Spec
	}
	for i, gone := range []string{"n1", "n2"} {
		s.remove(t, gone)
		for _, name := range []string{"runs", "halted"} {
			vm, b := at(name)
			if vm.Status.Phase != api.VMUnknown || b.Node == gone || b.Node == "fresh" || b.Protected || vm.Status.Node != b.Node || vm.Status.Epoch != b.Epoch {
				t.Errorf("after %d: %s is %+v, bound %+v", i+1, name, vm.Status, b)
			}
		}
	}
	if vm, _ := at("runs"); !strings.Contains(vm.Status.Message, "muster node remove n3 --force") {
		t.Errorf("it does not say what it waits for: %q", vm.Status.Message)
	}
	s.remove(t, "n3")
	for _, name := range []string{"runs", "halted"} {
		if vm, b := at(name); vm.Status.Phase != api.VMStopped || b.Node != "fresh" {
			t.Errorf("%s is %+v, bound %+v", name, vm.Status, b)
		}
	}
}

func TestRestoreRefusesNamesThatMislead(t *testing.T) {
	for _, c := range []struct {
		self  string
		off   []string
		code  api.Code
		words string
	}{
		{"n1", nil, api.CodeRefused, "--yes-i-have-switched-off n1"},
		{"n1", []string{"n2"}, api.CodeRefused, "--node-name"},
		{"fresh", []string{"n4"}, api.CodeInvalid, "it has n1, n2, n3"},
	} {
		if _, _, _, err := raise(t, c.self, api.RestoreRequest{SwitchedOff: c.off}); api.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s, off %v: %v", c.self, c.off, err)
		}
	}
}

// founded is a daemon that founded a cluster and ended, with a world in its
// database, in which n1's place is the daemon's own.
func founded(t *testing.T) (*Daemon, *oldWorld) {
	t.Helper()
	d := newDaemon(t)
	if _, err := d.Init(context.Background(), api.InitRequest{Name: "prod"}); err != nil {
		t.Fatal(err)
	}
	m := d.current()
	w := newOldWorld(t, adminless{m.store})
	if err := m.close(); err != nil {
		t.Fatal(err)
	}
	d.member = nil
	// The supervisor that would have closed the port never ran.
	d.cfg.Listen = freeport.Loopback(t)
	return d, w
}

// adminless is a database whose "admin" token is called otherwise, for a world
// that makes its own.
type adminless struct{ configdb.DB }

func (a adminless) Txn(ctx context.Context, tx *configdb.Txn) (uint64, error) {
	rev, err := a.DB.Txn(ctx, tx)
	if errors.Is(err, configdb.ErrConflict) && strings.Contains(err.Error(), "/admin") {
		return rev, nil
	}
	return rev, err
}

func putWord(t *testing.T, d *Daemon, w recovery) string {
	t.Helper()
	b, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.cfg.DataDir, recoverFile)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func wordOf(d *Daemon, t *testing.T, w *oldWorld) recovery {
	t.Helper()
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	out := recovery{ClusterID: info.ClusterID, Life: info.life() + 1, At: time.Now(), Others: map[string]string{"never-a-node": "ghost"}}
	for name, n := range w.nodes {
		out.Others[n.Meta.ID] = name
	}
	return out
}

// state reads the database of a daemon that does not run.
func state(t *testing.T, d *Daemon, look func(db configdb.DB)) {
	t.Helper()
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	stop := errors.New("looked")
	err = configdb.Recover(context.Background(), configdb.Files{Dir: filepath.Join(d.cfg.DataDir, replicaDir), NodeID: info.NodeID, Address: info.Address, Log: quiet}, func(db *configdb.Offline) error {
		look(db)
		return stop // nothing is written
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
}

func TestARecoveryIsFinishedAfterACrash(t *testing.T) {
	d, w := founded(t)
	word := wordOf(d, t, w)
	path := putWord(t, d, word)
	// The crash came after the database was written and before the identity was.
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.beginLife(context.Background(), info, word); err != nil {
		t.Fatal(err)
	}
	info.Life = 1
	if err := info.saveIdentity(d.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a start, and a later one
		if err := d.finishRecovery(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if exists(path) {
		t.Error("the word is still there")
	}
	if info, err = loadMembership(d.cfg.DataDir); err != nil || info.life() != 2 {
		t.Fatalf("life %d, %v", info.life(), err)
	}
	state(t, d, func(db configdb.DB) {
		w.db = db
		c, err := backup.Cluster(db.Local())
		if err != nil || c.Spec.Life != 2 {
			t.Errorf("life %d, %v", c.Spec.Life, err)
		}
		for _, name := range []string{"runs", "halted"} {
			if vm, b := w.now(t, name); vm.Status.Phase != api.VMStopped || b.NodeID != info.NodeID || b.Epoch != 4 {
				t.Errorf("%s: %+v, bound %+v: the recovery was carried out twice, or not at all", name, vm.Status, b)
			}
		}
		if got := nodeNames(t, db); !maps.Equal(got, map[string]api.NodePhase{"m1": api.NodeReady}) {
			t.Errorf("nodes %v", got)
		}
		for _, id := range []string{w.nodes["n1"].Meta.ID, "never-a-node"} {
			if _, ok := db.Local().Get(removedPrefix + id); !ok {
				t.Errorf("%s is not remembered as removed", id)
			}
		}
		tokens, _ := configdb.Tokens.List(db.Local())
		if slices.ContainsFunc(tokens, func(k api.Token) bool { return isJoinToken(&k) }) {
			t.Error("a join token of the old life is left")
		}
		events, _ := configdb.Events.List(db.Local())
		n := 0
		for i := range events {
			if events[i].Spec.Type == "cluster.recovered" {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d events tell of it", n)
		}
	})
	kept, err := filepath.Glob(filepath.Join(d.cfg.DataDir, backupsDir, "*"+keptInfix+"life-2"+backupSuffix))
	if err != nil || len(kept) != 1 {
		t.Fatalf("the state before: %v, %v", kept, err)
	}
	before, h, err := openBackup(kept[0], func(*backup.Header) ([]byte, error) { return info.clusterKey, nil })
	if err != nil || h.Life != 1 || len(nodeNames(t, configdb.NewOffline(before, 1))) != 4 {
		t.Errorf("%+v, %v", h, err)
	}
	// And the daemon runs on it, by itself.
	d.sup = suture.NewSimple("test")
	if err := d.start(info); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := d.current().store.View(ctx); err != nil {
		t.Error(err)
	}
}

// What an administrator said of the other hosts is not true for ever.
func TestAnOldWordIsNotCarriedOut(t *testing.T) {
	d, w := founded(t)
	word := wordOf(d, t, w)
	word.At = time.Now().Add(-2 * wordLife)
	path := putWord(t, d, word)
	if err := d.finishRecovery(context.Background()); err == nil || !strings.Contains(err.Error(), "may be true no longer") {
		t.Errorf("%v", err)
	}
	if info, err := loadMembership(d.cfg.DataDir); err != nil || info.life() != 1 || !exists(path) {
		t.Errorf("life %d, %v", info.life(), err)
	}
}

func TestAWordThatDoesNotFitIsRefused(t *testing.T) {
	d, w := founded(t)
	word := wordOf(d, t, w)
	other := word
	other.ClusterID = api.NewID()
	path := putWord(t, d, other)
	if err := d.finishRecovery(context.Background()); err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("of another cluster: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.finishRecovery(context.Background()); err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("damaged: %v", err)
	}
	putWord(t, d, word)
	replica := filepath.Join(d.cfg.DataDir, replicaDir)
	if err := os.Rename(replica, replica+".aside"); err != nil {
		t.Fatal(err)
	}
	if err := d.finishRecovery(context.Background()); !errors.Is(err, configdb.ErrNoState) || !strings.Contains(err.Error(), "to leave all as it was") {
		t.Errorf("without a replica: %v", err)
	}
	if err := os.Rename(replica+".aside", replica); err != nil {
		t.Fatal(err)
	}
	if info, err := loadMembership(d.cfg.DataDir); err != nil || info.life() != 1 {
		t.Errorf("a refused word changed the life: %v", err)
	}
	if err := d.finishRecovery(context.Background()); err != nil {
		t.Error(err)
	}
}

// The recovery was broken off: the identity lags behind the database, or, put
// together from two backups, is ahead of it.
func TestIdentityAndDatabaseHaveOneLife(t *testing.T) {
	d, w := founded(t)
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.beginLife(context.Background(), info, wordOf(d, t, w)); err != nil {
		t.Fatal(err)
	}
	info.Life = 1
	if err := info.saveIdentity(d.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	d.sup = suture.NewSimple("test")
	if err := d.start(info); !errors.Is(err, errBeginAnew) {
		t.Fatalf("an identity that lags: %v", err)
	}
	if info, err = loadMembership(d.cfg.DataDir); err != nil || info.life() != 2 {
		t.Errorf("it has life %d, %v", info.life(), err)
	}
	info.Life = 3
	if err := d.start(info); err == nil || errors.Is(err, errBeginAnew) || !strings.Contains(err.Error(), "restore both from one backup") {
		t.Errorf("an identity that is ahead: %v", err)
	}
}

func TestAWordNamesEveryOtherNode(t *testing.T) {
	p := &api.RecoveryPlan{Cluster: "prod", Node: "n1", Others: []api.RecoveryMember{{Node: "n2"}, {Node: "n3"}}}
	for _, c := range []struct {
		cluster, off, refused string
		field                 string
		code                  api.Code
	}{
		{"prod", "n2,n3", "", "", ""},
		{"prod", "n3,n2,n2", "", "", ""},
		{"prod", "n2", "", "switchedOff", api.CodeInvalid},
		{"prod", "", "", "switchedOff", api.CodeInvalid},
		{"prod", "n2,n3,n4", "", "switchedOff", api.CodeInvalid},
		{"prod", "n1,n2,n3", "", "switchedOff", api.CodeInvalid},
		{"Prod", "n2,n3", "", "cluster", api.CodeInvalid},
		{"", "n2,n3", "", "cluster", api.CodeInvalid},
		{"prod", "n2,n3", "node n2 leads", "", api.CodeRefused},
	} {
		p.Refused = c.refused
		err := agrees(p, &api.RecoveryRequest{Cluster: c.cluster, SwitchedOff: strings.Split(c.off, ",")})
		var e *api.Error
		errors.As(err, &e)
		if (c.code == "") != (err == nil) || err != nil && (e.Code != c.code || e.Field != c.field) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
