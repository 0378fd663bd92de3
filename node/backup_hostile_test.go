// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/pki"
)

var quiet = slog.New(slog.DiscardHandler)

// offlineReplica is a database as the keeper of backups sees it.
type offlineReplica struct {
	*configdb.Offline
	alone bool
}

func (o *offlineReplica) Snapshot(context.Context) (*fsm.Snapshot, error) {
	if o.alone {
		return nil, configdb.ErrNoQuorum
	}
	return o.Offline.Snapshot(), nil
}

func (o *offlineReplica) Newest(context.Context) (*fsm.Snapshot, error) {
	return o.Offline.Snapshot(), nil
}

func (o *offlineReplica) LocalSnapshot() *fsm.Snapshot { return o.Offline.Snapshot() }

func newOffline(t *testing.T) *configdb.Offline {
	t.Helper()
	db := configdb.NewOffline(fsm.New(), 1)
	t.Cleanup(db.Close)
	return db
}

func commit(t *testing.T, db configdb.DB, change func(tx *configdb.Txn) error) {
	t.Helper()
	tx := &configdb.Txn{Actor: "test"}
	if err := change(tx); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
}

// theCluster is the ID of the cluster that withCluster makes.
var theCluster = api.NewID()

func withCluster(t *testing.T, db configdb.DB) api.Cluster {
	t.Helper()
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{Life: 1}}
	c.Meta.ID = theCluster
	commit(t, db, func(tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &c) })
	return c
}

func touch(t *testing.T, db configdb.DB) {
	t.Helper()
	commit(t, db, func(tx *configdb.Txn) error { tx.Put("notes/x", []byte(api.NewID())); return nil })
}

// keeping is a keeper with a clock that a test sets.
func keeping(t *testing.T) (k *backupKeeper, db *offlineReplica, now *time.Time, events *[]string) {
	t.Helper()
	db = &offlineReplica{Offline: newOffline(t)}
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	now, events = &at, &[]string{}
	k = &backupKeeper{
		db: db, node: "n1", nodeID: "id-1", folder: newBackupFolder(t.TempDir(), theCluster, pki.NewSecret(pki.ClusterKeyBytes)), log: quiet,
		now: func() time.Time { return *now }, tell: func(_ context.Context, e api.Event) { *events = append(*events, e.Spec.Type) },
	}
	return k, db, now, events
}

func names(t *testing.T, k *backupKeeper) (out []string) {
	t.Helper()
	l, err := k.local()
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range l.Items {
		out = append(out, b.File)
	}
	return out
}

func TestBackupsFollowTheClock(t *testing.T) {
	k, db, now, events := keeping(t)
	ctx := context.Background()
	if wait := k.look(ctx); wait != backupLook || len(names(t, k)) != 0 {
		t.Errorf("an empty replica: wait %v, %v", wait, names(t, k))
	}
	withCluster(t, db)
	k.started = now.Add(time.Minute - k.spread(k.settings()))
	if wait := k.look(ctx); wait != backupLook || len(names(t, k)) != 0 {
		t.Errorf("before the first: wait %v, %v", wait, names(t, k))
	}
	*now = now.Add(50 * time.Second)
	if wait := k.look(ctx); wait != 10*time.Second {
		t.Errorf("shortly before the first: wait %v", wait)
	}
	if len(k.conditions()) != 0 {
		t.Errorf("conditions before the first: %+v", k.conditions())
	}
	*now = now.Add(10 * time.Second)
	k.look(ctx)
	if n := names(t, k); len(n) != 1 || n[0] != "prod-20260301T120100Z-r1.backup" {
		t.Fatalf("the first: %v", n)
	}
	for range 3 { // nothing changed, for days
		*now = now.Add(25 * time.Hour)
		k.look(ctx)
		k.look(ctx)
	}
	if n := names(t, k); len(n) != 1 {
		t.Errorf("an idle cluster has %v", n)
	}
	touch(t, db)
	if k.look(ctx); len(names(t, k)) != 1 {
		t.Errorf("at once after a change: %v", names(t, k))
	}
	for range 10 {
		*now = now.Add(24 * time.Hour)
		k.look(ctx)
		touch(t, db)
	}
	n := names(t, k)
	if len(n) != api.DefaultBackupKeep || !slices.IsSorted(n) {
		t.Errorf("kept: %v", n)
	}
	if c := k.conditions(); len(c) != 1 || !c[0].OK || len(*events) != 0 {
		t.Errorf("conditions %+v, events %v", c, *events)
	}
	newest := filepath.Join(k.folder.dir, n[len(n)-1])
	if info, err := os.Stat(newest); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, _, err := openBackup(newest, func(*backup.Header) ([]byte, error) { return k.folder.key, nil }); err != nil {
		t.Error(err)
	}
}

