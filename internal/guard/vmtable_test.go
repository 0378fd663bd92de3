// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

const sec = int64(time.Second)

func startReq(vm string, session uint64, protected bool) StartRequest {
	return StartRequest{VM: vm, Session: session, Protected: protected, Argv: []string{"/bin/x"}, LogPath: "/l"}
}

// leased returns a table with session 5 until 10 s.
func leased(t *testing.T) *table {
	t.Helper()
	tab := newTable()
	if _, e := tab.extend(0, 5, 10*sec); e != nil {
		t.Fatal(e)
	}
	return tab
}

// run starts a VM all the way. It stands for a forked process by a pid alone.
func run(t *testing.T, tab *table, now int64, req StartRequest) *instance {
	t.Helper()
	in, e := tab.beginStart(now, req)
	if e != nil {
		t.Fatal(e)
	}
	in.proc = &process{pid: 100}
	if e := tab.finishStart(now, in, 100, 1); e != nil {
		t.Fatal(e)
	}
	return in
}

func wantCode(t *testing.T, e *Error, want Code) {
	t.Helper()
	if got := codeOf(e); got != want {
		t.Fatalf("code %q (%v), want %q", got, e, want)
	}
}

func codeOf(e *Error) Code {
	if e == nil {
		return ""
	}
	return e.Code
}

func TestExtend(t *testing.T) {
	tests := []struct {
		name     string
		now      int64
		session  uint64
		deadline int64
		code     Code
		want     int64
	}{
		{"same session moves forward", 5 * sec, 5, 20 * sec, "", 20 * sec},
		{"same session never shortens", 5 * sec, 5, 7 * sec, "", 10 * sec},
		{"same session just before its deadline", 10*sec - 1, 5, 20 * sec, "", 20 * sec},
		{"same session at its deadline", 10 * sec, 5, 20 * sec, CodeLapsed, 0},
		{"lower session", 5 * sec, 4, 20 * sec, CodeStaleSession, 0},
		{"session zero", 5 * sec, 0, 20 * sec, CodeStaleSession, 0},
		{"higher session before the lapse", 5 * sec, 6, 20 * sec, "", 20 * sec},
		{"higher session may be shorter", 5 * sec, 6, 6 * sec, "", 6 * sec},
		{"higher session after the lapse", 11 * sec, 6, 20 * sec, "", 20 * sec},
		{"deadline now", 5 * sec, 5, 5 * sec, CodeBadRequest, 0},
		{"deadline past in a new session", 5 * sec, 6, 4 * sec, CodeBadRequest, 0},
		{"deadline as far as allowed", 5 * sec, 5, 5*sec + int64(MaxAhead), "", 5*sec + int64(MaxAhead)},
		{"deadline too far", 5 * sec, 5, 5*sec + int64(MaxAhead) + 1, CodeBadRequest, 0},
		{"deadline at the end of time", 5 * sec, 5, 1<<63 - 1, CodeBadRequest, 0},
		{"deadline before time", 5 * sec, 5, -1 << 63, CodeBadRequest, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tab := leased(t)
			got, e := tab.extend(tt.now, tt.session, tt.deadline)
			wantCode(t, e, tt.code)
			if e == nil && (got != tt.want || tab.deadlineNS != tt.want || tab.session != tt.session || tab.lapsed) {
				t.Fatalf("deadline %d, table %+v, want %d", got, tab, tt.want)
			}
			if e != nil && tab.session != 5 {
				t.Fatalf("a refused extend changed the session to %d", tab.session)
			}
		})
	}
}

