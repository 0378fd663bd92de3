// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/storetest"
)

// leveled is the leader of three nodes that report nothing, in a cluster of level 1.
func leveled(t *testing.T) (*member, *storetest.Cluster) {
	t.Helper()
	k, c := keeperOf(t)
	k.m.cfg = &Config{DataDir: t.TempDir()}
	return k.m, c
}

func (m *member) commit(t *testing.T, f func(v *configdb.View, tx *configdb.Txn) error) {
	t.Helper()
	if _, err := configdb.Transact(t.Context(), m.store, "test", 1, f); err != nil {
		t.Fatal(err)
	}
}

// report writes what a node supports into its status; nil: as software does that
// knows no levels.
func (m *member) report(t *testing.T, name string, levels *api.FeatureLevels) {
	t.Helper()
	m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", name)
		if err != nil {
			return err
		}
		n.Status.FeatureLevels = levels
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
}

func (m *member) hold(t *testing.T, on bool) {
	t.Helper()
	m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
		c, err := configdb.Clusters.Get(v, m.info.ClusterID)
		c.Spec.FeatureLevelHold = on
		return errors.Join(err, configdb.Clusters.UpdateSpec(v, tx, &c))
	})
}

// level raises if it can, and returns what is in force and what it waits for.
func (m *member) level(t *testing.T) *api.FeatureLevelStatus {
	t.Helper()
	if err := m.raiseLevel(t.Context(), m.store.Term()); err != nil {
		t.Fatal(err)
	}
	v := m.store.Local()
	c, err := configdb.Clusters.Get(v, m.info.ClusterID)
	if err != nil {
		t.Fatal(err)
	}
	return levelStatus(&c.Spec, v)
}

func TestTheLevelIsRaisedWhenEveryNodeSupportsIt(t *testing.T) {
	m, c := leveled(t)
	one, two := api.FeatureLevels{Min: 1, Max: 1}, api.FeatureLevels{Min: 1, Max: 2}
	stays := func(what string, waits ...string) {
		t.Helper()
		rev := m.store.Local().Revision()
		if s := m.level(t); s.Level != 1 || !slices.Equal(s.Waits, waits) || m.store.Local().Revision() != rev {
			t.Fatalf("%s: %+v", what, s)
		}
	}
	stays("nobody reports anything")
	m.report(t, "m1", &two)
	stays("one does", "m2: supports 1", "m3: supports 1")
	m.report(t, "m2", &one)
	m.report(t, "m3", &api.FeatureLevels{Min: 2, Max: 9})
	stays("one cannot", "m2: supports 1")
	m.report(t, "m2", &two)
	m.hold(t, true)
	stays("held", "held; to go on: muster cluster set --feature-level-hold=false")
	m.hold(t, false)
	m.report(t, "m3", nil) // went back
	m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", "m3")
		n.Status.Phase = api.NodeLost
		return errors.Join(err, configdb.Nodes.UpdateStatus(v, tx, &n))
	})
	stays("a lost node that reports nothing", "m3: supports 1, as it said before it was lost")

	// Of two levels that all support, this build can raise but one.
	r := expelRequest{NodeID: c.Followers(c.Leader())[0].ID, Actor: "test"}
	for _, n := range c.Nodes {
		if o, err := configdb.Nodes.Get(m.store.Local(), n.ID); err == nil && o.Meta.Name == "m3" {
			r.NodeID = n.ID
		}
	}
	if err := deleteNode(t.Context(), m.store, r, m.store.Term()); err != nil {
		t.Fatal(err)
	}
	if s := m.level(t); s.Level != 2 || len(s.Waits) > 0 {
		t.Fatalf("when it was removed: %+v", s)
	}
	events, err := configdb.Events.List(m.store.Local())
	if err != nil || len(events) != 1 || events[0].Spec.Type != "cluster.featurelevel" || !strings.Contains(events[0].Spec.Message, "raised to 2") {
		t.Errorf("events %+v, %v", events, err)
	}
	m.report(t, "m2", &one) // too late: it never goes down
	if s := m.level(t); s.Level != 2 {
		t.Fatalf("after a report of less: %+v", s)
	}
	if l := m.store.Local().LogLevel(); l != 2 {
		t.Errorf("entries after the raise say %d", l)
	}
}

