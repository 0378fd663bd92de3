// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestBootClockTimer(t *testing.T) {
	var clock BootClock
	timer, err := clock.NewTimer()
	if err != nil {
		t.Fatal(err)
	}
	fired := func(wait time.Duration) bool {
		select {
		case <-timer.C():
			return true
		case <-time.After(wait):
			return false
		}
	}
	at := clock.NowNS() + int64(50*time.Millisecond)
	wantErr(t, timer.Set(at), nil)
	if !fired(10*time.Second) || clock.NowNS() < at {
		t.Fatalf("fired %v too early", time.Duration(at-clock.NowNS()))
	}
	wantErr(t, timer.Set(clock.NowNS()-sec), nil)
	if !fired(10 * time.Second) {
		t.Fatal("a past time does not fire at once")
	}
	wantErr(t, timer.Set(-5), nil)
	if !fired(10 * time.Second) {
		t.Fatal("a negative time does not fire at once")
	}
	for disarmed := false; !disarmed; {
		at := clock.NowNS() + int64(30*time.Millisecond)
		wantErr(t, timer.Set(at), nil)
		wantErr(t, timer.Set(0), nil)
		disarmed = clock.NowNS() < at // or it may have fired before
		if fired(100*time.Millisecond) && disarmed {
			t.Fatal("a disarmed timer fired")
		}
	}
	wantErr(t, timer.Close(), nil)
	wantErr(t, timer.Close(), nil)
	if timer.Set(clock.NowNS()) == nil {
		t.Fatal("a closed timer can be armed")
	}
}

