// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of a store.
const (
	// Step is the distance of the values of a series.
	Step = 10 * time.Second
	// Keep is how long a value is kept.
	Keep = time.Hour
	// MaxSeries is the most series; one takes about 3 KiB.
	MaxSeries = 4000
	// fresh is how old the newest value may be to count as current.
	fresh = 60 * time.Second

	places      = int(Keep / Step)
	maxLabel    = 128
	maxLabels   = 4
	stepSeconds = int64(Step / time.Second)
)

// Label is one name and value that tells series of a metric apart.
type Label struct{ Name, Value string }

// ring holds the values of the last hour: step s is at s % places.
type ring struct {
	name   string
	labels []Label
	source string // the collector that set it last
	first  int64  // step of the oldest place that may hold a value
	last   int64  // step of the newest value
	at     time.Time
	latest float64
	values [places]float64
}

// Store keeps series. All methods may be called from any goroutine.
type Store struct {
	now func() time.Time

	mu      sync.Mutex
	rings   map[string]*ring
	dropped uint64 // samples that found no place
}

// NewStore returns an empty store; now is time.Now when nil.
func NewStore(now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{now: now, rings: map[string]*ring{}}
}

func stepOf(t time.Time) int64 { return t.Unix() / stepSeconds }

// ID is the name and labels as Prometheus writes them.
func ID(name string, labels []Label) string {
	if len(labels) == 0 {
		return name
	}
	var b strings.Builder
	b.WriteString(name)
	b.WriteByte('{')
	for i, l := range labels {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(l.Name)
		b.WriteString(`="`)
		b.WriteString(escape(l.Value))
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return b.String()
}

var escaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// escape writes the value of a label as the text format 0.0.4 wants it.
func escape(s string) string {
	if len(s) > maxLabel {
		s = s[:maxLabel]
	}
	return escaper.Replace(strings.ToValidUTF8(s, "?"))
}

// Set adds a sample. One that is no number, has too many labels or would be
// one series too many is counted and left out.
func (s *Store) Set(at time.Time, name string, value float64, labels ...Label) {
	s.set("", at, name, value, labels)
}

func (s *Store) set(source string, at time.Time, name string, value float64, labels []Label) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if math.IsNaN(value) || math.IsInf(value, 0) || len(labels) > maxLabels {
		s.dropped++
		return
	}
	key := ID(name, labels)
	r := s.rings[key]
	if r == nil {
		if len(s.rings) >= MaxSeries {
			s.prune(at)
		}
		if len(s.rings) >= MaxSeries {
			s.dropped++
			return
		}
		r = &ring{name: name, labels: slices.Clone(labels), first: stepOf(at), last: stepOf(at) - 1}
		s.rings[key] = r
	}
	r.source = source
	r.set(at, value)
}

func (r *ring) set(at time.Time, value float64) {
	step := stepOf(at)
	if step < r.last { // the clock went back: begin anew rather than mix
		r.first, r.last = step, step-1
	}
	if step-r.last >= int64(places) {
		r.first = step
	} else {
		for gap := r.last + 1; gap < step; gap++ {
			r.values[gap%int64(places)] = math.NaN()
		}
	}
	r.values[step%int64(places)] = value
	r.last, r.at, r.latest = step, at, value
	r.first = max(r.first, step-int64(places)+1)
}

// prune removes series that had no value for an hour.
func (s *Store) prune(now time.Time) {
	maps.DeleteFunc(s.rings, func(_ string, r *ring) bool { return now.Sub(r.at) > Keep })
}

// Query returns the series whose name is name or, if that ends in *, begins
// with it; all when it is empty. since is how far back, at most Keep; with 0
// only the newest value, if it is current.
func (s *Store) Query(name string, since time.Duration) []api.MetricSeries {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	out := []api.MetricSeries{}
	for _, key := range slices.Sorted(maps.Keys(s.rings)) {
		r := s.rings[key]
		if !matches(name, r.name) {
			continue
		}
		one := api.MetricSeries{Name: r.name, Points: r.points(now, since)}
		for _, l := range r.labels {
			if one.Labels == nil {
				one.Labels = map[string]string{}
			}
			one.Labels[l.Name] = l.Value
		}
		if len(one.Points) > 0 {
			out = append(out, one)
		}
	}
	return out
}

// Stuck returns the IDs of series of a name that are kept and not current
// because the collector that sets them fails.
func (s *Store) Stuck(name string, failing map[string]bool) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	var out []string
	for key, r := range s.rings {
		if age := now.Sub(r.at); r.name == name && failing[r.source] && age > fresh && age <= Keep {
			out = append(out, key)
		}
	}
	slices.Sort(out)
	return out
}

func matches(pattern, name string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	return pattern == "" || wild && strings.HasPrefix(name, prefix) || pattern == name
}

func (r *ring) points(now time.Time, since time.Duration) []api.MetricPoint {
	if since <= 0 {
		if now.Sub(r.at) > fresh {
			return nil
		}
		return []api.MetricPoint{{Time: r.at.UTC(), Value: r.latest}}
	}
	var out []api.MetricPoint
	from := max(r.first, stepOf(now.Add(-min(since, Keep))))
	for step := from; step <= r.last; step++ {
		v := r.values[step%int64(places)]
		if !math.IsNaN(v) {
			out = append(out, api.MetricPoint{Time: time.Unix(step*stepSeconds, 0).UTC(), Value: v})
		}
	}
	return out
}

// WriteText appends the current values in the Prometheus text format 0.0.4.
func (s *Store) WriteText(b *strings.Builder) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	last := ""
	keys := slices.SortedFunc(maps.Keys(s.rings), func(a, b string) int {
		if c := strings.Compare(s.rings[a].name, s.rings[b].name); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	for _, key := range keys {
		r := s.rings[key]
		if now.Sub(r.at) > fresh {
			continue
		}
		if r.name != last {
			help, typ := describe(r.name)
			b.WriteString("# HELP " + r.name + " " + help + "\n# TYPE " + r.name + " " + typ + "\n")
			last = r.name
		}
		b.WriteString(key + " " + strconv.FormatFloat(r.latest, 'g', -1, 64) + "\n")
	}
	b.WriteString("# HELP muster_series Series kept in memory.\n# TYPE muster_series gauge\nmuster_series " + strconv.Itoa(len(s.rings)) + "\n")
	b.WriteString("# HELP muster_series_dropped_total Samples that found no place.\n# TYPE muster_series_dropped_total counter\nmuster_series_dropped_total " +
		strconv.FormatUint(s.dropped, 10) + "\n")
}