func TestSettingsOfBackups(t *testing.T) {
	k, db, now, _ := keeping(t)
	ctx := context.Background()
	c := withCluster(t, db)
	set := func(s api.BackupSettings) {
		t.Helper()
		commit(t, db, func(tx *configdb.Txn) error {
			c, err := configdb.Clusters.Get(db.Local(), c.Meta.ID)
			if err != nil {
				return err
			}
			c.Spec.Backup = s
			return configdb.Clusters.UpdateSpec(db.Local(), tx, &c)
		})
	}
	k.look(ctx)
	set(api.BackupSettings{EveryMinutes: 60, Keep: 2})
	*now = now.Add(59 * time.Minute)
	if k.look(ctx); len(names(t, k)) != 1 {
		t.Errorf("too early: %v", names(t, k))
	}
	for range 4 {
		*now = now.Add(time.Hour)
		touch(t, db)
		k.look(ctx)
	}
	if n := names(t, k); len(n) != 2 {
		t.Errorf("kept: %v", n)
	}
	set(api.BackupSettings{Disabled: true})
	*now = now.Add(48 * time.Hour)
	touch(t, db)
	if k.look(ctx); len(names(t, k)) != 2 {
		t.Errorf("switched off: %v", names(t, k))
	}
	for id := range 50 { // the nodes do not all write at once, nor too late
		k.nodeID = fmt.Sprint(id)
		for _, minutes := range []int{1, 60, 44640} {
			if d := k.spread(api.BackupSettings{EveryMinutes: minutes}); d < 0 || d > maxSpread || d > time.Duration(minutes)*time.Minute/backupSpread {
				t.Errorf("node %d, %d minutes: %v", id, minutes, d)
			}
		}
	}
}

// A clock that was wrong once must not stop the backups for years.
func TestABackupFromTheFuture(t *testing.T) {
	k, db, now, _ := keeping(t)
	withCluster(t, db)
	*now = now.AddDate(70, 0, 0)
	k.look(context.Background())
	*now = now.AddDate(-70, 0, 0)
	k.notBefore, k.unchanged = time.Time{}, time.Time{}
	touch(t, db)
	if k.look(context.Background()); len(names(t, k)) != 2 {
		t.Errorf("%v", names(t, k))
	}
}

func TestWhatFailsIsToldOnceAndHarmsNothing(t *testing.T) {
	k, db, now, events := keeping(t)
	ctx := context.Background()
	withCluster(t, db)
	k.look(ctx)
	good := names(t, k)
	touch(t, db)
	dir := k.folder.dir
	aside := dir + ".aside"
	if err := errors.Join(os.Rename(dir, aside), os.WriteFile(dir, nil, 0o600)); err != nil { // as if the disk were gone
		t.Fatal(err)
	}
	*now = now.Add(24 * time.Hour)
	for range 3 {
		k.look(ctx)
		*now = now.Add(time.Hour)
	}
	if c := k.conditions(); len(c) != 1 || c[0].OK || c[0].Type != api.ConditionBackup || c[0].Message == "" || !slices.Equal(*events, []string{"node.backup-failed"}) {
		t.Errorf("conditions %+v, events %v", c, *events)
	}
	if err := errors.Join(os.Remove(dir), os.Rename(aside, dir)); err != nil {
		t.Fatal(err)
	}
	if l, err := k.local(); err != nil || l.LastError == "" || len(l.Items) != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	k.look(ctx)
	if n := names(t, k); len(n) != 2 || n[0] != good[0] {
		t.Errorf("after it works again: %v", n)
	}
	if c := k.conditions(); len(c) != 1 || !c[0].OK || !slices.Equal(*events, []string{"node.backup-failed", "node.backup-ok"}) {
		t.Errorf("conditions %+v, events %v", c, *events)
	}
}

