// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/nbd"
)

// The image of notes. It has no exclusive lock, since all nodes write to it, and no
// object map, which one writer alone keeps right.
const (
	rbdNotes      = "notes-" // and the ID of the pool
	notesFeatures = "layering"
	// noteSlots of noteSlot bytes: so many that two nodes hardly ever have one.
	noteSlots  = 1 << 20
	notesBytes = noteSlots * noteSlot
	// notesObject is large, so that the image has few of them to be removed.
	notesObject = "32M"
)

// Times of what serves notes in a pool of type rbd.
const (
	// notesLasting is how long one has to run to be started again at once. Else the
	// pause between two starts is twice the one before, from the least to the most.
	notesLasting    = time.Minute
	notesLeastPause = time.Second
	notesMostPause  = 30 * time.Second
	// notesCloseTime bounds the wait for its end, notesStartTime that for one that is
	// being started, which may be making the image.
	notesCloseTime = 5 * time.Second
	notesStartTime = noteDeadline + 2*stopTime
	// notesGoneTime bounds the removal of the image: Ceph calls it open for 30 s after
	// a client ended without a word.
	notesGoneTime = 45 * time.Second
)

// noteImage are the notes in a pool of type rbd, in one image that a qemu-nbd opens as
// long as they are used. It is the pool's by its name, in the Ceph cluster that knows
// the pool's key.
type noteImage struct {
	s                     *Service
	lp                    *localPool
	reads, writes, starts *lane
	limit                 time.Duration // of one read or write that was begun

	mu     sync.Mutex
	proved bool        // the pool was found usable
	gone   bool        // closed
	server *noteServer // nil if there is none; one that ends is here until it has ended
	began  time.Time   // of the last start
	pause  time.Duration
	why    error // the last one ended, or did not start
}

func newNoteImage(s *Service, lp *localPool) *noteImage {
	return &noteImage{s: s, lp: lp, reads: newLane(lp.what, maxNoteReads), writes: newLane(lp.what, 1), starts: newLane(lp.what, 1), limit: noteDeadline}
}

func (n *noteImage) proven(rootID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.proved = true
}

// close waits for a start that is under way: ended halfway, it would leave half an image,
// and later than the removal of the pool, a whole one.
func (n *noteImage) close() {
	n.mu.Lock()
	n.gone = true
	n.mu.Unlock()
	if err := n.starts.do(context.Background(), notesStartTime, func() error { return nil }); err != nil {
		n.s.log.Warn("the start of what serves notes does not end", "pool", n.lp.name, "err", err)
	}
	n.mu.Lock()
	srv := n.server
	n.mu.Unlock()
	if srv == nil {
		return
	}
	go func() { _ = contain.Do(srv.stop) }()
	select {
	case <-srv.ended:
	case <-time.After(notesCloseTime):
		n.s.log.Warn("what serves notes does not end", "pool", n.lp.name, "pid", srv.pid())
	}
}

func (n *noteImage) open() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone = false
}

// noteOffset is where a node's slot is. That two have one is seen by the frames.
func noteOffset(poolID, nodeID string) uint64 {
	sum := sha256.Sum256([]byte(poolID + nodeID))
	return binary.BigEndian.Uint64(sum[:]) % noteSlots * noteSlot
}

// write keeps its lane until the write has ended, or the process that was told to. What
// nobody waits for any more is not begun.
func (n *noteImage) write(ctx context.Context, frame []byte) error {
	return n.writes.attempt(ctx, noteDeadline, func(wanted func() error) error {
		srv, err := n.serve()
		if err == nil {
			err = wanted()
		}
		if err != nil {
			return err
		}
		return n.ask(srv, func(ctx context.Context) error {
			return srv.conn.Write(ctx, noteOffset(n.lp.id, n.s.cfg.NodeID), frame)
		})
	})
}

func (n *noteImage) read(ctx context.Context, nodeID string) ([]byte, error) {
	return call(ctx, n.reads, noteDeadline, func() (b []byte, err error) {
		srv, err := n.serve()
		if err != nil {
			return nil, err
		}
		err = n.ask(srv, func(ctx context.Context) error {
			b, err = srv.conn.Read(ctx, noteOffset(n.lp.id, nodeID), noteSlot)
			return err
		})
		return b, err
	})
}

// ask ends a server that fails, or does not answer, and returns when it has ended: what
// it was told can then not come later than what another one is told, but for what was on
// its way in the network. (A client that Ceph has locked out never recovers.)
func (n *noteImage) ask(srv *noteServer, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), n.limit)
	defer cancel()
	err := f(ctx)
	if err != nil {
		n.failed(err)
		n.end(srv)
	}
	return err
}

func (n *noteImage) failed(why error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.why = why
}

// end returns when a server has ended.
func (n *noteImage) end(srv *noteServer) {
	srv.stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.server == srv {
		n.server = nil
	}
}

