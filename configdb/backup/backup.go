// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backup

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
)

// Header of a backup.
type Header = backupfile.Header

// Source is what goes into a backup, and who makes it.
type Source struct {
	Snapshot *fsm.Snapshot
	// Node and Version of the maker.
	Node, Version string
	Time          time.Time
	// Stale: nobody confirmed that the state is the newest; it may be as old
	// as Age.
	Stale bool
	Age   time.Duration
}

// Write writes a backup, sealed with the cluster key. With a pass phrase the
// backup also holds that key.
func Write(w io.Writer, src Source, clusterKey []byte, passphrase string) (*Header, error) {
	h, err := headerOf(src)
	if err != nil {
		return nil, err
	}
	if passphrase != "" {
		if h.Slot, err = backupfile.NewSlot(clusterKey, passphrase); err != nil {
			return nil, err
		}
	}
	out, err := backupfile.NewWriter(w, h, clusterKey)
	if err != nil {
		return nil, err
	}
	if _, err := src.Snapshot.Bare().WriteTo(out); err != nil {
		return nil, err
	}
	return h, out.Close()
}

// headerOf describes a state.
func headerOf(src Source) (*Header, error) {
	v := src.Snapshot.View()
	c, err := Cluster(v)
	if err != nil {
		return nil, err
	}
	h := &Header{
		ClusterID: c.Meta.ID, Cluster: c.Meta.Name, Life: c.Spec.Life, Node: src.Node, Version: src.Version, Time: src.Time.UTC().Truncate(time.Second),
		Revision: v.Revision(), Term: v.Term(), Stale: src.Stale, Schema: api.Schema, FeatureLevel: c.Spec.FeatureLevel, Keys: v.Len(), Bytes: v.Bytes(), Objects: map[api.Kind]int{},
	}
	if src.Stale {
		h.StaleSeconds = src.Age.Round(time.Millisecond).Seconds()
	}
	for e := range v.Scan(configdb.SpecRoot, "") {
		kind, _, _ := strings.Cut(strings.TrimPrefix(e.Key, configdb.SpecRoot), "/")
		h.Objects[api.Kind(kind)]++
	}
	nodes, _ := configdb.Nodes.List(v) // one that cannot be read is not named
	for i := range nodes {
		h.Nodes = append(h.Nodes, nodes[i].Meta.Name)
	}
	return h, nil
}

// Cluster returns the one object that describes the cluster of a state.
func Cluster(v *configdb.View) (api.Cluster, error) {
	all, err := configdb.Clusters.List(v)
	if err != nil {
		return api.Cluster{}, err
	}
	if len(all) != 1 {
		return api.Cluster{}, fmt.Errorf("the state at revision %d describes %d clusters", v.Revision(), len(all))
	}
	return all[0], nil
}

// Read returns the state of a backup. key finds the cluster key. Check the
// file with backupfile.Verify before: it tells damage from forgery.
func Read(r io.Reader, key func(*Header) ([]byte, error)) (*fsm.State, *Header, error) {
	in, err := backupfile.NewReader(r, key)
	if err != nil {
		return nil, nil, err
	}
	state := fsm.New()
	if err := state.Restore(in); err != nil {
		return nil, nil, readError(in.Header, err)
	}
	v := state.View()
	if err := fits(in.Header, v, fsm.Content{Keys: v.Len(), Bytes: v.Bytes()}); err != nil {
		return nil, nil, err
	}
	return state, in.Header, nil
}

// Prove reads a backup to its end and checks all that Read does, with the memory
// that a few keys take. It returns how many bytes the state has.
func Prove(r io.Reader, key func(*Header) ([]byte, error)) (*Header, int64, error) {
	in, err := backupfile.NewReader(r, key)
	if err != nil {
		return nil, 0, err
	}
	cluster := []byte(configdb.Clusters.SpecPrefix())
	v, c, err := fsm.Survey(in, func(key []byte) bool { return bytes.HasPrefix(key, cluster) })
	if err != nil {
		return nil, 0, readError(in.Header, err)
	}
	return in.Header, c.Bytes, fits(in.Header, v, c)
}

// fits compares a state with what the header says of it.
func fits(h *Header, v *configdb.View, content fsm.Content) error {
	c, err := Cluster(v)
	switch {
	case err != nil:
	case v.Revision() != h.Revision || content.Keys != h.Keys:
		err = fmt.Errorf("it has %d keys at revision %d, its header says %d at %d", content.Keys, v.Revision(), h.Keys, h.Revision)
	case c.Meta.ID != h.ClusterID || c.Spec.Life != h.Life:
		err = fmt.Errorf("it is of cluster %s, life %d; its header says %s, life %d", c.Meta.ID, c.Spec.Life, h.ClusterID, h.Life)
	default:
		return nil
	}
	return fmt.Errorf("the content of the backup is not what it should be: %w", err)
}