func mustList(t *testing.T, f backupFolder) []api.LocalBackup {
	t.Helper()
	all, err := f.list()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// ofCluster names the backups of a folder's own cluster.
func ofCluster(t *testing.T, f backupFolder) (out []string) {
	t.Helper()
	for _, b := range mustList(t, f) {
		if b.ClusterID == f.clusterID {
			out = append(out, b.File)
		}
	}
	return out
}

func TestRetentionCountsWhatIsGood(t *testing.T) {
	k, db, now, _ := keeping(t)
	withCluster(t, db)
	for range 5 {
		touch(t, db)
		if _, err := k.folder.take(k.source(db.LocalSnapshot(), false), ""); err != nil {
			t.Fatal(err)
		}
		*now = now.Add(time.Hour)
	}
	if _, err := k.folder.take(k.source(db.LocalSnapshot(), false), "life-2"); err != nil {
		t.Fatal(err)
	}
	// A host that belonged to another cluster has its backups still.
	former := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "former"), Spec: api.ClusterSpec{Life: 1}}
	other := backupFolder{dir: k.folder.dir, clusterID: former.Meta.ID, key: k.folder.key}
	theirs := &offlineReplica{Offline: newOffline(t)}
	commit(t, theirs, func(tx *configdb.Txn) error { return configdb.Clusters.Create(tx, &former) })
	if _, err := other.take(k.source(theirs.LocalSnapshot(), false), ""); err != nil {
		t.Fatal(err)
	}
	if got := k.folder.newest(mustList(t, k.folder)); got == nil || got.ClusterID != k.folder.clusterID {
		t.Errorf("the newest backup is %+v, of another cluster", got)
	}
	all := slices.DeleteFunc(names(t, k), func(name string) bool { return slices.Contains(ofCluster(t, other), name) })
	for _, i := range []int{3, 4} { // the newest two that count are damaged
		if err := os.WriteFile(filepath.Join(k.folder.dir, all[i]), []byte("junk"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, other := range []string{"readme.txt", "x.backup.part"} {
		if err := os.WriteFile(filepath.Join(k.folder.dir, other), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.folder.prune(2); err != nil {
		t.Fatal(err)
	}
	left := names(t, k)
	if len(ofCluster(t, other)) != 1 {
		t.Error("the backup of the other cluster is gone")
	}
	for i, want := range []bool{false, true, true, true, true, true} {
		if slices.Contains(left, all[i]) != want {
			t.Errorf("%s: kept is %v", all[i], !want)
		}
	}
	if err := k.folder.sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(k.folder.dir, "x.backup.part")); err == nil {
		t.Error("what a crash left is still there")
	}
	if _, err := os.Stat(filepath.Join(k.folder.dir, "readme.txt")); err != nil {
		t.Error("a file of somebody else is gone")
	}
}

func TestAFullDiskIsLeftAlone(t *testing.T) {
	k, _, _, _ := keeping(t)
	if err := os.MkdirAll(k.folder.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := k.folder.room(1 << 60); api.CodeOf(err) != api.CodeStorageFull || !strings.Contains(err.Error(), "--backup-keep") {
		t.Errorf("an exbibyte fits: %v", err)
	}
	if err := k.folder.room(1); err != nil {
		t.Error(err)
	}
}

func TestBackupsOnDemand(t *testing.T) {
	k, db, _, _ := keeping(t)
	withCluster(t, db)
	var b bytes.Buffer
	rev, write, err := k.prepare(context.Background(), false, "")
	if err == nil {
		touch(t, db) // it is later than the answer
		err = write(&b)
	}
	h, _, verr := backupfile.Verify(&b)
	if err != nil || verr != nil || h.Revision != rev || h.Stale {
		t.Errorf("%+v, %v, %v", h, err, verr)
	}
	if _, _, err := k.prepare(context.Background(), false, "short"); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("a short pass phrase: %v", err)
	}
	db.alone = true
	if _, _, err := k.prepare(context.Background(), false, ""); api.CodeOf(err) != api.CodeNoQuorum || !strings.Contains(err.Error(), "stale") {
		t.Errorf("without a quorum: %v", err)
	}
	if _, write, err = k.prepare(context.Background(), true, ""); err == nil {
		b.Reset()
		err = write(&b)
	}
	if h, _, verr := backupfile.Verify(&b); err != nil || verr != nil || !h.Stale {
		t.Errorf("stale: %+v, %v, %v", h, err, verr)
	}
	if err := write(errWriter{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("nobody takes it: %v", err)
	}
}

type errWriter struct{}

func (errWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
