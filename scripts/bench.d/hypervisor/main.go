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
	"syscall"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
)

// The systems of the table.
const (
	muster  = "muster"
	bare    = "bare-qemu"
	libvirt = "libvirt"
)

const (
	fullRounds, quickRounds = 7, 3
	// fleet is how many VMs are started in a row, at once, and left idle.
	fleet = 20
	// clones is how many linked clones one command makes.
	clones, quickClones = 100, 20
)

type options struct {
	programs, data, guest string
	quick                 bool
	rounds                int
	only                  string // one group of rows; "" is all
}

// bench is one run.
type bench struct {
	options
	sheet  report.Sheet
	ours   *ours
	peer   *peer
	direct *direct
	load   foreign
}

func main() { os.Exit(run()) }

func run() int {
	var o options
	flag.StringVar(&o.programs, "programs", "", "folder with musterd, muster and muster-guard")
	flag.StringVar(&o.data, "data", "", "folder for data and logs")
	flag.StringVar(&o.guest, "guest", "", "disk image of a small guest with a serial console")
	flag.BoolVar(&o.quick, "quick", false, "few rounds")
	flag.IntVar(&o.rounds, "rounds", 0, "another number of rounds")
	flag.StringVar(&o.only, "only", "", "the name of one group of rows")
	flag.Parse()
	if flag.NArg() > 0 || o.programs == "" || o.data == "" || o.guest == "" {
		fmt.Fprintln(os.Stderr, "hypervisor: called with wrong arguments; use scripts/bench")
		return 2
	}
	if o.rounds == 0 {
		o.rounds = fullRounds
		if o.quick {
			o.rounds = quickRounds
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	b := &bench{options: o, sheet: report.Sheet{Ours: muster}}
	if err := errors.Join(b.all(ctx), b.end()); err != nil {
		fmt.Fprintln(os.Stderr, "hypervisor:", err)
		return 1
	}
	mode := "full"
	if o.quick {
		mode = "quick"
	}
	fmt.Println()
	if err := errors.Join(b.sheet.Table(os.Stdout), b.sheet.Line(os.Stdout, "hypervisor", mode, b.load.worst)); err != nil {
		fmt.Fprintln(os.Stderr, "hypervisor:", err)
		return 1
	}
	return 0
}

// all begins the systems and takes the rows in their order.
func (b *bench) all(ctx context.Context) (err error) {
	if err := os.RemoveAll(b.data); err != nil {
		return err
	}
	if err := os.MkdirAll(b.data, 0o755); err != nil {
		return err
	}
	if b.ours, err = beginOurs(ctx, b.programs, b.data, b.guest); err != nil {
		return fmt.Errorf("muster: %w", err)
	}
	if b.peer, err = beginLibvirt(ctx, b.data, b.guest); err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	if b.direct, err = beginBare(ctx, b.ours); err != nil {
		return fmt.Errorf("bare QEMU: %w", err)
	}
	taken := 0
	for _, row := range []struct {
		name string
		take func(context.Context) error
	}{
		{"start", b.starts}, {"first serial byte", b.serial}, {"state", b.states},
		{"migration", b.migrations}, {"twenty in a row and at once", b.fleets}, {"idle", b.idle}, {"linked clones", b.clones},
	} {
		if b.only != "" && b.only != row.name {
			continue
		}
		fmt.Printf("== %s\n", row.name)
		if err := b.load.during(row.name, func() error { return row.take(ctx) }); err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		taken++
	}
	if taken == 0 {
		return fmt.Errorf("there are no rows %q", b.only)
	}
	return nil
}

// end takes everything down, also after an error.
func (b *bench) end() error {
	var errs []error
	if b.direct != nil {
		errs = append(errs, b.direct.end())
	}
	if b.peer != nil {
		errs = append(errs, b.peer.end())
	}
	if b.ours != nil {
		errs = append(errs, b.ours.end())
	}
	return errors.Join(errs...)
}
