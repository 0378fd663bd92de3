// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"context"
	"encoding/base64"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Times and limits of commands.
const (
	// pollFirst and pollMost are the pauses between looks at a command's end.
	pollFirst = 20 * time.Millisecond
	pollMost  = 500 * time.Millisecond
	// MaxExecs is how many commands of one VM are waited for at once.
	MaxExecs = 4
)

// FileSystems asks for the mounted file systems (guest-get-fsinfo).
func (a *Agent) FileSystems(ctx context.Context) ([]api.GuestFileSystem, error) {
	var list []wireFS
	if err := a.do(ctx, CommandTimeout, "guest-get-fsinfo", nil, &list); err != nil {
		return nil, err
	}
	return fileSystems(list), nil
}

// SetPassword changes a user's password (guest-set-user-password).
func (a *Agent) SetPassword(ctx context.Context, user, password string) error {
	const command = "guest-set-user-password"
	if err := a.able(ctx, command); err != nil {
		return err
	}
	err := a.session(ctx, func(ctx context.Context, c *conn) error {
		return call(ctx, c, CommandTimeout, command, map[string]any{
			"username": user, "password": base64.StdEncoding.EncodeToString([]byte(password)), "crypted": false,
		}, nil)
	})
	var refused *CommandError
	if asCommand(err, &refused) && refused.Class != "CommandNotFound" {
		return api.Errorf(api.CodeRefused, "vm %s: the password of %q was not changed: %w", a.cfg.VM, user, hide(err, password))
	}
	return a.refusal(err)
}

// execStatus is guest-exec-status.
type execStatus struct {
	Exited       bool   `json:"exited"`
	ExitCode     *int   `json:"exitcode"`
	Signal       *int   `json:"signal"`
	Out          []byte `json:"out-data"`
	Err          []byte `json:"err-data"`
	OutTruncated bool   `json:"out-truncated"`
	ErrTruncated bool   `json:"err-truncated"`
}

// Exec runs a command in the guest and waits for its end (guest-exec,
// guest-exec-status). Between its looks other commands have their turn.
func (a *Agent) Exec(ctx context.Context, e api.GuestExec) (api.GuestExecResult, error) {
	none := api.GuestExecResult{}
	if !a.enterExec() {
		return none, api.Errorf(api.CodeRefused, "%d commands run in vm %s already, which is the limit", MaxExecs, a.cfg.VM)
	}
	defer a.leaveExec()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(e.Seconds)*time.Second)
	defer cancel()
	args := map[string]any{"path": e.Command[0], "capture-output": true}
	if len(e.Command) > 1 {
		args["arg"] = e.Command[1:]
	}
	if len(e.Env) > 0 {
		args["env"] = e.Env
	}
	if len(e.Input) > 0 {
		args["input-data"] = base64.StdEncoding.EncodeToString(e.Input)
	}
	var begun struct {
		PID int64 `json:"pid"`
	}
	if err := a.do(ctx, CommandTimeout, "guest-exec", args, &begun); err != nil {
		return none, err
	}
	wait := pollFirst
	for {
		var st execStatus
		err := a.do(ctx, CommandTimeout, "guest-exec-status", map[string]any{"pid": begun.PID}, &st)
		switch {
		case ctx.Err() != nil:
			return none, a.late(ctx, e, begun.PID)
		case err != nil:
			return none, err
		case st.Exited:
			return ended(&st), nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return none, a.late(ctx, e, begun.PID)
		}
		wait = min(2*wait, pollMost)
	}
}

func (a *Agent) late(ctx context.Context, e api.GuestExec, pid int64) error {
	return api.Errorf(api.CodeTimeout, "the command did not end within %d s and goes on in vm %s as process %d: %w", e.Seconds, a.cfg.VM, pid, context.Cause(ctx))
}

// ended bounds what a guest says of a command's end.
func ended(st *execStatus) api.GuestExecResult {
	out := api.GuestExecResult{Truncated: st.OutTruncated || st.ErrTruncated || len(st.Out) > api.MaxExecOutput || len(st.Err) > api.MaxExecOutput}
	out.Stdout, out.Stderr = st.Out[:min(len(st.Out), api.MaxExecOutput)], st.Err[:min(len(st.Err), api.MaxExecOutput)]
	if st.ExitCode != nil {
		out.ExitCode = *st.ExitCode
	}
	if st.Signal != nil && *st.Signal > 0 && *st.Signal < 128 {
		out.Signal, out.ExitCode = *st.Signal, 128+*st.Signal
	}
	return out
}

