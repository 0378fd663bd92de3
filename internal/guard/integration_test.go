// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/internal/goodturn"
)

func TestLeaseExpiryKillsProtectedOnly(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	wantErr(t, c.Watch(testCtx(t)), nil)
	extendFor(t, c, 1, time.Minute) // however long the starts take
	stubborn := sleeper(dir, "stubborn", 1, true)
	stubborn.Argv = []string{self(t), roleStubborn, "x"}
	p, s := start(t, c, sleeper(dir, "p", 1, true)), start(t, c, stubborn)
	u, late := start(t, c, sleeper(dir, "u", 1, false)), start(t, c, sleeper(dir, "late", 1, false))
	wantErr(t, c.Protect(testCtx(t), "late", true), nil)
	deadline := extendFor(t, c, 2, 2*time.Second)
	if same := extendFor(t, c, 2, 500*time.Millisecond); same != deadline { // no shorter than before
		t.Fatalf("the deadline went from %d to %d", deadline, same)
	}
	if ev := nextEvent(t, c); ev.Kind != EventLapsed || ev.Session != 2 {
		t.Fatalf("%+v", ev)
	}
	seen := make(map[string]bool)
	for range 3 {
		ev := nextEvent(t, c)
		if ev.Kind != EventExit || ev.Reason != ReasonLease || ev.Signal != int(unix.SIGKILL) || ev.ExitCode != -1 || ev.ExitedNS < deadline {
			t.Fatalf("%+v, deadline %d", ev, deadline)
		}
		seen[ev.VM] = true
	}
	if !seen["p"] || !seen["stubborn"] || !seen["late"] || !p.gone() || !s.gone() || !late.gone() || u.gone() {
		t.Fatalf("seen %v, u gone: %v", seen, u.gone())
	}
	_, err := c.Start(testCtx(t), sleeper(dir, "p", 2, true))
	wantErr(t, err, ErrLapsed)
	extendFor(t, c, 3, time.Minute)
	start(t, c, sleeper(dir, "p", 3, true))
}

func TestAVMDoesNotOutliveItsLeaseForLong(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	wantErr(t, c.Watch(testCtx(t)), nil)
	goodturn.Take(t, func(n int) error {
		vm, session := fmt.Sprint("vm", n), uint64(2*n)
		extendFor(t, c, session, time.Minute)
		start(t, c, sleeper(dir, vm, session, true))
		deadline := extendFor(t, c, session+1, 300*time.Millisecond)
		for {
			ev := nextEvent(t, c)
			if ev.Kind != EventExit {
				continue
			}
			if over := time.Duration(ev.ExitedNS - deadline); ev.VM != vm || over < 0 {
				t.Fatalf("%+v, deadline %d", ev, deadline)
			} else if over > 500*time.Millisecond {
				return fmt.Errorf("%s ran %v past its deadline", vm, over)
			}
			return nil
		}
	})
}

func TestGuardDeathTakesTheChildrenAndANewGuardBegins(t *testing.T) {
	dir := shortDir(t)
	g, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	p, u := start(t, c, sleeper(dir, "p", 1, true)), start(t, c, sleeper(dir, "u", 1, false))
	wantErr(t, g.Process.Kill(), nil)
	_ = g.Wait()
	<-c.Done()
	eventually(t, "the children are gone", func() bool { return p.gone() && u.gone() })
	_, c2 := newGuard(t, dir)
	h, err := c2.Hello(testCtx(t))
	if err != nil || h.Session != 0 || len(h.Strangers) != 0 {
		t.Fatalf("%+v, %v", h, err)
	}
	_, err = c2.Start(testCtx(t), sleeper(dir, "p", 1, true))
	wantErr(t, err, ErrStaleSession)
	extendFor(t, c2, 1, time.Minute)
	start(t, c2, sleeper(dir, "p", 1, true))
}

