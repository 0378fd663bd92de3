// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command muster is the command line of a cluster. It talks only REST, to any
// node; see internal/cli.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/muster-vm/muster/internal/cli"
	"github.com/muster-vm/muster/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Run(ctx, os.Args[1:], cli.System(version.Version)))
}
