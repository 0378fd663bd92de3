// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"syscall"
	"time"

	"github.com/muster-vm/muster/configdb"
)

// gcPercent: with gigabytes of replicas in one process, twice the live heap
// would be too much.
const gcPercent = 40

func main() {
	if err := run(os.Args[1:]); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "simulate:", err)
		}
		os.Exit(1)
	}
}

// writeHeap writes a heap profile unless path is empty.
func writeHeap(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("heap").WriteTo(f, 0), f.Close())
}

// timing is the daemon's, stretched.
func timing(heartbeat time.Duration) configdb.Timing {
	return configdb.Timing{Heartbeat: heartbeat, Election: heartbeat, Lease: heartbeat * 6 / 7, Commit: heartbeat * 4 / 7}
}

func run(args []string) error {
	s := size{}
	fs := flag.NewFlagSet("simulate", flag.ContinueOnError)
	fs.IntVar(&s.nodes, "nodes", 200, "nodes; the first five vote")
	fs.IntVar(&s.vms, "vms", 10000, "VMs that are created")
	fs.IntVar(&s.changes, "changes", 50000, "changes of VMs' status")
	fs.DurationVar(&s.idle, "idle", 10*time.Second, "how long to measure the idle cluster")
	heartbeat := fs.Duration("heartbeat", 0, "time without a leader's word until an election; 0 is the daemon's own")
	timeout := fs.Duration("timeout", 40*time.Minute, "bound of the whole run")
	profile := fs.String("profile", "", "file for a CPU profile of the changes and what came before")
	heap := fs.String("heap", "", "file for a heap profile of the end, when all nodes are still there")
	verbose := fs.Bool("log", false, "print the nodes' log")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if s.nodes < 1 || s.vms < 1 || s.changes < 1 {
		return fmt.Errorf("--nodes, --vms and --changes must be at least 1")
	}
	if *heartbeat > 0 {
		s.timing = timing(*heartbeat)
	}
	level := slog.LevelError
	if *verbose {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	debug.SetGCPercent(gcPercent)
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), *timeout, fmt.Errorf("not done within --timeout %s", *timeout))
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	s.atEnd = func() error { return writeHeap(*heap) }
	r, err := simulate(ctx, s, log, func(format string, a ...any) {
		fmt.Fprintf(os.Stderr, "== %6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, a...))
	})
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	if err != nil {
		return err
	}
	r.table(os.Stdout)
	fmt.Fprintf(os.Stderr, "== %6.1f s  all %d replicas are the same (%s, %s/%s)\n", time.Since(began).Seconds(), s.nodes, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return nil
}