// serve returns the server that runs, or starts one.
func (n *noteImage) serve() (*noteServer, error) {
	n.mu.Lock()
	srv, gone, proved := n.server, n.gone, n.proved
	n.mu.Unlock()
	switch {
	case gone:
		return nil, errNotesGone
	case !proved:
		return nil, api.Errorf(api.CodeRefused, "%s was not found usable yet", n.lp.what)
	}
	d, ok := n.s.driverIn(n.lp).(*rbdDriver)
	if !ok {
		return nil, api.Errorf(api.CodeInternal, "%s is not of type rbd", n.lp.what)
	}
	if srv != nil && srv.driver == d && srv.runs() {
		return srv, nil
	}
	if srv != nil {
		n.failed(errNotesServer)
		n.end(srv)
	}
	return call(context.Background(), n.starts, 2*noteDeadline, func() (*noteServer, error) { return n.start(d) })
}

// errNotesServer: it has died, or the pool has other monitors or another key now.
var errNotesServer = errors.New("its process has ended, or the pool was changed")

var errNotesGone = api.Errorf(api.CodeRefused, "the pool is not used here any more")

// start is called by one at a time.
func (n *noteImage) start(d *rbdDriver) (*noteServer, error) {
	n.mu.Lock()
	srv, wait, why, gone := n.server, n.pause-time.Since(n.began), n.why, n.gone
	n.mu.Unlock()
	switch {
	case gone:
		return nil, errNotesGone
	case srv != nil:
		return srv, nil // of who was here before
	case wait > 0:
		return nil, api.Errorf(api.CodeTimeout, "what serves the notes is started again in %s; the last one failed: %w", wait.Round(time.Second), why)
	}
	n.mu.Lock()
	if n.pause = min(2*n.pause, notesMostPause); time.Since(n.began) > notesLasting {
		n.pause = notesLeastPause
	}
	n.began = time.Now()
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), noteDeadline)
	defer cancel()
	srv, err := d.serveNotes(ctx)
	if errors.Is(err, errNoNotes) {
		var taken bool
		if taken, err = d.makeNotes(ctx); err == nil {
			srv, err = d.serveNotes(ctx)
		}
		if taken && errors.Is(err, errNoNotes) {
			err = d.unfinishedNotes()
		}
	}
	if err != nil {
		n.failed(err)
		return nil, err
	}
	n.mu.Lock()
	gone = n.gone
	if !gone {
		n.server = srv
	}
	n.mu.Unlock()
	if gone {
		srv.stop()
		return nil, errNotesGone
	}
	return srv, nil
}

func (d *rbdDriver) notesImage() string { return rbdNotes + d.lp.id }

// errNoNotes is that there is no image of notes, or none that is complete.
var errNoNotes = errors.New("the image of notes is not there")

// makeNotes makes the image, or finds its name taken. It is claimed before anything else
// of it is there, so of two nodes one makes it, and the other finds it complete a moment
// later.
func (d *rbdDriver) makeNotes(ctx context.Context) (taken bool, err error) {
	_, err = d.cmd.run(ctx, noteDeadline, programRBD, "create", d.at(d.notesImage()),
		"--size", bytesArg(notesBytes), "--object-size", notesObject, "--image-feature", notesFeatures)
	if errors.Is(err, syscall.EEXIST) {
		return true, nil
	}
	return false, err
}

// unfinishedNotes is that the name is taken, and there is no image that can be opened. It
// is not removed here: between a look at it and its removal another node may have done
// that, made it anew, and left its note in what would then be removed.
func (d *rbdDriver) unfinishedNotes() error {
	return api.Errorf(api.CodeRefused, "%s is being made, or whoever made it was ended halfway; if that lasts, remove it, and it is made anew: rbd rm %s", d.at(d.notesImage()), d.at(d.notesImage()))
}

// removeNotes removes the image once no node has it open.
func (d *rbdDriver) removeNotes(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, notesGoneTime)
	defer cancel()
	for {
		_, err := d.cmd.run(ctx, cephDeadline, programRBD, "rm", "--no-progress", d.at(d.notesImage()))
		switch {
		case err == nil, errors.Is(err, syscall.ENOENT): // another node was faster
			return nil
		case !errors.Is(err, syscall.EBUSY):
			return fmt.Errorf("remove %s: %w", d.at(d.notesImage()), err)
		}
		select {
		case <-time.After(time.Second + rand.N(time.Second)): // nodes that try at once are in each other's way
		case <-ctx.Done():
			return api.Errorf(api.CodeTimeout, "a client of Ceph still has %s open; remove it with: rbd rm %s", d.at(d.notesImage()), d.at(d.notesImage()))
		}
	}
}

// notesSocket is where the server of a pool's notes listens.
func (d *rbdDriver) notesSocket() string { return filepath.Join(d.s.cfg.RunDir, "notes", d.lp.id) }

// notesUsable looks whether what was opened is an image of notes.
func (d *rbdDriver) notesUsable(c *nbd.Conn) error {
	if c.Size() != notesBytes {
		return api.Errorf(api.CodeRefused, "%s has %d bytes and is not what this software makes; remove it, and it is made anew", d.at(d.notesImage()), c.Size())
	}
	return nil
}
