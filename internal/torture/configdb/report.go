// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
)

// result is what the checks counted.
type result struct {
	lost, events, relists int
}

// summary is the last line of a campaign.
type summary struct {
	Torture      string         `json:"torture"`
	Seed         uint64         `json:"seed"`
	Nodes        int            `json:"nodes"`
	Seconds      float64        `json:"seconds"`
	Faults       int            `json:"faults"`
	ByKind       map[string]int `json:"by_kind"`
	Violations   int            `json:"violations"`
	ByViolation  map[string]int `json:"by_violation"`
	LostWrites   int            `json:"lost_writes"`
	Undecided    int            `json:"undecided"`
	Acknowledged int            `json:"acknowledged"`
	Ops          int            `json:"ops"`
	Unknown      int            `json:"unknown"`
	Groups       int            `json:"groups"`
	StaleReads   int            `json:"stale_reads"`
	CutOffProbes int            `json:"cut_off_probes"`
	WatchEvents  int            `json:"watch_events"`
	Relists      int            `json:"relists"`
	DaemonExits  int            `json:"daemon_exits"`
	// MaxOutage is the longest time without an acknowledged write while faults
	// were in force that leave a majority.
	MaxOutage   float64 `json:"max_write_outage_s"`
	MaxRecovery float64 `json:"max_recovery_s"`
}

func seconds(d time.Duration) float64 { return math.Round(d.Seconds()*1000) / 1000 }

func (c *campaign) report(r *linear.Report, res result) (ok bool, err error) {
	s := summary{
		Torture: "configdb", Seed: c.seed, Nodes: c.nodes, Seconds: seconds(c.rec.Now()), ByKind: c.faults,
		Violations: len(c.violations), ByViolation: map[string]int{}, LostWrites: res.lost, Undecided: len(r.Undecided),
		Acknowledged: len(c.acks), Ops: r.Ops, Unknown: r.ByStatus[linear.Unknown.String()], Groups: r.Groups,
		StaleReads: len(c.stale), CutOffProbes: len(c.probes), WatchEvents: res.events, Relists: res.relists,
		DaemonExits: len(c.exits), MaxRecovery: seconds(c.recovered),
	}
	for _, n := range c.faults {
		s.Faults += n
	}
	fmt.Println("answers:")
	for _, word := range slices.Sorted(maps.Keys(c.answers)) {
		fmt.Printf("  %7d  %s\n", c.answers[word], word)
	}
	worst := map[string]time.Duration{}
	for _, sp := range c.spans {
		if !sp.majority {
			continue
		}
		gap, _ := torture.Outage(c.acks, sp.Span)
		worst[sp.what] = max(worst[sp.what], gap)
		s.MaxOutage = max(s.MaxOutage, seconds(gap))
	}
	fmt.Println("longest time without an acknowledged write, of the faults that leave a majority:")
	for _, what := range slices.Sorted(maps.Keys(worst)) {
		fmt.Printf("  %7.2f s  %s\n", worst[what].Seconds(), what)
	}
	for _, u := range r.Undecided {
		fmt.Println("UNDECIDED", u)
	}
	for _, v := range c.violations {
		fmt.Println("VIOLATION", v)
		s.ByViolation[string(v.Kind)]++
	}
	ok = s.Violations == 0 && s.Undecided == 0
	if !ok {
		if err := c.keepHistory(); err != nil {
			fmt.Println("the history could not be kept:", err)
		}
		fmt.Printf("what was found is in %s; replay it: scripts/torture configdb --nodes %d --seed %d\n", c.work, c.nodes, c.seed)
	}
	line, err := json.Marshal(s)
	if err != nil {
		return false, err
	}
	fmt.Println(string(line))
	return ok, nil
}

// keepHistory writes all operations, one a line, for a look at a violation.
func (c *campaign) keepHistory() error {
	f, err := os.Create(filepath.Join(c.work, "history.txt"))
	if err != nil {
		return err
	}
	for _, o := range c.rec.Ops() {
		if _, err := fmt.Fprintln(f, o.Group, o.String()); err != nil {
			return err
		}
	}
	return f.Close()
}
