// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// After the restore of an older backup the file of a volume may be on another node
// than the database says. A migration to that node wrote over it.
func TestACopyDoesNotReplaceAFileThatNobodyMarked(t *testing.T) {
	k := newKit(t, "m1", "m2")
	k.start("m1", "m2")
	pool := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.untilReady(pool, "m1", "m2")
	vol := k.volume("data", api.VolumeSpec{Pool: "local", Node: "m1", Size: api.MiB})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	k.moving(api.NewID(), vol.Meta.ID, true)
	path := volumePath(k.nodes["m2"].dir+"/pool", vol.Meta.ID)
	if err := os.WriteFile(path, []byte("the last copy"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := k.nodes["m2"].MakeCopy(t.Context(), k.db.Local(), vol.Meta.ID)
	wantCode(t, err, api.CodeRefused, path, "move it away")
	if got := string(read(t, path)); got != "the last copy" || there(path+copyMark) {
		t.Errorf("it holds %q; marked %v", got, there(path+copyMark))
	}
}

// A call that hung and was given up comes back to a world that has gone on: another try
// has made the file by then.
func TestACallThatWasGivenUpRemovesNothing(t *testing.T) {
	k := newKit(t, "m1", "m2")
	k.start("m1", "m2")
	pool := k.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.untilReady(pool, "m1", "m2")
	m2 := k.nodes["m2"]
	m2.stop() // its own sweep removes marked files that are no volume's
	lp := m2.local(pool)
	path := volumePath(m2.dir+"/pool", api.NewID())
	tmp := path + ".tmp"
	for what, late := range map[string]func(wanted func() error) error{
		"the place of a copy": func(wanted func() error) error { return m2.makeRoom(path, pool, true, wanted) },
		"the place of a move": func(wanted func() error) error { return m2.placeMarked(tmp, path, pool, wanted) },
	} {
		for _, p := range []string{path, tmp} {
			if err := os.WriteFile(p, []byte("of a later try"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := m2.mark(path, pool); err != nil {
			t.Fatal(err)
		}
		release, ended := make(chan struct{}), make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		begun := make(chan struct{})
		go func() { <-begun; cancel() }()
		err := lp.work.attempt(ctx, time.Minute, func(wanted func() error) error {
			close(begun)
			<-release
			err := late(wanted)
			ended <- err
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		close(release)
		wantCode(t, <-ended, api.CodeTimeout, "given up")
		if got := string(read(t, path)); got != "of a later try" || !there(tmp) {
			t.Errorf("%s: it holds %q", what, got)
		}
	}
}