func TestTheLogSaysTheLevelThoughNothingIsWritten(t *testing.T) {
	m, _ := leveled(t)
	for _, n := range []string{"m1", "m2", "m3"} {
		m.report(t, n, &api.FeatureLevels{Min: 1, Max: 2})
	}
	if s := m.level(t); s.Level != 2 {
		t.Fatalf("%+v", s)
	}
	if l := m.store.Local().LogLevel(); l != 1 {
		t.Fatalf("the raise itself has the format of level %d: a node of level 1 could not apply it even if it failed", l)
	}
	for range 3 {
		if err := m.sealLevel(t.Context(), m.store.Term()); err != nil {
			t.Fatal(err)
		}
	}
	if l, rev := m.store.Local().LogLevel(), m.store.Local().Revision(); l != 2 {
		t.Errorf("the log says %d at %d", l, rev)
	}
	idle := m.store.Local().Revision()
	if err := errors.Join(m.raiseLevel(t.Context(), m.store.Term()), m.sealLevel(t.Context(), m.store.Term())); err != nil || m.store.Local().Revision() != idle {
		t.Errorf("an idle cluster writes: revision %d after %d, %v", m.store.Local().Revision(), idle, err)
	}
}

// What was decided about an older view must not take effect when somebody came in,
// or took back his report, meanwhile.
func TestARaiseSeesWhoeverComesInMeanwhile(t *testing.T) {
	for name, meanwhile := range map[string]func(t *testing.T, m *member){
		"an old node is admitted": func(t *testing.T, m *member) {
			n := api.Node{Meta: api.NewMeta(api.KindNode, "", "m4")}
			m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
				tx.Put(admittedKey, []byte(n.Meta.ID)) // as admission does
				return configdb.Nodes.Create(tx, &n)
			})
		},
		"a node goes back":       func(t *testing.T, m *member) { m.report(t, "m2", nil) },
		"an administrator holds": func(t *testing.T, m *member) { m.hold(t, true) },
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := leveled(t)
			for _, n := range []string{"m1", "m2", "m3"} {
				m.report(t, n, &api.FeatureLevels{Min: 1, Max: 2})
			}
			v, tx := m.store.Local(), &configdb.Txn{}
			waits, err := requireReports(v, tx, 2)
			if err != nil || len(waits) > 0 {
				t.Fatalf("%v, %v", waits, err)
			}
			c, err := configdb.Clusters.Get(v, m.info.ClusterID)
			if err != nil {
				t.Fatal(err)
			}
			c.Spec.FeatureLevel = 2
			if err := configdb.Clusters.UpdateSpec(v, tx, &c); err != nil {
				t.Fatal(err)
			}
			meanwhile(t, m)
			if _, err := m.store.Txn(t.Context(), tx); !errors.Is(err, configdb.ErrConflict) {
				t.Errorf("it took effect: %v", err)
			}
			if s := m.level(t); s.Level != 1 || len(s.Waits) != 1 {
				t.Errorf("looked at anew: %+v", s)
			}
		})
	}
}

// A deposed leader's raise does not land.
func TestARaiseRequiresItsTerm(t *testing.T) {
	m, _ := leveled(t)
	for _, n := range []string{"m1", "m2", "m3"} {
		m.report(t, n, &api.FeatureLevels{Min: 1, Max: 2})
	}
	if err := m.raiseLevel(t.Context(), m.store.Term()-1); err == nil {
		t.Error("in an earlier term")
	}
	if l := feature.Level(m.store.Local()); l != 1 {
		t.Errorf("level %d", l)
	}
}