func TestNewGuardKillsLeftovers(t *testing.T) {
	dir := shortDir(t)
	// Not a child of any guard: as if it had lost its PDEATHSIG.
	cmd := exec.Command(sleepPath(), "1000")
	cmd.Env = []string{EnvGuardDir + "=" + dir, EnvVM + "=old"}
	other := exec.Command(sleepPath(), "1000")
	other.Env = []string{EnvGuardDir + "=" + dir + "x", EnvVM + "=old"}
	for _, c := range []*exec.Cmd{cmd, other} {
		wantErr(t, c.Start(), nil)
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	}
	_, c := newGuard(t, dir)
	if st, err := readProcStat(cmd.Process.Pid); err != nil || !st.gone() {
		t.Fatalf("the leftover lives: %+v, %v", st, err)
	}
	if st, err := readProcStat(other.Process.Pid); err != nil || st.gone() {
		t.Fatalf("a process of another run directory was killed: %+v, %v", st, err)
	}
	extendFor(t, c, 1, time.Minute)
	start(t, c, sleeper(dir, "old", 1, true))
}

func TestStoppedClientDoesNotDelayTheKill(t *testing.T) {
	goodturn.Take(t, func(int) error {
		dir := shortDir(t)
		_, c := newGuard(t, dir)
		wantErr(t, c.Watch(testCtx(t)), nil)
		client := spawnSelf(t, roleClient, dir)
		early := errors.New("the client has not extended its lease in time")
		eventually(t, "p runs, or did", func() bool { return record(t, c, "p").State != "" || exited(client) })
		time.Sleep(time.Second) // longer than one lease: it is being extended
		if record(t, c, "p").State != StateRunning {
			return early
		}
		wantErr(t, client.Process.Signal(unix.SIGSTOP), nil)
		stopped := BootClock{}.NowNS()
		if ev := nextEvent(t, c); ev.Kind != EventLapsed {
			t.Fatalf("%+v", ev)
		}
		ev := nextEvent(t, c)
		if ev.Kind != EventExit || ev.VM != "p" || ev.Reason != ReasonLease {
			t.Fatalf("%+v", ev)
		}
		wantErr(t, client.Process.Signal(unix.SIGCONT), nil)
		force := time.AfterFunc(time.Minute, func() { _ = client.Process.Kill() })
		_ = client.Wait() // its next extend is refused, and it ends
		if !force.Stop() {
			t.Fatal("the client was not refused")
		}
		h, err := c.Hello(testCtx(t))
		if err != nil || !h.Lapsed || h.Session != 1 {
			t.Fatalf("the lapsed session came back: %+v, %v", h, err)
		}
		switch after := time.Duration(ev.ExitedNS - stopped); {
		case after < 0:
			return early
		case after > 2*time.Second:
			return fmt.Errorf("killed %v after the stop", after)
		}
		return nil
	})
}

// exited tells whether a process that nobody has waited for has ended.
func exited(cmd *exec.Cmd) bool {
	st, err := readProcStat(cmd.Process.Pid)
	return err != nil || st.gone()
}

func TestExitEventsAndRecords(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	ctx := testCtx(t)
	wantErr(t, c.Watch(ctx), nil)
	extendFor(t, c, 1, time.Minute)
	req := sleeper(dir, "a", 1, true)
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	req.Argv = []string{sh, "-c", `echo "$A-$HOME-$MUSTER_VM-$MUSTER_GUARD_DIR"; pwd >&2; cat; exit 3`}
	req.Env, req.Dir, req.Extra = []string{"A=1", "PATH=/usr/bin:/bin"}, dir, []byte(`{"k":[1,2]}`)
	if _, err := c.Start(ctx, req); err != nil {
		t.Fatal(err)
	}
	ev := nextEvent(t, c)
	if ev.Kind != EventExit || ev.VM != "a" || ev.Epoch != 7 || ev.ExitCode != 3 || ev.Signal != 0 || ev.Reason != ReasonExited ||
		!ev.Protected || ev.ExitedNS < ev.StartedNS || ev.LogPath != req.LogPath || string(ev.Extra) != `{"k":[1,2]}` {
		t.Fatalf("%+v", ev)
	}
	out, err := os.ReadFile(req.LogPath)
	if want := "1--a-" + dir + "\n" + dir + "\n"; err != nil || string(out) != want {
		t.Fatalf("output %q, %v, want %q", out, err, want)
	}
	if rec := record(t, c, "a"); rec.State != StateExited || rec.ExitCode != 3 {
		t.Fatalf("%+v", rec)
	}
	req.Argv = []string{"/no/such/program"}
	_, err = c.Start(ctx, req)
	wantErr(t, err, ErrStartFailed)
	if rec := record(t, c, "a"); rec.ExitCode != 3 {
		t.Fatalf("a failed start lost the record: %+v", rec)
	}
	wantErr(t, c.Forget(ctx, "a"), nil)
	l := start(t, c, sleeper(dir, "a", 1, true))
	wantErr(t, unix.Kill(l.pid, unix.SIGSEGV), nil)
	if ev := nextEvent(t, c); ev.Signal != int(unix.SIGSEGV) || ev.ExitCode != -1 || ev.Reason != ReasonExited || ev.PID != l.pid {
		t.Fatalf("%+v", ev)
	}
}

