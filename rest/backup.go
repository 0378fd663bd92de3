// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/internal/contain"
)

// backupReads bounds the wait for the newest state, restoreTimeout reading and
// founding, of which a large backup takes seconds.
const (
	backupReads    = 10 * time.Second
	restoreTimeout = 10 * time.Minute
)

// BackupList is the answer of GET /cluster/backups.
type BackupList struct {
	Kind     string             `json:"kind"`
	Settings api.BackupSettings `json:"settings"`
	// Nodes are the backups that each node keeps, in order of name.
	Nodes []api.LocalBackups `json:"nodes"`
	// Unreachable nodes, with the reason.
	Unreachable map[string]string `json:"unreachable,omitempty"`
}

func (s *Server) backupRoutes() []route {
	path := base + "cluster"
	const summary = "A backup of the configuration database, sealed with the cluster key"
	return []route{
		{method: http.MethodGet, path: path + "/backup", need: needAdministrator, handle: s.takeBackup, stream: true, summary: summary,
			params: readParams, produces: "application/octet-stream", status: http.StatusOK},
		{method: http.MethodPost, path: path + "/backup", need: needAdministrator, handle: s.takeBackup, stream: true, summary: summary + ", with that key inside, sealed with a pass phrase",
			params: readParams, in: typeOf[api.BackupRequest](), produces: "application/octet-stream", status: http.StatusOK},
		{method: http.MethodGet, path: path + "/backups", need: needAdministrator, handle: listBackups, summary: "The backups that the nodes keep by themselves",
			params: []string{"node"}, out: typeOf[BackupList](), status: http.StatusOK},
		{method: http.MethodGet, path: path + "/settings", need: needViewer, handle: clusterSettings, summary: "The settings of the cluster as a whole",
			params: readParams, out: typeOf[api.ClusterSettings](), status: http.StatusOK},
		{method: http.MethodPatch, path: path + "/settings", need: needAdministrator, handle: changeSettings, summary: "Change settings of the cluster as a whole",
			consumes: "application/merge-patch+json", out: typeOf[api.ClusterSettings](), status: http.StatusOK},
		{method: http.MethodPost, path: path + "/restore", need: needLocal, early: true, handle: s.clusterRestore, summary: "Found a cluster on this host from a backup (unix socket only)",
			in: typeOf[api.RestoreRequest](), out: typeOf[api.RestoreResult](), status: http.StatusOK},
		{method: http.MethodGet, path: path + "/recover", need: needLocal, handle: s.recoveryPlan, summary: "Whether the cluster may be recovered from this node (unix socket only)",
			out: typeOf[api.RecoveryPlan](), status: http.StatusOK},
		{method: http.MethodPost, path: path + "/recover", need: needLocal, handle: s.clusterRecover, summary: "Recover the cluster from lost quorum with this node alone (unix socket only)",
			in: typeOf[api.RecoveryRequest](), out: typeOf[api.RecoveryResult](), status: http.StatusAccepted},
	}
}

// takeBackup streams a backup. What fails after the first byte ends the
// connection: a backup without its end is none.
func (s *Server) takeBackup(q *request) error {
	var in api.BackupRequest
	if q.r.Method == http.MethodPost {
		body, err := q.body()
		if err != nil {
			return err
		}
		if err := decode(body, &in); err != nil {
			return err
		}
	}
	old := q.param("consistency") == "stale"
	if c := q.param("consistency"); c != "" && c != "stale" && c != "linearizable" {
		return api.Invalid("consistency", "is %q; give linearizable or stale", clip(c))
	}
	if !s.backups.tryAcquire() {
		return api.Errorf(api.CodeRefused, "node %s makes %d backups already; try again later, or at another node", s.cfg.Node(), maxBackups)
	}
	defer s.backups.release()
	ctx, cancel := context.WithTimeout(q.ctx(), backupReads)
	defer cancel()
	rev, write, err := s.cfg.Backups.Prepare(ctx, old, in.Passphrase)
	if err != nil {
		return err
	}
	what := api.Meta{Name: "backup"}
	if in.Passphrase != "" {
		what.Name = "backup with the cluster key" // whoever has it can open all secrets
	}
	if old { // without a quorum nothing can be written, and nobody is to wait for that
		s.log.Warn("backup taken without a word from the leader", "actor", q.who.actor, "what", what.Name)
		go func() { _ = contain.Do(func() { q.auditAlone(api.KindCluster, what) }) }()
	} else {
		q.auditAlone(api.KindCluster, what)
	}
	h := q.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Cache-Control", "no-store")
	setRevision(h, rev)
	q.w.WriteHeader(http.StatusOK)
	if err := write(&timedWriter{q}); err != nil {
		s.log.Warn("backup not delivered", "actor", q.who.actor, "rev", rev, "err", err)
		panic(http.ErrAbortHandler)
	}
	return nil
}