func TestBeginStart(t *testing.T) {
	tests := []struct {
		name string
		prep func(t *testing.T, tab *table)
		now  int64
		req  StartRequest
		code Code
	}{
		{"current session", nil, 5 * sec, startReq("a", 5, true), ""},
		{"older session", nil, 5 * sec, startReq("a", 4, true), CodeStaleSession},
		{"future session", nil, 5 * sec, startReq("a", 6, true), CodeStaleSession},
		{"no session", nil, 5 * sec, startReq("a", 0, true), CodeStaleSession},
		{"just before the deadline", nil, 10*sec - 1, startReq("a", 5, true), ""},
		{"at the deadline", nil, 10 * sec, startReq("a", 5, true), CodeLapsed},
		{"unprotected at the deadline", nil, 10 * sec, startReq("a", 5, false), CodeLapsed},
		{"present", func(t *testing.T, tab *table) { run(t, tab, sec, startReq("a", 5, true)) },
			5 * sec, startReq("a", 5, true), CodeExists},
		{"present under an older session", func(t *testing.T, tab *table) {
			run(t, tab, sec, startReq("a", 5, true))
			_, _ = tab.extend(sec, 6, 10*sec)
		}, 5 * sec, startReq("a", 6, true), CodeExists},
		{"exited", func(t *testing.T, tab *table) { tab.exit(sec, run(t, tab, sec, startReq("a", 5, true)), 0, 0) },
			5 * sec, startReq("a", 5, true), ""},
		{"stranger", func(_ *testing.T, tab *table) { tab.strangers["a"] = 7 }, 5 * sec, startReq("a", 5, true), CodeStranger},
		{"another's stranger", func(_ *testing.T, tab *table) { tab.strangers["b"] = 7 }, 5 * sec, startReq("a", 5, true), ""},
		{"nameless stranger", func(_ *testing.T, tab *table) { tab.strangers[""] = 7 }, 5 * sec, startReq("a", 5, true), CodeStranger},
		{"stopping", func(_ *testing.T, tab *table) { tab.stopping = true }, 5 * sec, startReq("a", 5, true), CodeStopping},
		{"full", func(t *testing.T, tab *table) {
			for i := range MaxRunning {
				run(t, tab, sec, startReq(fmt.Sprint("x", i), 5, false))
			}
		}, 5 * sec, startReq("a", 5, true), CodeTooMany},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tab := leased(t)
			if tt.prep != nil {
				tt.prep(t, tab)
			}
			_, e := tab.beginStart(tt.now, tt.req)
			wantCode(t, e, tt.code)
		})
	}
}

func TestFinishStart(t *testing.T) {
	tests := []struct {
		name    string
		between func(tab *table) // after the reservation at 5 s
		now     int64
		code    Code
		state   State
		reason  Reason
	}{
		{"in time", nil, 6 * sec, "", StateRunning, ""},
		{"deadline passed in between", nil, 10 * sec, CodeLapsed, StateKilling, ReasonLease},
		{"lapse seen by somebody else", func(tab *table) { tab.observe(11 * sec) }, 11 * sec, CodeLapsed, StateKilling, ReasonLease},
		{"new session in between", func(tab *table) { _, _ = tab.extend(6*sec, 6, 20*sec) }, 7 * sec, CodeStaleSession, StateKilling, ReasonLease},
		{"killed in between", func(tab *table) { _, _, _ = tab.kill(6*sec, "a") }, 7 * sec, CodeKilled, StateKilling, ReasonKill},
		{"guard stopping", func(tab *table) { tab.beginStopping() }, 7 * sec, CodeStopping, StateKilling, ReasonStopping},
	}
	for _, tt := range tests {
		for _, protected := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, protected=%v", tt.name, protected), func(t *testing.T) {
				tab := leased(t)
				in, e := tab.beginStart(5*sec, startReq("a", 5, protected))
				wantCode(t, e, "")
				if tt.between != nil {
					tt.between(tab)
				}
				wantCode(t, tab.mayFork(tt.now, in), tt.code)
				in.proc = &process{pid: 9}
				wantCode(t, tab.finishStart(tt.now, in, 9, 77), tt.code)
				if in.rec.State != tt.state || in.rec.Reason != tt.reason || in.rec.PID != 9 || in.rec.StartTicks != 77 {
					t.Fatalf("record %+v, want state %s, reason %q", in.rec, tt.state, tt.reason)
				}
				if killing := len(tab.condemned()) == 1; killing != (tt.state == StateKilling) {
					t.Fatalf("condemned: %v", killing)
				}
			})
		}
	}
}