func TestChildIsSetUpAsPromised(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	l := start(t, c, sleeper(dir, "a", 1, false))
	if sid, err := unix.Getsid(l.pid); err != nil || sid != l.pid {
		t.Errorf("session %d, %v", sid, err)
	}
	eventually(t, "only stdio is open", func() bool { // the loader opens libraries first
		fds, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(l.pid), "fd"))
		return err == nil && len(fds) == 3
	})
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGPIPE} {
		if ignores(t, l.pid, sig) {
			t.Errorf("the child ignores %v", sig)
		}
	}
	if null, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", l.pid)); err != nil || null != os.DevNull {
		t.Errorf("stdin %q, %v", null, err)
	}
	adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", l.pid))
	if err != nil || strings.TrimSpace(string(adj)) != "0" {
		t.Errorf("oom_score_adj %q, %v", adj, err)
	}
	if attr, err := unix.SchedGetAttr(l.pid, 0); err != nil || attr.Policy != unix.SCHED_NORMAL {
		t.Errorf("scheduling %+v, %v", attr, err)
	}
	h, err := c.Hello(testCtx(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("hardening %+v", h.Hardening)
	if !strings.HasPrefix(h.Hardening.Cgroup, hardenedOK) {
		t.Logf("no cgroup v2 here: %s", h.Hardening.Cgroup)
		return
	}
	cg, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", l.pid))
	if err != nil || !strings.Contains(string(cg), "0::/muster/guard-") || !strings.Contains(string(cg), "/a\n") {
		t.Errorf("cgroup %q, %v", cg, err)
	}
	base := strings.TrimPrefix(h.Hardening.Cgroup, hardenedOK+": ")
	if _, err := c.Kill(testCtx(t), "a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cgroup is removed", func() bool {
		_, err := os.Stat(filepath.Join(base, "a"))
		return errors.Is(err, os.ErrNotExist)
	})
}

// ignores reads SigIgn of /proc/PID/status.
func ignores(t testing.TB, pid int, sig unix.Signal) bool {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "SigIgn:\t")
	mask, err := strconv.ParseUint(rest[:16], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return mask&(1<<(uint(sig)-1)) != 0
}

// A VM's helper in a session of its own goes with the VM, by its cgroup.
func TestKillTakesHelpersOutOfTheCgroup(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	h, err := c.Hello(testCtx(t))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(h.Hardening.Cgroup, hardenedOK) {
		t.Logf("not promised without cgroup v2: %s", h.Hardening.Cgroup)
		return
	}
	extendFor(t, c, 1, time.Minute)
	req := sleeper(dir, "a", 1, true)
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	req.Argv = []string{sh, "-c", `setsid sleep 1000 & echo $!; exec sleep 1000`}
	req.Env = []string{"PATH=/usr/bin:/bin"}
	start(t, c, req)
	helper := 0
	eventually(t, "the helper runs in its own session", func() bool {
		out, _ := os.ReadFile(req.LogPath)
		helper, _ = strconv.Atoi(strings.TrimSpace(string(out)))
		sid, err := unix.Getsid(helper)
		return helper > 0 && err == nil && sid == helper
	})
	for range 2 { // the second start finds a clean place
		_, err := c.Kill(testCtx(t), "a")
		wantErr(t, err, nil)
		eventually(t, "the helper is gone", func() bool {
			st, err := readProcStat(helper)
			return err != nil || st.gone()
		})
		start(t, c, sleeper(dir, "a", 1, true))
	}
}

func TestSecondGuardIsRefused(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	l := start(t, c, sleeper(dir, "a", 1, true))
	_, err := NewServer(Config{RunDir: dir, Watchdog: WatchdogNone})
	wantErr(t, err, ErrLocked)
	if err := exec.Command(self(t), roleGuard, dir).Run(); err == nil || err.(*exec.ExitError).ExitCode() != ExitLocked {
		t.Fatalf("second guard: %v", err)
	}
	if _, err := c.Hello(testCtx(t)); err != nil || l.gone() {
		t.Fatalf("the first guard was disturbed: %v", err)
	}
}

func TestAdoptionByASecondClient(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, 20*time.Second)
	l := start(t, c, sleeper(dir, "a", 1, true))
	wantErr(t, c.Close(), nil)
	c2 := dial(t, dir)
	ctx := testCtx(t)
	wantErr(t, c2.Watch(ctx), nil)
	h, err := c2.Hello(ctx)
	if err != nil {
		t.Fatal(err)
	}
	deadline := extendFor(t, c2, h.Session+1, 30*time.Second)
	rec := record(t, c2, "a")
	if rec.PID != l.pid || rec.StartTicks != l.startTicks || rec.State != StateRunning || rec.Epoch != 7 {
		t.Fatalf("%+v, started as %+v", rec, l)
	}
	_, err = dial(t, dir).Extend(ctx, h.Session, deadline+sec)
	wantErr(t, err, ErrStaleSession)
	outcome, err := c2.Kill(ctx, "a")
	if err != nil || outcome != OutcomeKilled || !l.gone() {
		t.Fatalf("%q, %v", outcome, err)
	}
	if ev := nextEvent(t, c2); ev.Reason != ReasonKill {
		t.Fatalf("%+v", ev)
	}
}

