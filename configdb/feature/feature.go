// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package feature

import (
	"encoding/json"
	"math"
	"sync/atomic"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/version"
)

// Feature is something that only a cluster of a certain level may use.
type Feature string

// The features.
const (
	// Levels: entries of the log and snapshots name the feature level, so that a
	// build which does not support it stops before it applies them.
	Levels Feature = "levels"
	// History: each change of configuration is recorded in its transaction. An
	// older node records nothing, so that the history would have holes.
	History Feature = "history"
	// Migration: a VM is handed to another node while it runs. An older node would
	// neither take its part nor tell such a binding from one of ha.
	Migration Feature = "migration"
	// Moves: volumes are moved between pools and nodes while no guest uses them, and
	// images are made from volumes. An older node would start a VM whose disks are
	// on their way, and wait for the upload of such an image.
	Moves Feature = "moves"
	// Snapshots: snapshots, saved memory and clones of VMs. An older node would
	// start a suspended VM from its disks, and a VM whose revert was interrupted.
	Snapshots Feature = "snapshots"
	// StorageGuard: a VM outlives the lease of its node, because its disks can be
	// locked away from it. An older leader would move it without doing that.
	StorageGuard Feature = "storage-guard"
	// RBD: pools of type rbd. An older node would take one for a directory.
	RBD Feature = "rbd"
	// Drills: an older node does not end a VM for one, an older leader keeps no evidence.
	Drills Feature = "drills"
	// RollingReboot: nodes are rebooted one after the other. Each takes its turn at
	// leading meanwhile, and an older leader would not go on.
	RollingReboot Feature = "rolling-reboot"
	// OldHosts: in a restored cluster the word that one host of the old one is off frees
	// no VM that another may run. An older leader would free it.
	OldHosts Feature = "old-hosts"
)

// Level is the level that brings a feature.
func (f Feature) Level() int {
	switch f {
	case Levels, History, Migration, Moves, Snapshots, RBD, StorageGuard, Drills, RollingReboot, OldHosts:
		return 2
	}
	return math.MaxInt
}

// InForce reports whether a feature may be used. In a database without a
// cluster, which is one that is being founded, it is what this build supports:
// the founder's levels are the cluster's.
func (f Feature) InForce(v *fsm.View) bool { return f.At(Level(v)) }

// At is InForce in a cluster of a level; 0 is one that is being founded.
func (f Feature) At(level int) bool {
	if level == 0 {
		level = version.FeatureLevel
	}
	return level >= f.Level()
}

// Supported are the levels of a cluster in which this build can be a node.
func Supported() api.FeatureLevels {
	return api.FeatureLevels{Min: version.MinFeatureLevel, Max: version.FeatureLevel}
}

// clusterPrefix is that of the one object that has the level.
const clusterPrefix = "muster/spec/" + string(api.KindCluster) + "/"

// Level is the cluster's level in a view, 0 if there is no cluster in it.
func Level(v *fsm.View) int {
	level, _ := read(v, nil)
	return level
}

// Reader is Level for those who ask with every transaction: it reads the object
// when it has changed. The zero value is ready; any goroutine may use it.
type Reader struct{ last atomic.Pointer[reading] }

type reading struct {
	key      string
	revision uint64
	level    int
}

// Level is the cluster's level in a view, 0 if there is no cluster in it.
func (r *Reader) Level(v *fsm.View) int {
	last := r.last.Load()
	level, now := read(v, last)
	if now != last {
		r.last.Store(now)
	}
	return level
}

// read returns the level, and last if that is what it read.
func read(v *fsm.View, last *reading) (int, *reading) {
	for e := range v.Scan(clusterPrefix, "") {
		if last != nil && last.revision == e.Revision && last.key == e.Key {
			return last.level, last
		}
		level := LevelOf(e.Value)
		return level, &reading{e.Key, e.Revision, level}
	}
	return 0, last
}

// LevelOf is the level in a stored cluster object. One that does not say it is of
// a cluster that was founded before there were any, and one that cannot be read no
// reason to use what is new.
func LevelOf(stored []byte) int {
	var c struct {
		Spec struct {
			FeatureLevel int `json:"featureLevel"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(stored, &c); err != nil {
		return 1
	}
	return max(1, c.Spec.FeatureLevel)
}