func (a *Agent) enterExec() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.execs >= MaxExecs {
		return false
	}
	a.execs++
	return true
}

func (a *Agent) leaveExec() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.execs--
}

func (a *Agent) frozenHere() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.thawsAt.IsZero()
}

// Freeze stops all writes to the guest's file systems (guest-fsfreeze-freeze)
// for at most a time, and returns how many there are and when they are thawed.
func (a *Agent) Freeze(ctx context.Context, most time.Duration) (n int, until time.Time, err error) {
	const command = "guest-fsfreeze-freeze"
	if a.frozenHere() {
		return 0, until, a.frozenAlready()
	}
	if err := a.able(ctx, command); err != nil {
		return 0, until, err
	}
	err = a.session(ctx, func(ctx context.Context, c *conn) error {
		a.mu.Lock()
		already := !a.thawsAt.IsZero() // somebody was faster
		closed := a.closed
		if !already && !closed {
			// Before it is asked: whatever the answer, they may be frozen.
			until = a.cfg.Now().Add(most)
			a.startTimer(most, until)
		}
		a.mu.Unlock()
		switch {
		case already:
			return a.frozenAlready()
		case closed:
			return a.none()
		}
		return call(ctx, c, min(FreezeTimeout, most), command, nil, &n)
	})
	if err != nil && !until.IsZero() {
		a.mu.Lock()
		a.startTimer(0, until) // whatever was frozen must not stay so
		a.mu.Unlock()
	}
	if err != nil {
		return 0, until, a.refusal(err)
	}
	return max(n, 0), until, nil
}

func (a *Agent) frozenAlready() error {
	return api.Errorf(api.CodeRefused, "the file systems of vm %s are frozen already; thaw them first: muster vm thaw %s", a.cfg.VM, a.cfg.VM)
}

// Thaw lets the guest write again (guest-fsfreeze-thaw). It is no error if
// nothing is frozen.
func (a *Agent) Thaw(ctx context.Context) (int, error) {
	a.mu.Lock()
	have := a.known.Commands
	a.mu.Unlock()
	if have == nil {
		if err := a.Check(ctx); err != nil {
			return 0, err
		}
	}
	return a.thaw(ctx)
}

func (a *Agent) thaw(ctx context.Context) (n int, err error) {
	err = a.session(ctx, func(ctx context.Context, c *conn) error {
		return call(ctx, c, FreezeTimeout, "guest-fsfreeze-thaw", nil, &n)
	})
	if err == nil {
		a.mu.Lock()
		a.known.Frozen = false
		a.stopTimer()
		a.mu.Unlock()
	}
	return max(n, 0), a.refusal(err)
}

// startTimer makes sure that what is frozen is thawed. mu is held.
func (a *Agent) startTimer(after time.Duration, until time.Time) {
	if a.timer != nil {
		a.timer.Stop()
	}
	a.thawsAt = until
	a.timer = time.AfterFunc(after, func() { a.thawLate(until) })
}

// stopTimer forgets that anything is frozen. mu is held.
func (a *Agent) stopTimer() {
	if a.timer != nil {
		a.timer.Stop()
	}
	a.timer, a.thawsAt = nil, time.Time{}
}

// thawLate thaws because nobody did, and tries again until it works or there is
// nothing to thaw any more.
func (a *Agent) thawLate(until time.Time) {
	a.mu.Lock()
	if a.closed || !a.thawsAt.Equal(until) {
		a.mu.Unlock()
		return
	}
	a.work.Add(1)
	a.mu.Unlock()
	defer a.work.Done()
	if err := contain.Do(func() {
		ctx, cancel := context.WithTimeout(a.quit, SyncTimeout+FreezeTimeout)
		defer cancel()
		_, err := a.thaw(ctx)
		if err == nil {
			a.cfg.Log.Warn("the file systems of a guest were frozen for their longest time and are thawed", "vm", a.cfg.VM)
			return
		}
		a.cfg.Log.Warn("the file systems of a guest cannot be thawed; it is tried again", "vm", a.cfg.VM, "err", err)
		a.mu.Lock()
		defer a.mu.Unlock()
		if !a.closed && a.thawsAt.Equal(until) {
			a.startTimer(thawRetry, until)
		}
	}); err != nil {
		a.cfg.Log.Error("a guest was not thawed", "vm", a.cfg.VM, "err", err)
	}
}