func TestSigtermEndsVMsPolitelyFirst(t *testing.T) {
	dir := shortDir(t)
	g, c := newGuard(t, dir)
	wantErr(t, c.Watch(testCtx(t)), nil)
	extendFor(t, c, 1, time.Minute)
	polite := start(t, c, sleeper(dir, "polite", 1, true))
	req := sleeper(dir, "stubborn", 1, true)
	req.Argv = []string{self(t), roleStubborn, "x"}
	stubborn := start(t, c, req)
	eventually(t, "it ignores SIGTERM", func() bool {
		out, _ := os.ReadFile(req.LogPath)
		return strings.Contains(string(out), "ready")
	})
	began := time.Now()
	for _, harmless := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGPIPE} {
		wantErr(t, g.Process.Signal(harmless), nil)
	}
	extendFor(t, c, 1, time.Minute)
	wantErr(t, g.Process.Signal(unix.SIGTERM), nil)
	if ev := nextEvent(t, c); ev.VM != "polite" || ev.Signal != int(unix.SIGTERM) || ev.Reason != ReasonStopping {
		t.Fatalf("%+v", ev)
	}
	_, err := c.Start(testCtx(t), sleeper(dir, "b", 1, true))
	wantErr(t, err, ErrStopping)
	if ev := nextEvent(t, c); ev.VM != "stubborn" || ev.Signal != int(unix.SIGKILL) || ev.Reason != ReasonStopping {
		t.Fatalf("%+v", ev)
	}
	wantErr(t, g.Wait(), nil)
	if took := time.Since(began); took < StopGrace || took > StopGrace+5*time.Second || !polite.gone() || !stubborn.gone() {
		t.Fatalf("took %v", took)
	}
}

func TestManyStartsAndKillsAtOnce(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			vm := fmt.Sprint("vm-", i)
			for range 3 {
				if _, err := c.Start(testCtx(t), sleeper(dir, vm, 1, i%2 == 0)); err != nil {
					t.Error(err)
				}
				if got, err := c.Kill(testCtx(t), vm); err != nil || got != OutcomeKilled {
					t.Errorf("%q, %v", got, err)
				}
			}
		})
	}
	wg.Wait()
	wantErr(t, c.Stop(testCtx(t)), nil)
}
