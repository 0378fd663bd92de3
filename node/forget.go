// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/guard"
)

// keptKey is where the cluster key goes when a directory with backups is
// cleared: without it they open no more.
func keptKey(dataDir string, info *membership) string {
	return filepath.Join(dataDir, backupsDir, info.Cluster+"-"+backupfile.KeyID(info.clusterKey)+".key")
}

// Forget makes the data directory of a daemon that does not run that of no
// cluster: identity, keys and replica go, so that it can join again. What users
// own stays: the pool's files, and the backups with the key that opens them. The
// name of the cluster guards against the wrong directory.
func Forget(ctx context.Context, cfg *Config, cluster string, out io.Writer) error {
	lock, err := lockDir(cfg.DataDir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	info, err := loadMembership(cfg.DataDir)
	if err != nil {
		return err
	}
	if info == nil {
		return fmt.Errorf("%s belongs to no cluster; there is nothing to forget", cfg.DataDir)
	}
	if cluster != info.Cluster {
		return fmt.Errorf("%s is that of node %s of cluster %s; to clear it, give --cluster %s", cfg.DataDir, info.Node, info.Cluster, info.Cluster)
	}
	runDir := cfg.RunDir
	if b, err := os.ReadFile(filepath.Join(cfg.DataDir, runDirFile)); err == nil {
		runDir = strings.TrimSuffix(string(b), "\n") // where the daemon had it, whatever is said now
	}
	if err := endIdleGuard(ctx, runDir, info); err != nil {
		return err
	}
	backups := filepath.Join(cfg.DataDir, backupsDir)
	if entries, err := os.ReadDir(backups); err == nil && len(entries) > 0 {
		key := keptKey(cfg.DataDir, info)
		if err := writeFile(key, info.clusterKey, 0o600); err != nil {
			return err
		}
		fmt.Fprintf(out, "kept: %s, with the cluster key that opens the backups: %s\n", backups, key)
	}
	// With the mark of init, what a crash interrupts is finished by the next start.
	if err := writeFile(filepath.Join(cfg.DataDir, foundingFile), nil, 0o600); err != nil {
		return err
	}
	err = errors.Join(os.RemoveAll(filepath.Join(cfg.DataDir, recoverFile)), forget(cfg.DataDir), syncDir(cfg.DataDir))
	if err != nil {
		return fmt.Errorf("clear %s: %w", cfg.DataDir, err)
	}
	if pool := filepath.Join(cfg.DataDir, poolDir); exists(pool) {
		fmt.Fprintf(out, "kept: %s, the files of the pool local; a node of the name %s finds them again\n", pool, info.Node)
	}
	fmt.Fprintf(out, "node %s of cluster %s is forgotten; this host can join a cluster again\n", info.Node, info.Cluster)
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// endIdleGuard ends the guard of this host, unless it runs VMs.
func endIdleGuard(ctx context.Context, runDir string, info *membership) error {
	lock, err := lockRunDir(runDir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	ctx, cancel := context.WithTimeout(ctx, guardAnswer)
	defer cancel()
	c, err := guard.Dial(ctx, runDir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil // there is none
	}
	if err != nil {
		return fmt.Errorf("the guard of node %s may run VMs, and cannot be asked: %w", info.Node, err)
	}
	defer func() { _ = c.Close() }()
	if err := c.Stop(ctx); err != nil {
		return fmt.Errorf("VMs of node %s still run here (%w); stop them first, or start musterd and let it end them", info.Node, err)
	}
	return nil
}
