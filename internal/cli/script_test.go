// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// scriptPrograms are what the scripts can run besides the system's programs; each
// is this binary under another name.
var scriptPrograms = map[string]func(){
	"muster": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		s := System("0.9-test")
		s.RaceDelay, s.Soon = time.Minute, time.Minute // the scripts say which server is asked first
		os.Exit(Run(ctx, os.Args[1:], s))
	},
}

func TestMain(m *testing.M) { testscript.Main(m, scriptPrograms) }

type clusterKey struct{}

// TestScripts runs testdata/script/*.txtar, each against a cluster of its own.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			f, env := newFake(t, e.WorkDir)
			e.Defer(f.close)
			e.Values[clusterKey{}] = f
			for k, v := range env {
				e.Setenv(k, v)
			}
			// With the race detector a program sleeps for a second before it exits, for the
			// sake of its other goroutines; a command that is over has none that matter.
			e.Setenv("GORACE", "atexit_sleep_ms=10 "+os.Getenv("GORACE"))
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("DATA", filepath.Join(e.WorkDir, "data"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"cluster": clusterCommand, "exitcode": exitCodeCommand},
	})
}

// exitCodeCommand runs "exitcode N command args...".
func exitCodeCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N command args...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// clusterCommand steers the fake cluster from a script.
func clusterCommand(ts *testscript.TestScript, neg bool, args []string) {
	f := ts.Value(clusterKey{}).(*fakeCluster)
	if neg || len(args) == 0 {
		ts.Fatalf("usage: cluster down|mode|count|log|print|end|await ...")
	}
	switch args[0] {
	case "down":
		f.mu.Lock()
		f.mode[args[1]] = "cut" // ends WebSockets, which the test server forgets
		f.wake()
		f.mu.Unlock()
		f.servers[args[1]].CloseClientConnections()
		f.servers[args[1]].Close()
	case "mode": // cluster mode NODE MODE
		f.mu.Lock()
		f.mode[args[1]] = args[2]
		f.wake()
		f.mu.Unlock()
	case "count": // cluster count KIND N
		f.mu.Lock()
		defer f.mu.Unlock()
		for k, list := range f.objects {
			if string(k) == args[1] && fmt.Sprint(len(list)) != args[2] {
				ts.Fatalf("%d objects of kind %s, want %s", len(list), k, args[2])
			}
		}
	case "logged": // cluster logged TEXT: some request matches
		f.mu.Lock()
		defer f.mu.Unlock()
		if all := strings.Join(f.log, "\n"); !strings.Contains(all, args[1]) {
			ts.Fatalf("no request %q in:\n%s", args[1], all)
		}
	case "print":
		f.print(strings.Join(args[1:], " ") + "\n")
	case "end":
		f.mu.Lock()
		f.ended = true
		f.wake()
		f.mu.Unlock()
	case "await": // cluster await FILE TEXT
		deadline := time.Now().Add(time.Minute)
		for {
			b, _ := os.ReadFile(ts.MkAbs(args[1]))
			if strings.Contains(string(b), args[2]) {
				return
			}
			if time.Now().After(deadline) {
				ts.Fatalf("%s never held %q:\n%s", args[1], args[2], b)
			}
			time.Sleep(10 * time.Millisecond)
		}
	default:
		ts.Fatalf("unknown: cluster %s", args[0])
	}
}
