// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/torture"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// Exit codes: 0 all promises kept, 1 a violation or a failure, 2 usage.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run()) }

type config struct {
	seed              uint64
	nodes, perNode    int
	minutes           float64
	diskMiB           int
	bin, work, runDir string
	schedule          int
}

func run() int {
	lab.KeepToOneself()
	var cfg config
	flag.Uint64Var(&cfg.seed, "seed", 1, "what the faults and operations are drawn from")
	flag.IntVar(&cfg.nodes, "nodes", 3, "hosts, 3 or 5")
	flag.IntVar(&cfg.perNode, "clients", 4, "clients per host")
	flag.Float64Var(&cfg.minutes, "minutes", 5, "length of the time with faults")
	flag.IntVar(&cfg.diskMiB, "disk", 128, "size of each host's disk in MiB")
	flag.StringVar(&cfg.bin, "bin", "", "folder with musterd and muster")
	flag.StringVar(&cfg.work, "work", "", "folder for disks, logs and findings")
	flag.StringVar(&cfg.runDir, "run", "", "folder for sockets, a short path")
	flag.IntVar(&cfg.schedule, "schedule", 0, "print that many episodes of the seed, and no more")
	flag.Parse()
	if cfg.nodes != 3 && cfg.nodes != 5 || flag.NArg() > 0 || cfg.perNode < 1 || cfg.minutes <= 0 {
		flag.Usage()
		return exitUsage
	}
	if cfg.schedule > 0 {
		s := torture.NewSchedule(cfg.seed, cfg.nodes)
		for range cfg.schedule {
			fmt.Println(s.Next())
		}
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ok, err := campaigned(ctx, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
	}
	if err != nil || !ok {
		return exitFailed
	}
	return 0
}

func campaigned(ctx context.Context, cfg config) (ok bool, err error) {
	if cfg.bin == "" || cfg.work == "" || cfg.runDir == "" {
		return false, errors.New("-bin, -work and -run are needed; use scripts/torture")
	}
	if err := os.MkdirAll(filepath.Join(cfg.work, "log"), 0o700); err != nil {
		return false, err
	}
	c := newCampaign(cfg)
	defer c.end()
	if err := c.begin(ctx); err != nil {
		return false, fmt.Errorf("begin: %w", err)
	}
	c.say("the cluster is up: %d nodes, %d clients; seed %d", cfg.nodes, len(c.clients), cfg.seed)
	c.torment(ctx, time.Duration(cfg.minutes*float64(time.Minute)))
	return c.finish(ctx)
}
