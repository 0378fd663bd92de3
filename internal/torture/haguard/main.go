// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

// Command haguard is muster-guard on the hosts of scripts/torture ha: its watchdog
// is a file. The campaign resets a host whose file does not grow, as the device
// would; everything else is package guard.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/internal/guard"
	"github.com/muster-vm/muster/internal/torture/lab"
)

func main() { os.Exit(run()) }

func run() int {
	runDir := flag.String("run-dir", "", "directory of the lock and the socket")
	path := flag.String("watchdog", "", "the file")
	flag.Parse()
	guard.DetachFromCaller()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	err := serve(ctx, *runDir, *path)
	switch {
	case err == nil:
		return guard.ExitOK
	case errors.Is(err, guard.ErrLocked):
		return guard.ExitLocked
	}
	fmt.Fprintln(os.Stderr, "haguard:", err)
	return guard.ExitFailed
}

func serve(ctx context.Context, runDir, path string) error {
	dog, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	s, err := guard.NewServer(guard.Config{RunDir: runDir, Device: dog, DeviceTimeout: lab.DogTimeout, Harden: true, Log: os.Stderr})
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}
