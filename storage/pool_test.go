// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// The clock is the bubble's: it stands still while a file is written, so that no
// bound of the procedure, and none of the test, passes because the machine is busy.
func TestSharedPoolIsReadyEverywhereAndThenQuiet(t *testing.T) { synctest.Test(t, sharedPoolIsQuiet) }

func sharedPoolIsQuiet(t *testing.T) {
	k := newKit(t, "m1", "m2", "m3")
	p := k.pool("nfs", api.PoolSpec{Type: api.PoolShared, Path: serviceDir(t)})
	k.start("m1", "m2", "m3")
	k.untilReady(p, "m1", "m2", "m3")
	st := k.state(k.db.Local(), p, "m2")
	if st.Node != "m2" || st.Stamp == "" || st.Total == 0 || st.Free == 0 || st.Reason != "" {
		t.Errorf("state %+v", st)
	}
	if !k.nodes["m1"].HasPool(k.db.Local(), "nfs") || k.nodes["m1"].HasPool(k.db.Local(), "other") {
		t.Error("HasPool is wrong")
	}
	// A restart proves itself anew and disturbs no other node.
	stamps := map[string]string{}
	for _, n := range []string{"m1", "m3"} {
		stamps[n] = k.state(k.db.Local(), p, n).Stamp
	}
	k.restart("m2", nil)
	k.until("a new stamp on m2", func(v *configdb.View) bool {
		now := k.state(v, p, "m2")
		return now.Ready && now.Stamp != st.Stamp
	})
	for n, was := range stamps {
		if now := k.state(k.db.Local(), p, n); !now.Ready || now.Stamp != was {
			t.Errorf("%s is now %+v", n, now)
		}
	}
	// Services that run where nothing happens write nothing, however long.
	synctest.Wait() // what the last change woke has looked
	rev := k.db.Local().Revision()
	time.Sleep(2 * staleGrace)
	if now := k.db.Local().Revision(); now != rev {
		t.Errorf("%d writes in %v at rest", now-rev, 2*staleGrace)
	}
	for _, h := range k.nodes {
		h.stop()
	}
	// A service that ends does not wait for a look that is under way, and one more
	// look beside it would take the file system for hung.
	synctest.Wait()
	for _, h := range k.nodes {
		if _, err := h.reconcilePool(t.Context(), p.Meta.ID); err != nil {
			t.Error(err)
		}
	}
	if now := k.db.Local().Revision(); now != rev {
		t.Errorf("%d writes at rest", now-rev)
	}
}

