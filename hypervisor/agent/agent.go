// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
)

// Times.
const (
	// SyncTimeout is how long an agent may take to say that it is there,
	// CommandTimeout to answer a usual command.
	SyncTimeout    = 3 * time.Second
	CommandTimeout = 5 * time.Second
	// FreezeTimeout is for freezing and thawing, which wait for the guest's disks.
	FreezeTimeout = 30 * time.Second
	// CheckInterval is the time between two looks at an agent that answers.
	CheckInterval = 5 * time.Minute
	// MinRetry and MaxRetry bound the time to the next look at one that does not.
	MinRetry = 10 * time.Second
	MaxRetry = 5 * time.Minute
	// MinRefresh is how old what is known must be to be asked anew on demand.
	MinRefresh = 5 * time.Second
	// closeTimeout is for the thaw of a guest that is left behind frozen.
	closeTimeout = 3 * time.Second
	// thawRetry is the pause between attempts to thaw.
	thawRetry = 2 * time.Second
)

// Config of New.
type Config struct {
	// VM is the name, for messages.
	VM string
	// Dial connects to the channel.
	Dial func(context.Context) (net.Conn, error)
	Log  *slog.Logger
	Now  func() time.Time
	// Changed, if set, is called when Summary has news. It must not block.
	Changed func()
}

// Agent is the agent of one running VM. All methods may be called from any
// goroutine.
type Agent struct {
	cfg  Config
	busy chan struct{} // holds a token while a command runs
	conn *conn         // of who holds the token
	work sync.WaitGroup
	once sync.Once
	quit context.Context //nolint:containedctx // ends with Close
	end  context.CancelFunc

	mu       sync.Mutex
	open     bool
	known    api.GuestAgent
	checked  time.Time // the last attempt to learn something
	failures int
	heard    time.Time // the last answer on the channel that is open now
	missed   int       // questions without an answer since then
	asked    time.Time // the last attempt to ask anything
	thawsAt  time.Time // not zero while frozen through here
	timer    *time.Timer
	closed   bool
	execs    int
}

// New returns an agent that does nothing until it is asked.
func New(cfg Config) *Agent {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	a := &Agent{cfg: cfg, busy: make(chan struct{}, 1)}
	a.quit, a.end = context.WithCancel(context.Background())
	return a
}

// SetOpen tells whether a program in the guest holds the channel open (QMP
// VSERPORT_CHANGE, query-chardev). A closed one ends what was known.
func (a *Agent) SetOpen(open bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open == open {
		return
	}
	a.open, a.failures, a.checked = open, 0, time.Time{}
	a.heard, a.missed = time.Time{}, 0
	if !open {
		a.known = api.GuestAgent{}
		a.stopTimer() // a reset guest is thawed; any other is found frozen at the next look
	}
}

// Due reports whether it is time for a look.
func (a *Agent) Due() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.open || a.closed {
		return false
	}
	wait := CheckInterval
	if a.failures > 0 {
		wait = min(MinRetry<<min(a.failures-1, 16), MaxRetry)
	}
	return a.checked.IsZero() || a.cfg.Now().Sub(a.checked) >= wait
}

// Known returns what is known, without asking.
func (a *Agent) Known() api.GuestAgent {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.known
	out.Connected = a.open
	out.Frozen = out.Frozen || !a.thawsAt.IsZero()
	if !a.thawsAt.IsZero() {
		t := a.thawsAt.UTC()
		out.ThawsAt = &t
	}
	if !a.open {
		out.Answering, out.Problem = false, a.none().Error()
	}
	return out
}

// Summary returns what seldom changes, nil if nothing is known.
func (a *Agent) Summary() *api.VMAgent {
	a.mu.Lock()
	defer a.mu.Unlock()
	return summary(&a.known)
}

func summary(k *api.GuestAgent) *api.VMAgent {
	if k.Version == "" {
		return nil
	}
	s := &api.VMAgent{Version: k.Version, Hostname: k.Hostname, Addresses: reachable(k.Interfaces)}
	if k.OS != nil {
		s.OS = k.OS.Name
	}
	return s
}

