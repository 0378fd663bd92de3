// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// kind is a kind of fault.
type kind string

// The faults. Each ends with its episode.
const (
	killDaemon kind = "kill_daemon" // SIGKILL; started again at the end
	killGuard  kind = "kill_guard"  // SIGKILL; the daemon starts another
	killQEMU   kind = "kill_qemu"   // SIGKILL, all of the host's
	powerCut   kind = "power_cut"   // SIGKILL for everything; comes back at the end
	stopDaemon kind = "stop_daemon" // SIGSTOP, then SIGCONT
	stopGuard  kind = "stop_guard"
	stopQEMU   kind = "stop_qemu"
	stopAll    kind = "stop_all"  // daemon, guard and QEMUs at once
	isolate    kind = "isolate"   // no packet in or out
	deaf       kind = "deaf"      // none in
	mute       kind = "mute"      // none out
	flap       kind = "flap"      // isolated for a second, connected for a second
	fullDisk   kind = "full_disk" // the node's own
	twoHosts   kind = "two_power_cuts"
	deadSwitch kind = "dead_switch" // no host hears another
	noStorage  kind = "no_storage"  // the host does not hear the Ceph cluster
	// Steps of the wall clock, at once; stepped back at the end.
	clockBack  kind = "clock_back"  // by an hour
	clockAhead kind = "clock_ahead" // by an hour
	clocksPart kind = "clocks_part" // two hosts' in opposite directions
	clockLeap  kind = "clock_leap"  // by up to stepMost, in either direction
	clockBoot  kind = "clock_boot"  // a power cut, and the host boots at once with a wrong clock
	// The restore of an old backup, once in a round, one or the other.
	oldBackup kind = "old_backup"        // after a power cut of all hosts, at the end
	oldBeside kind = "old_backup_beside" // on a host that was cut off power, while the cluster lives on the others
)

var kinds = []kind{
	powerCut, isolate, killDaemon, killGuard, killQEMU, stopDaemon, stopGuard, stopQEMU, stopAll, deaf, mute, flap, deadSwitch, fullDisk, twoHosts,
	clockBack, clockAhead, clocksPart, clockLeap, clockBoot, oldBackup,
}

// target is whom a fault meets.
type target string

// The targets: who leads, who runs the first VM, or a node of the seed's choice.
const (
	leader target = "leader"
	owner  target = "owner"
	anyone target = "any"
)

// fault is one thing that goes wrong.
type fault struct {
	kind  kind
	at    target
	node  int           // of anyone
	delay time.Duration // after the first of its episode
	step  time.Duration // of a clock
}

func (f fault) String() string {
	s := string(f.kind) + "@" + string(f.at)
	if f.step != 0 {
		s += fmt.Sprintf(" by %s", f.step)
	}
	return s
}

// clock reports that nothing but clocks is wrong.
func (k kind) clock() bool {
	return k == clockBack || k == clockAhead || k == clocksPart || k == clockLeap
}

// episode is a calm time and then one or two faults, all over after hold.
type episode struct {
	n          int
	calm, hold time.Duration
	faults     []fault
	// rushed: the next one begins before the VMs are up again.
	rushed bool
	// notes: the storage heartbeat is on.
	notes bool
}

// networkAlone reports that only the network fails, for good until the end: with the
// storage heartbeat no guest ends for it.
func (e *episode) networkAlone() bool {
	return e.notes && len(e.faults) == 1 && (e.faults[0].kind == isolate || e.faults[0].kind == deadSwitch)
}

// clockAlone reports that nothing but one fault of clocks happens: no guest ends and no
// host is lost for it.
func (e *episode) clockAlone() bool { return len(e.faults) == 1 && e.faults[0].kind.clock() }

func (e episode) String() string {
	var parts []string
	for _, f := range e.faults {
		s := f.String()
		if f.delay > 0 {
			s += fmt.Sprintf(" %.1f s later", f.delay.Seconds())
		}
		parts = append(parts, s)
	}
	if !e.notes {
		parts = append(parts, "no notes")
	}
	if e.rushed {
		parts = append(parts, "rushed")
	}
	return fmt.Sprintf("%d: calm %.1f s, %s, for %.1f s", e.n, e.calm.Seconds(), strings.Join(parts, " and "), e.hold.Seconds())
}

