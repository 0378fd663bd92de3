// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/thejerf/suture/v4"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/freeport"
)

func newDaemon(t *testing.T) *Daemon {
	t.Helper()
	cfg := &Config{DataDir: t.TempDir(), RunDir: t.TempDir(), Listen: freeport.Loopback(t), NodeName: "m1"}
	if err := cfg.Complete(); err != nil {
		t.Fatal(err)
	}
	d, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d.sup = suture.NewSimple("test") // never served: no guard, no QEMU
	t.Cleanup(d.closeMember)
	return d
}

// The caller of init may go away at any moment: the command line is
// interrupted. What is left then has to be a cluster, or nothing.
func TestInitOfACallerWhoLeavesIsWhole(t *testing.T) {
	d := newDaemon(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := d.Init(ctx, api.InitRequest{Name: "c"}); err != nil {
		t.Fatalf("init: %v", err)
	}
	if _, err := configdb.Clusters.Get(d.current().store.Local(), d.current().info.ClusterID); err != nil {
		t.Errorf("this host is a member of a cluster that does not exist: %v", err)
	}
	if err := d.dropFounding(); err != nil {
		t.Error(err)
	}
	if info, err := loadMembership(d.cfg.DataDir); err != nil || info == nil {
		t.Errorf("a finished init was taken for an interrupted one: %v", err)
	}
}

// A crash in the middle of init leaves an identity without a cluster; the key
// of the authority was in memory only, so it can never become one.
func TestInterruptedInitIsForgotten(t *testing.T) {
	d := newDaemon(t)
	info, _, err := d.foundership("c")
	if err != nil {
		t.Fatal(err)
	}
	mark := filepath.Join(d.cfg.DataDir, foundingFile)
	if err := writeFile(mark, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := info.save(d.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(d.cfg.DataDir, replicaDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.dropFounding(); err != nil {
		t.Fatal(err)
	}
	if info, err := loadMembership(d.cfg.DataDir); err != nil || info != nil {
		t.Errorf("after a crash during init: %+v, %v", info, err)
	}
	if err := d.notYetMember(); err != nil {
		t.Errorf("init cannot be repeated: %v", err)
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the mark is still there")
	}
}
