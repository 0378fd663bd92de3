// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

// Command muster-guard starts and parents the QEMU processes of one host and
// kills the protected ones when their lease ends. See package guard.
//
// Exit codes: 0 stopped, 1 another guard has the run directory, 2 usage,
// 3 anything else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/internal/guard"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stderr))
}

func run(args []string, stderr io.Writer) int {
	fs := flag.NewFlagSet("muster-guard", flag.ContinueOnError)
	fs.SetOutput(stderr)
	runDir := fs.String("run-dir", "", "`directory` of the lock and the socket (required)")
	watchdog := fs.String("watchdog", guard.WatchdogAuto, "auto, none or the `path` of a watchdog device")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return guard.ExitOK
		}
		return guard.ExitUsage
	}
	if *runDir == "" || fs.NArg() > 0 {
		_, _ = fmt.Fprintln(stderr, "muster-guard: --run-dir is required, and no other arguments")
		fs.Usage()
		return guard.ExitUsage
	}
	guard.DetachFromCaller()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	s, err := guard.NewServer(guard.Config{RunDir: *runDir, Watchdog: *watchdog, Harden: true, Log: stderr})
	if err == nil {
		err = s.Serve(ctx)
	}
	if err == nil {
		return guard.ExitOK
	}
	_, _ = fmt.Fprintln(stderr, "muster-guard:", err)
	if errors.Is(err, guard.ErrLocked) {
		return guard.ExitLocked
	}
	return guard.ExitFailed
}
