// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/api"
)

// The files of a data directory. identityFile is written last: without it the
// directory belongs to no cluster, whatever else an interrupted join left.
const (
	lockFile       = "lock"
	socketFile     = "muster.sock"
	identityFile   = "node.json"
	keyFile        = "node.key"
	certFile       = "node.crt"
	caFile         = "ca.crt"
	clusterKeyFile = "cluster.key"
	replicaDir     = "configdb"
	// foundingFile is there while init is under way: a cluster without its
	// first objects is none, and nobody has its token.
	foundingFile = "founding"
	// levelFile has the highest feature level that this node has seen.
	levelFile = "featurelevel"
	// toldFile has whom this node told that it lost the quorum.
	toldFile = "quorum-told.json"
	poolDir  = "pool"
)

// membership is what a node must remember to be a member again after a restart.
type membership struct {
	ClusterID string `json:"clusterID"`
	Cluster   string `json:"cluster"`
	NodeID    string `json:"nodeID"`
	Node      string `json:"node"`
	Address   string `json:"address"`
	// Role given by the join token; a witness runs neither VMs nor storage.
	Role api.NodeRole `json:"role,omitempty"`
	// Founder is true on the node that ran init.
	Founder bool `json:"founder,omitempty"`
	// Life of the cluster that this node is a member of; 0 is 1.
	Life uint64 `json:"life,omitempty"`
	// Peers are "id@host:port" of the members at the time of joining.
	Peers []string `json:"peers,omitempty"`

	key, cert, ca, clusterKey []byte
	// authority is a copy of the authority's sealed key, if there is one yet.
	authority []byte
}

// lockDir takes the data directory for this process.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another musterd is running on %s; stop it first or choose another --data-dir", dir)
	}
	return f, nil
}

// lockRunDir takes the run directory for this process: two daemons on one guard
// would extend each other's leases.
func lockRunDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another musterd uses the run directory %s; choose another with --run-dir", dir)
	}
	return f, nil
}

// writeFile replaces a file so that after a crash it has the old or the new
// content, and after a return the new one.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// save makes the directory that of a member.
func (m *membership) save(dir string) error {
	held := m.held()
	for _, f := range append(held.files(), credentialFile{clusterKeyFile, m.clusterKey, 0o600}) {
		if err := writeFile(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			return fmt.Errorf("save membership: %w", err)
		}
	}
	return m.saveIdentity(dir)
}

// saveIdentity writes the one file that says whose directory it is.
func (m *membership) saveIdentity(dir string) error {
	id, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = writeFile(filepath.Join(dir, identityFile), append(id, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("save membership: %w", err)
	}
	return nil
}

// forget undoes save after a failed init or join, with the replica. The mark of
// an init goes last, so that an interrupted forget is taken up again.
func forget(dir string) error {
	var errs []error
	for _, name := range []string{identityFile, keyFile, clusterKeyFile, certFile, caFile, authorityFile, redoFile, runDirFile, levelFile, replicaDir, foundingFile} {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
	}
	return errors.Join(errs...)
}

// loadMembership returns nil if the directory belongs to no cluster.
func loadMembership(dir string) (*membership, error) {
	b, err := os.ReadFile(filepath.Join(dir, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read membership: %w", err)
	}
	var m membership
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w); restore it from a backup, or remove the node from its cluster and start with an empty data directory", filepath.Join(dir, identityFile), err)
	}
	if err := redoCredentials(dir); err != nil {
		return nil, err
	}
	if m.authority, err = readAuthority(dir); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name string
		into *[]byte
	}{{keyFile, &m.key}, {certFile, &m.cert}, {caFile, &m.ca}, {clusterKeyFile, &m.clusterKey}} {
		if *f.into, err = os.ReadFile(filepath.Join(dir, f.name)); err != nil {
			return nil, fmt.Errorf("read membership: %w", err)
		}
	}
	return &m, nil
}

func (m *membership) life() uint64 { return max(1, m.Life) }
