// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of notes.
const (
	// noteDeadline is how long one read or write may take; callers have less patience.
	noteDeadline = 10 * time.Second
	// maxNoteReads is how many reads of one pool may run, or hang, at a time. Of writes
	// it is one: a write that hung must never come after a later one.
	maxNoteReads = 16
	// noteTrouble is how long the notes of a node have to fail until the state of the
	// pool says so, and for how long after the last attempt it does.
	noteTrouble = 30 * time.Second
	// noteAgain is how long a reader that found half of a write waits for the rest.
	noteAgain = 20 * time.Millisecond
	// maxNotesSaid is how many notes that fail the state of a pool names.
	maxNotesSaid = 3
)

// notePlace is where the notes of a pool lie, by its type. It needs neither the database
// nor the network between the nodes.
type notePlace interface {
	// write replaces what this node has there with a frame, a multiple of noteBlock.
	write(ctx context.Context, frame []byte) error
	// read returns what a node has there, up to noteSlot; empty if it has nothing.
	read(ctx context.Context, nodeID string) ([]byte, error)
	// proven says that the pool was found to be the one that all nodes see.
	proven(root rootID)
	// close ends what serves the place. What is asked for later is refused, until open.
	close()
	open()
}

// noteBox is what this process knows of the notes in a pool.
type noteBox struct {
	poolID, what string
	place        notePlace

	mu      sync.Mutex
	root    *rootID // of the directory that was found to be the common one
	ready   bool    // it was there when the pool was looked at last
	failing map[noteAccess]noteFailure
}

// noteFailure is one that lasts: since when, its last attempt, and why the first one
// failed, which later ones repeat or wait for.
type noteFailure struct {
	since, last time.Time
	why         error
}

// noteAccess is what may fail: a node's note is written, or read.
type noteAccess struct{ verb, nodeID string }

// saw takes down what a check of the pool found: the directory, nil if it does not
// answer, and whether it is the one that all nodes see. Once it was, it is that for as
// long as it is the same directory: a node that is cut off compares the others' stamps
// with those in its old replica.
func (b *noteBox) saw(common bool, root *rootID) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if common && root != nil {
		b.root = root
		b.place.proven(*root)
	}
	b.ready = root != nil && b.root != nil && *b.root == *root
}

func (b *noteBox) close() {
	if b != nil {
		b.place.close()
	}
}

// NotePools returns the IDs of the pools through which this node can reach others: of
// types shared and rbd, usable here as last seen.
func (s *Service) NotePools() []string {
	var ids []string
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, lp := range s.pools {
		if lp.notes == nil {
			continue
		}
		lp.notes.mu.Lock()
		if lp.notes.ready {
			ids = append(ids, id)
		}
		lp.notes.mu.Unlock()
	}
	slices.Sort(ids)
	return ids
}

// WriteNote replaces this node's note in a pool, of at most NoteSize bytes. When it
// returns nil the note is on the pool's storage, where other nodes read it, though not
// necessarily safe from a loss of power there. After an error it may be there or not, or
// come there later, but never after a note that is written later (but for what an
// operation that was ended in a Ceph cluster that hung had on its way in the network;
// who reads has the note's own number). It returns at the end of ctx, whatever the
// storage does.
func (s *Service) WriteNote(ctx context.Context, poolID string, note []byte) error {
	box, err := s.noteBox(poolID)
	if err != nil {
		return err
	}
	if len(note) > NoteSize {
		return api.Errorf(api.CodeTooLarge, "a note has %d bytes, of %d that it may have", len(note), NoteSize)
	}
	frame := noteFrame(s.cfg.NoteKey, poolID, s.cfg.NodeID, s.noteSequence(), note)
	return s.noted(box, noteAccess{"write", s.cfg.NodeID}, box.place.write(ctx, frame))
}

// ReadNote returns the newest note of a node in a pool; nil, nil if there is none. A
// note that is torn, damaged, of another node or pool, or not made with the cluster's
// key, is an error. That a note is not an old one put back is not seen here. It returns
// at the end of ctx, whatever the storage does.
func (s *Service) ReadNote(ctx context.Context, poolID, nodeID string) (note []byte, err error) {
	box, err := s.noteBox(poolID)
	if err != nil {
		return nil, err
	}
	if !api.IsID(nodeID) {
		return nil, api.Errorf(api.CodeInvalid, "%q is no ID of a node", clip(nodeID))
	}
	note, err = s.readFrame(ctx, box, nodeID)
	if errors.Is(err, errNoteTorn) {
		// Perhaps it is being written.
		select {
		case <-ctx.Done():
			return nil, noteFailed(box, "read", context.Cause(ctx))
		case <-time.After(noteAgain):
		}
		note, err = s.readFrame(ctx, box, nodeID)
	}
	return note, s.noted(box, noteAccess{"read", nodeID}, err)
}