func TestFailedStartGivesTheOldRecordBack(t *testing.T) {
	tab := leased(t)
	tab.exit(2*sec, run(t, tab, sec, startReq("a", 5, true)), 3, 0)
	in, e := tab.beginStart(3*sec, startReq("a", 5, true))
	wantCode(t, e, "")
	tab.failStart(in)
	recs := tab.list()
	if len(recs) != 1 || recs[0].State != StateExited || recs[0].ExitCode != 3 || tab.live != 0 {
		t.Fatalf("records %+v, live %d", recs, tab.live)
	}
	in, e = tab.beginStart(3*sec, startReq("b", 5, true))
	wantCode(t, e, "")
	tab.failStart(in)
	if len(tab.list()) != 1 {
		t.Fatalf("a failed first start left a record: %+v", tab.list())
	}
}

func TestLapseKillsProtectedOnlyAndBlocksNewSessions(t *testing.T) {
	tab := leased(t)
	p := run(t, tab, sec, startReq("p", 5, true))
	u := run(t, tab, sec, startReq("u", 5, false))
	k := run(t, tab, sec, startReq("k", 5, true))
	_, _, _ = tab.kill(2*sec, "k")
	if tab.observe(10*sec-1) || !tab.observe(10*sec) || tab.observe(11*sec) {
		t.Fatal("lapse not noticed exactly once at the deadline")
	}
	if p.rec.State != StateKilling || p.rec.Reason != ReasonLease || u.rec.State != StateRunning || k.rec.Reason != ReasonKill {
		t.Fatalf("p %+v, u %+v, k %+v", p.rec, u.rec, k.rec)
	}
	_, e := tab.extend(11*sec, 6, 20*sec)
	wantCode(t, e, CodeKilling)
	tab.exit(11*sec, p, -1, 9)
	_, e = tab.extend(11*sec, 6, 20*sec)
	wantCode(t, e, CodeKilling) // k was asked for before, but it is not reaped
	bad := func(now int64, timeout time.Duration) int {
		ins, _ := tab.disobedient(now, timeout)
		return len(ins)
	}
	if bad(12*sec, 0) != 0 || bad(12*sec+1, 0) != 1 {
		t.Fatal("not disobedient exactly after the kill time")
	}
	tab.exit(12*sec, k, -1, 9)
	if bad(100*sec, 10*time.Second) != 0 {
		t.Fatal("disobedient although all protected VMs are reaped")
	}
	_, e = tab.extend(13*sec, 6, 20*sec)
	wantCode(t, e, "")
	if u.rec.State != StateRunning {
		t.Fatal("the unprotected VM did not survive")
	}
}

func TestProtect(t *testing.T) {
	tab := leased(t)
	u := run(t, tab, sec, startReq("u", 5, false))
	wantCode(t, tab.protect(2*sec, "nobody", true), CodeNotRunning)
	wantCode(t, tab.protect(2*sec, "u", true), "")
	wantCode(t, tab.protect(2*sec, "u", false), "")
	wantCode(t, tab.protect(10*sec, "u", true), CodeLapsed)
	if u.rec.Protected || u.rec.State != StateRunning {
		t.Fatalf("a refused protect changed the VM: %+v", u.rec)
	}
	wantCode(t, tab.protect(10*sec, "u", false), "")
	_, e := tab.extend(11*sec, 6, 20*sec)
	wantCode(t, e, "")
	wantCode(t, tab.protect(11*sec, "u", true), "")
	tab.observe(20 * sec)
	if u.rec.State != StateKilling {
		t.Fatal("protected later, but not killed at the new deadline")
	}
	wantCode(t, tab.protect(20*sec, "u", false), CodeNotRunning)
}

