// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// Limits of moves; DESIGN.md has the steps.
const (
	// maxMoves is how many operations a node carries out at a time.
	maxMoves = 2
	// moveTries is how often a move is tried that broke off, moveRetry the pause
	// before the second try, which grows with each.
	moveTries = 6
	moveRetry = time.Second
)

// errBroken is for what another try may mend: another node was not reached, or a
// pool is not ready yet.
var errBroken = errors.New("the move broke off")

// brokenError is such a failure, in the words of its cause.
type brokenError struct{ error }

func (e brokenError) Is(target error) bool { return target == errBroken }
func (e brokenError) Unwrap() error        { return e.error }

// movesLoop carries out the moves that come to this node.
func (s *Service) movesLoop() *reconcile.Loop {
	return reconcile.New(reconcile.Config{
		Name: "moves", DB: s.cfg.DB, Log: s.log, Workers: maxMoves, Reconcile: s.reconcileMove,
		Sources: []reconcile.Source{{Prefix: configdb.Operations.SpecPrefix(), IDs: idOf(configdb.Operations)}},
	})
}

// mover is one try of a move.
type mover struct {
	s  *Service
	op api.Operation
}

// ownMove returns a move that this node has to carry out, if there is one.
func (s *Service) ownMove(v *configdb.View, id string) (*mover, bool) {
	op, err := configdb.Operations.Get(v, id)
	if err != nil || op.Spec.Move == nil || op.Spec.NodeID != s.cfg.NodeID || op.Status.Phase.Final() {
		return nil, false
	}
	return &mover{s, op}, true
}

// reconcileMove carries out a move from its beginning, whatever an earlier life of
// the daemon did of it.
func (s *Service) reconcileMove(ctx context.Context, id string) (reconcile.Result, error) {
	m, ok := s.ownMove(s.cfg.DB.Local(), id)
	if !ok {
		return reconcile.Result{}, nil
	}
	task := m.op.Spec.TaskID
	if m.op.Spec.Cancel {
		return reconcile.Result{}, m.end(ctx, api.TaskCancelled, "", "given up; everything is where it was")
	}
	pools := m.pools(s.cfg.DB.Local())
	err := m.run(ctx)
	for _, id := range pools {
		s.sweeps.Enqueue(id)
	}
	switch {
	case err == nil:
		s.forgetTries(task)
		return reconcile.Result{}, nil
	case ctx.Err() != nil:
		return reconcile.Result{}, context.Cause(ctx)
	case errors.Is(err, errUnwanted):
		return reconcile.Result{After: time.Millisecond}, nil // a wish to cancel is next, or it is over
	}
	if n := s.tried(task); errors.Is(err, errBroken) && n < moveTries {
		s.log.Warn("a move broke off and is tried again", "task", task, "try", n, "err", err)
		m.say(ctx, 0, "to be tried again: "+err.Error())
		return reconcile.Result{After: time.Duration(n) * moveRetry}, nil
	}
	s.forgetTries(task)
	s.log.Warn("a move failed", "task", task, "err", err)
	return reconcile.Result{}, m.end(ctx, api.TaskFailed, api.CodeOf(err), err.Error()+"; everything is where it was")
}

// tried counts the tries of a task.
func (s *Service) tried(task string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tries[task]++
	return s.tries[task]
}

func (s *Service) forgetTries(task string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tries, task)
}

// pools are the IDs of those where a move may leave something: asked before it
// changes where the volumes are.
func (m *mover) pools(v *configdb.View) (ids []string) {
	for _, mv := range m.op.Spec.Move.Volumes {
		names := []string{mv.Pool}
		if vol, err := configdb.Volumes.Get(v, mv.ID); err == nil {
			names = append(names, vol.Spec.Pool)
		}
		for _, name := range names {
			if pool, err := configdb.Pools.Find(v, "", name); err == nil {
				ids = append(ids, pool.Meta.ID)
			}
		}
	}
	return ids
}

func (m *mover) run(ctx context.Context) error {
	for i := range m.op.Spec.Move.Volumes {
		if err := m.bring(ctx, i); err != nil {
			return err
		}
	}
	return m.commit(ctx)
}

// wanted reports whether the operation is still there and not to be given up.
func (m *mover) wanted(v *configdb.View) bool {
	op, err := configdb.Operations.Get(v, m.op.Meta.ID)
	if err != nil {
		return api.IgnoreNotFound(err) != nil
	}
	return op.Spec.TaskID == m.op.Spec.TaskID && !op.Status.Phase.Final() && !op.Spec.Cancel
}

// bring makes the file of one volume here, complete and in its place.
func (m *mover) bring(ctx context.Context, i int) error {
	s, mv := m.s, m.op.Spec.Move.Volumes[i]
	v := s.cfg.DB.Local()
	vol, err := configdb.Volumes.Get(v, mv.ID)
	if err != nil {
		return err
	}
	pool, lp, err := s.readyPool(v, mv.Pool)
	if err != nil {
		return brokenError{err}
	}
	if pool.Spec.Type == api.PoolRBD {
		return noMoves(&pool)
	}
	tmp := s.tmpFile(lp, vol.Meta.ID)
	defer s.discard(lp, tmp)
	all := len(m.op.Spec.Move.Volumes)
	f := follower{wanted: m.wanted, tell: func(ctx context.Context, percent int) error {
		done := (100*i + percent) / all
		m.say(ctx, done-done%progressStep, fmt.Sprintf("copying volume %s to pool %s of node %s", vol.Meta.Name, pool.Meta.Name, s.cfg.NodeName))
		return nil
	}}
	err = s.followed(ctx, f, func(ctx context.Context, progress *progressReader) error {
		if err := f.tell(ctx, 0); err != nil {
			return err
		}
		return m.fetch(ctx, &vol, mv, lp, tmp, progress)
	})
	if err == nil {
		err = m.place(ctx, pool, lp, &vol, tmp)
	}
	if err != nil {
		return diskError(lp, "move volume "+vol.Meta.Name, err)
	}
	return nil
}