func TestAnotherDirectoryIsFoundOut(t *testing.T) {
	for _, kind := range []string{"empty", "copy", "missing"} {
		t.Run(kind, func(t *testing.T) {
			k := newKit(t, "m1", "m2", "m3")
			shared, other := serviceDir(t), filepath.Join(serviceDir(t), "other")
			p := k.pool("nfs", api.PoolSpec{Type: api.PoolShared, Path: shared})
			k.start("m1", "m2", "m3")
			k.untilReady(p, "m1", "m2", "m3")
			k.nodes["m3"].stop()
			reason := "has no " + markerName
			switch kind {
			case "missing":
				reason = "does not exist any more"
			case "copy":
				reason = "does not see"
				if out, err := exec.Command("cp", "-a", shared, other).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			default:
				if err := os.Mkdir(other, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			start := time.Now()
			k.restart("m3", func(s *Service) {
				s.mounts = map[string]string{shared: other}
				// Patience must not be real time.
				s.cfg.Now = func() time.Time { return start.Add(10 * time.Since(start)) }
			})
			k.untilNotReady(p, "m3", reason)
			if !strings.Contains(k.state(k.db.Local(), p, "m3").Reason, "mount") {
				t.Errorf("the reason says no remedy: %q", k.state(k.db.Local(), p, "m3").Reason)
			}
			for _, n := range []string{"m1", "m2"} {
				if st := k.state(k.db.Local(), p, n); !st.Ready {
					t.Errorf("%s suffers: %+v", n, st)
				}
			}
			// The right directory heals it.
			k.nodes["m3"].stop()
			k.nodes["m3"].mounts = nil
			k.restart("m3", nil)
			k.untilReady(p, "m3")
		})
	}
}

func TestOfTwoDirectoriesFromTheStartOnlyOneIsReady(t *testing.T) {
	k := newKit(t, "m1", "m2")
	path := serviceDir(t)
	p := k.pool("nfs", api.PoolSpec{Type: api.PoolShared, Path: path})
	start := time.Now()
	for i, h := range []*host{k.nodes["m1"], k.nodes["m2"]} {
		dirs := []string{serviceDir(t), serviceDir(t)}
		h.mounts = map[string]string{path: dirs[i]}
		h.cfg.Now = func() time.Time { return start.Add(10 * time.Since(start)) }
	}
	k.start("m1", "m2")
	k.until("one ready, one found out", func(v *configdb.View) bool {
		a, b := k.state(v, p, "m1"), k.state(v, p, "m2")
		if a.Ready && b.Ready {
			t.Fatal("both are ready")
		}
		return a.Ready && strings.Contains(b.Reason, "mount") || b.Ready && strings.Contains(a.Reason, "mount")
	})
}

func TestLostNodeIsNoObstacleAndARemovedOneIsForgotten(t *testing.T) {
	k := newKit(t, "m1", "m2")
	p := k.pool("nfs", api.PoolSpec{Type: api.PoolShared, Path: serviceDir(t)})
	k.start("m1", "m2")
	k.untilReady(p, "m1", "m2")
	k.nodes["m1"].stop()
	k.setPhase("m1", api.NodeLost)
	st := k.state(k.db.Local(), p, "m2")
	k.restart("m2", nil)
	k.until("ready again", func(v *configdb.View) bool {
		now := k.state(v, p, "m2")
		return now.Ready && now.Stamp != st.Stamp
	})
}

func TestMarkersAndBadDirectories(t *testing.T) {
	k := newKit(t, "m1")
	taken := serviceDir(t)
	first := k.pool("first", api.PoolSpec{Type: api.PoolDir, Path: taken})
	k.start("m1")
	k.untilReady(first, "m1")
	second := k.pool("second", api.PoolSpec{Type: api.PoolDir, Path: taken})
	k.untilNotReady(second, "m1", "belongs to another pool ("+first.Meta.ID+")")
	file := filepath.Join(serviceDir(t), "file")
	junk := serviceDir(t)
	for _, f := range []string{file, filepath.Join(junk, markerName)} {
		if err := os.WriteFile(f, []byte("junk"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.untilNotReady(k.pool("file", api.PoolSpec{Type: api.PoolDir, Path: file}), "m1", "is not a directory")
	k.untilNotReady(k.pool("junk", api.PoolSpec{Type: api.PoolDir, Path: junk}), "m1", "not a valid marker")
	k.untilNotReady(k.pool("none", api.PoolSpec{Type: api.PoolShared, Path: "/nowhere/at/all"}), "m1", "mount the shared file system")

	// Deletion leaves the user's data and takes what is ours.
	precious := filepath.Join(taken, "volumes", "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		p, err := configdb.Pools.Get(v, first.Meta.ID)
		configdb.Pools.Delete(tx, &p)
		return err
	})
	k.untilGone(configdb.PoolStates.SpecKey(first.Meta.ID + "." + k.nodes["m1"].id))
	k.txn(func(v *configdb.View, tx *configdb.Txn) error { // any change makes it look again
		p, err := configdb.Pools.Get(v, second.Meta.ID)
		p.Meta.Labels = map[string]string{"look": "again"}
		return errors.Join(err, configdb.Pools.UpdateSpec(v, tx, &p))
	})
	k.untilReady(second, "m1") // the directory is free now
	if string(read(t, precious)) != "x" {
		t.Error("the user's data is gone")
	}
}

func TestAHungPoolStallsNoOther(t *testing.T) {
	k := newKit(t, "m1")
	hung := k.pool("hung", api.PoolSpec{Type: api.PoolDir, Path: filepath.Join(serviceDir(t), "a")})
	good := k.pool("good", api.PoolSpec{Type: api.PoolDir, Path: filepath.Join(serviceDir(t), "b")})
	stuck := make(chan struct{})
	defer close(stuck)
	lp := k.nodes["m1"].local(hung)
	_ = lp.check.do(t.Context(), time.Millisecond, func() error { <-stuck; return nil }) // as a stat on a dead server
	k.start("m1")
	k.untilReady(good, "m1")
	k.untilNotReady(hung, "m1", "has not answered")
	vol := k.volume("v", api.VolumeSpec{Pool: "good", Size: api.MiB, Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
}

func TestSpaceIsWrittenInSteps(t *testing.T) {
	s := space{total: 1000}
	for _, c := range []struct{ old, now, want api.Size }{{0, 7, 7}, {500, 549, 500}, {500, 550, 550}, {500, 451, 500}, {500, 450, 450}, {500, 0, 0}} {
		if got := s.step(c.old, c.now); got != c.want {
			t.Errorf("from %d to %d: got %d", c.old, c.now, got)
		}
	}
}
