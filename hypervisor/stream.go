// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/greeting"
)

// Limits of the streams between nodes.
const (
	// helloDeadline bounds the first line of a stream and its answer.
	helloDeadline = 5 * time.Second
	// askDeadline bounds the question whether the target has everything, which
	// it answers when QEMU has loaded what is on its way.
	askDeadline = 5 * time.Second
	// MaxStreams are carried at a time to this node.
	MaxStreams = 128
	streamOK   = "ok"
)

// Streams reach other nodes.
type Streams interface {
	// Stream connects to a node by ID; the other end calls ServeStream. Both
	// ends have proved which nodes they are.
	Stream(ctx context.Context, nodeID string) (net.Conn, error)
}

// streamHello is the first line of a stream, one JSON object. The answer is one
// line: "ok", or why not.
type streamHello struct {
	VM      string `json:"vm"`
	Task    string `json:"task"`
	Purpose string `json:"purpose"`
	// Channels are how many others there are beside the main connection with
	// memory; only a target that said so gets it.
	Channels int `json:"channels,omitempty"`
	// Now asks for an answer at once, whether or not it may soon be another one.
	Now bool `json:"now,omitempty"`
}

// The purposes of a stream.
const (
	purposeMemory = "memory" // one connection of QEMU's own migration stream
	purposeDisk   = "disk"   // one connection to QEMU's NBD server
	purposeLoaded = "loaded" // the answer is "ok" when QEMU has the guest
	// The answer is "ok" when QEMU waits for another connection with memory.
	purposeRecover = "recover"
)

// refusedStream is the other node's own word why it does not take a stream.
type refusedStream struct{ why string }

func (e *refusedStream) Error() string { return e.why }

// hasNothing reports that it refused because its QEMU has never got anything.
func (e *refusedStream) hasNothing() bool {
	return strings.HasSuffix(e.why, (&notLoadedError{migNone}).Error())
}

// openStream connects to a node, says what for and waits for its leave.
func (h *Hypervisor) openStream(ctx context.Context, node string, hello streamHello) (*greeting.Conn, error) {
	conn, err := h.cfg.Streams.Stream(ctx, node)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(helloDeadline)
	if d, ok := ctx.Deadline(); ok {
		deadline = d
	}
	_ = conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	c := greeting.NewConn(conn, greeting.MaxLine)
	err = greeting.Say(conn, hello)
	var answer string
	if err == nil {
		answer, err = greeting.Line(c.R)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil && answer != streamOK {
		err = &refusedStream{answer}
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("open a stream to the target: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	return c, nil
}

// ServeStream serves a stream that a node opened, until it ends or the context
// does.
func (h *Hypervisor) ServeStream(ctx context.Context, conn net.Conn, peer string) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(helloDeadline))
	c := greeting.NewConn(conn, greeting.MaxLine)
	var hello streamHello
	if err := greeting.Hear(c.R, &hello); err != nil {
		h.log.Warn("a stream began with no word for what it is", "peer", peer, "err", err)
		return
	}
	up, g, err := h.admitStream(ctx, hello, peer)
	if err != nil {
		h.log.Warn("a stream is refused", "peer", peer, "vm", hello.VM, "purpose", hello.Purpose, "err", err)
		fmt.Fprintln(conn, greeting.Text(err))
		return
	}
	if up != nil {
		defer up.Close()
		stopUp := context.AfterFunc(ctx, func() { _ = up.Close() })
		defer stopUp()
	}
	if g != nil {
		defer h.leaveGate(hello.VM, g)
	}
	if _, err := fmt.Fprintln(conn, streamOK); err != nil || up == nil && g == nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	if g != nil {
		err = g.carry(ctx, c)
	} else {
		err = splice(c, up)
	}
	if err != nil {
		h.log.Info("a stream broke", "peer", peer, "vm", hello.VM, "purpose", hello.Purpose, "err", err)
	}
}

// admitStream checks that a node may send what it wants to send and returns the
// connection to QEMU, or the gate that leads to it, if there is to be one.
func (h *Hypervisor) admitStream(ctx context.Context, hello streamHello, peer string) (up net.Conn, g *gate, err error) {
	op := liveMigration(h.cfg.DB.Local(), hello.VM)
	mark, err := h.marked(hello.VM)
	switch {
	case err != nil:
		return nil, nil, err
	case op == nil || op.Spec.TaskID != hello.Task:
		return nil, nil, fmt.Errorf("node %s knows no migration of vm %s in task %s", h.cfg.NodeName, hello.VM, hello.Task)
	case op.Spec.NodeID != peer || op.Spec.Migration.NodeID != h.cfg.NodeID:
		return nil, nil, api.Errorf(api.CodeForbidden, "the migration of vm %s is not one from node %s to node %s", op.Spec.VM, peer, h.cfg.NodeName)
	case mark != hello.Task && (mark != "" || !expectsRest(h.cfg.DB.Local(), op)):
		return nil, nil, fmt.Errorf("node %s does not expect vm %s", h.cfg.NodeName, op.Spec.VM)
	}
	switch hello.Purpose {
	case purposeMemory:
		if hello.Channels > 0 {
			g, err = h.enterGate(hello)
			return nil, g, err
		}
		up, err = h.dialIncoming(ctx, hello.VM, h.pathsOf(hello.VM).in)
		if err == nil && op.Spec.Migration.PostCopy {
			up = h.rests.add(hello.VM, up)
		}
		return up, nil, err
	case purposeDisk:
		up, err = h.dialIncoming(ctx, hello.VM, h.pathsOf(hello.VM).nbd)
		return up, nil, err
	case purposeLoaded:
		return nil, nil, h.awaitLoaded(ctx, hello.VM, hello.Now)
	case purposeRecover:
		return nil, nil, h.receiveAnew(ctx, hello.VM)
	}
	return nil, nil, fmt.Errorf("node %s does not know streams for %q; upgrade it", h.cfg.NodeName, hello.Purpose)
}

// dialIncoming connects to a socket of the waiting QEMU, and to that of no other:
// its directory is the VM's to write, and what comes is the other guest's.
func (h *Hypervisor) dialIncoming(ctx context.Context, id, path string) (net.Conn, error) {
	h.mu.Lock()
	in := h.instances[id]
	h.mu.Unlock()
	if in == nil {
		return nil, fmt.Errorf("node %s has no QEMU of vm %s", h.cfg.NodeName, id)
	}
	return access.Dial(ctx, path, in.ownPID())
}

// awaitLoaded waits a little for QEMU to have the whole guest, unless the answer is
// wanted now or will not be another one.
func (h *Hypervisor) awaitLoaded(ctx context.Context, id string, now bool) error {
	ctx, cancel := context.WithTimeout(ctx, helloDeadline-time.Second)
	defer cancel()
	for {
		h.mu.Lock()
		in := h.instances[id]
		h.mu.Unlock()
		err := errors.New("its QEMU does not answer")
		if in != nil && in.openConn() != nil {
			err = in.hasGuest(ctx)
		}
		if err == nil {
			return nil
		}
		if not := (*notLoadedError)(nil); now || errors.As(err, &not) && not.state == migPostPaused {
			return fmt.Errorf("node %s has not got all of the guest: %w", h.cfg.NodeName, err)
		}
		t := time.NewTimer(switchLook)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("node %s has not got all of the guest: %w", h.cfg.NodeName, err)
		}
	}
}

