// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
)

func has(t *testing.T, db configdb.DB, key, want string) {
	t.Helper()
	if e, _ := db.Local().Get(key); string(e.Value) != want {
		t.Errorf("%s is %q, want %q", key, e.Value, want)
	}
}

// recovered is what an administrator makes of a stopped node.
func recovered(t *testing.T, n *storetest.Node, life uint64) {
	t.Helper()
	recoveredFrom(t, n, n.Files(), life)
}

func recoveredFrom(t *testing.T, n *storetest.Node, files configdb.Files, life uint64) {
	t.Helper()
	err := configdb.Recover(context.Background(), files, func(db *configdb.Offline) error {
		set(t, db, "life", fmt.Sprint(life))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n.Life = life
}

func TestOneOfThreeGoesOnAlone(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	var rev uint64
	for i := range 50 {
		rev = set(t, c.Leader(), fmt.Sprintf("k%02d", i), fmt.Sprint(i))
	}
	survivor := c.Followers(c.Leader())[0]
	if _, err := survivor.WaitRevision(ctx(t, time.Minute), rev); err != nil {
		t.Fatal(err)
	}
	term := survivor.Term()
	for _, n := range c.Nodes {
		n.Stop()
	}
	recovered(t, survivor, 2)
	survivor.Start()
	now := set(t, survivor, "after", "alone")
	for i := range 50 {
		has(t, survivor, fmt.Sprintf("k%02d", i), fmt.Sprint(i))
	}
	has(t, survivor, "life", "2")
	e, _ := survivor.Local().Get("life")
	if e.Revision <= rev || now <= e.Revision || survivor.Term() <= term {
		t.Errorf("revisions %d, %d, %d; term %d after %d", rev, e.Revision, now, survivor.Term(), term)
	}
	if m, err := survivor.Members(); err != nil || len(m) != 1 || m[0].NodeID != survivor.ID || !m[0].Voter {
		t.Errorf("members %+v, %v", m, err)
	}
	survivor.Stop() // and once more from its files
	survivor.Start()
	set(t, survivor, "again", "1")
	has(t, survivor, "after", "alone")
}

// The others were only away. They are the majority of the old life and go on in
// it; neither side ever sees anything of the other.
func TestTheOldMajorityDoesNotReachTheNewLife(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	survivor := c.Nodes[0]
	rest := c.Nodes[1:]
	rev := set(t, c.Leader(), "k", "shared")
	if _, err := survivor.WaitRevision(ctx(t, time.Minute), rev); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		n.Stop()
	}
	recovered(t, survivor, 2)
	survivor.Start()
	set(t, survivor, "k", "new life")
	for _, n := range rest {
		n.Start()
	}
	c.Eventually("the old majority elects a leader", func() error {
		for _, n := range rest {
			if _, ok := n.Leadership(); ok {
				return nil
			}
		}
		return errors.New("none leads")
	})
	for i := range 20 {
		set(t, rest[i%2], "k", fmt.Sprint("old life ", i))
		set(t, survivor, "k", fmt.Sprint("new life ", i))
	}
	for _, n := range rest {
		if v, err := n.View(ctx(t, time.Minute)); err != nil {
			t.Error(err)
		} else if e, _ := v.Get("k"); string(e.Value) != "old life 19" {
			t.Errorf("node %d of the old life has %q", n.Index, e.Value)
		}
		if _, ok := n.Local().Get("life"); ok {
			t.Errorf("node %d of the old life has what the new one wrote", n.Index)
		}
	}
	v, err := survivor.View(ctx(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if e, _ := v.Get("k"); string(e.Value) != "new life 19" {
		t.Errorf("the new life has %q", e.Value)
	}
	if id, _, ok := survivor.Store.Leader(); !ok || id != survivor.ID {
		t.Errorf("the new life follows %q", id)
	}
}

// A power cut may come at any point of a recovery; it is then begun anew.
func TestRecoveryCanBeRepeated(t *testing.T) {
	c := storetest.NewCluster(t, 2)
	n := c.Nodes[1]
	rev := set(t, c.Leader(), "k", "v")
	if _, err := n.WaitRevision(ctx(t, time.Minute), rev); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		n.Stop()
	}
	cut := errors.New("power cut")
	if err := configdb.Recover(context.Background(), n.Files(), func(db *configdb.Offline) error {
		set(t, db, "half", "done")
		return cut
	}); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	runs := 0
	for range 3 { // the marks of the second and third find the work of the first
		err := configdb.Recover(context.Background(), n.Files(), func(db *configdb.Offline) error {
			if _, done := db.Local().Get("life"); done {
				return nil
			}
			runs++
			set(t, db, "life", "2")
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if runs != 1 {
		t.Errorf("the state was changed %d times", runs)
	}
	n.Life = 2
	n.Start()
	set(t, n, "after", "1")
	has(t, n, "k", "v")
	if _, ok := n.Local().Get("half"); ok {
		t.Error("an interrupted change is there")
	}
}

// A snapshot that the disk has damaged must not be replaced by an older one
// without a word: what lies between them was acknowledged.
func TestADamagedSnapshotIsNotPassedOver(t *testing.T) {
	c := storetest.NewCluster(t, 1)
	n := c.Nodes[0]
	set(t, n, "k", "1")
	n.Stop()
	recovered(t, n, 2) // the log is now one snapshot
	n.Start()
	set(t, n, "k", "2")
	n.Stop()
	recovered(t, n, 3)
	states, err := filepath.Glob(filepath.Join(n.Files().Dir, "snapshots", "*", "state.bin"))
	if err != nil || len(states) != 2 {
		t.Fatalf("snapshots %v, %v", states, err)
	}
	slices.Sort(states)
	newest, err := os.ReadFile(states[1])
	if err != nil {
		t.Fatal(err)
	}
	flip := func(path string) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	flip(states[1])
	err = configdb.Recover(context.Background(), n.Files(), func(*configdb.Offline) error { t.Error("an old state was taken"); return nil })
	if err == nil || !strings.Contains(err.Error(), "the newest snapshot ends with entry") {
		t.Errorf("the newest is damaged: %v", err)
	}
	if err := os.WriteFile(states[1], newest, 0o600); err != nil {
		t.Fatal(err)
	}
	flip(states[0])
	recovered(t, n, 4)
	n.Start()
	set(t, n, "after", "1")
	has(t, n, "k", "2")
	has(t, n, "life", "4")
}

func TestRecoveryKnowsBothLogStores(t *testing.T) {
	c := storetest.NewCluster(t, 2)
	n := c.Nodes[0]
	rev := set(t, c.Leader(), "k", "v")
	if _, err := n.WaitRevision(ctx(t, time.Minute), rev); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		n.Stop()
	}
	bolt := n.Files()
	bolt.LogStore = configdb.LogBolt
	recoveredFrom(t, n, bolt, 2)
	n.Start() // with the other one
	set(t, n, "after", "1")
	n.Stop()
	recoveredFrom(t, n, bolt, 3)
	n.Life = 3
	n.Start()
	for key, want := range map[string]string{"k": "v", "after": "1", "life": "3"} {
		c.Eventually(key, func() error { // the log is applied when it leads
			if e, _ := n.Local().Get(key); string(e.Value) != want {
				return fmt.Errorf("%q", e.Value)
			}
			return nil
		})
	}
}

// After a start without a quorum nobody can say what is committed.
func TestWithoutAQuorumTheWholeLogIsReadable(t *testing.T) {
	c := storetest.NewCluster(t, 3)
	n := c.Followers(c.Leader())[0]
	rev := set(t, c.Leader(), "k", "v")
	if _, err := n.WaitRevision(ctx(t, time.Minute), rev); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		n.Stop()
	}
	// Without the note of what was committed, which may be lost in a power cut.
	if err := os.Remove(filepath.Join(n.Files().Dir, "committed")); err != nil {
		t.Fatal(err)
	}
	n.Start()
	if _, ok := n.Local().Get("k"); ok {
		t.Fatal("the state has it by itself: this test tests nothing")
	}
	s, err := n.Newest(ctx(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if e, _ := s.View().Get("k"); string(e.Value) != "v" || s.View().Revision() < rev {
		t.Errorf("%q at revision %d", e.Value, s.View().Revision())
	}
	index, term := n.LastLog()
	if index < rev || term == 0 {
		t.Errorf("the log ends at %d in term %d", index, term)
	}
}

func TestRecoverNeedsAReplica(t *testing.T) {
	c := storetest.NewCluster(t, 1)
	n := c.Nodes[0]
	edit := func(*configdb.Offline) error { t.Error("nothing was changed, but edit was called"); return nil }
	gone := n.Files()
	gone.Dir = filepath.Join(gone.Dir, "not-there")
	if err := configdb.Recover(context.Background(), gone, edit); !errors.Is(err, configdb.ErrNoState) {
		t.Errorf("no directory: %v", err)
	}
	empty := n.Files()
	empty.Dir = t.TempDir()
	if err := configdb.Recover(context.Background(), empty, edit); !errors.Is(err, configdb.ErrNoState) {
		t.Errorf("an empty directory: %v", err)
	}
	if err := configdb.Recover(context.Background(), n.Files(), edit); err == nil {
		t.Error("the files of a running node were taken")
	}
}

func TestAStateIsInstalledAndGoesOn(t *testing.T) {
	db := configdb.NewOffline(fsm.New(), 7)
	var rev uint64
	for i := range 20 {
		rev = set(t, db, fmt.Sprintf("k%d", i), fmt.Sprint(i))
	}
	c := storetest.NewCluster(t, 1)
	n := c.Nodes[0]
	if err := configdb.Install(n.Files(), db); err == nil {
		t.Fatal("installed over the files of a running node")
	}
	n.Stop()
	if err := configdb.Install(n.Files(), db); err == nil {
		t.Fatal("installed over another state")
	}
	if err := os.RemoveAll(n.Files().Dir); err != nil {
		t.Fatal(err)
	}
	if err := configdb.Install(n.Files(), db); err != nil {
		t.Fatal(err)
	}
	n.Start()
	if next := set(t, n, "next", "1"); next <= rev || n.Term() <= 7 {
		t.Errorf("revision %d after %d, term %d", next, rev, n.Term())
	}
	for i := range 20 {
		has(t, n, fmt.Sprintf("k%d", i), fmt.Sprint(i))
	}
}
