// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of copies of volumes.
const (
	// maxCopies is how many copies a node makes at a time; copyRetry is when
	// another one asks again for its turn.
	maxCopies = 2
	copyRetry = 2 * time.Second
	// copyLook is how often a copy looks whether its volume is still wanted.
	copyLook = time.Second
)

// copySlots are the turns of copies.
type copySlots chan struct{}

func (c copySlots) tryTake() bool {
	select {
	case c <- struct{}{}:
		return true
	default:
		return false
	}
}

func (c copySlots) give() { <-c }

// copySource is what a volume or an image is copied from: an internal snapshot,
// which never changes, whatever a guest writes to the volume meanwhile, or with no
// tag a volume that no VM has.
type copySource struct {
	path, tag string
	volume    api.Volume
}

func (s *Service) volumesOfSnapshot(v *configdb.View, c configdb.Change) []string {
	id, _ := configdb.Snapshots.IDOf(c.Key)
	return s.volumesWhere(v, func(vol *api.Volume) bool { return vol.Spec.SourceSnapshot == id })
}

// copySource finds what a volume or an image is copied from, or says what it waits
// for.
func (s *Service) copySource(v *configdb.View, project, volume, snapshot string) (*copySource, error) {
	snap, err := configdb.Snapshots.Get(v, snapshot)
	if err != nil {
		return nil, api.Errorf(api.CodeRefused, "the snapshot of volume %q that it was to be copied from is gone, or could not be taken", volume)
	}
	switch snap.Status.Phase {
	case api.SnapshotCreating:
		return nil, pendingError{"waiting for snapshot " + snap.Meta.Name + " of vm " + snap.Spec.VM}
	case api.SnapshotReady, api.SnapshotReverting:
	default:
		return nil, api.Errorf(api.CodeRefused, "snapshot %q of vm %q, which it was to be copied from, is %s", snap.Meta.Name, snap.Spec.VM, snap.Status.Phase)
	}
	for _, d := range snap.Status.Disks {
		if d.Volume != volume {
			continue
		}
		now, err := configdb.Volumes.Get(v, d.VolumeID)
		if err != nil || now.Meta.Name != d.Volume {
			return nil, api.Errorf(api.CodeRefused, "volume %q, which it was to be copied from, is gone", d.Volume)
		}
		return s.sourceIn(v, project, now, snap.Status.Tag)
	}
	return nil, api.Errorf(api.CodeRefused, "snapshot %q of vm %q does not have volume %q", snap.Meta.Name, snap.Spec.VM, volume)
}

// sourceIn finds the file of a volume to copy from, an internal snapshot of it if
// there is a tag.
func (s *Service) sourceIn(v *configdb.View, project string, vol api.Volume, tag string) (*copySource, error) {
	path, format, err := s.Resolve(v, project, vol.Meta.Name)
	if err != nil {
		return nil, err
	}
	if format != formatQcow2 {
		return nil, api.Errorf(api.CodeRefused, "volume %q has the format %s; only qcow2 volumes can be copied", vol.Meta.Name, format)
	}
	return &copySource{path: path, tag: tag, volume: vol}, nil
}

// waitsForCopy says why a copy does not begin yet.
func (s *Service) waitsForCopy() error {
	return pendingError{fmt.Sprintf("waiting: node %s copies %d volumes already", s.cfg.NodeName, maxCopies)}
}

var errUnwanted = errors.New("the copy is not wanted any more")

// follower is what a copy is made for.
type follower struct {
	wanted func(v *configdb.View) bool
	// tell writes the progress in percent.
	tell func(ctx context.Context, percent int) error
}

// followed makes a copy whose progress is told. It ends early, with errUnwanted,
// when the copy is not wanted any more.
func (s *Service) followed(ctx context.Context, f follower, do func(ctx context.Context, progress *progressReader) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := &progressReader{}
	group, follow := contain.NewGroup(ctx)
	group.Go(func() { s.follow(follow, f, watch, func() { cancel(errUnwanted) }) })
	err := do(ctx, watch)
	if stopErr := group.Stop(); err == nil {
		err = stopErr
	}
	if err != nil && errors.Is(context.Cause(ctx), errUnwanted) {
		return errUnwanted
	}
	return err
}

// follow tells the progress in coarse steps and looks whether the copy is wanted.
func (s *Service) follow(ctx context.Context, f follower, p *progressReader, stop func()) {
	tick := time.NewTicker(copyLook)
	defer tick.Stop()
	shown := -1
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !f.wanted(s.cfg.DB.Local()) {
			stop()
			return
		}
		if now := p.percent() / progressStep * progressStep; now != shown {
			shown = now
			if err := f.tell(ctx, now); ignore(err) != nil && ctx.Err() == nil {
				s.log.Warn("progress of a copy not written", "err", err)
			}
		}
	}
}

