// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/agent"
	"github.com/muster-vm/muster/hypervisor/console"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/contain"
)

// instance is what the daemon remembers of one VM. Only the VM's reconciler
// (one at a time) uses the fields of the first group; the second is shared with
// the follower of events and with callers of Console, under mu.
type instance struct {
	id string

	pid         int       // of the process that this daemon started or adopted
	judged      int       // PID whose end was judged and written
	putOff      int       // PID whose end put off the next start
	startedAt   time.Time // when this daemon started or adopted it
	logFrom     int64     // size of QEMU's log before the start
	wasUp       bool      // QEMU answered once
	cleanEnd    bool      // QEMU was told to end, or ended by itself, and said goodbye
	generation  uint64    // of the VM when it was looked at last
	failures    int       // unexpected ends in a row
	notBefore   time.Time // of the next start
	quietUntil  time.Time // no QMP before, because QEMU did not answer
	promised    uint64    // revision of the binding that a promise needs whose outcome is not known
	drillPID    int       // what this life has said it ends for a drill
	drillAt     time.Time
	buttonAt    time.Time   // last press of the power button
	stopSince   time.Time   // when the stop began
	askedOff    bool        // we pressed the button in this life of QEMU
	reset       uint64      // spec.reboots carried out
	ioRetryAt   time.Time   // last attempt to continue after an I/O error
	unsure      atomic.Bool // a start was sent and its outcome is not known
	accel       string      // kvm or tcg, as QEMU says
	said        qmp.Log     // what was said on the monitor; has its own lock
	work        *work       // what goes on beside the looks; nil: nothing
	settleFor   string      // task of the operation that waits for known hardware
	settleSince time.Time
	loadPID     int // QEMU that this daemon started to load memory into
	quitPID     int // QEMU that was told to quit, at quitAt
	quitAt      time.Time
	summaryAt   time.Time // when the guest's own words in the status changed last

	verified     bool                  // status.hardware is what QEMU has
	unplugging   map[string]*unplug    // devices that the guest was asked to let go of
	growing      bool                  // the guest's memory is on its way
	memorySince  time.Time             // when the guest was asked for another size of memory
	memorySaid   memorySaid            // what was said of it
	grown        map[string]api.Size   // disks that QEMU was told to enlarge, by volume
	linkDown     time.Time             // when a cable was taken out to change a network
	refusedMedia map[int]refusedMedium // media that QEMU did not take, by drive
	trays        map[int]*askedTray    // trays that the guest was asked to open, by drive

	balloon *balloon // under the hypervisor's mu

	receiving sync.Mutex // held while QEMU is told to listen anew, see receiveAnew

	limited limited

	// peer is the process, if it has a user of its own; else 0.
	peer atomic.Int64
	// rooted: it runs as the daemon's own user although others have their own.
	rooted atomic.Bool
	// beat is after how many nanoseconds without an answer the guest agent counts
	// as silent; 0: never.
	beat atomic.Int64
	// asking: its agent is being looked at; slowAgent: that took too long last time.
	asking, slowAgent atomic.Bool
	// waker bounds the looks that its QEMU's words ask for.
	waker waker

	awaited    time.Time // when the guest of a post-copy was first due here,
	awaitedPID int       // in this process
	out        *departure
	waiting    waiting // for other VMs, before a start
	strayAsked bool    // whether QEMU was asked for a migration that nobody wants

	mu       sync.Mutex
	conn     *qmp.Conn
	console  *console.Console
	followed chan struct{} // closed when all events of conn were seen
	shutdown *shutdownEvent
	ioReason string // of the last error of a disk
	panicked bool
	// panickedAt is when its kernel said so last.
	panickedAt time.Time
	befell     befallen
	viewers    int           // of the screen
	shot       chan struct{} // holds a token while a screenshot is taken
	stale      bool          // QEMU's devices changed by themselves
	agent      *agent.Agent
	// portKnown is whether the agent knows if a program in the guest has its
	// channel open; portNews counts the events that told.
	portKnown bool
	portNews  int
}

// shutdownEvent is QMP's SHUTDOWN (QAPI run-state.json).
type shutdownEvent struct {
	guest  bool
	reason string
}

