// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/greeting"
)

// Limits of the streams that bring volumes.
const (
	// MaxStreams are served at a time by a node.
	MaxStreams = 16
	// streamStall is how long either end may deliver nothing.
	streamStall = 60 * time.Second
	// waitEvery is the pause between the words that a node still prepares a file.
	waitEvery = 2 * time.Second
)

// The words before the frames: still preparing; the size of the file follows; why
// there is none follows; why there is none now follows, but ask again.
const (
	wordWait  = "wait"
	wordFile  = "file "
	wordNone  = "none "
	wordLater = "later "
)

// Streams reach other nodes.
type Streams interface {
	// Stream connects to a node by ID; the other end calls ServeStream. Both ends
	// have proved which nodes they are.
	Stream(ctx context.Context, nodeID string) (net.Conn, error)
}

// streamHello is the first line of a stream, one JSON object: which volume is to be
// sent, for which operation and task. The answer is in words, a line each, then in
// frames (sparse.go).
type streamHello struct {
	Operation string `json:"operation"`
	Task      string `json:"task"`
	Volume    string `json:"volume"`
}

// patientConn sets a deadline for each read and write.
type patientConn struct{ net.Conn }

func (c patientConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(streamStall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c patientConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(streamStall)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// receive brings the file of a volume from the node that has it.
func (m *mover) receive(ctx context.Context, vol *api.Volume, lp *localPool, tmp string, progress *progressReader) error {
	s := m.s
	if s.cfg.Streams == nil {
		return api.Errorf(api.CodeUnsupported, "node %s cannot reach other nodes for their volumes", s.cfg.NodeName)
	}
	node, err := findNode(s.cfg.DB.Local(), vol.Spec.Node)
	if err != nil {
		return err
	}
	raw, err := s.cfg.Streams.Stream(ctx, node)
	if err != nil {
		return brokenError{fmt.Errorf("reach node %s, which has volume %s: %w", vol.Spec.Node, vol.Meta.Name, err)}
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { _ = raw.Close() })()
	conn := patientConn{raw}
	if err := greeting.Say(conn, streamHello{Operation: m.op.Meta.ID, Task: m.op.Spec.TaskID, Volume: vol.Meta.ID}); err != nil {
		return brokenError{fmt.Errorf("ask node %s for volume %s: %w", vol.Spec.Node, vol.Meta.Name, err)}
	}
	r := greeting.NewConn(conn, chunkBytes).R
	size, err := awaitFile(r)
	if err != nil {
		return fmt.Errorf("node %s, which has volume %s: %w", vol.Spec.Node, vol.Meta.Name, err)
	}
	var broken error // of the other end; what goes wrong here is said as it is
	err = s.write(ctx, lp, tmp, size, progress, func(do func(piece) error) error {
		return readFrames(r, size, func(p piece) error {
			broken = do(p)
			return broken
		})
	})
	if err != nil && broken == nil && ctx.Err() == nil && isStream(err) {
		return brokenError{fmt.Errorf("node %s, which has volume %s: %w", vol.Spec.Node, vol.Meta.Name, err)}
	}
	return err
}

// isStream reports whether an error is the end of a stream rather than a refusal of
// this node.
func isStream(err error) bool {
	var n net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &n) || errors.Is(err, net.ErrClosed) || api.CodeOf(err) == api.CodeIncomplete
}

// awaitFile reads the words of the other node until it has the file, whose size it
// returns.
func awaitFile(r *bufio.Reader) (int64, error) {
	for {
		line, err := greeting.Line(r)
		if err != nil {
			return 0, brokenError{fmt.Errorf("it did not say whether it has the file: %w", err)}
		}
		if line == wordWait {
			continue
		}
		if why, ok := strings.CutPrefix(line, wordNone); ok {
			return 0, refusedBy(why)
		}
		if why, ok := strings.CutPrefix(line, wordLater); ok {
			return 0, brokenError{refusedBy(why)}
		}
		text, ok := strings.CutPrefix(line, wordFile)
		size, err := strconv.ParseInt(text, 10, 64)
		if !ok || err != nil || size < 0 || size > 2*maxVirtualSize {
			return 0, api.Errorf(api.CodeInternal, "it says %q where the size of the file was expected", clip(line))
		}
		return size, nil
	}
}

// refusedBy is the other node's reason, with its code.
func refusedBy(why string) error {
	code, text, _ := strings.Cut(why, " ")
	return api.Errorf(api.Code(code), "%s", text)
}

// ServeStream sends the file of a volume to the node that it moves to, until that
// has it or the context ends. peer is the node's ID.
func (s *Service) ServeStream(ctx context.Context, raw net.Conn, peer string) {
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { _ = raw.Close() })()
	conn := patientConn{raw}
	var hello streamHello
	if err := greeting.Hear(greeting.NewConn(conn, greeting.MaxLine).R, &hello); err != nil {
		s.log.Warn("a stream began with no word for what it is", "peer", peer, "err", err)
		return
	}
	f, err := s.prepare(ctx, raw, conn, hello, peer)
	if err != nil {
		s.log.Warn("a volume is not sent", "volume", hello.Volume, "peer", peer, "err", err)
		word := wordNone
		if errors.Is(err, errBroken) {
			word = wordLater
		}
		_, _ = fmt.Fprintf(conn, "%s%s %s\n", word, api.CodeOf(err), greeting.Text(err))
		return
	}
	defer f.close()
	if err := s.send(ctx, conn, f); err != nil && ctx.Err() == nil {
		s.log.Warn("a stream broke", "volume", hello.Volume, "peer", peer, "err", err)
	}
}

