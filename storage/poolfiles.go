// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/muster-vm/muster/api"
)

const (
	markerName = ".muster-pool"
	// maxSmallFile bounds what is read of markers and stamps, which anybody
	// with access to a shared directory may have replaced.
	maxSmallFile = 4096
)

var poolFolders = []string{"images", "volumes", "tmp", "nodes"}

// marker says which pool a directory belongs to. It names no cluster, so that
// a restored cluster finds its pools.
type marker struct {
	Format int    `json:"format"`
	Pool   string `json:"pool"`
}

// look describes one look at a pool's directory; run makes it. It uses no
// state of the service, because it may outlive its deadline.
type look struct {
	path, poolID, nodeID string
	create               bool // make the directory if it was never there
	established          bool // the marker must be there already
	shared, clean        bool
	others               []other
}

// sight is what it found.
type sight struct {
	root  rootID
	space space
	own   string // content of nodes/<own ID>
	// By node ID: their stamps, their answers to us, our answers to them.
	stamps, answers, answered map[string]string
}

// rootID tells whether the directory under the path was replaced.
type rootID struct {
	dev, ino uint64
}

type space struct{ total, free api.Size }

// step returns the new value only if it differs from the old one by at least
// 1/spaceStep of the total.
func (s space) step(old, now api.Size) api.Size {
	diff := now - old
	if diff < 0 {
		diff = -diff
	}
	if old == 0 || diff*spaceStep >= s.total {
		return now
	}
	return old
}

func (l look) run() (sight, error) {
	var out sight
	info, err := os.Stat(l.path)
	switch {
	case err == nil && !info.IsDir():
		return out, api.Errorf(api.CodeRefused, "%s is not a directory", l.path)
	case errors.Is(err, fs.ErrNotExist) && l.established:
		return out, api.Errorf(api.CodeRefused, "%s does not exist any more; mount it again", l.path)
	case errors.Is(err, fs.ErrNotExist) && !l.create:
		return out, api.Errorf(api.CodeRefused, "%s does not exist; mount the shared file system there on every node", l.path)
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(l.path, 0o711); err != nil {
			return out, fmt.Errorf("create the pool's directory: %w", err)
		}
	case err != nil:
		return out, fmt.Errorf("look at the pool's directory: %w", err)
	}
	if err := l.mark(); err != nil {
		return out, err
	}
	for _, f := range poolFolders {
		if err := os.Mkdir(filepath.Join(l.path, f), 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
			return out, fmt.Errorf("create the pool's folder: %w", err)
		}
	}
	if l.clean {
		if err := removeLeftovers(l.path, l.nodeID); err != nil {
			return out, err
		}
	}
	if out.root, out.space, err = statRoot(l.path); err != nil {
		return out, err
	}
	if l.shared {
		err = l.readStamps(&out)
	}
	return out, err
}

func statRoot(path string) (rootID, space, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return rootID{}, space{}, fmt.Errorf("stat %s: %w", path, err)
	}
	var f syscall.Statfs_t
	if err := syscall.Statfs(path, &f); err != nil {
		return rootID{}, space{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	block := api.Size(f.Frsize)
	if block == 0 {
		block = api.Size(f.Bsize)
	}
	return rootID{st.Dev, st.Ino}, space{total: api.Size(f.Blocks) * block, free: api.Size(f.Bavail) * block}, nil
}

// mark checks the marker, and makes it in a directory that is new.
func (l look) mark() error {
	path := filepath.Join(l.path, markerName)
	b, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		if l.established {
			return api.Errorf(api.CodeRefused, "%s has no %s, so it is not the directory that this pool began with; mount the right file system there", l.path, markerName)
		}
		if b, err = json.Marshal(marker{Format: 1, Pool: l.poolID}); err != nil {
			return err
		}
		if err := createFile(path, l.nodeID, b); err != nil {
			return err
		}
		b, err = readSmall(path) // another node or pool may have been first
	}
	if err != nil {
		return fmt.Errorf("read the pool's marker: %w", err)
	}
	var m marker
	if err := json.Unmarshal(b, &m); err != nil || !api.IsID(m.Pool) {
		return api.Errorf(api.CodeRefused, "%s is not a valid marker; if %s belongs to no pool, remove the file", path, l.path)
	}
	if m.Pool != l.poolID {
		return api.Errorf(api.CodeRefused, "%s belongs to another pool (%s); choose another directory, or remove %s if that pool is gone", l.path, m.Pool, path)
	}
	return nil
}