// Close thaws what it froze and ends. Calls under way fail. It may be called
// more than once.
func (a *Agent) Close() { a.once.Do(a.close) }

func (a *Agent) close() {
	a.mu.Lock()
	frozen := !a.thawsAt.IsZero()
	a.closed = true
	a.stopTimer()
	a.mu.Unlock()
	if frozen {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		if _, err := a.thaw(ctx); err != nil {
			a.cfg.Log.Warn("a guest is left with frozen file systems; it is thawed when the daemon is back", "vm", a.cfg.VM, "err", err)
		}
		cancel()
	}
	a.end()
	a.work.Wait()
	a.busy <- struct{}{} // for good
	a.drop()
}

func (a *Agent) drop() {
	if a.conn != nil {
		_ = a.conn.stream.Close()
		a.conn = nil
	}
}

func (a *Agent) none() error {
	return api.Errorf(api.CodeRefused, "no guest agent runs in vm %s; install qemu-guest-agent in the guest and start it", a.cfg.VM)
}

// session runs f with a connection whose agent has just answered. The deadline
// of the sync is its own; those of f's commands are f's.
func (a *Agent) session(ctx context.Context, f func(ctx context.Context, c *conn) error) error {
	a.mu.Lock()
	open := a.open
	a.mu.Unlock()
	if !open {
		return a.none()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(a.quit, cancel)()
	select {
	case a.busy <- struct{}{}:
		defer func() { <-a.busy }()
	case <-ctx.Done():
		return api.Errorf(api.CodeTimeout, "the guest agent of vm %s is busy: %w", a.cfg.VM, context.Cause(ctx))
	}
	if err := a.ready(ctx); err != nil {
		a.drop()
		a.hear(ctx.Err() != nil, false)
		return a.failed(err)
	}
	a.hear(false, true)
	err := f(ctx, a.conn)
	var refused *CommandError
	if err != nil && !asCommand(err, &refused) {
		a.drop()
		return a.failed(err)
	}
	return err
}

func (a *Agent) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, SyncTimeout)
	defer cancel()
	if a.conn == nil {
		stream, err := a.cfg.Dial(ctx)
		if err != nil {
			return err
		}
		a.conn = newConn(stream)
	}
	return a.conn.sync(ctx)
}

// failed says what went wrong in words and a code for users.
func (a *Agent) failed(err error) error {
	var own *api.Error
	if errors.As(err, &own) {
		return err
	}
	return api.Errorf(api.CodeTimeout, "the guest agent of vm %s does not work: %w", a.cfg.VM, err)
}

func asCommand(err error, target **CommandError) bool { return errors.As(err, target) }

// call runs one command within a time.
func call(ctx context.Context, c *conn, within time.Duration, name string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return c.command(ctx, name, args, result)
}

// optional runs a command that an agent need not have.
func optional(ctx context.Context, c *conn, have []string, name string, result any) error {
	if !slices.Contains(have, name) {
		return nil
	}
	err := call(ctx, c, CommandTimeout, name, nil, result)
	var refused *CommandError
	if asCommand(err, &refused) {
		return nil
	}
	return err
}

// Check asks the agent what it is and knows, and thaws what nobody here froze.
func (a *Agent) Check(ctx context.Context) error {
	var now api.GuestAgent
	var left bool
	err := a.session(ctx, func(ctx context.Context, c *conn) error {
		var info wireInfo
		if err := call(ctx, c, CommandTimeout, "guest-info", nil, &info); err != nil {
			return err
		}
		now.Version, now.Commands = clean(info.Version), info.commands()
		if now.Version == "" {
			now.Version = "unknown"
		}
		var state string
		if err := optional(ctx, c, now.Commands, "guest-fsfreeze-status", &state); err != nil {
			return err
		}
		if now.Frozen = state == "frozen"; now.Frozen {
			left = !a.frozenHere()
			return nil // it answers little else now
		}
		return a.learn(ctx, c, &now)
	})
	a.note(&now, err)
	if err == nil && left {
		a.cfg.Log.Warn("a guest's file systems are frozen and nobody here froze them; they are thawed", "vm", a.cfg.VM)
		if _, err := a.thaw(ctx); err != nil {
			return err
		}
	}
	return err
}

