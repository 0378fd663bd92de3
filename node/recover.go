// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/internal/version"
)

// recoverFile is an administrator's word that the cluster is to be recovered
// from this node, from the moment it was given until it is carried out.
const recoverFile = "recover.json"

// recoverActor is recorded with what a recovery writes.
const recoverActor = "local:root"

// errBeginAnew ends a life of the daemon, after which the next one begins in
// the same process.
var errBeginAnew = errors.New("the daemon begins anew")

// recovery is the content of recoverFile.
// wordLife is how old an administrator's word may be when it is carried out: the
// daemon may have been down since.
const wordLife = time.Hour

type recovery struct {
	ClusterID string    `json:"clusterID"`
	Life      uint64    `json:"life"` // that begins
	At        time.Time `json:"at"`
	// Others are the nodes that are switched off, by ID.
	Others map[string]string `json:"others"`
}

// RecoveryPlan implements rest.Disaster.
func (d *Daemon) RecoveryPlan(ctx context.Context) (api.RecoveryPlan, error) {
	m := d.current()
	if m == nil {
		return api.RecoveryPlan{}, notMember()
	}
	s, err := m.survey(ctx)
	if err != nil {
		return api.RecoveryPlan{}, err
	}
	return s.plan, nil
}

// Recover implements rest.Disaster: it notes the administrator's word and lets
// the daemon begin anew, which then carries it out before anything else runs.
func (d *Daemon) Recover(ctx context.Context, r api.RecoveryRequest) (api.RecoveryResult, error) {
	d.become.Lock()
	defer d.become.Unlock()
	m := d.current()
	if m == nil {
		return api.RecoveryResult{}, notMember()
	}
	s, err := m.survey(ctx)
	if err != nil {
		return api.RecoveryResult{}, err
	}
	p := &s.plan
	if err := agrees(p, &r); err != nil {
		return api.RecoveryResult{}, err
	}
	word := recovery{ClusterID: p.ClusterID, Life: p.Life + 1, At: time.Now().UTC(), Others: map[string]string{}}
	out := api.RecoveryResult{Cluster: p.Cluster, Node: p.Node, Life: word.Life}
	for _, o := range p.Others {
		word.Others[o.NodeID] = o.Node
		out.Removed = append(out.Removed, o.Node)
		out.TakenOver = append(out.TakenOver, boundTo(s.view, o.NodeID)...)
	}
	b, err := json.MarshalIndent(word, "", "  ")
	if err != nil {
		return api.RecoveryResult{}, err
	}
	if err := writeFile(filepath.Join(d.cfg.DataDir, recoverFile), append(b, '\n'), 0o600); err != nil {
		return api.RecoveryResult{}, err
	}
	d.log.Warn("the cluster is to be recovered from this node", "life", word.Life, "removed", strings.Join(out.Removed, ", "))
	d.fail(errBeginAnew)
	return out, nil
}

// agrees refuses a word that does not name exactly what it is about.
func agrees(p *api.RecoveryPlan, r *api.RecoveryRequest) error {
	if p.Refused != "" {
		return api.Errorf(api.CodeRefused, "cluster %s is not recovered from node %s: %s", p.Cluster, p.Node, p.Refused)
	}
	if r.Cluster != p.Cluster {
		return api.Invalid("cluster", "is %q; repeat the name of the cluster, %q", r.Cluster, p.Cluster)
	}
	var missing []string
	want := map[string]bool{}
	for _, o := range p.Others {
		want[o.Node] = true
		if !slices.Contains(r.SwitchedOff, o.Node) {
			missing = append(missing, o.Node)
		}
	}
	if len(missing) > 0 {
		return api.Invalid("switchedOff", "lacks %s; every other node must be switched off, and named", strings.Join(missing, ", "))
	}
	for _, name := range r.SwitchedOff {
		if !want[name] {
			return api.Invalid("switchedOff", "%q is no other node of cluster %s", name, p.Cluster)
		}
	}
	return nil
}

// finishRecovery carries out an administrator's word, before the database is
// opened. After a crash it is called again and begins from the beginning.
func (d *Daemon) finishRecovery(ctx context.Context) error {
	path := filepath.Join(d.cfg.DataDir, recoverFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var word recovery
	if err == nil {
		err = json.Unmarshal(b, &word)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w; if the cluster is not to be recovered from this node, remove the file", path, err)
	}
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		return err
	}
	if info == nil || info.ClusterID != word.ClusterID {
		return fmt.Errorf("%s is about another cluster than this data directory; remove the file", path)
	}
	if info.life() < word.Life {
		if err := d.beginLife(ctx, info, word); err != nil {
			return fmt.Errorf("recover cluster %s from this node: %w; nothing is lost: put right what is wrong and start musterd again, or remove %s to leave all as it was", info.Cluster, err, path)
		}
	}
	if err := errors.Join(os.Remove(path), syncDir(d.cfg.DataDir)); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	d.log.Warn("the cluster was recovered from this node", "cluster", info.Cluster, "life", word.Life)
	return nil
}