func TestAdmissionLooksAtTheLevel(t *testing.T) {
	m, _ := leveled(t)
	fits := func(level int, has *api.FeatureLevels) error {
		t.Helper()
		m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
			c, err := configdb.Clusters.Get(v, m.info.ClusterID)
			c.Spec.FeatureLevel = level
			return errors.Join(err, configdb.Clusters.UpdateSpec(v, tx, &c))
		})
		return m.levelFits(m.store.Local(), api.AdmitRequest{Version: "0.7", FeatureLevels: has})
	}
	for _, ok := range []struct {
		level int
		has   *api.FeatureLevels
	}{{0, nil}, {1, nil}, {1, &api.FeatureLevels{Min: 1, Max: 3}}, {2, &api.FeatureLevels{Min: 1, Max: 2}}, {2, &api.FeatureLevels{Min: 2, Max: 3}}} {
		if err := fits(ok.level, ok.has); err != nil {
			t.Errorf("level %d, %v: %v", ok.level, ok.has, err)
		}
	}
	for _, c := range []struct {
		level int
		has   *api.FeatureLevels
		words string
	}{
		{2, nil, "cluster c is at feature level 2, and version 0.7 supports 1; upgrade this node's software first"},
		{1, &api.FeatureLevels{Min: 2, Max: 4}, "supports 2-4; this node's software is too new"},
		{1, &api.FeatureLevels{}, "supports 0"},
		{3, &api.FeatureLevels{Min: 1, Max: 2}, "supports 1-2; upgrade this node's software first"}, // the last: no entry follows
	} {
		if err := fits(c.level, c.has); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), c.words) {
			t.Errorf("level %d, %v: %v", c.level, c.has, err)
		}
	}
}

func TestTheFileOfTheLevel(t *testing.T) {
	dir := t.TempDir()
	info := &membership{Cluster: "c"}
	if err := checkLevelFile(dir, info); err != nil {
		t.Errorf("without a file: %v", err)
	}
	for text, words := range map[string]string{
		"1\n": "", "2": "", "2\n": "", "3\n": "upgrade this node's software first", "": "is damaged", "0\n": "is damaged", "-1": "is damaged", "two": "is damaged", "2 2": "is damaged",
	} {
		if err := os.WriteFile(filepath.Join(dir, levelFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := checkLevelFile(dir, info)
		if (err == nil) != (words == "") || err != nil && !strings.Contains(err.Error(), words) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := forget(dir); err != nil || exists(filepath.Join(dir, levelFile)) {
		t.Errorf("a forgotten node keeps its level: %v", err)
	}
}

// A daemon notes the level, and ends when it is one that it does not support.
func TestALevelThatIsNotSupportedEndsTheDaemon(t *testing.T) {
	m, _ := leveled(t)
	ended := make(chan error, 1)
	m.fatal = func(err error) { ended <- err }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- m.watchLevel(ctx) }()
	set := func(level int) {
		t.Helper()
		m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
			c, err := configdb.Clusters.Get(v, m.info.ClusterID)
			c.Spec.FeatureLevel = level
			return errors.Join(err, configdb.Clusters.UpdateSpec(v, tx, &c))
		})
	}
	set(2)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(m.cfg.DataDir, levelFile))
		if err == nil && string(b) == "2\n" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the level is not noted: %q, %v", b, err)
		}
	}
	set(feature.Supported().Max + 1)
	if err := <-ended; api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "upgrade this node's software first") {
		t.Errorf("%v", err)
	}
	if err := <-done; err == nil {
		t.Error("the service ended without an error")
	}
	if err := m.checkLevel(); err == nil {
		t.Error("a start on this replica is not refused")
	}
	if b, err := os.ReadFile(filepath.Join(m.cfg.DataDir, levelFile)); err != nil || string(b) != "2\n" {
		t.Errorf("noted %q, %v", b, err)
	}
}