func (a *Agent) learn(ctx context.Context, c *conn, now *api.GuestAgent) error {
	var os wireOS
	var host struct {
		Name string `json:"host-name"`
	}
	var nics []wireInterface
	for _, q := range []struct {
		command string
		result  any
	}{{"guest-get-osinfo", &os}, {"guest-get-host-name", &host}, {"guest-network-get-interfaces", &nics}} {
		if err := optional(ctx, c, now.Commands, q.command, q.result); err != nil {
			return err
		}
	}
	now.OS, now.Hostname, now.Interfaces = os.os(), clean(host.Name), interfaces(nics)
	return nil
}

// note keeps what a look found.
func (a *Agent) note(now *api.GuestAgent, err error) {
	a.mu.Lock()
	before := summary(&a.known)
	t := a.cfg.Now()
	a.checked = t
	t = t.UTC()
	var refused *CommandError
	switch {
	case err == nil && now.Frozen: // what was known stays; of its commands it offers few now
		a.known.Version, a.known.Frozen = now.Version, true
		a.known.Answering, a.known.Problem, a.known.CheckedAt = true, "", &t
		if a.thawsAt.IsZero() {
			a.failures++ // it is looked at again soon, when it is thawed
		}
	case err == nil:
		now.Answering, now.CheckedAt, a.failures = true, &t, 0
		a.known = *now
		if !a.thawsAt.IsZero() { // the guest has thawed by itself
			a.stopTimer()
		}
	case asCommand(err, &refused):
		a.known.Answering, a.known.Problem, a.known.CheckedAt = true, err.Error(), &t
		a.failures++
	default:
		a.known.Answering, a.known.Problem = false, err.Error()
		a.failures++
	}
	changed := !reflect.DeepEqual(before, summary(&a.known))
	a.mu.Unlock()
	if changed && a.cfg.Changed != nil {
		a.cfg.Changed()
	}
}

// Refresh is Check unless what is known is younger than MinRefresh.
func (a *Agent) Refresh(ctx context.Context) error {
	a.mu.Lock()
	fresh := !a.checked.IsZero() && a.cfg.Now().Sub(a.checked) < MinRefresh
	a.mu.Unlock()
	if fresh {
		return nil
	}
	return a.Check(ctx)
}

// able makes sure that the agent has a command and that nothing is frozen.
func (a *Agent) able(ctx context.Context, command string) error {
	a.mu.Lock()
	have, version, frozen := a.known.Commands, a.known.Version, !a.thawsAt.IsZero()
	a.mu.Unlock()
	if have == nil {
		if err := a.Check(ctx); err != nil {
			return err
		}
		a.mu.Lock()
		have, version = a.known.Commands, a.known.Version
		a.mu.Unlock()
	}
	if frozen {
		return api.Errorf(api.CodeRefused, "the file systems of vm %s are frozen; thaw them first: muster vm thaw %s", a.cfg.VM, a.cfg.VM)
	}
	if !slices.Contains(have, command) {
		return api.Errorf(api.CodeUnsupported, "the guest agent of vm %s (version %s) does not offer %s; install or configure a newer one in the guest", a.cfg.VM, version, command)
	}
	return nil
}

// refusal turns the agent's refusal into an error for users.
func (a *Agent) refusal(err error) error {
	var refused *CommandError
	if !asCommand(err, &refused) {
		return err
	}
	if refused.Class == "CommandNotFound" {
		return api.Errorf(api.CodeUnsupported, "vm %s: %w", a.cfg.VM, err)
	}
	return api.Errorf(api.CodeRefused, "vm %s: %w", a.cfg.VM, err)
}

// do runs one command.
func (a *Agent) do(ctx context.Context, within time.Duration, command string, args, result any) error {
	if err := a.able(ctx, command); err != nil {
		return err
	}
	return a.refusal(a.session(ctx, func(ctx context.Context, c *conn) error {
		return call(ctx, c, within, command, args, result)
	}))
}
