// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asUser is a sleeper that runs as a user of its own.
func asUser(dir, vm string, uid uint32) StartRequest {
	req := sleeper(dir, vm, 1, true)
	req.User = &User{UID: uid, GID: uid, Groups: []uint32{70000}}
	return req
}

// procStatus returns the fields of /proc/PID/status.
func procStatus(t testing.TB, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.Join(strings.Fields(value), " ")
	}
	return out
}

func TestUserHasItsIdsAndNothingElse(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	req := asUser(dir, "a", 70001)
	req.Env = []string{"PATH=/usr/bin"}
	l := start(t, c, req)
	st := procStatus(t, l.pid)
	const none = "0000000000000000"
	for name, want := range map[string]string{
		"Uid": "70001 70001 70001 70001", "Gid": "70001 70001 70001 70001", "Groups": "70000",
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapAmb": none, "NoNewPrivs": "1",
	} {
		if st[name] != want {
			t.Errorf("%s is %q, want %q", name, st[name], want)
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", l.pid))
	if want := "PATH=/usr/bin\x00" + EnvGuardDir + "=" + dir + "\x00" + EnvVM + "=a\x00"; err != nil || string(env) != want {
		t.Errorf("environment %q, %v", env, err)
	}
	eventually(t, "only stdio is open", func() bool { // the loader opens libraries first
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", l.pid))
		return err == nil && len(fds) == 3
	})
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", l.pid))
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 bytes") {
		t.Errorf("limits %s, %v", limits, err)
	}
	if rec := record(t, c, "a"); rec.UID != 70001 {
		t.Errorf("the record says uid %d", rec.UID)
	}
	if h, err := c.Hello(testCtx(t)); err != nil || !slices.Equal(h.Features, []string{FeatureUser, FeatureControl}) {
		t.Errorf("%+v, %v", h, err)
	}
	// The guard itself goes on as root, and so does a VM without a user.
	if st := procStatus(t, start(t, c, sleeper(dir, "b", 1, true)).pid); st["Uid"] != "0 0 0 0" {
		t.Errorf("without a user it runs as %s", st["Uid"])
	}
}

// PDEATHSIG is cleared by a change of ids, so it has to be set after it.
func TestGuardDeathTakesChildrenOfOtherUsers(t *testing.T) {
	dir := shortDir(t)
	g, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	var all []leftover
	for i := range 5 {
		all = append(all, start(t, c, asUser(dir, fmt.Sprint("u", i), uint32(70001+i))))
	}
	wantErr(t, g.Process.Kill(), nil)
	_ = g.Wait()
	eventually(t, "the children are gone", func() bool {
		for _, l := range all {
			if !l.gone() {
				return false
			}
		}
		return true
	})
}

func TestNewGuardKillsLeftoversOfOtherUsers(t *testing.T) {
	dir := shortDir(t)
	cmd := exec.Command(sleepPath(), "1000")
	cmd.Env = []string{EnvGuardDir + "=" + dir, EnvVM + "=old"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 70009, Gid: 70009}}
	wantErr(t, cmd.Start(), nil)
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	newGuard(t, dir)
	if st, err := readProcStat(cmd.Process.Pid); err != nil || !st.gone() {
		t.Fatalf("the leftover lives: %+v, %v", st, err)
	}
}

func TestLeaseAndKillReachOtherUsers(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	wantErr(t, c.Watch(testCtx(t)), nil)
	extendFor(t, c, 1, time.Minute) // however long the starts take
	killed, lapsed := start(t, c, asUser(dir, "k", 70001)), start(t, c, asUser(dir, "l", 70002))
	if got, err := c.Kill(testCtx(t), "k"); err != nil || got != OutcomeKilled || !killed.gone() {
		t.Fatalf("%q, %v", got, err)
	}
	extendFor(t, c, 2, 300*time.Millisecond)
	eventually(t, "the lease ends the other", lapsed.gone)
}

func atoi(s string) int { n, _ := strconv.Atoi(s); return n }

func TestUserMayLockMemory(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	req := asUser(dir, "a", 70001)
	req.User.MemlockBytes = 4 << 20
	l := start(t, c, req)
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", l.pid))
	_, rest, _ := strings.Cut(string(limits), "Max locked memory")
	if f := strings.Fields(rest); err != nil || len(f) == 0 || f[0] != "unlimited" && atoi(f[0]) < 4<<20 {
		t.Fatalf("%s, %v", limits, err)
	}
}

// A program that the user may not execute, a directory that it may not enter.
func TestUserThatMayNotStartIsRefusedAndLeavesNothing(t *testing.T) {
	dir := shortDir(t)
	_, c := newGuard(t, dir)
	extendFor(t, c, 1, time.Minute)
	closed := filepath.Join(dir, "closed")
	wantErr(t, os.Mkdir(closed, 0o700), nil)
	req := asUser(dir, "a", 70001)
	req.Dir = closed
	_, err := c.Start(testCtx(t), req)
	wantErr(t, err, ErrStartFailed)
	req.Dir = ""
	start(t, c, req)
}

func TestUserIsChecked(t *testing.T) {
	const start = `{"id":1,"op":"start","vm":"a","epoch":1,"session":1,"protected":false,"argv":["/x"],"log_path":"/l","user":%s}`
	for _, bad := range []string{
		`{}`, `{"uid":0,"gid":5}`, `{"uid":5,"gid":0}`, `{"uid":5,"gid":5,"groups":[0]}`, `{"uid":4294967295,"gid":5}`,
		`{"uid":-1,"gid":5}`, `"root"`, `null`, `{"uid":5,"GID":5}`, `{"uid":5,"gid":5,"gid":6}`, `{"uid":5,"gid":5,"caps":1}`, `{"uid":5,"gid":5,"groups":[` + strings.Repeat("5,", MaxGroups) + `5]}`,
	} {
		if _, e := decodeRequest([]byte(fmt.Sprintf(start, bad))); e == nil || e.Code != CodeBadRequest {
			t.Errorf("%s: %v", bad, e)
		}
	}
	req, e := decodeRequest([]byte(fmt.Sprintf(start, `{"uid":70001,"gid":70002,"groups":[70000],"memlock_bytes":`+strconv.Itoa(1<<30)+`}`)))
	if e != nil {
		t.Fatal(e)
	}
	u := req.body.(StartRequest).User
	if u == nil || u.UID != 70001 || u.GID != 70002 || len(u.Groups) != 1 || u.MemlockBytes != 1<<30 {
		t.Fatalf("%+v", u)
	}
}