func (s *Service) readFrame(ctx context.Context, box *noteBox, nodeID string) ([]byte, error) {
	b, err := box.place.read(ctx, nodeID)
	if err != nil {
		return nil, err
	}
	f, err := openFrame(s.cfg.NoteKey, b)
	if err == nil && f == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("what is in the place of node %s: %w", nodeID, err)
	}
	return f.of(box.poolID, nodeID)
}

// noteBox is that of a pool which can have notes.
func (s *Service) noteBox(poolID string) (*noteBox, error) {
	if len(s.cfg.NoteKey) == 0 {
		return nil, api.Errorf(api.CodeInternal, "this node has no key for notes")
	}
	s.mu.Lock()
	lp := s.pools[poolID]
	s.mu.Unlock()
	switch {
	case lp == nil:
		return nil, api.Errorf(api.CodeNotFound, "pool %s is not known on node %s, or not yet", clip(poolID), s.cfg.NodeName)
	case lp.notes == nil:
		return nil, api.Errorf(api.CodeUnsupported, "%s has no notes; pools of types shared and rbd have", lp.what)
	}
	return lp.notes, nil
}

// noteSequence rises with each note, also from one life of the daemon to the next as far
// as the clock does.
func (s *Service) noteSequence() uint64 {
	for {
		was := s.noteSeq.Load()
		next := max(was+1, uint64(s.cfg.Now().UnixNano()))
		if s.noteSeq.CompareAndSwap(was, next) {
			return next
		}
	}
}

// noted logs when the notes of a node begin to fail, and when they work again, and names
// the pool in the error.
func (s *Service) noted(box *noteBox, a noteAccess, err error) error {
	if err != nil && errors.Is(err, context.Canceled) {
		return noteFailed(box, a.verb, err)
	}
	now := s.cfg.Now()
	box.mu.Lock()
	f, was := box.failing[a]
	if err != nil {
		if !was || now.Sub(f.last) >= noteTrouble { // nobody tried for long
			was, f = false, noteFailure{since: now, why: err}
		}
		f.last = now
		box.failing[a] = f
	} else {
		delete(box.failing, a)
	}
	box.mu.Unlock()
	switch {
	case err != nil && !was:
		s.log.Warn("notes of a node in a pool fail", "pool", box.what, "node", s.nodeNames(a.nodeID), "attempt", a.verb, "err", err)
	case err == nil && was:
		s.log.Info("notes of a node in a pool work again", "pool", box.what, "node", s.nodeNames(a.nodeID), "attempt", a.verb)
	}
	return noteFailed(box, a.verb, err)
}

// trouble says which notes have failed for long, and why.
func (b *noteBox) trouble(now time.Time) string {
	if b == nil {
		return ""
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var said []string
	for a, f := range b.failing {
		if now.Sub(f.since) >= noteTrouble && now.Sub(f.last) < noteTrouble {
			said = append(said, fmt.Sprintf("it cannot %s the note of node %s: %v", a.verb, a.nodeID, f.why))
		}
	}
	slices.Sort(said)
	return strings.Join(said[:min(len(said), maxNotesSaid)], "; ")
}

// nodeNames puts the names of nodes into a text that has their IDs, as far as they are
// known here.
func (s *Service) nodeNames(text string) string {
	nodes, _ := configdb.Nodes.List(s.cfg.DB.Local()) // of one that cannot be read the ID stays
	for i := range nodes {
		text = strings.ReplaceAll(text, nodes[i].Meta.ID, nodes[i].Meta.Name)
	}
	return text
}

func noteFailed(box *noteBox, verb string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s a note in %s: %w", verb, box.what, err)
}

// notesOf makes what holds the notes of a pool, nil for a type that has none.
func (s *Service) notesOf(pool *api.Pool, lp *localPool) *noteBox {
	box := &noteBox{poolID: lp.id, what: lp.what, failing: map[noteAccess]noteFailure{}}
	switch pool.Spec.Type {
	case api.PoolShared:
		box.place = newNoteFiles(lp, s.cfg.NodeID)
	case api.PoolRBD:
		box.place = newNoteImage(s, lp)
	default:
		return nil
	}
	return box
}

// closeNotes ends what serves notes, of all pools at once; openNotes lets them be used
// again, by the next Run.
func (s *Service) closeNotes() {
	var wg sync.WaitGroup
	for _, b := range s.noteBoxes() {
		wg.Go(func() { _ = contain.Do(b.close) })
	}
	wg.Wait()
}

func (s *Service) openNotes() {
	for _, b := range s.noteBoxes() {
		b.place.open()
	}
}

func (s *Service) noteBoxes() (boxes []*noteBox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, lp := range s.pools {
		if lp.notes != nil {
			boxes = append(boxes, lp.notes)
		}
	}
	return boxes
}