// splice copies both ways until both ends are done or one fails. What one side
// ends, the other is told.
func splice(a, b net.Conn) error {
	_, err := join(a, b)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// join is splice that tells whether b was the first to end, and that connections
// were closed from here.
func join(a, b net.Conn) (second bool, err error) {
	type end struct {
		ofB bool
		err error
	}
	ends := make(chan end, 2)
	go func() { ends <- end{true, contain.Call(func() error { return pour(a, b) })} }()
	go func() { ends <- end{false, contain.Call(func() error { return pour(b, a) })} }()
	first := <-ends
	if first.err != nil { // the other direction is of no use any more
		_ = a.Close()
		_ = b.Close()
	}
	other := <-ends
	_ = a.Close()
	_ = b.Close()
	if first.err != nil {
		return first.ofB, first.err
	}
	return first.ofB, other.err
}

// pour copies one way until the end, and tells it.
func pour(to, from net.Conn) error {
	_, err := io.Copy(to, from)
	if cerr := greeting.CloseWrite(to); err == nil {
		err = cerr
	}
	return err
}

// sender accepts QEMU's connections on a unix socket and carries each to the
// target.
type sender struct {
	ln     net.Listener
	cancel context.CancelFunc
	// most connections are carried in all: what QEMU makes more of is not its work.
	most int
	// whole: all of them or none.
	whole bool

	mu   sync.Mutex
	last error
}

// newSender listens for QEMU, which makes at most so many connections; everything
// ends with close or with Run.
func (h *Hypervisor) newSender(path, node string, most int, hello streamHello) (*sender, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove an old socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for QEMU: %w", err)
	}
	if uid := h.users.get(hello.VM); uid != 0 {
		// The socket stays root's, so that the VM cannot put another in its place.
		if err := access.Give(path, 0, uid, vmSocketMode); err != nil {
			return nil, errors.Join(err, ln.Close())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &sender{ln: ln, cancel: cancel, most: most, whole: hello.Channels > 0}
	context.AfterFunc(ctx, func() { _ = ln.Close() })
	h.spawn(func(run context.Context) {
		stop := context.AfterFunc(run, cancel)
		defer stop()
		for range s.most {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			h.spawn(func(context.Context) { s.carry(ctx, h, c, node, hello) })
		}
		_ = ln.Close()
		<-ctx.Done()
	})
	return s, nil
}

func (s *sender) close() { s.cancel() }

func (s *sender) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// carry takes one connection of QEMU to the target. Of several that belong
// together one that breaks ends all, or QEMU would wait for the others. A target
// that ends one first has all of the guest or is broken: either way nothing
// flows any more.
func (s *sender) carry(ctx context.Context, h *Hypervisor, c net.Conn, node string, hello streamHello) {
	defer c.Close()
	far := false
	out, err := h.openStream(ctx, node, hello)
	if err == nil {
		stop := context.AfterFunc(ctx, func() {
			_ = c.Close()
			_ = out.Close()
		})
		defer stop()
		far, err = join(c, out)
		_ = out.Close()
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
		h.log.Warn("a stream to the target broke", "vm", hello.VM, "purpose", hello.Purpose, "err", err)
		s.mu.Lock()
		s.last = err
		s.mu.Unlock()
	}
	if s.whole && (far || err != nil) {
		s.cancel()
	}
}
