// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/version"
)

// Times of the backups that a node makes by itself.
const (
	// backupLook is how often it looks whether one is due. A look reads memory.
	backupLook = 15 * time.Second
	// backupRetry is the least pause after a failure.
	backupRetry = 10 * time.Minute
	// backupSpread: the nodes make their first backup within this part of the
	// interval after their start, so that not all write at once.
	backupSpread = 10
	maxSpread    = 10 * time.Minute
)

// Reasons of the condition Backup.
const (
	backupTaken  = "Taken"
	backupFailed = "Failed"
)

// replica is what a backup needs of the database.
type replica interface {
	configdb.DB
	Snapshot(ctx context.Context) (*fsm.Snapshot, error)
	LocalSnapshot() *fsm.Snapshot
	// Newest is what this node has, also of what nobody confirms.
	Newest(ctx context.Context) (*fsm.Snapshot, error)
}

// backupKeeper makes this node's own backups, and those that are asked for.
type backupKeeper struct {
	db     replica
	node   string
	nodeID string
	folder backupFolder
	log    *slog.Logger
	now    func() time.Time
	tell   func(context.Context, api.Event) // writes an event

	// Only run's goroutine uses these: when it began, when it may try again after
	// a failure, and when it last saw that nothing had changed.
	started, notBefore, unchanged time.Time

	mu      sync.Mutex
	took    bool // one was made in this life of the daemon
	failing error
	next    time.Time // when the next one is due, zero when not known
}

func newBackupKeeper(m *member) *backupKeeper {
	return &backupKeeper{
		db: m.store, node: m.info.Node, nodeID: m.info.NodeID, folder: newBackupFolder(m.cfg.DataDir, m.info.ClusterID, m.info.clusterKey),
		log: m.log.With("module", "backup"), now: time.Now, tell: m.writeEvent,
	}
}

// source describes a state of this node.
func (k *backupKeeper) source(s *fsm.Snapshot, stale bool) backup.Source {
	src := backup.Source{Snapshot: s, Node: k.node, Version: version.Version, Time: k.now(), Stale: stale}
	src.Age, _ = k.db.Staleness()
	return src
}

// run makes backups on schedule until the context ends.
func (k *backupKeeper) run(ctx context.Context) error {
	if err := k.folder.sweep(); err != nil {
		k.log.Warn("unfinished backups not removed", "err", err)
	}
	k.started = k.now()
	for {
		wait := k.look(ctx)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// settings in force; the defaults until this node's replica has the cluster.
func (k *backupKeeper) settings() api.BackupSettings {
	c, _ := backup.Cluster(k.db.Local())
	return c.Spec.Settings().Backup
}

// spread is different for every node.
func (k *backupKeeper) spread(s api.BackupSettings) time.Duration {
	most := min(s.Every()/backupSpread, maxSpread)
	h := fnv.New64a()
	_, _ = h.Write([]byte(k.nodeID))
	return time.Duration(h.Sum64() % uint64(most))
}

// look makes a backup if one is due, and returns when to look again.
func (k *backupKeeper) look(ctx context.Context) time.Duration {
	if _, err := backup.Cluster(k.db.Local()); err != nil {
		return backupLook // the replica is still empty
	}
	s := k.settings()
	if s.Disabled {
		k.plan(time.Time{})
		k.done(ctx, nil, false)
		return backupLook
	}
	have, err := k.folder.list()
	if err != nil {
		k.failed(ctx, err, s)
		return backupLook
	}
	due, last := k.started.Add(k.spread(s)), k.folder.newest(have)
	if k.notBefore.After(due) {
		due = k.notBefore
	}
	for _, done := range []time.Time{k.unchanged, timeOf(last)} {
		if done.After(k.now()) {
			continue // the clock was set back: it must not stop the backups
		}
		if next := done.Add(s.Every()); !done.IsZero() && next.After(due) {
			due = next
		}
	}
	k.plan(due)
	if left := due.Sub(k.now()); left > 0 {
		return min(left, backupLook) // the settings may change meanwhile
	}
	snap := k.db.LocalSnapshot()
	if last != nil && last.Revision == snap.View().Revision() {
		k.unchanged = k.now() // nothing is written
		return 0
	}
	if err := k.take(snap, s); err != nil {
		k.failed(ctx, err, s)
		return backupLook
	}
	k.done(ctx, nil, true)
	return 0
}

// failed waits before the next try.
func (k *backupKeeper) failed(ctx context.Context, err error, s api.BackupSettings) {
	k.notBefore = k.now().Add(min(backupRetry, s.Every()))
	k.plan(k.notBefore)
	k.done(ctx, err, false)
}

func timeOf(b *api.LocalBackup) time.Time {
	if b == nil {
		return time.Time{}
	}
	return b.Time
}

// newest returns the newest backup that can be read.
func (f backupFolder) newest(all []api.LocalBackup) *api.LocalBackup {
	all = f.counted(all)
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].Error == "" {
			return &all[i]
		}
	}
	return nil
}

