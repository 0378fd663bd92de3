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
	nodes, vms        int
	minutes           float64
	bin, work, runDir string
	image             string
	schedule          int
	failovers, crowd  int    // what is measured in place of a campaign
	bmc               bool   // the hosts have power devices
	ceph              string // script that starts one; "": a directory for all hosts
}

func run() int {
	lab.KeepToOneself()
	var cfg config
	flag.Uint64Var(&cfg.seed, "seed", 1, "what the faults are drawn from")
	flag.IntVar(&cfg.nodes, "nodes", 3, "hosts, 3 or 5")
	flag.IntVar(&cfg.vms, "vms", 2, "protected VMs")
	flag.Float64Var(&cfg.minutes, "minutes", 10, "length of the time with faults")
	flag.StringVar(&cfg.bin, "bin", "", "folder with musterd, muster and the guard")
	flag.StringVar(&cfg.image, "image", "", "disk image of the guests")
	flag.StringVar(&cfg.work, "work", "", "folder for disks, logs and findings")
	flag.StringVar(&cfg.runDir, "run", "", "folder for sockets, a short path")
	flag.IntVar(&cfg.schedule, "schedule", 0, "print that many episodes of the seed, and no more")
	flag.StringVar(&cfg.ceph, "ceph", "", "the script that starts a Ceph, which has the guests' disks")
	flag.IntVar(&cfg.failovers, "failovers", 0, "measure that many failovers, and make no other faults")
	flag.BoolVar(&cfg.bmc, "bmc", false, "the hosts have power devices")
	flag.IntVar(&cfg.crowd, "crowd", 0, "measure the loss of a host with that many VMs, and make no other faults")
	flag.Parse()
	if cfg.nodes != 3 && cfg.nodes != 5 || flag.NArg() > 0 || cfg.vms < 1 || cfg.minutes <= 0 {
		flag.Usage()
		return exitUsage
	}
	if cfg.bmc && cfg.failovers > cfg.nodes-1 {
		fmt.Fprintf(os.Stderr, "torture: -bmc: a node is switched off at most once in ten minutes, so %d failovers cannot be measured in a row; give at most %d, and begin again for more\n", cfg.failovers, cfg.nodes-1)
		return exitUsage
	}
	if cfg.schedule > 0 {
		s := newSchedule(cfg.seed, cfg.nodes, cfg.ceph != "")
		for range cfg.schedule {
			fmt.Println(s.next())
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
	if cfg.bin == "" || cfg.work == "" || cfg.runDir == "" || cfg.image == "" {
		return false, errors.New("-bin, -work, -run and -image are needed; use scripts/torture")
	}
	if err := os.MkdirAll(filepath.Join(cfg.work, "log"), 0o755); err != nil {
		return false, err
	}
	c := newCampaign(cfg)
	defer c.end()
	if err := c.begin(ctx); err != nil {
		return false, fmt.Errorf("begin: %w", err)
	}
	switch {
	case cfg.crowd > 0:
		err = c.beside(ctx, func() error { return c.crowded(ctx) })
		return err == nil && len(c.violations) == 0, err
	case cfg.failovers > 0:
		err = c.beside(ctx, func() error { return c.measure(ctx, cfg.failovers) })
		c.showFailovers()
		return err == nil && len(c.violations) == 0, err
	}
	c.say("the cluster is up: %d nodes, %d protected VMs that count; seed %d", cfg.nodes, cfg.vms, cfg.seed)
	c.torment(ctx, time.Duration(cfg.minutes*float64(time.Minute)))
	return c.finish(ctx)
}