func TestKillForgetStop(t *testing.T) {
	tab := leased(t)
	in := run(t, tab, sec, startReq("a", 5, false))
	wantCode(t, tab.forget("a"), CodeBusy)
	wantCode(t, tab.stop(), CodeBusy)
	got, outcome, e := tab.kill(2*sec, "a")
	if got != in || outcome != OutcomeKilled || e != nil {
		t.Fatal(got, outcome, e)
	}
	if rec := tab.exit(3*sec, in, -1, 9); rec.Reason != ReasonKill || rec.ExitedNS != 3*sec || rec.Signal != 9 {
		t.Fatalf("%+v", rec)
	}
	if got, outcome, e := tab.kill(4*sec, "a"); got != nil || outcome != OutcomeExited || e != nil {
		t.Fatal(got, outcome, e)
	}
	wantCode(t, tab.forget("a"), "")
	wantCode(t, tab.forget("a"), "")
	if got, outcome, e := tab.kill(4*sec, "a"); got != nil || outcome != OutcomeUnknown || e != nil {
		t.Fatal(got, outcome, e)
	}
	tab.strangers["s"] = 7
	_, _, e = tab.kill(4*sec, "s")
	wantCode(t, e, CodeStranger)
	wantCode(t, tab.stop(), "")
	_, e = tab.beginStart(4*sec, startReq("a", 5, false))
	wantCode(t, e, CodeStopping)
}

func TestStoppingReasons(t *testing.T) {
	tab := leased(t)
	polite := run(t, tab, sec, startReq("polite", 5, false))
	prot := run(t, tab, sec, startReq("prot", 5, true))
	if got := len(tab.beginStopping()); got != 2 {
		t.Fatalf("%d instances get SIGTERM", got)
	}
	if rec := tab.exit(2*sec, polite, 0, 0); rec.Reason != ReasonStopping {
		t.Fatalf("%+v", rec)
	}
	tab.observe(10 * sec)
	if prot.rec.State != StateKilling || prot.rec.Reason != ReasonLease {
		t.Fatalf("the lease does not hold while stopping: %+v", prot.rec)
	}
}

func TestExitedRecordsAreBounded(t *testing.T) {
	tab := leased(t)
	for i := range MaxExited + 10 {
		tab.exit(int64(i), run(t, tab, sec, startReq(fmt.Sprint("x", i), 5, false)), 0, 0)
	}
	if len(tab.exited) != MaxExited || len(tab.vms) != MaxExited || tab.vms["x9"] != nil || tab.vms["x10"] == nil {
		t.Fatalf("%d exited, %d vms", len(tab.exited), len(tab.vms))
	}
}

// model drives a table with random operations and checks the promise after
// each one.
type model struct {
	t           *testing.T
	rng         *rand.Rand
	tab         *table
	now         int64
	maxSession  uint64
	lapsedOnce  map[uint64]bool
	lastSession uint64
	lastLine    int64
	pid         int
	starting    []*instance
}

func (m *model) pick() string { return string(rune('a' + m.rng.IntN(6))) }

func (m *model) live(ok func(*instance) bool) *instance {
	for _, in := range m.tab.vms { // map order is random enough, and irrelevant
		if ok(in) {
			return in
		}
	}
	return nil
}

func (m *model) step() {
	switch m.rng.IntN(12) {
	case 0, 1:
		m.now += m.rng.Int64N(4 * sec)
	case 2, 3:
		m.extend()
	case 4, 5:
		session := m.maxSession - min(m.maxSession, m.rng.Uint64N(3)) + m.rng.Uint64N(2)
		if in, e := m.tab.beginStart(m.now, startReq(m.pick(), session, m.rng.IntN(2) == 0)); e == nil {
			if session != m.tab.session || m.tab.lapsed || m.now >= m.tab.deadlineNS || in.prev != nil && in.prev.rec.State != StateExited {
				m.t.Fatalf("start reserved without right: session %d, table %+v, now %d", session, m.tab, m.now)
			}
			m.starting = append(m.starting, in)
		}
	case 6, 7:
		m.finish()
	case 8:
		_, _, _ = m.tab.kill(m.now, m.pick())
	case 9:
		_ = m.tab.protect(m.now, m.pick(), m.rng.IntN(2) == 0)
	case 10:
		if in := m.live(func(in *instance) bool { return in.proc != nil }); in != nil {
			m.tab.exit(m.now, in, 0, 0)
		}
	case 11:
		_ = m.tab.forget(m.pick())
		m.tab.observe(m.now)
	}
}