func (h *Hypervisor) instance(id string) *instance {
	h.mu.Lock()
	defer h.mu.Unlock()
	in := h.instances[id]
	if in == nil {
		in = &instance{id: id, shot: make(chan struct{}, 1)}
		h.instances[id] = in
	}
	return in
}

// drop forgets a VM that is no business of this node any more.
func (h *Hypervisor) drop(id string) {
	h.mu.Lock()
	in := h.instances[id]
	delete(h.instances, id)
	delete(h.awaiting, id)
	delete(h.strangers, id)
	delete(h.starting, id)
	h.mu.Unlock()
	h.users.release(id)
	if in != nil {
		in.stopWork()
		in.detach()
	}
}

// isOf notes the user of the process.
func (in *instance) isOf(pid, uid int) {
	if uid == 0 {
		pid = 0
	}
	in.peer.Store(int64(pid))
}

// ownPID is the process that must listen on the VM's sockets; 0 where it may write
// to nothing but what is its own anyway.
func (in *instance) ownPID() int {
	return int(in.peer.Load())
}

func (in *instance) openConn() *qmp.Conn {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.conn == nil {
		return nil
	}
	select {
	case <-in.conn.Done():
		return nil
	default:
		return in.conn
	}
}

func (in *instance) openConsole() *console.Console {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.console == nil {
		return nil
	}
	select {
	case <-in.console.Done():
		return nil
	default:
		return in.console
	}
}

// detach lets go of QEMU, which goes on.
func (in *instance) detach() {
	in.mu.Lock()
	conn, con, ga := in.conn, in.console, in.agent
	in.conn, in.console, in.agent, in.portKnown = nil, nil, nil, false
	in.mu.Unlock()
	if ga != nil {
		ga.Close() // while QEMU is there: it may have something to thaw
	}
	if conn != nil {
		_ = conn.Disconnect()
	}
	if con != nil {
		con.Close()
	}
}

// begin takes note of a process that this life of the daemon has not seen.
func (in *instance) begin(pid int, now time.Time) {
	in.detach()
	in.cleanEnd = false
	in.pid, in.startedAt, in.wasUp, in.loadPID, in.strayAsked = pid, now, false, 0, false
	in.quietUntil, in.buttonAt, in.stopSince, in.askedOff = time.Time{}, time.Time{}, time.Time{}, false
	in.grown, in.trays, in.refusedMedia = nil, nil, nil
	in.verified, in.growing, in.unplugging, in.linkDown, in.memorySince, in.memorySaid = false, false, nil, time.Time{}, time.Time{}, memorySaid{}
	in.mu.Lock()
	in.shutdown, in.panicked, in.panickedAt, in.followed, in.ioReason = nil, false, time.Time{}, nil, ""
	in.befell = befallen{}
	in.mu.Unlock()
}

// attach connects to QEMU's monitor and console, as far as that has not been
// done.
func (h *Hypervisor) attach(ctx context.Context, in *instance) error {
	p := h.pathsOf(in.id)
	if in.openConn() == nil {
		dialCtx, cancel := context.WithTimeout(ctx, AttachDeadline)
		conn, err := qmp.DialLogged(dialCtx, p.qmp, in.ownPID(), &in.said)
		cancel()
		if err != nil {
			return err
		}
		followed := make(chan struct{})
		sub := conn.Subscribe()
		in.mu.Lock()
		in.conn, in.followed, in.portKnown = conn, followed, false
		in.mu.Unlock()
		h.spawn(func(ctx context.Context) {
			defer close(followed)
			// What this QEMU sends must not harm the other VMs: it is attached anew.
			if err := contain.Do(func() { h.follow(ctx, in, sub) }); err != nil {
				h.log.Error("events of a VM are not followed", "vm", in.id, "err", err)
				_ = conn.Disconnect()
				h.loop.Enqueue(in.id)
			}
		})
		h.lookAtAgents()
		if err := in.askAccelerator(ctx); err != nil {
			return err
		}
	}
	if in.openConsole() == nil {
		c, err := console.Open(ctx, p.serial, in.ownPID(), p.serialLog, h.log.With("vm", in.id))
		if err != nil {
			h.log.Warn("no console", "vm", in.id, "err", err)
			return nil
		}
		in.mu.Lock()
		in.console = c
		in.mu.Unlock()
	}
	return nil
}