func (d *Daemon) beginLife(ctx context.Context, info *membership, word recovery) error {
	files := configdb.Files{Dir: filepath.Join(d.cfg.DataDir, replicaDir), NodeID: info.NodeID, Address: info.Address, LogStore: d.cfg.LogStore, Log: d.log.With("module", "configdb")}
	err := configdb.Recover(ctx, files, func(db *configdb.Offline) error {
		c, err := configdb.Clusters.Get(db.Local(), info.ClusterID)
		if err != nil {
			return err
		}
		if c.Spec.Life >= word.Life {
			return nil // done before the crash
		}
		if age := time.Since(word.At).Abs(); age > wordLife {
			return fmt.Errorf("the word that the other nodes are switched off was given %s ago, and may be true no longer; remove %s, start musterd, and run muster cluster recover again",
				age.Round(time.Minute), filepath.Join(d.cfg.DataDir, recoverFile))
		}
		if err := keepOldLife(d.cfg.DataDir, info, db, word); err != nil {
			return err
		}
		self, err := configdb.Nodes.Get(db.Local(), info.NodeID)
		if err != nil {
			return fmt.Errorf("this node is not in the database: %w", err)
		}
		a := &afterlife{db: db, self: self, term: db.Term(), actor: recoverActor, log: d.log}
		return a.begin(ctx, c, word)
	})
	if err != nil {
		return err
	}
	info.Life, info.Peers = word.Life, nil
	return info.saveIdentity(d.cfg.DataDir)
}

// checkLife compares the lives of identity and database. They differ only after
// a recovery that was interrupted between the two, and then broken off.
func (m *member) checkLife() error {
	c, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	switch {
	case err != nil || c.Spec.Life == m.info.life():
		return nil //nolint:nilerr // a new replica has no cluster yet
	case c.Spec.Life < m.info.life():
		return fmt.Errorf("the database is of life %d of cluster %s, but the identity of life %d; restore both from one backup", c.Spec.Life, m.info.Cluster, m.info.life())
	}
	m.info.Life = c.Spec.Life
	if err := m.info.saveIdentity(m.cfg.DataDir); err != nil {
		return err
	}
	return errBeginAnew
}

// keepOldLife backs the state up as it was, beside the node's other backups.
func keepOldLife(dataDir string, info *membership, db *configdb.Offline, word recovery) error {
	src := backup.Source{Snapshot: db.Snapshot(), Node: info.Node, Version: version.Version, Time: time.Now(), Stale: true, Age: max(0, time.Since(time.Unix(0, db.Local().Time())))}
	_, err := newBackupFolder(dataDir, info.ClusterID, info.clusterKey).take(src, fmt.Sprintf("life-%d", word.Life))
	return err
}

// begin makes the state that of a cluster with this node alone, in its next life.
func (a *afterlife) begin(ctx context.Context, c api.Cluster, word recovery) error {
	if err := a.rise(ctx); err != nil {
		return err
	}
	nodes, err := configdb.Nodes.List(a.db.Local())
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Meta.ID == a.self.Meta.ID || isGhost(a.db.Local(), &n) {
			continue
		}
		if _, off := word.Others[n.Meta.ID]; !off {
			// It came with an entry that was not committed when the word was given.
			why := fmt.Sprintf("not a member of the cluster since its recovery; if its host is switched off for good: muster node remove %s --force", n.Meta.Name)
			if _, err := a.haunt(ctx, n, why); err != nil {
				return err
			}
			continue
		}
		if _, err := a.bury(ctx, n, a.itself()); err != nil {
			return err
		}
	}
	if err := a.dropTokens(ctx, isJoinToken); err != nil {
		return err
	}
	_, err = configdb.Transact(ctx, a.db, a.actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
		for id, name := range word.Others {
			if _, known := v.Get(removedPrefix + id); !known { // a member that was no node yet
				tx.Put(removedPrefix+id, []byte(name))
			}
		}
		c.Spec.Life = word.Life
		if err := configdb.Clusters.UpdateSpec(v, tx, &c); err != nil {
			return err
		}
		return a.tell(tx, "cluster.recovered", c.Meta, fmt.Sprintf("cluster %s was recovered from lost quorum on node %s and is in its life %d; removed as switched off: %s",
			c.Meta.Name, a.self.Meta.Name, word.Life, strings.Join(sortedValues(word.Others), ", ")))
	})
	return err
}

// rise makes this node, which the others may have called lost, a ready voter.
func (a *afterlife) rise(ctx context.Context) error {
	_, err := configdb.Transact(ctx, a.db, a.actor, 1, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, a.self.Meta.ID)
		if err != nil {
			return err
		}
		n.Status.Phase, n.Status.Message = api.NodeReady, ""
		// It may have been about to leave, or not to vote; now it is all there is.
		n.Meta.DeletingAt = nil
		if n.Spec.Role == api.RoleReplica {
			n.Spec.Role = api.RoleVoter
		}
		if err := configdb.Nodes.UpdateSpec(v, tx, &n); err != nil {
			return err
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}

func sortedValues(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for _, v := range m {
		out = append(out, v)
	}
	slices.Sort(out)
	return out
}