func TestParseProcStat(t *testing.T) {
	const tail = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 0 4242 99 98"
	for _, name := range []string{"(qemu)", "(a b)", "(a) S 1 (b))"} {
		st, err := parseProcStat("12 " + name + tail)
		if err != nil || st != (procStat{state: 'S', flags: 6, threads: 17, startTicks: 4242}) {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
	}
	for _, bad := range []string{"", "12 (x", "12 (x)", "12 (x) S 1 2", strings.Replace("1 (x)"+tail, "4242", "x", 1)} {
		if _, err := parseProcStat(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	st, err := readProcStat(os.Getpid())
	if err != nil || st.gone() || st.startTicks == 0 || st.threads < 2 {
		t.Fatalf("self: %+v, %v", st, err)
	}
	// A dead leader with a living thread is not gone.
	if (procStat{state: 'Z', threads: 2}).gone() || !(procStat{state: 'Z', threads: 1}).gone() || !(procStat{state: 'X'}).gone() {
		t.Fatal("gone() is wrong")
	}
}

func TestParseEnviron(t *testing.T) {
	tests := []struct {
		env, vm string
		ok      bool
	}{
		{"A=b\x00MUSTER_GUARD_DIR=/run/g\x00MUSTER_VM=a1\x00", "a1", true},
		{"MUSTER_VM=a1\x00MUSTER_GUARD_DIR=/run/g", "a1", true},
		{"MUSTER_GUARD_DIR=/run/g\x00", "", true},
		{"MUSTER_GUARD_DIR=/run/g\x00MUSTER_VM=../x\x00", "", true},
		{"MUSTER_GUARD_DIR=/run/g2\x00MUSTER_VM=a1\x00", "a1", false},
		{"XMUSTER_GUARD_DIR=/run/g\x00MUSTER_VM=a1\x00", "a1", false},
		{"", "", false},
	}
	for _, tt := range tests {
		if vm, ok := parseEnviron([]byte(tt.env), "/run/g"); vm != tt.vm || ok != tt.ok {
			t.Errorf("%q: %q, %v", tt.env, vm, ok)
		}
	}
}

func TestFindCgroupMount(t *testing.T) {
	const v1 = "33 32 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	for text, want := range map[string]string{
		"": "", v1: "",
		v1 + "42 32 0:39 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw\n": "/sys/fs/cgroup/unified",
		"30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n":                "/sys/fs/cgroup",
	} {
		if got := findCgroupMount(text); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestOpenLog(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	write := func(s string) {
		t.Helper()
		f, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(s); err != nil {
			t.Fatal(err)
		}
		wantErr(t, f.Close(), nil)
	}
	write("one ")
	write("two ")
	data, _ := os.ReadFile(path)
	fi, err := os.Stat(path)
	if err != nil || string(data) != "one two " || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%q, %v, %v", data, fi, err)
	}
	write(strings.Repeat("x", LogRotateBytes))
	write("new")
	data, _ = os.ReadFile(path)
	old, err := os.Stat(path + ".1")
	if err != nil || string(data) != "new" || old.Size() <= LogRotateBytes {
		t.Fatalf("%q, %v", data, err)
	}
	fifo := filepath.Join(dir, "fifo")
	link := filepath.Join(dir, "link")
	wantErr(t, unix.Mkfifo(fifo, 0o600), nil)
	wantErr(t, os.Symlink(path, link), nil)
	for _, bad := range []string{fifo, link, dir, filepath.Join(dir, "none", "log")} {
		if _, err := openLog(bad); err == nil {
			t.Errorf("%s opened as a log", bad)
		}
	}
}

func TestWatchdogLevels(t *testing.T) {
	class := t.TempDir()
	for name, id := range map[string]string{"watchdog0": "iTCO_wdt\n", "watchdog1": "Software Watchdog\n"} {
		wantErr(t, os.Mkdir(filepath.Join(class, name), 0o755), nil)
		wantErr(t, os.WriteFile(filepath.Join(class, name, "identity"), []byte(id), 0o644), nil)
	}
	for path, want := range map[string]Level{
		"/dev/watchdog": LevelHardware, "/dev/watchdog0": LevelHardware, "/dev/watchdog1": LevelSoftdog,
	} {
		if got := levelOf(watchdogIdentity(class, path)); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	if id := watchdogIdentity(class, "/dev/watchdog7"); id != "" {
		t.Errorf("identity %q of nothing", id)
	}
}

func TestNoWatchdogIsSaid(t *testing.T) {
	file := filepath.Join(t.TempDir(), "precious")
	wantErr(t, os.WriteFile(file, []byte("data"), 0o600), nil)
	for _, setting := range []string{WatchdogNone, "/dev/no-such-watchdog", file, os.DevNull} {
		w := openWatchdog(setting)
		if w.level != LevelProcess || w.note == "" || strings.HasPrefix(w.note, hardenedOK) {
			t.Errorf("%s: level %q, note %q", setting, w.level, w.note)
		}
		if err := errors.Join(w.pet(), w.close(true)); err != nil {
			t.Errorf("%s: %v", setting, err)
		}
	}
	if data, _ := os.ReadFile(file); string(data) != "data" {
		t.Fatalf("a plain file was written to: %q", data)
	}
}

func TestWatchdogClose(t *testing.T) {
	for _, clean := range []bool{true, false} {
		f, err := os.CreateTemp(t.TempDir(), "dog")
		if err != nil {
			t.Fatal(err)
		}
		w := &watchdog{f: f}
		wantErr(t, errors.Join(w.pet(), w.close(clean)), nil)
		data, err := os.ReadFile(f.Name())
		if err != nil || bytes.HasSuffix(data, []byte("V")) != clean {
			t.Errorf("clean %v: %q, %v", clean, data, err)
		}
	}
}

func TestLogWriterNeverBlocks(t *testing.T) {
	r, w := io.Pipe() // nobody reads yet
	lw := newLogWriter(w)
	for range 2 * logQueue {
		if n, err := lw.Write([]byte("line\n")); n != 5 || err != nil {
			t.Fatal(n, err)
		}
	}
	var got bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&got, r)
	}()
	lw.close()
	lw.close()
	_, _ = lw.Write([]byte("late\n"))
	_ = w.Close()
	<-read
	if !strings.Contains(got.String(), "log lines dropped") || strings.Contains(got.String(), "late") {
		t.Fatalf("%d bytes, no word of dropped lines", got.Len())
	}
}

func FuzzParseProcStat(f *testing.F) {
	f.Add("12 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 0 4242 99")
	f.Fuzz(func(_ *testing.T, line string) { _, _ = parseProcStat(line) })
}

// A process whose threads are all in do_exit is told from one that runs, that
// sleeps, and whose leader alone has ended.
func TestExitingIsToldFromRunning(t *testing.T) {
	f := newForker(shortDir(t), nil)
	defer f.close()
	p, err := f.start(StartRequest{VM: "x", Argv: []string{"/bin/sleep", "60"}, LogPath: filepath.Join(shortDir(t), "log")}, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if f.exiting(p) {
		t.Fatal("a running process is taken for an ending one")
	}
	f.signal(p, unix.SIGKILL)
	eventually(t, "killed and not reaped", func() bool { return f.exiting(p) }) // a zombie is in do_exit for good
	eventually(t, "reaped", func() bool { _, ok := f.reap(p); return ok })
}
