// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/uefi"
	"github.com/muster-vm/muster/reconcile"
)

// Limits and intervals.
const (
	// workers of the pool, the image and the volume loop; an import occupies one, and
	// so does a pool that does not answer, for a while.
	workers = 8
	// txnAttempts is how often a status write is repeated on fresh state.
	txnAttempts = 10
	// finishDeadline bounds the writes that record the end of an operation
	// whose own context is over.
	finishDeadline = 10 * time.Second
	// retryPool is how soon an object looks again for a pool or image that is
	// not ready; changes of these wake it earlier.
	retryPool = 30 * time.Second
	// progressStep in percent: finer progress is not written.
	progressStep = 10
	// finalizer is this module's own; objects with others wait for them.
	finalizer = "storage"
)

// Config of a Service.
type Config struct {
	DB     configdb.DB
	NodeID string
	// NodeName is what spec.node of images and volumes says.
	NodeName string
	// DataDir holds the pool "local" in its folder pool.
	DataDir string
	// RunDir has the sockets, in its folder notes, of what serves notes in pools of type
	// rbd; it must be short.
	RunDir string
	// QemuImg is the program, "qemu-img" when empty.
	QemuImg string
	// FirmwareDirs have the descriptors of UEFI firmwares; uefi.Dirs() when nil.
	FirmwareDirs []string
	// Streams reach other nodes; nil: volumes move between pools of this node only.
	Streams Streams
	// OpenKey opens a key that is sealed for a label; nil: there are no pools of type
	// rbd.
	OpenKey func(label string, sealed []byte) ([]byte, error)
	// NoteKey proves that a note in a pool is of a node of this cluster; every node has
	// the same. Without one there are no notes.
	NoteKey []byte
	Log     *slog.Logger
	// Now is the clock for conditions and graces, time.Now when nil.
	Now func() time.Time
}

// Service is the storage module of one node. Make it with New, then Run it.
type Service struct {
	cfg     Config
	log     *slog.Logger
	img     *qemuImg
	sources *lane // files that are imported by path
	copies  copySlots
	images  *reconcile.Loop
	volumes *reconcile.Loop
	sweeps  *reconcile.Loop // of what moves left

	noteSeq atomic.Uint64 // of the last note that was written

	moves sync.Mutex // who makes or removes files of volumes that move, see moving.go

	mu     sync.Mutex
	pools  map[string]*localPool // by pool ID
	active map[string]bool       // images with an upload in this process
	tries  map[string]int        // of moves, by task
	mounts map[string]string     // tests only: where a pool's path is on this "host"
}

