// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package report

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Unit of a metric.
type Unit string

// The units.
const (
	PerSecond Unit = "1/s"
	Millis    Unit = "ms"
	Micros    Unit = "us"
	MiB       Unit = "MiB"
	Bytes     Unit = "B"
	Percent   Unit = "%"
	Count     Unit = "1"
)

// higherIsBetter of a unit; of all others the lower.
func (u Unit) higherIsBetter() bool { return u == PerSecond }

// Sheet has the values of all rounds.
type Sheet struct {
	// Ours is the system that the others are compared with.
	Ours    string
	metrics []metric // in order of their first value
	systems []string // likewise
	values  map[cell][]float64
}

type metric struct {
	name string
	unit Unit
}

type cell struct{ metric, system string }

// Add notes one value of one round.
func (s *Sheet) Add(system, name string, unit Unit, value float64) {
	if s.values == nil {
		s.values = map[cell][]float64{}
	}
	if m := (metric{name, unit}); !slices.Contains(s.metrics, m) {
		s.metrics = append(s.metrics, m)
	}
	if !slices.Contains(s.systems, system) {
		s.systems = append(s.systems, system)
	}
	c := cell{name, system}
	s.values[c] = append(s.values[c], value)
}

// median of the rounds; false if the system has none of this metric.
func (s *Sheet) median(m, system string) (float64, bool) {
	v := slices.Clone(s.values[cell{m, system}])
	if len(v) == 0 {
		return 0, false
	}
	slices.Sort(v)
	half := len(v) / 2
	if len(v)%2 == 1 {
		return v[half], true
	}
	return (v[half-1] + v[half]) / 2, true
}

// Worst returns the highest of all values.
func (s *Sheet) Worst(system, name string) (float64, bool) {
	v := s.values[cell{name, system}]
	if len(v) == 0 {
		return 0, false
	}
	return slices.Max(v), true
}

// Table prints the medians, a column for each system.
func (s *Sheet) Table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	if _, err := fmt.Fprintf(tw, "metric\tunit\tbetter\t%s\t\n", strings.Join(s.order(), "\t")); err != nil {
		return err
	}
	for _, m := range s.metrics {
		line := []string{m.name, string(m.unit), m.better()}
		for _, system := range s.order() {
			text := "-"
			if v, ok := s.median(m.name, system); ok {
				text = short(v)
			}
			line = append(line, text)
		}
		if _, err := fmt.Fprintln(tw, strings.Join(line, "\t")+"\t"); err != nil {
			return err
		}
	}
	return tw.Flush()
}

func (m metric) better() string {
	if m.unit.higherIsBetter() {
		return "higher"
	}
	return "lower"
}

// order is ours first.
func (s *Sheet) order() []string {
	out := []string{s.Ours}
	for _, o := range s.systems {
		if o != s.Ours {
			out = append(out, o)
		}
	}
	return out
}

// short writes a number with three digits that count.
func short(v float64) string {
	if v == 0 || math.Abs(v) >= 100 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	digits := 2 - int(math.Floor(math.Log10(math.Abs(v))))
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// Row compares one metric of ours with that of a peer. Without a peer the
// last three are left out.
type Row struct {
	Name   string   `json:"name"`
	Unit   Unit     `json:"unit"`
	Better string   `json:"better"`
	Ours   float64  `json:"ours"`
	Peer   string   `json:"peer,omitempty"`
	Theirs *float64 `json:"theirs,omitempty"`
	// Ratio is ours through theirs.
	Ratio *float64 `json:"ratio,omitempty"`
	// Runs is how many values the median of ours is of.
	Runs int `json:"runs"`
}

// Rows compares ours with every peer that has the metric.
func (s *Sheet) Rows() []Row {
	out := []Row{}
	for _, m := range s.metrics {
		ours, ok := s.median(m.name, s.Ours)
		if !ok {
			continue
		}
		base := Row{Name: m.name, Unit: m.unit, Better: m.better(), Ours: round(ours), Runs: len(s.values[cell{m.name, s.Ours}])}
		alone := true
		for _, peer := range s.systems {
			theirs, ok := s.median(m.name, peer)
			if !ok || peer == s.Ours {
				continue
			}
			alone = false
			r, t := base, round(theirs)
			r.Peer, r.Theirs = peer, &t
			if theirs != 0 {
				ratio := round(ours / theirs)
				r.Ratio = &ratio
			}
			out = append(out, r)
		}
		if alone {
			out = append(out, base)
		}
	}
	return out
}

// round to a thousandth: nobody believes more digits.
func round(v float64) float64 { return math.Round(v*1000) / 1000 }

// Line prints the contract of scripts/bench: one line of JSON, the last one.
func (s *Sheet) Line(w io.Writer, bench, mode string, foreignCPU float64) error {
	b, err := json.Marshal(struct {
		Bench string `json:"bench"`
		Mode  string `json:"mode"`
		// Foreign is what other programs took of the machine meanwhile, the
		// worst of all measurements in percent: much of it spoils them.
		Foreign float64 `json:"foreign_cpu_percent"`
		Rows    []Row   `json:"rows"`
	}{bench, mode, round(foreignCPU), s.Rows()})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}