func (l look) readStamps(out *sight) error {
	out.stamps, out.answers, out.answered = map[string]string{}, map[string]string{}, map[string]string{}
	read := func(name string) (string, error) {
		b, err := readSmall(filepath.Join(l.path, "nodes", name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("read a node's stamp: %w", err)
		}
		return string(b), nil
	}
	var err error
	if out.own, err = read(l.nodeID); err != nil {
		return err
	}
	for _, o := range l.others {
		if out.stamps[o.nodeID], err = read(o.nodeID); err != nil {
			return err
		}
		if out.answers[o.nodeID], err = read(answerName(o.nodeID, l.nodeID)); err != nil {
			return err
		}
		if out.answered[o.nodeID], err = read(answerName(l.nodeID, o.nodeID)); err != nil {
			return err
		}
	}
	return nil
}

func answerName(by, to string) string { return by + ".saw." + to }

func writeStamp(root, nodeID, stamp string) error {
	return replaceFile(filepath.Join(root, "nodes", nodeID), nodeID, []byte(stamp))
}

func writeAnswers(root, nodeID string, to []other) error {
	for _, o := range to {
		if err := replaceFile(filepath.Join(root, "nodes", answerName(nodeID, o.nodeID)), nodeID, []byte(o.stamp)); err != nil {
			return err
		}
	}
	return nil
}

// leavePool removes what this module put beside the user's data.
func leavePool(root, poolID, nodeID string) error {
	b, err := readSmall(filepath.Join(root, markerName))
	var m marker
	switch {
	case errors.Is(err, fs.ErrNotExist): // another node was first; what bears this one's ID is still its own
		err = nil
	case err == nil:
		if err = json.Unmarshal(b, &m); err == nil && m.Pool != poolID {
			return nil // it belongs to another pool by now
		}
	}
	if err != nil {
		return err
	}
	names, err := filepath.Glob(filepath.Join(root, "nodes", "*"+nodeID+"*"))
	if err != nil {
		return err
	}
	errs := []error{removeLeftovers(root, nodeID), remove(filepath.Join(root, notesFolder, nodeID))}
	for _, n := range append(names, filepath.Join(root, markerName)) {
		errs = append(errs, remove(n))
	}
	// Empty folders go too; others hold data and stay.
	for _, f := range append([]string{notesFolder}, poolFolders...) {
		_ = os.Remove(filepath.Join(root, f))
	}
	return errors.Join(errs...)
}

// removeLeftovers removes the unfinished work of this node's earlier life.
func removeLeftovers(root, nodeID string) error {
	dir := filepath.Join(root, "tmp")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), nodeID+".") {
			err = errors.Join(err, remove(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("remove leftovers: %w", err)
	}
	return nil
}

// remove is os.Remove for which a missing file is no error.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func readSmall(path string) ([]byte, error) {
	// O_NONBLOCK: a FIFO of that name must not stop us.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxSmallFile))
}

// replaceFile writes a small file whole or not at all.
func replaceFile(path, nodeID string, b []byte) error {
	tmp, err := writeBeside(path, nodeID, b)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

// createFile is replaceFile for a file that must not be replaced; that it is
// there already is no error.
func createFile(path, nodeID string, b []byte) error {
	tmp, err := writeBeside(path, nodeID, b)
	if err == nil {
		err = placeFile(tmp, path)
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	return errors.Join(err, remove(tmp))
}

func writeBeside(path, nodeID string, b []byte) (tmp string, err error) {
	tmp = path + ".new." + nodeID
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o644)
	if err != nil {
		return tmp, err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return tmp, errors.Join(err, f.Close())
}

// syncDir makes a change of a directory survive a power cut.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// placeFile gives the finished file its final name. It never replaces a file
// that is there already (fs.ErrExist), as rename would.
func placeFile(tmp, final string) error {
	if err := os.Link(tmp, final); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(final)); err != nil {
		return err
	}
	return remove(tmp)
}