// timedWriter gives each piece of a long answer its own deadline.
type timedWriter struct{ q *request }

// Write implements io.Writer.
func (w *timedWriter) Write(p []byte) (int, error) {
	if err := w.q.ctx().Err(); err != nil {
		return 0, context.Cause(w.q.ctx())
	}
	_ = w.q.ctl.SetWriteDeadline(time.Now().Add(streamWrite))
	return w.q.w.Write(p)
}

func listBackups(q *request) error {
	nodes, unreachable, err := gather(q, func(ctx context.Context, node string) (api.LocalBackups, error) {
		if node == q.s.cfg.Node() {
			return q.s.cfg.Backups.Local()
		}
		var list BackupList
		if err := q.askPeer(ctx, node, "cluster/backups", &list); err != nil || len(list.Nodes) != 1 {
			return api.LocalBackups{}, err
		}
		return list.Nodes[0], nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(nodes, func(a, b api.LocalBackups) int { return strings.Compare(a.Node, b.Node) })
	v := q.db.Local()
	c, err := backup.Cluster(v)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, v.Revision(), BackupList{Kind: "backupList", Settings: c.Spec.Settings().Backup, Nodes: nodes, Unreachable: unreachable})
	return nil
}

func clusterSettings(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	c, err := backup.Cluster(v)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, v.Revision(), c.Spec.Settings())
	return nil
}

// changeSettings merges what is given into the settings (RFC 7396).
func changeSettings(q *request) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), writeTimeout)
	defer cancel()
	var now api.ClusterSettings
	changed := false
	rev, err := configdb.Transact(ctx, q.db, q.who.actor, maxAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		c, err := backup.Cluster(v)
		if err != nil {
			return err
		}
		now = c.Spec.Settings()
		if err := decode(body, &now); err != nil {
			return err
		}
		if err := now.Backup.Validate(); err != nil {
			return err
		}
		if err := now.HA.Validate(); err != nil {
			return err
		}
		changed = c.Spec.Settings() != now
		c.Spec.Backup, c.Spec.FeatureLevelHold, c.Spec.HA = now.Backup, now.FeatureLevelHold, now.HA
		return configdb.Clusters.UpdateSpec(v, tx, &c)
	})
	if err != nil {
		return err
	}
	if changed {
		q.auditAlone(api.KindCluster, api.Meta{Name: "settings"})
	}
	q.reply(http.StatusOK, rev, now)
	return nil
}

func (s *Server) clusterRestore(q *request) error {
	var in api.RestoreRequest
	return q.membershipFor(restoreTimeout, &in, func(ctx context.Context) (any, error) {
		return s.cfg.Disaster.Restore(ctx, in)
	})
}

func (s *Server) recoveryPlan(q *request) error {
	p, err := s.cfg.Disaster.RecoveryPlan(q.ctx())
	if err != nil {
		return err
	}
	// Without the revision: it is that of the log, which this node cannot reach.
	q.reply(http.StatusOK, 0, p)
	return nil
}

func (s *Server) clusterRecover(q *request) error {
	var in api.RecoveryRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		return s.cfg.Disaster.Recover(ctx, in)
	})
}
