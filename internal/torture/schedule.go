// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Kind is a kind of fault.
type Kind string

// The faults.
const (
	// Kill is SIGKILL for a daemon, which is started again at the end.
	Kill Kind = "kill"
	// Stop is SIGSTOP, and SIGCONT at the end.
	Stop Kind = "stop"
	// Isolate drops all that a node and the others send each other.
	Isolate Kind = "isolate"
	// Deaf drops what the others send to a node; Mute what it sends to them.
	Deaf Kind = "deaf"
	Mute Kind = "mute"
	// CutLink drops what two nodes send each other; the others hear both.
	CutLink Kind = "cut_link"
	// DiskFull fills a node's file system, and makes room at the end.
	DiskFull Kind = "disk_full"
	// KillAll is SIGKILL for all daemons.
	KillAll Kind = "kill_all"
	// CutOff is Isolate for longer than the deadline of a write, while the node
	// is asked what it may still answer.
	CutOff Kind = "cut_off"
)

// baseKinds are the kinds that every round has at least once, each for a node
// of the seed's choice and, but for the last two, for the leader.
var baseKinds = []Kind{Kill, Stop, Isolate, Deaf, Mute, CutLink, DiskFull, KillAll, CutOff}

// pairKinds may happen together with another one.
var pairKinds = []Kind{Kill, Stop, Isolate, Deaf, Mute, DiskFull}

// Fault is one thing that goes wrong.
type Fault struct {
	Kind Kind
	// Leader: it happens to whoever leads then; otherwise to Node (from 0).
	Leader bool
	Node   int
	// Delay after the beginning of the episode.
	Delay time.Duration
}

// String is a word for people and for counting.
func (f Fault) String() string {
	if f.Leader {
		return string(f.Kind) + "_leader"
	}
	return string(f.Kind)
}

// Episode is a calm time and then one or two faults, all over after Hold.
type Episode struct {
	N      int
	Calm   time.Duration
	Faults []Fault
	Hold   time.Duration
	// Settle: wait after it until every node serves again. Without, only until
	// the cluster takes writes, so that the next faults meet a cluster that is
	// still recovering.
	Settle bool
}

// String is one line for people.
func (e Episode) String() string {
	parts := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		parts[i] = f.String()
		if !f.Leader && f.Kind != KillAll {
			parts[i] += fmt.Sprintf(" n%d", f.Node+1)
		}
		if f.Delay > 0 {
			parts[i] += fmt.Sprintf(" %.1f s later", f.Delay.Seconds())
		}
	}
	return fmt.Sprintf("%d: calm %.1f s, %s, for %.1f s", e.N, e.Calm.Seconds(), strings.Join(parts, " and "), e.Hold.Seconds())
}

// Times of the schedule.
const (
	calmLeast, calmMost = 500 * time.Millisecond, 2500 * time.Millisecond
	holdLeast, holdMost = 1500 * time.Millisecond, 6 * time.Second
	diskHold            = 5 * time.Second
	// cutOffHold is beyond the deadline of a write (10 s) with some to spare.
	cutOffHold   = 16 * time.Second
	delayMost    = 2 * time.Second
	settlePer100 = 70
)

// Schedule is the sequence of episodes of a seed.
type Schedule struct {
	rng   *rand.Rand
	nodes int
	n     int
	round int
	queue []Episode
}

// streams of one seed that must not depend on each other.
const (
	scheduleStream = 0x5eed
	clientStream   = 0xc11e
)

// NewSchedule returns the schedule for a number of nodes.
func NewSchedule(seed uint64, nodes int) *Schedule {
	return &Schedule{rng: rand.New(rand.NewPCG(seed, scheduleStream)), nodes: nodes}
}

// Next returns the next episode; there is always one.
func (s *Schedule) Next() Episode {
	if len(s.queue) == 0 {
		s.fill()
	}
	e := s.queue[0]
	s.queue = s.queue[1:]
	e.N = s.n
	s.n++
	return e
}

// fill makes a round: first every kind once, in a random order, then the kinds
// on the other target, then pairs. A short campaign so has most kinds.
func (s *Schedule) fill() {
	var first, second []Episode
	for _, i := range s.rng.Perm(len(baseKinds)) {
		k := baseKinds[i]
		leader := s.rng.IntN(2) == 0 && k != KillAll
		f := s.fault(k, leader)
		first = append(first, s.episode(f))
		if k != KillAll && k != CutOff {
			second = append(second, s.episode(s.fault(k, !leader)))
		}
	}
	s.rng.Shuffle(len(second), func(i, j int) { second[i], second[j] = second[j], second[i] })
	if s.round == 0 {
		// The long one last, so that a short campaign has the others.
		for i, e := range first {
			if e.Faults[0].Kind == CutOff {
				first = append(append(first[:i:i], first[i+1:]...), e)
				break
			}
		}
	}
	s.queue = slices.Concat(first, second)
	for range len(pairKinds) {
		a := s.fault(pairKinds[s.rng.IntN(len(pairKinds))], s.rng.IntN(2) == 0)
		b := s.fault(pairKinds[s.rng.IntN(len(pairKinds))], s.rng.IntN(2) == 0)
		b.Delay = between(s.rng, 0, delayMost)
		s.queue = append(s.queue, s.episode(a, b))
	}
	s.round++
}

func (s *Schedule) fault(k Kind, leader bool) Fault {
	return Fault{Kind: k, Leader: leader, Node: s.rng.IntN(s.nodes)}
}

func (s *Schedule) episode(faults ...Fault) Episode {
	e := Episode{
		Calm: between(s.rng, calmLeast, calmMost), Hold: between(s.rng, holdLeast, holdMost),
		Settle: s.rng.IntN(100) < settlePer100, Faults: faults,
	}
	for _, f := range faults {
		switch f.Kind {
		case CutOff:
			e.Hold, e.Settle = cutOffHold, true
		case DiskFull:
			e.Hold = max(e.Hold, diskHold)
		}
	}
	return e
}

func between(rng *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rng.Int64N(int64(most-least))).Truncate(100*time.Millisecond)
}