// noMoves refuses what rest has refused already, unless the pool is another one now.
func noMoves(pool *api.Pool) error {
	return api.Errorf(api.CodeUnsupported, "pool %q is of type rbd, from and to which volumes are not moved", pool.Meta.Name)
}

// fetch copies the content of a volume into a new file of this node.
func (m *mover) fetch(ctx context.Context, vol *api.Volume, mv api.VolumeMove, lp *localPool, tmp string, progress *progressReader) error {
	s := m.s
	v := s.cfg.DB.Local()
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil {
		return err
	}
	if pool.Spec.Type == api.PoolDir && vol.Spec.Node != s.cfg.NodeName {
		return m.receive(ctx, vol, lp, tmp, progress)
	}
	src, err := s.openMoving(ctx, v, vol)
	if err != nil {
		return err
	}
	if mv.Whole {
		return s.copyFrom(ctx, volumePlan{source: &copySource{path: src.path, volume: *vol}, size: int64(vol.Status.Size)}, tmp, progress)
	}
	f, size, err := src.open(ctx)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := s.roomFor(ctx, lp, src.lp, src.path); err != nil {
		return err
	}
	return s.write(ctx, lp, tmp, size, progress, func(do func(piece) error) error { return pieces(ctx, src.lp.work, f, size, do) })
}

// write makes a file of the pieces that feed delivers.
func (s *Service) write(ctx context.Context, lp *localPool, path string, size int64, progress *progressReader, feed func(do func(piece) error) error) error {
	f, err := call(ctx, lp.work, callDeadline, func() (*os.File, error) {
		return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	})
	if err != nil {
		return err
	}
	defer f.Close()
	err = feed(func(p piece) error {
		progress.reach(p.at, size)
		return s.writeChunk(ctx, lp, f, p.b, p.at)
	})
	if err != nil {
		return err
	}
	return lp.work.do(ctx, createDeadline, func() error {
		if err := f.Truncate(size); err != nil { // a hole at the end
			return err
		}
		return f.Sync()
	})
}

// movingFile is the file of a volume that leaves its place.
type movingFile struct {
	path string
	lp   *localPool
}

// openMoving marks the file of a volume that no guest uses as one that a move may
// leave behind. It refuses one whose header is not to be believed, or that a process
// has open.
func (s *Service) openMoving(ctx context.Context, v *configdb.View, vol *api.Volume) (*movingFile, error) {
	pool, lp, err := s.readyPool(v, vol.Spec.Pool)
	if err != nil {
		return nil, brokenError{err}
	}
	if pool.Spec.Type == api.PoolRBD {
		return nil, noMoves(&pool)
	}
	path, format, err := s.Resolve(v, vol.Meta.Project, vol.Meta.Name)
	if err != nil {
		return nil, err
	}
	if format == formatQcow2 {
		if _, err := s.honest(ctx, v, lp, path, vol.Meta.Project, vol.Meta.Name); err != nil {
			return nil, err
		}
	}
	_, err = call(ctx, lp.work, infoDeadline+callDeadline, func() (*imageInfo, error) { return s.img.info(ctx, path, format) })
	var exit *exitError
	switch {
	case errors.As(err, &exit) && exit.locked():
		return nil, api.Errorf(api.CodeConflict, "volume %q is in use by another process: %w", vol.Meta.Name, err)
	case err != nil:
		return nil, diskError(lp, "look at volume "+vol.Meta.Name, err)
	}
	s.moves.Lock()
	defer s.moves.Unlock()
	if err := lp.work.do(ctx, callDeadline, func() error { return s.mark(path, pool) }); err != nil {
		return nil, diskError(lp, "mark the volume", err)
	}
	return &movingFile{path: path, lp: lp}, nil
}

func (m *movingFile) open(ctx context.Context) (*os.File, int64, error) {
	f, err := call(ctx, m.lp.work, callDeadline, func() (*os.File, error) { return os.Open(m.path) })
	if err != nil {
		return nil, 0, err
	}
	info, err := call(ctx, m.lp.work, callDeadline, f.Stat)
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// place gives a complete file the name of its volume, marked, if the operation is
// still there. What an earlier try left makes room.
func (m *mover) place(ctx context.Context, pool api.Pool, lp *localPool, vol *api.Volume, tmp string) error {
	s := m.s
	s.moves.Lock()
	defer s.moves.Unlock()
	v, err := s.cfg.DB.View(ctx)
	if err != nil {
		return brokenError{err}
	}
	now, err := configdb.Volumes.Get(v, vol.Meta.ID)
	if err != nil || !m.wanted(v) || now.Spec.Pool != vol.Spec.Pool || now.Spec.Node != vol.Spec.Node {
		return errUnwanted
	}
	final := volumePath(lp.path, vol.Meta.ID)
	return lp.work.attempt(ctx, createDeadline, func(wanted func() error) error { return s.placeMarked(tmp, final, pool, wanted) })
}