// take makes one backup and removes the oldest.
func (k *backupKeeper) take(snap *fsm.Snapshot, s api.BackupSettings) error {
	age, known := k.db.Staleness()
	path, err := k.folder.take(k.source(snap, !known || age >= quorumAge), "")
	if err != nil {
		return err
	}
	k.log.Info("backup made", "file", path, "rev", snap.View().Revision())
	if err := k.folder.prune(s.Keep); err != nil {
		return fmt.Errorf("remove old backups: %w", err)
	}
	return nil
}

func (k *backupKeeper) plan(next time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.next = next
}

// done notes the outcome; the first failure and the end of failing are events.
func (k *backupKeeper) done(ctx context.Context, err error, took bool) {
	k.mu.Lock()
	was := k.failing
	k.failing, k.took = err, k.took || took
	k.mu.Unlock()
	me := api.Meta{ID: k.nodeID, Name: k.node}
	switch {
	case err != nil && was == nil:
		k.log.Error("backup failed", "err", err)
		k.tell(ctx, api.NewEvent("node.backup-failed", api.SeverityWarning, api.KindNode, me, fmt.Sprintf("node %s cannot keep backups of the configuration database: %v", k.node, err), k.now()))
	case err == nil && was != nil:
		k.log.Info("backups work again")
		k.tell(ctx, api.NewEvent("node.backup-ok", api.SeverityInfo, api.KindNode, me, fmt.Sprintf("node %s keeps backups of the configuration database again", k.node), k.now()))
	}
}

// conditions of the node; none until the first outcome.
func (k *backupKeeper) conditions() []api.Condition {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.failing != nil:
		return []api.Condition{{Type: api.ConditionBackup, Reason: backupFailed, Message: k.failing.Error()}}
	case k.took:
		return []api.Condition{{Type: api.ConditionBackup, OK: true, Reason: backupTaken, Message: "this node keeps backups of the configuration database"}}
	}
	return nil
}

// local is what this node keeps.
func (k *backupKeeper) local() (api.LocalBackups, error) {
	k.mu.Lock()
	out := api.LocalBackups{Node: k.node, Directory: k.folder.dir}
	if k.failing != nil {
		out.LastError = k.failing.Error()
	}
	if !k.next.IsZero() {
		next := k.next.UTC().Truncate(time.Second)
		out.NextAt = &next
	}
	k.mu.Unlock()
	var err error
	out.Items, err = k.folder.list()
	return out, err
}

// prepare decides on the state of a backup; write then delivers it.
func (k *backupKeeper) prepare(ctx context.Context, stale bool, passphrase string) (revision uint64, write func(io.Writer) error, err error) {
	if passphrase != "" {
		if err := backupfile.CheckPassphrase(passphrase); err != nil {
			return 0, nil, err
		}
	}
	var snap *fsm.Snapshot
	if stale {
		snap, err = k.db.Newest(ctx)
	} else {
		snap, err = k.db.Snapshot(ctx)
	}
	if err != nil {
		if !stale && (errors.Is(err, configdb.ErrNoQuorum) || ctx.Err() != nil) {
			err = api.Errorf(api.CodeNoQuorum, "%w; consistency=stale takes what node %s has", err, k.node)
		}
		return 0, nil, err
	}
	src := k.source(snap, stale)
	return snap.View().Revision(), func(w io.Writer) error {
		_, err := backup.Write(w, src, k.folder.key, passphrase)
		return err
	}, nil
}

// writeEvent stores an event; without a quorum the log has it.
func (m *member) writeEvent(ctx context.Context, e api.Event) {
	e.Spec.Node = m.info.Node
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	tx := &configdb.Txn{Actor: "node " + m.info.Node}
	err := configdb.Events.CreateUnnamed(tx, &e)
	if err == nil {
		_, err = m.store.Txn(ctx, tx)
	}
	if err != nil {
		m.log.Warn("event not written", "event", e.Spec.Type, "message", e.Spec.Message, "err", err)
	}
}