// copyInto copies the source of a volume into a new file that is not in its place
// yet. It ends early when the volume is to be deleted.
func (s *Service) copyInto(ctx context.Context, id, to string, p volumePlan) error {
	f := follower{
		wanted: func(v *configdb.View) bool {
			vol, err := configdb.Volumes.Get(v, id)
			return api.IgnoreNotFound(err) != nil || err == nil && !vol.Meta.Deleting()
		},
		tell: func(ctx context.Context, percent int) error {
			return s.setVolume(ctx, id, func(vol *api.Volume) error {
				vol.Status.Phase, vol.Status.Progress, vol.Status.Message = api.StoragePending, percent, "copying volume "+vol.Spec.SourceVolume
				return nil
			})
		},
	}
	// Not through the lane: its slots are for short calls. The number of copies
	// has a bound of its own, and the process its deadline.
	return s.followed(ctx, f, func(ctx context.Context, progress *progressReader) error { return s.copyFrom(ctx, p, to, progress) })
}

// copyFrom looks at the source's header, then copies. QEMU may have it open and
// may have changed its header since: the backing file is named by this program.
func (s *Service) copyFrom(ctx context.Context, p volumePlan, to string, progress io.Writer) error {
	src := &p.source.volume
	v := s.cfg.DB.Local()
	_, lp, err := s.readyPool(v, src.Spec.Pool)
	if err != nil {
		return err
	}
	back, err := s.honest(ctx, v, lp, p.source.path, src.Meta.Project, src.Meta.Name)
	if err != nil {
		return err
	}
	err = s.img.copyVolume(ctx, qcow2Source(p.source.path, back), p.source.tag, to, p.backing, p.backingFormat, progress)
	if err != nil {
		return err
	}
	if size, err := s.img.sizeOf(ctx, to); err != nil || size >= p.size {
		return err
	}
	return s.img.grow(ctx, to, p.size) // the source was enlarged after the snapshot
}

// qcow2Source names a file and what is behind it (QAPI BlockdevOptionsQcow2), so
// that the header's own word for it does not count.
func qcow2Source(path string, back *backingFile) string {
	type options map[string]any
	file := func(path string) options { return options{"driver": "file", "filename": path} }
	o := options{"driver": formatQcow2, "file": file(path), "backing": nil}
	if back != nil {
		o["backing"] = options{"driver": back.format, "file": file(back.path)}
	}
	b, err := json.Marshal(o)
	if err != nil {
		return fileArg(path) // strings only: it cannot fail
	}
	return "json:" + string(b)
}

// copyVolume writes what a source, or an internal snapshot of it, holds into a new
// file: all of it, or with a backing image what differs from that. Another process
// may have a source open and write to it if it is a snapshot that is copied: what
// that refers to is never written again while it is there. Without one, QEMU's lock
// on the file keeps others from writing.
func (q *qemuImg) copyVolume(ctx context.Context, from, tag, to, backing, backingFormat string, progress io.Writer) error {
	args := []string{"convert", "-p", "-O", formatQcow2}
	if tag != "" {
		args = append(args, "-U", "-l", "snapshot.name="+tag)
	}
	if backing != "" {
		args = append(args, "-B", backing, "-F", backingFormat)
	}
	return q.runTo(ctx, convertDeadline, 0, progress, append(args, from, fileArg(to))...)
}

// progressReader is how far a copy is: as its maker says, or as qemu-img prints it,
// "(12.34/100%)".
type progressReader struct {
	mu   sync.Mutex
	rest []byte
	last float64
}

var percentText = regexp.MustCompile(`\((\d+(?:\.\d+)?)/100%\)`)

const maxProgressLine = 256

func (p *progressReader) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	if all := percentText.FindAllSubmatchIndex(p.rest, -1); len(all) > 0 {
		m := all[len(all)-1]
		if f, err := strconv.ParseFloat(string(p.rest[m[2]:m[3]]), 64); err == nil {
			p.last = max(0, min(f, 100))
		}
		p.rest = bytes.Clone(p.rest[m[1]:])
	}
	if len(p.rest) > maxProgressLine {
		p.rest = bytes.Clone(p.rest[len(p.rest)-maxProgressLine:])
	}
	return len(b), nil
}

// reach is told how far a copy of this program is.
func (p *progressReader) reach(done, of int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = float64(percent(done, of))
}

func (p *progressReader) percent() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return min(int(p.last), 99)
}
