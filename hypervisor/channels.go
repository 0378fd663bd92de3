// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/greeting"
)

// ChannelsTime is how long the target waits for the first bytes of a connection
// that carries memory, for the main one, and for all of them.
const ChannelsTime = 10 * time.Second

// What the connections of QEMU's migration stream begin with, big-endian
// (QEMU_VM_FILE_MAGIC of docs/devel/migration.rst, MULTIFD_MAGIC).
const (
	magicMain    = 0x5145564d
	magicChannel = 0x11223344
	magicBytes   = 4
)

// gate orders the connections of one migration at its target. QEMU before 8.0
// takes the first one that it accepts for the main one, so the others wait until
// that is there. One that breaks breaks all: QEMU might wait for it forever.
type gate struct {
	task     string
	channels int
	dial     func(context.Context) (net.Conn, error)
	ctx      context.Context // of all connections
	cancel   context.CancelCauseFunc
	open     chan struct{} // closed when QEMU has the main connection

	in int // connections that are here, under the hypervisor's mu

	mu   sync.Mutex
	main bool
	came int // others
}

func newGate(hello streamHello, dial func(context.Context) (net.Conn, error)) *gate {
	g := &gate{task: hello.Task, channels: hello.Channels, open: make(chan struct{}), dial: dial}
	g.ctx, g.cancel = context.WithCancelCause(context.Background())
	return g
}

// enterGate counts a connection in; the caller must call leaveGate.
func (h *Hypervisor) enterGate(hello streamHello) (*gate, error) {
	if hello.Channels > api.MaxMigrationChannels {
		return nil, fmt.Errorf("%d connections for one vm are too many; at most %d", hello.Channels, api.MaxMigrationChannels)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.gates[hello.VM]
	if g == nil || g.task != hello.Task {
		path := h.pathsOf(hello.VM).in
		g = newGate(hello, func(ctx context.Context) (net.Conn, error) { return h.dialIncoming(ctx, hello.VM, path) })
		h.gates[hello.VM] = g
	}
	if g.in > g.channels {
		return nil, fmt.Errorf("vm %s has its %d connections already", hello.VM, g.channels+1)
	}
	g.in++
	return g, nil
}

func (h *Hypervisor) leaveGate(id string, g *gate) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if g.in--; g.in > 0 {
		return
	}
	g.cancel(nil)
	if h.gates[id] == g {
		delete(h.gates, id)
	}
}

// carry takes a connection to QEMU when it is its turn, until it ends.
func (g *gate) carry(ctx context.Context, c *greeting.Conn) error {
	stop := context.AfterFunc(g.ctx, func() { _ = c.Close() })
	defer stop()
	err := g.pass(ctx, c)
	if err != nil {
		if cause := context.Cause(g.ctx); cause != nil {
			err = cause // it is not this one that broke
		}
		g.cancel(err)
	}
	return err
}

func (g *gate) pass(ctx context.Context, c *greeting.Conn) error {
	_ = c.SetDeadline(time.Now().Add(ChannelsTime))
	main, err := g.admit(c)
	if err != nil {
		return err
	}
	if !main {
		if err := g.await(ctx); err != nil {
			return err
		}
	}
	up, err := g.dial(ctx)
	if err != nil {
		return err
	}
	defer up.Close()
	for _, done := range []context.Context{ctx, g.ctx} {
		stop := context.AfterFunc(done, func() { _ = up.Close() })
		defer stop()
	}
	if main {
		close(g.open)
		late := time.AfterFunc(ChannelsTime, g.judge)
		defer late.Stop()
	}
	_ = c.SetDeadline(time.Time{})
	_, err = join(c, up)
	return err
}

// admit reads which of the connections this is.
func (g *gate) admit(c *greeting.Conn) (main bool, err error) {
	b, err := c.R.Peek(magicBytes)
	if err != nil {
		return false, fmt.Errorf("read how a connection with memory begins: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch magic := binary.BigEndian.Uint32(b); {
	case magic == magicMain && !g.main:
		g.main = true
		return true, nil
	case magic == magicChannel && g.came < g.channels:
		g.came++
		return false, nil
	case magic == magicMain, magic == magicChannel:
		return false, errors.New("a connection with memory comes twice")
	default:
		return false, fmt.Errorf("a connection with memory begins with %#08x, which is not QEMU's", magic)
	}
}

// await waits until QEMU has its main connection.
func (g *gate) await(ctx context.Context) error {
	t := time.NewTimer(ChannelsTime)
	defer t.Stop()
	select {
	case <-g.open:
		return nil
	case <-t.C:
		return fmt.Errorf("the main connection with memory did not come within %v", ChannelsTime)
	case <-g.ctx.Done():
		return context.Cause(g.ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// judge breaks all connections if some have not come: QEMU would wait forever.
func (g *gate) judge() {
	g.mu.Lock()
	came := g.came
	g.mu.Unlock()
	if came < g.channels {
		g.cancel(fmt.Errorf("%d of %d connections with memory came within %v", came, g.channels, ChannelsTime))
	}
}

// canSend is over how many connections the source can send the guest of a
// migration, as it was wished; 0 is one.
func canSend(op *api.Operation) int {
	if n := op.Spec.Migration.Channels; n > 1 && !op.Spec.Migration.PostCopy {
		return min(n, api.MaxMigrationChannels)
	}
	return 0
}

// channelsOf is how many connections carry the memory beside the main one: what
// both sides have said. 0 is none, also where one of them is older.
func channelsOf(op *api.Operation, arr *api.Arrival) int {
	if op.Status.Channels > 1 && op.Status.Channels == arr.Status.Channels {
		return op.Status.Channels
	}
	return 0
}

// withChannels sets the capabilities of a migration, with those of a number of
// connections.
func (in *instance) withChannels(ctx context.Context, n int, capabilities ...string) error {
	if n < 2 {
		return in.setCapabilities(ctx, capabilities...)
	}
	if err := in.setCapabilities(ctx, append(capabilities, capMultifd)...); err != nil {
		return err
	}
	return in.execute(ctx, "migrate-set-parameters", map[string]any{"multifd-channels": n}, nil)
}