// Times of the schedule. A lease ends after 10 s and a node is lost after 13.1 s:
// the short hold is over before, the long one after.
const (
	calmMost                = 3 * time.Second
	shortLeast, shortMost   = 2 * time.Second, 12 * time.Second
	longLeast, longMost     = 14 * time.Second, 30 * time.Second
	secondAtOnce            = time.Second
	secondLeast, secondMost = 10 * time.Second, 18 * time.Second // while a VM moves

	clockStep = time.Hour
	// stepMost stays below what certificates allow for (internal/pki, clockSkew).
	stepMost = 20 * time.Hour
)

// schedule is the sequence of episodes of a seed.
type schedule struct {
	rng    *rand.Rand
	nodes  int
	n      int
	rounds int
	queue  []episode
	kinds  []kind
}

func newSchedule(seed uint64, nodes int, ceph bool) *schedule {
	s := &schedule{rng: rand.New(rand.NewPCG(seed, 0x4a)), nodes: nodes, kinds: slices.Clone(kinds)}
	if ceph {
		s.kinds = slices.DeleteFunc(s.kinds, func(k kind) bool { return k == oldBackup })
		s.kinds = append(s.kinds, noStorage)
	}
	return s
}

func (s *schedule) next() episode {
	if len(s.queue) == 0 {
		s.fill()
	}
	e := s.queue[0]
	s.queue = s.queue[1:]
	e.n = s.n
	s.n++
	return e
}

// restEvery is how many episodes of a rushed round pass until all VMs must be up.
const restEvery = 5

// fill makes a round: each kind once for the owner or leader, then pairs. In the
// first round the VMs are up again before the next episode; later rounds are
// rushed, so that faults meet recoveries and returns that are under way. In every second
// round the storage heartbeat is off, so that hosts that are cut off are lost.
func (s *schedule) fill() {
	for _, i := range s.rng.Perm(len(s.kinds)) {
		k := s.kinds[i]
		if k == twoHosts && s.nodes < 5 {
			continue // no majority would be left
		}
		if k == oldBackup && s.rng.IntN(2) == 0 {
			k = oldBeside
		}
		s.queue = append(s.queue, s.episode(s.fault(k)))
	}
	single := slices.DeleteFunc(slices.Clone(s.kinds), func(k kind) bool { return k == twoHosts || k == oldBackup })
	for range len(s.kinds) / 2 {
		first, second := s.fault(single[s.rng.IntN(len(single))]), s.fault(single[s.rng.IntN(len(single))])
		second.delay = s.between(0, secondAtOnce)
		if s.rng.IntN(2) == 0 {
			second.delay = s.between(secondLeast, secondMost)
		}
		e := s.episode(first, second)
		e.hold = max(e.hold, second.delay+shortLeast)
		s.queue = append(s.queue, e)
	}
	for i := range s.queue {
		s.queue[i].notes = s.rounds%2 == 0
		s.queue[i].rushed = s.rounds > 0 && i%restEvery != restEvery-1 && i != len(s.queue)-1 && !s.queue[i].whole()
	}
	s.rounds++
}

func (s *schedule) fault(k kind) fault {
	f := fault{kind: k, at: []target{leader, owner, owner, anyone}[s.rng.IntN(4)], node: s.rng.IntN(s.nodes)}
	switch k {
	case clockBack:
		f.step = -clockStep
	case clockAhead:
		f.step = clockStep
	case clocksPart:
		f.step = s.either(clockStep)
	case clockLeap, clockBoot:
		f.step = s.either(s.between(time.Minute, stepMost))
	}
	return f
}

// either is the time, or back by as much.
func (s *schedule) either(d time.Duration) time.Duration {
	if s.rng.IntN(2) == 0 {
		return -d
	}
	return d
}

func (s *schedule) episode(faults ...fault) episode {
	e := episode{calm: s.between(0, calmMost), hold: s.between(shortLeast, shortMost), faults: faults}
	if s.rng.IntN(2) == 0 {
		e.hold = s.between(longLeast, longMost)
	}
	return e
}

func (s *schedule) between(least, most time.Duration) time.Duration {
	return least + time.Duration(s.rng.Int64N(int64(most-least))).Truncate(100*time.Millisecond)
}