// New returns a service that does nothing until Run.
func New(cfg Config) *Service {
	if cfg.QemuImg == "" {
		cfg.QemuImg = "qemu-img"
	}
	if cfg.FirmwareDirs == nil {
		cfg.FirmwareDirs = uefi.Dirs()
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Service{
		cfg: cfg, log: cfg.Log, img: newQemuImg(cfg.QemuImg),
		sources: newLane("the file to import", maxWorkCalls),
		copies:  make(copySlots, maxCopies), pools: map[string]*localPool{}, active: map[string]bool{}, tries: map[string]int{},
	}
	s.sweeps = s.copiesLoop()
	s.images = reconcile.New(reconcile.Config{
		Name: "images", DB: cfg.DB, Log: cfg.Log, Workers: workers, Reconcile: s.reconcileImage,
		Sources: []reconcile.Source{
			own(configdb.Images), status(configdb.Images),
			{Prefix: configdb.PoolStates.StatusPrefix(), IDs: s.imagesOfPoolState},
			{Prefix: configdb.Snapshots.StatusPrefix(), IDs: s.imagesOfSnapshot},
			{Prefix: configdb.Snapshots.SpecPrefix(), IDs: s.imagesOfSnapshot},
			released(configdb.Images.RefPrefix("")),
		},
	})
	s.volumes = reconcile.New(reconcile.Config{
		Name: "volumes", DB: cfg.DB, Log: cfg.Log, Workers: workers, Reconcile: s.reconcileVolume,
		Sources: []reconcile.Source{
			own(configdb.Volumes), status(configdb.Volumes),
			{Prefix: configdb.PoolStates.StatusPrefix(), IDs: s.volumesOfPoolState},
			{Prefix: configdb.Images.StatusPrefix(), IDs: s.volumesOfImage},
			{Prefix: configdb.Snapshots.StatusPrefix(), IDs: s.volumesOfSnapshot},
			{Prefix: configdb.Snapshots.SpecPrefix(), IDs: s.volumesOfSnapshot},
			released(configdb.Volumes.RefPrefix("")),
			{Prefix: configdb.Operations.SpecPrefix(), IDs: volumesOfVM},
		},
	})
	return s
}

// Run works until the context ends, which is not an error.
func (s *Service) Run(ctx context.Context) error {
	if _, err := exec.LookPath(s.cfg.QemuImg); err != nil {
		s.log.Error("qemu-img is missing: images and volumes cannot be made; install the package qemu-utils", "err", err)
	}
	pools := reconcile.New(reconcile.Config{
		Name: "pools", DB: s.cfg.DB, Log: s.log, Workers: workers, Reconcile: s.reconcilePool,
		Sources: []reconcile.Source{
			own(configdb.Pools),
			{Prefix: configdb.Nodes.SpecKey(s.cfg.NodeID), IDs: allPools}, // this node became a member
			{Prefix: configdb.PoolStates.SpecPrefix(), IDs: poolOfState},
			{Prefix: configdb.PoolStates.StatusPrefix(), IDs: poolOfState},
		},
	})
	loops := []*reconcile.Loop{pools, s.images, s.volumes, s.sweeps, s.movesLoop()}
	s.openNotes() // this Run may follow one that failed
	defer s.closeNotes()
	group, ctx := contain.NewGroup(ctx)
	errs := make([]error, len(loops))
	for i, l := range loops {
		group.Go(func() {
			errs[i] = l.Run(ctx)
			group.Cancel() // all or none
		})
	}
	return errors.Join(append(errs, group.Wait())...)
}

// table is what the sources need of a configdb.Table.
type table interface {
	SpecPrefix() string
	StatusPrefix() string
	IDOf(key string) (string, bool)
}

func own(t table) reconcile.Source {
	return reconcile.Source{Prefix: t.SpecPrefix(), IDs: idOf(t)}
}

func status(t table) reconcile.Source {
	return reconcile.Source{Prefix: t.StatusPrefix(), IDs: idOf(t)}
}

func idOf(t table) func(*configdb.View, configdb.Change) []string {
	return func(_ *configdb.View, c configdb.Change) []string {
		if id, ok := t.IDOf(c.Key); ok {
			return []string{id}
		}
		return nil
	}
}

// released maps a changed reference to the object that is referred to, because
// a deletion may have waited for it. Given is the prefix of the empty ID.
func released(prefix string) reconcile.Source {
	prefix = strings.TrimSuffix(prefix, "/")
	return reconcile.Source{Prefix: prefix, IDs: func(_ *configdb.View, c configdb.Change) []string {
		id, _, ok := strings.Cut(strings.TrimPrefix(c.Key, prefix), "/")
		if !ok || id == "" {
			return nil
		}
		return []string{id}
	}}
}

func allPools(v *configdb.View, _ configdb.Change) []string {
	var ids []string
	for e := range v.Scan(configdb.Pools.SpecPrefix(), "") {
		if id, ok := configdb.Pools.IDOf(e.Key); ok {
			ids = append(ids, id)
		}
	}
	return ids
}

func poolOfState(_ *configdb.View, c configdb.Change) []string {
	id, _ := configdb.PoolStates.IDOf(c.Key)
	if pool, _, ok := strings.Cut(id, "."); ok {
		return []string{pool}
	}
	return nil
}

// HasPool reports whether the pool with this name or ID is ready on this node.
func (s *Service) HasPool(v *configdb.View, poolName string) bool {
	pool, err := configdb.Pools.Find(v, "", poolName)
	return err == nil && s.poolUsable(v, pool) == nil
}

// poolUsable returns nil if the pool is ready here and was found so by this
// process, or an error that says why it is not.
func (s *Service) poolUsable(v *configdb.View, pool api.Pool) error {
	st, err := configdb.PoolStateOf(v, pool.Meta.ID, s.cfg.NodeID)
	switch {
	case err != nil:
		return api.Errorf(api.CodeRefused, "pool %q is not set up on node %s yet", pool.Meta.Name, s.cfg.NodeName)
	case !st.Status.Ready:
		return api.Errorf(api.CodeRefused, "pool %q is not ready on node %s: %s", pool.Meta.Name, s.cfg.NodeName, st.Status.Reason)
	case !s.local(pool).usable():
		// The stored state is of an earlier life of this daemon.
		return api.Errorf(api.CodeRefused, "pool %q is being checked on node %s; try again in a moment", pool.Meta.Name, s.cfg.NodeName)
	}
	return nil
}

// Resolve returns the absolute path and the format of a volume that this node
// may open now.
func (s *Service) Resolve(v *configdb.View, project, name string) (path, format string, err error) {
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return "", "", err
	}
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil {
		return "", "", fmt.Errorf("volume %q: %w", vol.Meta.Name, err)
	}
	switch {
	case vol.Meta.Deleting():
		return "", "", api.Errorf(api.CodeRefused, "volume %q is being deleted", vol.Meta.Name)
	case vol.Status.Phase != api.StorageReady:
		why := vol.Status.Message
		if why == "" {
			why = "it has not been made yet"
		}
		return "", "", api.Errorf(api.CodeRefused, "volume %q is not ready: %s", vol.Meta.Name, why)
	case pool.Spec.Type == api.PoolDir && vol.Spec.Node != s.cfg.NodeName:
		return "", "", api.Errorf(api.CodeRefused, "volume %q is in the pool %q of node %s, not of node %s", vol.Meta.Name, pool.Meta.Name, vol.Spec.Node, s.cfg.NodeName)
	}
	if err := s.poolUsable(v, pool); err != nil {
		return "", "", fmt.Errorf("volume %q: %w", vol.Meta.Name, err)
	}
	return s.driver(pool).volumePath(vol.Meta.ID), vol.Status.Format, nil
}