// sentFile is the file that is sent: of the volume, or a copy of it that needs no
// image.
type sentFile struct {
	*os.File
	size  int64
	lane  *lane
	close func()
}

// errLeft is the end of a node that waited for a file.
var errLeft = errors.New("the node that asked has gone")

// prepare opens what is to be sent, and tells the other node meanwhile to wait. It
// ends when that has gone: it will ask again, and then for another copy.
func (s *Service) prepare(ctx context.Context, raw net.Conn, conn net.Conn, hello streamHello, peer string) (*sentFile, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	group, told := contain.NewGroup(ctx)
	group.Go(func() {
		tick := time.NewTicker(waitEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if _, err := fmt.Fprintln(conn, wordWait); err != nil {
					cancel(errLeft)
					return
				}
			case <-told.Done():
				return
			}
		}
	})
	group.Go(func() {
		_ = raw.SetReadDeadline(time.Time{})
		stop := context.AfterFunc(told, func() { _ = raw.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		if _, err := raw.Read(make([]byte, 1)); told.Err() == nil { // it has nothing to say
			cancel(fmt.Errorf("%w: %w", errLeft, err))
		}
	})
	f, err := s.openSent(ctx, hello, peer)
	if stopErr := group.Stop(); err == nil && stopErr != nil {
		f.close()
		err = stopErr
	}
	return f, err
}

// awaitCopy waits for a turn to make a copy. The caller gives it back.
func (s *Service) awaitCopy(ctx context.Context) error {
	select {
	case s.copies <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Service) openSent(ctx context.Context, hello streamHello, peer string) (*sentFile, error) {
	vol, mv, err := s.admit(hello, peer)
	if err != nil {
		return nil, err
	}
	src, err := s.openMoving(ctx, s.cfg.DB.Local(), vol)
	if err != nil {
		return nil, err
	}
	undo := func() {}
	if mv.Whole {
		if err := s.awaitCopy(ctx); err != nil {
			return nil, err
		}
		defer s.copies.give()
		tmp := s.tmpFile(src.lp, vol.Meta.ID)
		undo = func() { s.discard(src.lp, tmp) }
		from := &copySource{path: src.path, volume: *vol}
		if err := s.copyFrom(ctx, volumePlan{source: from, size: int64(vol.Status.Size)}, tmp, io.Discard); err != nil {
			undo()
			return nil, diskError(src.lp, "copy volume "+vol.Meta.Name, err)
		}
		src = &movingFile{path: tmp, lp: src.lp}
	}
	f, size, err := src.open(ctx)
	if err != nil {
		undo()
		return nil, diskError(src.lp, "open volume "+vol.Meta.Name, err)
	}
	return &sentFile{File: f, size: size, lane: src.lp.work, close: func() { _ = f.Close(); undo() }}, nil
}

// send sends the size, then what is in the file.
func (s *Service) send(ctx context.Context, conn net.Conn, f *sentFile) error {
	w := bufio.NewWriterSize(conn, chunkBytes+frameHead)
	if _, err := fmt.Fprintf(w, "%s%d\n", wordFile, f.size); err != nil {
		return err
	}
	if err := pieces(ctx, f.lane, f.File, f.size, func(p piece) error { return writeFrame(w, p) }); err != nil {
		return err
	}
	if err := writeFrame(w, piece{at: f.size}); err != nil {
		return err
	}
	return w.Flush()
}
