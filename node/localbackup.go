// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/internal/backupfile"
)

// The backups in a data directory. A name is "<cluster>-<time>-r<revision>"
// with backupSuffix; one with keptInfix is not counted and never removed.
const (
	backupsDir   = "backups"
	backupSuffix = ".backup"
	keptInfix    = ".before-"
	partSuffix   = ".part"
	backupTime   = "20060102T150405Z"
)

// Space that a backup must leave free on its file system, in bytes, and what it
// takes per key beside the state itself.
const (
	backupReserve = 64 << 20
	backupPerKey  = 64
)

// backupFolder is where a node keeps its own backups.
type backupFolder struct {
	dir       string
	clusterID string
	key       []byte // of the cluster
}

func newBackupFolder(dataDir, clusterID string, clusterKey []byte) backupFolder {
	return backupFolder{filepath.Join(dataDir, backupsDir), clusterID, clusterKey}
}

// take writes a backup, reads it back and only then gives it its name. kept, if
// not empty, says why it is never removed.
func (f backupFolder) take(src backup.Source, kept string) (path string, err error) {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return "", fmt.Errorf("backup: %w", err)
	}
	v := src.Snapshot.View()
	if err := f.room(v.Bytes() + int64(v.Len())*backupPerKey); err != nil {
		return "", err
	}
	c, err := backup.Cluster(v)
	if err != nil {
		return "", err
	}
	name := fmt.Sprintf("%s-%s-r%d", c.Meta.Name, src.Time.UTC().Format(backupTime), v.Revision())
	if kept != "" {
		name += keptInfix + kept
	}
	path = filepath.Join(f.dir, name+backupSuffix)
	part := path + partSuffix
	defer func() {
		if err != nil {
			_ = os.Remove(part) // it may not be there
		}
	}()
	h, err := writePart(part, src, f.key)
	if err != nil {
		return "", fmt.Errorf("write backup %s: %w", part, err)
	}
	if err := f.prove(part, h); err != nil {
		return "", fmt.Errorf("the backup that was just written is bad, check the disk: %w", err)
	}
	if err := os.Rename(part, path); err != nil {
		return "", fmt.Errorf("backup: %w", err)
	}
	return path, syncDir(f.dir)
}

func writePart(path string, src backup.Source, key []byte) (*backup.Header, error) {
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	h, err := backup.Write(out, src, key, "")
	if err == nil {
		err = out.Sync()
	}
	return h, errors.Join(err, out.Close())
}

// prove checks of a backup all that a restore would, without holding its state.
func (f backupFolder) prove(path string, wrote *backup.Header) error {
	h, size, err := proveBackup(path, f.key)
	if err != nil {
		return err
	}
	if h.Revision != wrote.Revision || size != wrote.Bytes {
		return fmt.Errorf("it has revision %d with %d bytes, written was %d with %d", h.Revision, size, wrote.Revision, wrote.Bytes)
	}
	return nil
}

// room refuses when a backup would fill the disk.
func (f backupFolder) room(size int64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(f.dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", f.dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	if free < size+backupReserve {
		return api.Errorf(api.CodeStorageFull, "a backup of %s needs %s free in %s, there is %s; free some space, or keep fewer backups (muster cluster set --backup-keep)",
			api.Size(size), api.Size(size+backupReserve), f.dir, api.Size(free))
	}
	return nil
}

// list returns the backups, the oldest first. What cannot be read is listed
// with why.
func (f backupFolder) list() ([]api.LocalBackup, error) {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list backups: %w", err)
	}
	var out []api.LocalBackup
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), backupSuffix) || !e.Type().IsRegular() {
			continue
		}
		out = append(out, f.describe(e))
	}
	slices.SortStableFunc(out, func(a, b api.LocalBackup) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Revision, b.Revision), cmp.Compare(a.File, b.File))
	})
	return out, nil
}

func (f backupFolder) describe(e fs.DirEntry) api.LocalBackup {
	b := api.LocalBackup{File: e.Name()}
	h, err := func() (*backup.Header, error) {
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		b.Size, b.Time = info.Size(), info.ModTime().UTC()
		in, err := os.Open(filepath.Join(f.dir, e.Name()))
		if err != nil {
			return nil, err
		}
		defer func() { _ = in.Close() }()
		return backupfile.ReadHeader(in)
	}()
	if err != nil {
		b.Error = err.Error()
		return b
	}
	b.Time, b.Cluster, b.ClusterID, b.Life, b.Revision = h.Time, h.Cluster, h.ClusterID, h.Life, h.Revision
	return b
}

// counted are the backups that retention is about: not those of another cluster
// that this host belonged to, which nobody may have elsewhere.
func (f backupFolder) counted(all []api.LocalBackup) []api.LocalBackup {
	return slices.DeleteFunc(slices.Clone(all), func(b api.LocalBackup) bool {
		return strings.Contains(b.File, keptInfix) || b.Error == "" && b.ClusterID != f.clusterID
	})
}

// prune removes the oldest backups until keep are left that can be read.
func (f backupFolder) prune(keep int) error {
	all, err := f.list()
	if err != nil {
		return err
	}
	good := 0
	var errs []error
	for _, b := range slices.Backward(f.counted(all)) { // the newest first
		if good >= keep {
			errs = append(errs, os.Remove(filepath.Join(f.dir, b.File)))
		}
		if b.Error == "" {
			good++
		}
	}
	return errors.Join(errs...)
}

// sweep removes what a crash left half written.
func (f backupFolder) sweep() error {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), backupSuffix+partSuffix) {
			errs = append(errs, os.Remove(filepath.Join(f.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