func (s *Service) poolPath(pool api.Pool) string {
	if m := s.mounts[pool.Spec.Path]; m != "" {
		return m
	}
	if pool.Spec.Type == api.PoolRBD {
		return filepath.Join(s.cfg.DataDir, "scratch", pool.Meta.ID)
	}
	if pool.Spec.Path == "" {
		return filepath.Join(s.cfg.DataDir, "pool")
	}
	return pool.Spec.Path
}

// readyPool returns the pool by name if it is ready here.
func (s *Service) readyPool(v *configdb.View, name string) (api.Pool, *localPool, error) {
	pool, err := configdb.Pools.Find(v, "", name)
	if err != nil {
		return pool, nil, err
	}
	if err := s.poolUsable(v, pool); err != nil {
		return pool, nil, err
	}
	return pool, s.local(pool), nil
}

// local returns what this process knows of a pool.
func (s *Service) local(pool api.Pool) *localPool {
	s.mu.Lock()
	defer s.mu.Unlock()
	lp := s.pools[pool.Meta.ID]
	if lp == nil {
		path := s.poolPath(pool)
		what := fmt.Sprintf("pool %q at %s", pool.Meta.Name, path)
		if pool.Spec.Type == api.PoolRBD {
			what = fmt.Sprintf("pool %q", pool.Meta.Name)
		}
		lp = &localPool{
			id: pool.Meta.ID, name: pool.Meta.Name, what: what, path: path,
			check: newLane(what, 1), work: newLane(what, maxWorkCalls),
		}
		lp.notes = s.notesOf(&pool, lp)
		s.pools[pool.Meta.ID] = lp
	}
	if lp.driver == nil || pool.Meta.Revision > lp.revision {
		lp.driver, lp.revision = s.driverOf(&pool, lp), pool.Meta.Revision
	}
	return lp
}

// driver is that of a pool as it was last seen.
func (s *Service) driver(pool api.Pool) driver {
	lp := s.local(pool)
	s.mu.Lock()
	defer s.mu.Unlock()
	return lp.driver
}

// driverIn is driver for a pool that local has returned.
func (s *Service) driverIn(lp *localPool) driver {
	s.mu.Lock()
	defer s.mu.Unlock()
	return lp.driver
}

// nodePhase returns the phase of a node by name; ok is false if it is no
// member (any more).
func nodePhase(v *configdb.View, name string) (phase api.NodePhase, ok bool) {
	n, err := configdb.Nodes.Find(v, "", name)
	return n.Status.Phase, err == nil
}

// diskError turns a full disk into an error that names the place; what was
// attempted is added to any other.
func diskError(lp *localPool, what string, err error) error {
	var e *api.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fullError(lp)
	case errors.As(err, &e), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, io.ErrUnexpectedEOF):
		return err
	}
	return fmt.Errorf("%s in %s: %w", what, lp.what, err)
}

func fullError(lp *localPool) error {
	return api.Errorf(api.CodeStorageFull, "%s is full; free some space or choose another pool", lp.what)
}

// reason is the CamelCase word of a condition for an error's code.
func reason(err error) string {
	switch api.CodeOf(err) {
	case api.CodeStorageFull:
		return "StorageFull"
	case api.CodeChecksum:
		return "Checksum"
	case api.CodeInvalid:
		return "Invalid"
	case api.CodeRefused:
		return "Refused"
	case api.CodeNotFound:
		return "NotFound"
	case api.CodeTimeout:
		return "Timeout"
	case api.CodeIncomplete:
		return "Incomplete"
	case api.CodeUnsupported:
		return "Unsupported"
	}
	return "Error"
}
