// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/version"
)

// The feature level of the cluster; configdb/DESIGN.md has the failure cases.
const (
	// levelLook is how often the leader looks whether the level can be raised.
	levelLook = 2 * time.Second
	// levelAttempts is how often a raise is computed again when a report or the
	// cluster object changed meanwhile.
	levelAttempts = 4
	// admittedKey has the ID of the node that was admitted last. A raise requires
	// its revision, so that no node can come in unseen.
	admittedKey = configdb.Root + "admitted"
	levelActor  = "feature level"
)

// unfit is the error of software that does not support a cluster's level.
func unfit(cluster string, level int, software string, has api.FeatureLevels) error {
	remedy := "upgrade this node's software first"
	if has.Min > level {
		remedy = "this node's software is too new for it: take a version in between, and upgrade when the cluster's level is higher"
	}
	return api.Errorf(api.CodeRefused, "cluster %s is at feature level %d, and version %s supports %s; %s", cluster, level, software, has, remedy)
}

// levelFits refuses a node whose software does not support the level in force.
// The transaction of its admission requires the cluster object's revision.
func (m *member) levelFits(v *configdb.View, r api.AdmitRequest) error {
	has := (&api.NodeStatus{FeatureLevels: r.FeatureLevels}).Supports()
	if level := max(1, feature.Level(v)); !has.Include(level) {
		return unfit(m.info.Cluster, level, r.Version, has)
	}
	return nil
}

// checkLevelFile refuses a data directory that was part of a cluster of another
// level than this build supports, before anything of it is opened.
func checkLevelFile(dir string, info *membership) error {
	path := filepath.Join(dir, levelFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the replica says it
	}
	if err != nil {
		return fmt.Errorf("read feature level: %w", err)
	}
	level, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || level < 1 {
		return fmt.Errorf("%s is damaged: it is to have the cluster's feature level; remove the file, the configuration database says it, too", path)
	}
	return supported(info.Cluster, level)
}

func supported(cluster string, level int) error {
	if has := feature.Supported(); !has.Include(level) {
		return unfit(cluster, level, version.Version, has)
	}
	return nil
}

// checkLevel refuses a replica whose cluster this build does not support.
func (m *member) checkLevel() error {
	if level := feature.Level(m.store.Local()); level > 0 {
		return supported(m.info.Cluster, level)
	}
	return nil // being founded or joined
}

// watchLevel notes the level in the data directory, and ends the daemon if it is
// one that this build does not support.
func (m *member) watchLevel(ctx context.Context) error {
	w := m.store.Watch(configdb.Clusters.SpecPrefix(), 0)
	noted := 0
	for {
		if level := feature.Level(m.store.Local()); level > noted {
			if err := supported(m.info.Cluster, level); err != nil {
				m.fatal(err)
				return err
			}
			if err := writeFile(filepath.Join(m.cfg.DataDir, levelFile), fmt.Appendln(nil, level), 0o600); err != nil {
				return err // and again, as the supervisor says
			}
			noted = level
		}
		if _, err := w.Next(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if !errors.Is(err, configdb.ErrCompacted) {
				return err
			}
			w = m.store.Watch(configdb.Clusters.SpecPrefix(), 0)
		}
	}
}

// keepLevel raises the level, on the leader, when every node supports the next.
func (m *member) keepLevel(ctx context.Context, term uint64) error {
	tick := time.NewTicker(levelLook)
	defer tick.Stop()
	for {
		err := m.raiseLevel(ctx, term)
		if err == nil {
			err = m.sealLevel(ctx, term)
		}
		if err != nil && ctx.Err() == nil {
			m.log.Warn("feature level not looked after", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// raiseLevel takes the next step, if nothing is in its way. It is an entry of the
// old level, which everybody may apply, whether it takes effect or not.
func (m *member) raiseLevel(ctx context.Context, term uint64) error {
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	said := ""
	_, err := configdb.Transact(ctx, m.store, levelActor, levelAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		said = ""
		c, err := configdb.Clusters.Get(v, m.info.ClusterID)
		if err != nil {
			return api.IgnoreNotFound(err) // being founded
		}
		next := c.Spec.Level() + 1
		if c.Spec.FeatureLevelHold || !feature.Supported().Include(next) {
			return nil
		}
		waits, err := requireReports(v, tx, next)
		if err != nil || len(waits) > 0 {
			return err
		}
		c.Spec.FeatureLevel = next
		tx.RequireTerm(term)
		said = fmt.Sprintf("feature level of cluster %s raised to %d, which all nodes support; software that supports less can no longer be a node of it", m.info.Cluster, next)
		ev := api.NewEvent("cluster.featurelevel", api.SeverityInfo, api.KindCluster, c.Meta, said, time.Now())
		ev.Spec.Node = m.info.Node
		return errors.Join(configdb.PutEvent(tx, &ev), configdb.Clusters.UpdateSpec(v, tx, &c))
	})
	if err == nil && said != "" {
		m.log.Info("feature level raised", "said", said)
	}
	return err
}

// requireReports makes a raise depend on what every node reports, and on there
// being no other node. It returns what is in its way.
func requireReports(v *configdb.View, tx *configdb.Txn, level int) (waits []string, err error) {
	admitted, _ := v.Get(admittedKey)
	tx.RequireRevision(admittedKey, admitted.Revision)
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return nil, err // one that cannot be read may be an old one
	}
	for i := range nodes {
		n := &nodes[i]
		if has := n.Status.Supports(); !has.Include(level) {
			waits = append(waits, fmt.Sprintf("%s: supports %s", n.Meta.Name, has))
		}
		tx.RequireRevision(configdb.Nodes.StatusKey(n.Meta.ID), n.Meta.StatusRevision)
	}
	return waits, nil
}

// sealLevel sees to it that the log says the level, so that a build which does
// not support it cannot go on even if it looks at nothing else. An entry that is
// written after the raise does; where none is, this writes an empty one.
func (m *member) sealLevel(ctx context.Context, term uint64) error {
	v := m.store.Local()
	if level := feature.Level(v); level <= v.LogLevel() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	tx := &configdb.Txn{Actor: levelActor}
	tx.RequireTerm(term)
	_, err := m.store.Txn(ctx, tx)
	return err
}

// levelStatus says what the level is and what it waits for.
func levelStatus(c *api.ClusterSpec, v *configdb.View) *api.FeatureLevelStatus {
	s := &api.FeatureLevelStatus{Level: c.Level(), Highest: c.Level(), Hold: c.FeatureLevelHold}
	nodes, err := configdb.Nodes.List(v)
	for i := range nodes {
		s.Highest = max(s.Highest, nodes[i].Status.Supports().Max)
	}
	if s.Highest == s.Level {
		return s
	}
	if s.Hold {
		s.Waits = append(s.Waits, "held; to go on: muster cluster set --feature-level-hold=false")
	}
	if err != nil {
		s.Waits = append(s.Waits, "the object of a node cannot be read: "+err.Error())
	}
	for i := range nodes {
		n := &nodes[i]
		has := n.Status.Supports()
		if has.Include(s.Level + 1) {
			continue
		}
		why := fmt.Sprintf("%s: supports %s", n.Meta.Name, has)
		if n.Status.Phase == api.NodeLost {
			why += ", as it said before it was lost"
		}
		s.Waits = append(s.Waits, why)
	}
	return s
}