func (m *model) extend() {
	session := m.maxSession + m.rng.Uint64N(3) - min(m.maxSession, 1)
	deadline := m.now + m.rng.Int64N(8*sec) - sec
	blocked := m.live(func(in *instance) bool {
		return in.rec.Protected && in.rec.State != StateExited && (m.tab.lapsed || m.now >= m.tab.deadlineNS)
	}) != nil
	got, e := m.tab.extend(m.now, session, deadline)
	if e != nil {
		return
	}
	if m.lapsedOnce[session] || session < m.maxSession || got <= m.now || session > m.maxSession && m.maxSession > 0 && blocked {
		m.t.Fatalf("extend of session %d granted until %d at %d, blocked %v", session, got, m.now, blocked)
	}
	m.maxSession = max(m.maxSession, session)
}

func (m *model) finish() {
	if len(m.starting) == 0 {
		return
	}
	i := m.rng.IntN(len(m.starting))
	in := m.starting[i]
	m.starting = append(m.starting[:i], m.starting[i+1:]...)
	if m.rng.IntN(8) == 0 {
		m.tab.failStart(in)
		return
	}
	m.pid++
	in.proc = &process{pid: m.pid}
	e := m.tab.finishStart(m.now, in, m.pid, 1)
	right := in.session == m.tab.session && !m.tab.lapsed && m.now < m.tab.deadlineNS
	if e == nil && (!right || in.rec.State != StateRunning) {
		m.t.Fatalf("start of %+v committed without right at %d: %+v", in, m.now, m.tab)
	}
	if e != nil && in.rec.State != StateKilling {
		m.t.Fatalf("refused start not killed: %+v", in.rec)
	}
}

func (m *model) check() {
	tab := m.tab
	if tab.session < m.lastSession || tab.session == m.lastSession && tab.deadlineNS < m.lastLine {
		m.t.Fatalf("session %d until %d after session %d until %d", tab.session, tab.deadlineNS, m.lastSession, m.lastLine)
	}
	m.lastSession, m.lastLine = tab.session, tab.deadlineNS
	if tab.lapsed {
		m.lapsedOnce[tab.session] = true
	}
	if m.lapsedOnce[tab.session] && !tab.lapsed {
		m.t.Fatalf("session %d came back to life", tab.session)
	}
	live, kill := 0, make(map[*instance]bool)
	for _, in := range tab.condemned() {
		kill[in] = true
	}
	for vm, in := range tab.vms {
		if in.rec.VM != vm {
			m.t.Fatalf("%s is filed under %s", in.rec.VM, vm)
		}
		if in.rec.State != StateExited {
			live++
		}
		if in.proc != nil && in.rec.Protected && tab.lapsed && !kill[in] {
			m.t.Fatalf("protected VM not being killed after the lapse: %+v", in.rec)
		}
	}
	if live != tab.live || len(tab.exited) > MaxExited {
		m.t.Fatalf("live %d, counted %d, exited %d", tab.live, live, len(tab.exited))
	}
}

func runModel(t *testing.T, seed uint64, steps int) {
	t.Helper()
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), tab: newTable(), now: sec, lapsedOnce: make(map[uint64]bool)}
	for range steps {
		m.step()
		m.check()
	}
}

func TestNoSequenceBreaksThePromise(t *testing.T) {
	for seed := range uint64(400) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { runModel(t, seed, 500) })
	}
}