// follow takes note of events and wakes the reconciler, which asks for the real
// state, so that lost events do no harm.
func (h *Hypervisor) follow(ctx context.Context, in *instance, sub *qmp.Subscription) {
	defer sub.Close()
	for {
		e, _, err := sub.Next(ctx)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, qmp.ErrClosed) {
				h.procs.invalidate()
				in.waker.wake(func() { h.loop.Enqueue(in.id) })
			}
			return
		}
		in.mu.Lock()
		in.befell.noteEvent(e.Event, h.cfg.Now())
		in.mu.Unlock()
		switch e.Event {
		case "SHUTDOWN":
			guest, _ := e.Data["guest"].(bool)
			reason, _ := e.Data["reason"].(string)
			in.mu.Lock()
			in.shutdown = &shutdownEvent{guest: guest, reason: reason}
			in.mu.Unlock()
		case "GUEST_PANICKED":
			in.mu.Lock()
			in.panicked, in.panickedAt = true, h.cfg.Now()
			in.mu.Unlock()
		case "RESET":
			in.mu.Lock()
			in.panicked = false
			in.mu.Unlock()
			in.restAgent()
		case "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEMORY_DEVICE_SIZE_CHANGE", "DEVICE_TRAY_MOVED":
			in.mu.Lock()
			in.stale = true
			in.mu.Unlock()
		case "VSERPORT_CHANGE":
			h.portChanged(in, e.Data)
			continue
		case "RESUME", "WAKEUP":
			in.restAgent()
		case "BLOCK_IO_ERROR":
			in.noteIOError(e.Data)
		case "STOP", "POWERDOWN", "WATCHDOG", "SUSPEND", "MIGRATION":
		default:
			continue // nothing that the status shows
		}
		in.waker.wake(func() { h.loop.Enqueue(in.id) })
	}
}

// settled waits until all events of an ended QEMU were seen, and returns what
// they said.
func (in *instance) settled(ctx context.Context) *shutdownEvent {
	in.mu.Lock()
	followed := in.followed
	in.mu.Unlock()
	if followed != nil {
		t := time.NewTimer(QMPDeadline)
		defer t.Stop()
		select {
		case <-followed:
		case <-t.C:
		case <-ctx.Done():
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.shutdown
}

// takeStale reports, once, that QEMU's devices changed by themselves.
func (in *instance) takeStale() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	was := in.stale
	in.stale = false
	return was
}

// command runs one QMP command without arguments under QMPDeadline.
func (in *instance) command(ctx context.Context, cmd string, result any) error {
	return in.execute(ctx, cmd, nil, result)
}

// execute runs one QMP command under QMPDeadline.
func (in *instance) execute(ctx context.Context, cmd string, args, result any) error {
	conn := in.openConn()
	if conn == nil {
		return fmt.Errorf("QMP %s: %w", cmd, qmp.ErrClosed)
	}
	ctx, cancel := context.WithTimeout(ctx, QMPDeadline)
	defer cancel()
	return conn.Execute(ctx, cmd, args, result)
}

// slowly is execute for a command during which QEMU waits for somebody else.
func (in *instance) slowly(ctx context.Context, cmd string, args any) error {
	conn := in.openConn()
	if conn == nil {
		return fmt.Errorf("QMP %s: %w", cmd, qmp.ErrClosed)
	}
	ctx, cancel := context.WithTimeout(ctx, SlowDeadline)
	defer cancel()
	return conn.Execute(ctx, cmd, args, nil)
}

// runState asks for QEMU's RunState (QAPI query-status).
func (in *instance) runState(ctx context.Context) (string, error) {
	var r struct {
		Status string `json:"status"`
	}
	err := in.command(ctx, "query-status", &r)
	return r.Status, err
}

func (in *instance) askAccelerator(ctx context.Context) error {
	var r struct {
		Enabled bool `json:"enabled"`
	}
	if err := in.command(ctx, "query-kvm", &r); err != nil {
		return err
	}
	in.accel = "tcg"
	if r.Enabled {
		in.accel = "kvm"
	}
	return nil
}
