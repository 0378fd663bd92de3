// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
)

func main() { os.Exit(run()) }

// options are the command line's.
type options struct {
	programs, data, only string
	quick, profile       bool
	steady, idle         float64 // minutes
	rounds               int
}

func run() int {
	var o options
	flag.StringVar(&o.programs, "programs", "", "folder with musterd, muster, muster-guard, etcd and rqlited")
	flag.StringVar(&o.data, "data", "", "folder for the data and logs of the servers")
	flag.StringVar(&o.only, "only", "", "run only these systems or outage trials, separated by commas")
	flag.BoolVar(&o.quick, "quick", false, "one short round")
	flag.Float64Var(&o.steady, "steady", 0, "instead: full write load on Muster for so many minutes")
	flag.Float64Var(&o.idle, "idle", 0, "instead: an idle cluster of Muster for so many minutes")
	flag.BoolVar(&o.profile, "profile", false, "instead: where Muster spends its time under load, by perf")
	flag.IntVar(&o.rounds, "rounds", 0, "another number of rounds")
	flag.Parse()
	if flag.NArg() > 0 || o.programs == "" || o.data == "" || o.steady < 0 || o.idle < 0 || o.steady > 0 && o.idle > 0 {
		fmt.Fprintln(os.Stderr, "configdb: called with wrong arguments; use scripts/bench")
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "configdb:", err)
		return 1
	}
	return 0
}

// session is one run of the bench.
type session struct {
	host    *system.Host
	sheet   report.Sheet
	foreign float64 // percent, the worst so far
	began   time.Time
}

func bench(ctx context.Context, o *options) error {
	host, err := system.NewHost(o.programs, o.data)
	if err != nil {
		return err
	}
	s := &session{host: host, sheet: report.Sheet{Ours: ours}, began: time.Now()}
	mode := "full"
	switch {
	case o.steady > 0:
		mode = "steady"
		err = s.steady(ctx, minutes(o.steady))
	case o.idle > 0:
		mode = "idle"
		err = s.idle(ctx, minutes(o.idle))
	case o.profile:
		mode = "profile"
		err = s.profile(ctx)
	default:
		p := fullPlan
		if o.quick {
			mode, p = "quick", quickPlan
		}
		if o.rounds > 0 {
			p.rounds = o.rounds
		}
		err = s.compare(ctx, p, o.only)
	}
	if err != nil {
		return err
	}
	fmt.Println()
	if err := s.sheet.Table(os.Stdout); err != nil {
		return err
	}
	if s.foreign > muchForeign {
		fmt.Printf("\nOther programs took up to %.0f %% of this machine meanwhile: do not trust these numbers.\n", s.foreign)
	}
	return s.sheet.Line(os.Stdout, "configdb", mode, s.foreign)
}

// muchForeign is how many percent of the machine others may use before the
// bench says so.
const muchForeign = 10

func minutes(m float64) time.Duration { return time.Duration(m * float64(time.Minute)) }

func (s *session) say(format string, a ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, a...))
}
