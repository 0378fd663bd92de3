// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// rig is a server on fakes with one client and session 1 for 10 s.
type rig struct {
	*Client
	t     *testing.T
	dir   string
	s     *Server
	clock *fakeClock
	procs *fakeProcesses
	stop  func() error
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigWith(t, nil)
}

func newRigWith(t *testing.T, dog *watchdog) *rig {
	t.Helper()
	r := &rig{t: t, dir: shortDir(t), clock: newFakeClock(), procs: newFakeProcesses()}
	r.s, r.stop = serve(t, Config{RunDir: r.dir, Clock: r.clock, procs: r.procs, dog: dog})
	r.Client = dial(t, r.dir)
	r.extend(1, 10*time.Second)
	return r
}

func (r *rig) extend(session uint64, ahead time.Duration) {
	r.t.Helper()
	if _, err := r.Extend(testCtx(r.t), session, r.clock.NowNS()+int64(ahead)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) start(vm string, session uint64, protected bool) error {
	r.t.Helper()
	_, err := r.Start(testCtx(r.t), startReq(vm, session, protected))
	return err
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func TestServerLapse(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	wantErr(t, r.Watch(ctx), nil)
	wantErr(t, r.start("p", 1, true), nil)
	wantErr(t, r.start("u", 1, false), nil)
	r.procs.set(func() { r.procs.stuck["p"] = true })
	r.clock.advance(10*time.Second, false)
	if ev := nextEvent(t, r.Client); ev.Kind != EventLapsed || ev.Session != 1 {
		t.Fatalf("%+v", ev)
	}
	eventually(t, "the kill is repeated", func() bool { return r.procs.killCount("p") > 20 })
	if rec := record(t, r.Client, "p"); rec.State != StateKilling || rec.Reason != ReasonLease {
		t.Fatalf("%+v", rec)
	}
	_, err := r.Extend(ctx, 1, r.clock.NowNS()+sec)
	wantErr(t, err, ErrLapsed)
	_, err = r.Extend(ctx, 2, r.clock.NowNS()+sec)
	wantErr(t, err, ErrKilling)
	wantErr(t, r.start("n", 1, false), ErrLapsed)
	r.procs.set(func() { r.procs.stuck["p"] = false })
	if ev := nextEvent(t, r.Client); ev.Kind != EventExit || ev.VM != "p" || ev.Reason != ReasonLease || ev.Signal != 9 {
		t.Fatalf("%+v", ev)
	}
	r.extend(2, 10*time.Second)
	if rec := record(t, r.Client, "u"); rec.State != StateRunning || r.procs.killCount("u") != 0 {
		t.Fatalf("%+v", rec)
	}
	wantErr(t, r.start("p", 2, true), nil)
	h, err := r.Hello(ctx)
	if err != nil || h.Session != 2 || h.Lapsed || h.NowNS != r.clock.NowNS() || h.DeadlineNS != h.NowNS+10*sec ||
		h.Protocol != ProtocolVersion || h.Level != LevelProcess || h.PID != os.Getpid() {
		t.Fatalf("%+v, %v", h, err)
	}
}

func TestDeadlineHoldsWithoutTheTimer(t *testing.T) {
	r := newRig(t)
	wantErr(t, r.start("p", 1, true), nil)
	r.clock.advance(10*time.Second, true)
	_, err := r.Extend(testCtx(t), 1, r.clock.NowNS()+sec)
	wantErr(t, err, ErrLapsed)
	if r.procs.killCount("p") == 0 {
		t.Fatal("the refusal went out before the kill")
	}
}

func TestHousekeepingCatchesALostTimer(t *testing.T) {
	r := newRig(t)
	wantErr(t, r.start("p", 1, true), nil)
	r.clock.advance(10*time.Second, true)
	eventually(t, "p is killed", func() bool { return r.procs.killCount("p") > 0 })
}

func TestLeaseEndsBetweenForkAndRegistration(t *testing.T) {
	tests := []struct {
		name    string
		between func(r *rig)
		want    error
		reason  Reason
	}{
		{"deadline passes, timer late", func(r *rig) { r.clock.advance(10*time.Second, true) }, ErrLapsed, ReasonLease},
		{"deadline passes", func(r *rig) { r.clock.advance(10*time.Second, false) }, ErrLapsed, ReasonLease},
		{"new session", func(r *rig) { r.extend(2, time.Minute) }, ErrStaleSession, ReasonLease},
		{"killed", func(r *rig) { go func() { _, _ = r.Kill(testCtx(r.t), "a") }() }, ErrKilled, ReasonKill},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			hold := make(chan struct{})
			r.procs.set(func() { r.procs.hold = hold })
			result := make(chan error, 1)
			go func() { result <- r.start("a", 1, false) }()
			<-r.procs.forked
			if rec := record(t, r.Client, "a"); rec.State != StateStarting || rec.PID != 0 {
				t.Fatalf("%+v", rec)
			}
			wantErr(t, r.start("a", 1, false), ErrExists)
			tt.between(r)
			if tt.want == ErrKilled {
				eventually(t, "kill is noted", func() bool { return record(t, r.Client, "a").State == StateKilling })
			}
			close(hold)
			wantErr(t, <-result, tt.want)
			eventually(t, "a is dead", func() bool {
				rec := record(t, r.Client, "a")
				return rec.State == StateExited && rec.Reason == tt.reason && rec.Signal == 9
			})
		})
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	r := newRig(t)
	r.procs.set(func() { r.procs.startIt = errors.New("no such program") })
	err := r.start("a", 1, true)
	wantErr(t, err, ErrStartFailed)
	if rec := record(t, r.Client, "a"); rec.VM != "" || !strings.Contains(err.Error(), "no such program") {
		t.Fatalf("%+v, %v", rec, err)
	}
}

func TestKillAnswersWhenReaped(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	wantErr(t, r.start("a", 1, false), nil)
	r.procs.set(func() { r.procs.stuck["a"] = true })
	done := make(chan error, 1)
	go func() {
		_, err := r.Kill(ctx, "a")
		done <- err
	}()
	eventually(t, "kills are repeated", func() bool { return r.procs.killCount("a") > 2 })
	// The waiting kill holds nothing up on the same connection.
	r.extend(1, 20*time.Second)
	select {
	case err := <-done:
		t.Fatalf("answered before the process was reaped: %v", err)
	default:
	}
	r.procs.set(func() { r.procs.stuck["a"] = false })
	wantErr(t, <-done, nil)
	for _, want := range []Outcome{OutcomeExited, OutcomeUnknown} {
		got, err := r.Kill(ctx, "a")
		if err != nil || got != want {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
		wantErr(t, r.Forget(ctx, "a"), nil)
	}
}

func TestPettingStopsWhenAProtectedVMSurvives(t *testing.T) {
	dog, err := os.CreateTemp(shortDir(t), "dog")
	if err != nil {
		t.Fatal(err)
	}
	r := newRigWith(t, &watchdog{f: dog, level: LevelProcess}) // too slow to be counted on
	s := r.s
	size := func() int64 {
		fi, err := os.Stat(dog.Name())
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	idle := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.dogIdle
	}
	eventually(t, "petted", func() bool { return size() > 0 })
	wantErr(t, r.start("p", 1, true), nil)
	r.procs.set(func() { r.procs.stuck["p"] = true })
	r.clock.advance(10*time.Second+KillTime+1, false)
	eventually(t, "no longer petted", idle)
	before := size()
	time.Sleep(petEvery + petEvery/2)
	if size() != before {
		t.Fatal("petted although a protected VM survives its lease")
	}
	r.procs.set(func() { r.procs.stuck["p"] = false })
	eventually(t, "petted again", func() bool { return !idle() && size() > before })
	wantErr(t, r.stop(), nil)
	data, err := os.ReadFile(dog.Name())
	if err != nil || data[len(data)-1] != 'V' {
		t.Fatalf("no magic close: %q, %v", data, err)
	}
}

// A guard that is stopped decides nothing: so the last petting must come early
// enough that the device bites when the VM's right to run and KillTime are over.
func TestLastPettingComesBeforeTheDeadline(t *testing.T) {
	dog, err := os.CreateTemp(shortDir(t), "dog")
	if err != nil {
		t.Fatal(err)
	}
	const timeout = 10 * time.Second
	r := newRigWith(t, &watchdog{f: dog, level: LevelHardware, timeout: timeout})
	ctx := testCtx(t)
	pets := func() int64 {
		fi, err := os.Stat(dog.Name())
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	idle := func() bool {
		r.s.mu.Lock()
		defer r.s.mu.Unlock()
		return r.s.dogIdle
	}
	petted := func(what string) {
		t.Helper()
		before := pets()
		eventually(t, what, func() bool { return !idle() && pets() > before })
	}
	unpetted := func(what string) {
		t.Helper()
		eventually(t, what, idle)
		before := pets()
		time.Sleep(petEvery + petEvery/2)
		if pets() != before {
			t.Fatalf("petted: %s", what)
		}
	}
	wantErr(t, r.start("u", 1, false), nil)
	r.clock.advance(9*time.Second, false)
	petted("only an unprotected vm, which no lease concerns")
	wantErr(t, r.start("p", 1, true), nil)
	unpetted("a protected vm and a lease of one more second")
	r.extend(1, 10*time.Second)
	petted("the lease is renewed")
	r.clock.advance(KillTime, false) // 8 s are left, and KillTime: the timeout, exactly
	petted("the last moment")
	r.clock.advance(1, false)
	unpetted("a nanosecond later")

	// The end of the lease: killed but there, then ending, then reaped.
	wantErr(t, r.Watch(ctx), nil)
	r.procs.set(func() { r.procs.stuck["p"] = true })
	r.clock.advance(8*time.Second, false)
	unpetted("killed and still there")
	r.procs.set(func() { r.procs.leaving["p"] = true })
	petted("none of its threads runs any more")
	r.procs.set(func() { r.procs.leaving["p"] = false })
	unpetted("it does again")
	r.procs.set(func() { r.procs.stuck["p"] = false })
	petted("reaped")
}

func TestAnUnkillableLeftoverIsPettedOnlyWithinTheLease(t *testing.T) {
	tab := newTable()
	tab.strangers["x"] = 7
	strange := func(now int64) bool { _, s := tab.disobedient(now, 10*time.Second); return s }
	if !strange(sec) {
		t.Fatal("petted without any lease")
	}
	if _, e := tab.extend(sec, 1, 11*sec); e != nil {
		t.Fatal(e)
	}
	if strange(3*sec) || !strange(3*sec+1) {
		t.Fatal("not petted exactly as long as the device then bites in time")
	}
}

func TestWatchdogThatBitesLateIsNotCountedOn(t *testing.T) {
	for _, c := range []struct {
		seconds int
		err     error
		level   Level
		timeout time.Duration
	}{
		{10, nil, LevelHardware, 10 * time.Second},
		{2, nil, LevelHardware, 2 * time.Second},
		{11, nil, LevelProcess, 0},
		{60, nil, LevelProcess, 0},
		{0, nil, LevelProcess, 0},
		{0, errors.New("no such ioctl"), LevelProcess, 0},
	} {
		w := &watchdog{level: LevelHardware, note: hardenedOK}
		w.count(c.seconds, c.err)
		if w.level != c.level || w.timeout != c.timeout || !strings.Contains(w.note, "timeout") {
			t.Errorf("%d s, %v: %q, %v, %q", c.seconds, c.err, w.level, w.timeout, w.note)
		}
	}
}

func TestSlowWatcherIsDisconnected(t *testing.T) {
	r := newRig(t)
	slow, err := net.Dial("unix", filepath.Join(r.dir, SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = slow.Close() }()
	if _, err := fmt.Fprintln(slow, `{"id":1,"op":"watch"}`); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(slow).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	conns := func() int {
		r.s.mu.Lock()
		defer r.s.mu.Unlock()
		return len(r.s.conns)
	}
	if conns() != 2 {
		t.Fatalf("%d connections", conns())
	}
	// Never read again: the socket's buffer and the queue fill up.
	r.s.mu.Lock()
	for range 20000 {
		r.s.broadcast(exitEvent{Kind: EventExit, Record: Record{VM: strings.Repeat("x", 64)}})
	}
	r.s.mu.Unlock()
	eventually(t, "the slow one is gone", func() bool { return conns() == 1 })
	r.extend(1, 20*time.Second)
}

func TestRawProtocol(t *testing.T) {
	r := newRig(t)
	c, err := net.Dial("unix", filepath.Join(r.dir, SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	in := bufio.NewReader(c)
	for _, tt := range []struct{ send, want string }{
		{`{"id":3,"op":"list"}`, `{"id":3,"ok":true,"vms":[]}`},
		{`{"id":4,"op":"kill","vm":"x"}`, `{"id":4,"ok":true,"outcome":"unknown"}`},
		{`{"id":5,"op":"watch"}`, `{"id":5,"ok":true}`},
		{`{"id":6,"op":"list","x":1}`, `{"id":6,"ok":false,"code":"bad_request","error":"unknown field \"x\""}`},
		{`nonsense`, `{"id":0,"ok":false,"code":"bad_request","error":"not JSON: invalid character 'o' in literal null (expecting 'u')"}`},
		{`{"id":7,"op":"protect","vm":"x","on":true}`, `{"id":7,"ok":false,"code":"not_running","error":"vm x is unknown"}`},
	} {
		if _, err := fmt.Fprintln(c, tt.send); err != nil {
			t.Fatal(err)
		}
		got, err := in.ReadString('\n')
		if err != nil || strings.TrimSpace(got) != tt.want {
			t.Fatalf("%s: %s, %v, want %s", tt.send, got, err, tt.want)
		}
	}
	// Half a request is not carried out; a line too long ends the connection.
	if _, err := fmt.Fprint(c, `{"id":8,"op":"list"`, strings.Repeat(" ", MaxRequestBytes)); err != nil {
		t.Fatal(err)
	}
	got, err := in.ReadString('\n')
	if err != nil || !strings.Contains(got, `"id":0,"ok":false,"code":"bad_request"`) {
		t.Fatalf("%s, %v", got, err)
	}
	if got, err := in.ReadString('\n'); err == nil {
		t.Fatalf("still connected: %s", got)
	}
}

func TestCutOffRequestIsNotCarriedOut(t *testing.T) {
	r := newRig(t)
	c, err := net.Dial("unix", filepath.Join(r.dir, SocketName))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(c, `{"id":8,"op":"stop"}`); err != nil { // no newline
		t.Fatal(err)
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatalf("answered with %d bytes", n)
	}
	_ = c.Close()
	r.extend(1, 20*time.Second)
}

// The guard answers a line that it cannot read with id 0, and the client hangs up. A
// start that is being forked is not refused by that: it goes on.
func TestAnEndedConnectionRefusesNothing(t *testing.T) {
	r := newRig(t)
	hold := make(chan struct{})
	r.procs.set(func() { r.procs.hold = hold })
	begun := make(chan error, 1)
	go func() { begun <- r.start("a", 1, true) }()
	<-r.procs.forked
	if _, err := r.c.Write([]byte("garbage\n")); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"the start": <-begun, "one that comes later": r.start("b", 1, true), "the connection": r.Err()} {
		wantErr(t, err, ErrClosed)
		var refused interface{ Refused() bool }
		if errors.As(err, &refused) {
			t.Errorf("%s counts as refused: %v", what, err)
		}
		if !strings.Contains(err.Error(), "bad_request: not JSON") {
			t.Errorf("%s does not say why: %v", what, err)
		}
	}
	close(hold)
	c := dial(t, r.dir)
	eventually(t, "a runs", func() bool { return record(t, c, "a").State == StateRunning })
}

func TestConnectionsAreBounded(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	for range MaxConnections - 1 {
		wantErr(t, dial(t, r.dir).Watch(ctx), nil)
	}
	eventually(t, "it says why", func() bool { // a client that is slow to read it may see only that it is over
		_, err := dial(t, r.dir).Hello(ctx)
		wantErr(t, err, ErrClosed)
		return strings.Contains(err.Error(), "busy: too many connections")
	})
	r.extend(1, 20*time.Second)
}

func TestStopOp(t *testing.T) {
	r := newRig(t)
	ctx := testCtx(t)
	wantErr(t, r.start("a", 1, false), nil)
	wantErr(t, r.Client.Stop(ctx), ErrBusy)
	_, err := r.Kill(ctx, "a")
	wantErr(t, err, nil)
	wantErr(t, r.Client.Stop(ctx), nil)
	<-r.Done()
	wantErr(t, r.Err(), ErrClosed)
	eventually(t, "the socket is removed", func() bool {
		_, err := os.Stat(filepath.Join(r.dir, SocketName))
		return errors.Is(err, os.ErrNotExist)
	})
	_, err = r.Hello(ctx)
	wantErr(t, err, ErrClosed)
}

func TestStrangerBlocksItsVMUntilGone(t *testing.T) {
	clock := newFakeClock()
	s, err := NewServer(Config{
		RunDir: shortDir(t), Watchdog: WatchdogNone, Log: testLog{t}, Clock: clock, procs: newFakeProcesses(),
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(sleepPath(), "1000")
	wantErr(t, cmd.Start(), nil)
	st, err := readProcStat(cmd.Process.Pid)
	wantErr(t, err, nil)
	// A sweep without time to wait leaves its finds as strangers. This one has
	// no mark, so it is put in by hand.
	s.strangers = []leftover{{vm: "a", pid: cmd.Process.Pid, startTicks: st.startTicks}}
	s.tab.strangers["a"] = cmd.Process.Pid
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-result
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c := dial(t, s.dir)
	_, err = c.Extend(testCtx(t), 1, clock.NowNS()+sec)
	wantErr(t, err, nil)
	_, err = c.Start(testCtx(t), startReq("a", 1, true))
	wantErr(t, err, ErrStranger)
	_, err = c.Kill(testCtx(t), "a")
	wantErr(t, err, ErrStranger)
	_, err = c.Start(testCtx(t), startReq("b", 1, true))
	wantErr(t, err, nil)
	h, err := c.Hello(testCtx(t))
	if err != nil || len(h.Strangers) != 1 || h.Strangers[0] != "a" {
		t.Fatalf("%+v, %v", h, err)
	}
	eventually(t, "the stranger is killed and its VM free", func() bool {
		_, err := c.Start(testCtx(t), startReq("a", 1, true))
		return err == nil
	})
}

func TestSweepReturnsWhatWillNotGo(t *testing.T) {
	dir := shortDir(t)
	cmd := exec.Command(sleepPath(), "1000")
	cmd.Env = []string{EnvGuardDir + "=" + dir, EnvVM + "=old"}
	wantErr(t, cmd.Start(), nil)
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	sw := newSweeper(dir)
	ls := sw.sweep(-time.Second, func() {})
	if len(ls) != 1 || ls[0].vm != "old" || ls[0].pid != cmd.Process.Pid {
		t.Fatalf("%+v", ls)
	}
	if ls := sw.sweep(LeftoverWait, func() {}); len(ls) != 0 {
		t.Fatalf("%+v", ls)
	}
}

// stuck is a process of an earlier guard, and a sweeper to which it does not say so before
// late is closed; another process never says anything.
func stuck(t *testing.T, dir string) (cmd *exec.Cmd, sw *sweeper, asked *atomic.Int32, late chan struct{}) {
	t.Helper()
	cmd = exec.Command(sleepPath(), "1000")
	cmd.Env = []string{EnvGuardDir + "=" + dir, EnvVM + "=old"}
	wantErr(t, cmd.Start(), nil)
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	mine, never := fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid), fmt.Sprintf("/proc/%d/environ", os.Getpid())
	sw, asked, late = newSweeper(dir), new(atomic.Int32), make(chan struct{})
	sw.read = func(name string) ([]byte, error) {
		switch name {
		case mine:
			asked.Add(1)
			<-late
		case never:
			<-t.Context().Done()
		}
		return os.ReadFile(name)
	}
	return cmd, sw, asked, late
}

// A process that is asked whose it is answers late: it is stuck for a while, or the guard
// stood still.
func TestSweepTakesLateAnswers(t *testing.T) {
	cmd, sw, asked, late := stuck(t, shortDir(t))
	ticks := 0
	if ls := sw.sweep(-time.Second, func() { ticks++ }); len(ls) != 0 || ticks < 2 {
		t.Fatalf("%+v before it answered, petted %d times", ls, ticks)
	}
	if ls := sw.find(nothing); len(ls) != 0 || asked.Load() != 1 {
		t.Fatalf("%+v, asked %d times", ls, asked.Load())
	}
	close(late)
	eventually(t, "it is killed", func() bool {
		if ls := sw.sweep(-time.Second, nothing); len(ls) == 1 && ls[0].pid != cmd.Process.Pid {
			t.Fatalf("%+v", ls)
		}
		return exited(cmd)
	})
	if q, open := sw.open[cmd.Process.Pid]; open {
		t.Errorf("it answered, and is asked still: %+v", q)
	}
}

// One that was asked has ended, and another one has its number.
func TestTheNextOfItsNumberIsAsked(t *testing.T) {
	dir := shortDir(t)
	cmd, _, _, _ := stuck(t, dir)
	sw := newSweeper(dir)
	sw.open[cmd.Process.Pid] = question{make(chan []byte), 1}
	if ls := sw.find(nothing); len(ls) != 1 || ls[0].pid != cmd.Process.Pid || len(sw.open) != 0 {
		t.Errorf("%+v, open %+v", ls, sw.open)
	}
}

// It answers when the guard serves already.
func TestALeftoverThatIsKnownLateIsKilled(t *testing.T) {
	dir := shortDir(t)
	cmd, sw, _, late := stuck(t, dir)
	sw.sweep(-time.Second, nothing)
	other := exec.Command(sleepPath(), "1000") // whose number is taken for that of one that was asked
	other.Env = cmd.Env
	wantErr(t, other.Start(), nil)
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	answer := make(chan []byte, 1)
	answer <- []byte(strings.Join(cmd.Env, "\x00"))
	sw.open[other.Process.Pid] = question{answer, 1}
	s, err := NewServer(Config{RunDir: dir, Watchdog: WatchdogNone, Log: testLog{t}, Clock: newFakeClock(), procs: newFakeProcesses()})
	wantErr(t, err, nil)
	s.sweeper = sw
	s.chaseStrangers()
	if exited(cmd) || len(s.strangers) != 0 {
		t.Fatalf("killed before it answered: %+v", s.strangers)
	}
	close(late)
	eventually(t, "it is killed and forgotten", func() bool {
		s.chaseStrangers()
		return exited(cmd) && len(s.strangers) == 0
	})
	if exited(other) {
		t.Error("a process that was not asked is killed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_ = s.Serve(ctx) // it lets go of all
}

func nothing() {}

func TestLongRunDir(t *testing.T) {
	dir := filepath.Join(shortDir(t), strings.Repeat("long/", 40))
	_, stop := serve(t, Config{RunDir: dir})
	if _, err := dial(t, dir).Hello(testCtx(t)); err != nil {
		t.Fatal(err)
	}
	wantErr(t, stop(), nil)
}
