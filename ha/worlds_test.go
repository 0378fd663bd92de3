// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build !race

package ha

import (
	"maps"
	"testing"

	"github.com/muster-vm/muster/configdb"
)

// The tests of this file go through many worlds. Each is one goroutine, in which the race
// detector can find nothing, and with it they take several times as long. So they are not
// built with it: scripts/test runs this package once with it, and once without.

// Of each world of a tour.
const (
	each = 2000 // looks: seven minutes of cluster time
	vms  = 4
)

// tour is a walk through worlds with every rule kept.
type tour struct{ worlds, steps, looks, ran int }

// through makes worlds, each with the next number, until they have had so many steps, and
// counts what else is wanted of each.
func through(t *testing.T, wanted int, create func(seed uint64) *world, count func(*world)) (all tour) {
	t.Helper()
	wanted, seed := setting(t, envSteps, wanted), setting(t, envSeed, 1)
	for ; all.steps < wanted; seed++ {
		w := create(uint64(seed))
		all.ran += w.run(each)
		if w.broken != "" {
			t.Fatalf("world %d: %s", seed, w.broken)
		}
		count(w)
		all.worlds, all.looks, all.steps = all.worlds+1, all.looks+each, all.steps+w.steps
		w.mem.Close()
	}
	return all
}

// percent is how many of the VMs were running in a look.
func (a tour) percent() int { return 100 * a.ran / (a.looks * vms) }

func TestNoTwoNodesRunOneVM(t *testing.T) {
	t.Parallel()
	var moved uint64
	var resets, shot, proved, credits int
	all := through(t, 8*each, func(seed uint64) *world {
		w := newWorld(t, seed, vms, everyRule)
		w.power = w.chancy
		return w
	}, func(w *world) {
		proved += w.prove()
		moved += w.moves()
		resets, shot, credits = resets+w.resets, shot+w.shot, credits+w.credits
	})
	t.Logf("%d worlds, %d steps, %d moves, %d hosts reset by their watchdogs, %d switched off, %d losses proved, %d leaders learned of earlier ones, VMs were running in %d %% of the looks, none twice",
		all.worlds, all.steps, moved, resets, shot, proved, credits, all.percent())
	if moved < uint64(all.worlds) || all.ran < all.looks || resets == 0 || shot == 0 || proved == 0 || credits < all.worlds {
		t.Error("the simulation is too quiet to prove anything")
	}
}

// As above, where daemons alone begin anew, too, up to three at once: guards and VMs go on,
// and what leaders, nodes and voters remembered is gone. And where the list of the voters
// changes.
func TestDaemonsThatBeginAnewAndVotersThatChange(t *testing.T) {
	t.Parallel()
	var moved uint64
	var restarts, changes, rollbacks, credits int
	all := through(t, 4*each, func(seed uint64) *world {
		w := newWorld(t, seed, vms, everyRule)
		w.restarting, w.changing = true, true
		return w
	}, func(w *world) {
		moved += w.moves()
		restarts, changes, rollbacks, credits = restarts+w.restarts, changes+w.changes, rollbacks+w.rollbacks, credits+w.credits
	})
	t.Logf("%d worlds, %d steps, %d moves, %d daemons begun anew, %d changes of the voters (%d taken back by a later leader), %d leaders learned of earlier ones, VMs were running in %d %% of the looks, none twice",
		all.worlds, all.steps, moved, restarts, changes, rollbacks, credits, all.percent())
	if moved < uint64(all.worlds) || all.ran < all.looks || restarts < 10*all.worlds || changes < 10*all.worlds || rollbacks == 0 || credits < all.worlds {
		t.Error("the simulation is too quiet to prove anything")
	}
}

// Without one of the rules a leader must be found that has learned what is not true: a lease
// is counted from too early a moment, by two seconds at most, in which few VMs run twice.
func TestTheRulesOfWhatVotersRememberAreNeeded(t *testing.T) {
	t.Parallel()
	needed(t, map[rule]ruleOff{
		majorityRemembers:        {"it takes a majority of the voters to say when an earlier leader was confirmed", 1},
		whoBeginsAnewMayHaveTold: {"who begins anew may have told its term until then", 1},
		listIsTakenDown:          {"a voter takes down when it stores a list of the voters", 46},
	}, 60, func(t *testing.T, seed uint64, off rule) *world {
		w := newWorld(t, seed, 4, off)
		w.restarting, w.changing, w.strict = true, true, true
		return w
	})
}

// A checker that sees nothing proves nothing: with each rule off, VMs run twice.
func TestEachRuleIsNeeded(t *testing.T) {
	t.Parallel()
	needed(t, rules, 60, func(t *testing.T, seed uint64, off rule) *world { return newWorld(t, seed, 4, off) })
}

func TestAVMThatIsPassedOnRunsOnce(t *testing.T) {
	t.Parallel()
	stubbornWorlds(t, false, (*world).moves, "moves of VMs that did not start or whose node was lost")
}

// stubbornWorlds runs some worlds in which starts fail, and VMs may be drilled, too. What is
// counted in them shows that they were not too quiet.
func stubbornWorlds(t *testing.T, drilling bool, count func(*world) uint64, what string) {
	t.Helper()
	const seeds, steps = 6, each
	var counted uint64
	ran := 0
	for seed := range uint64(seeds) {
		w := newWorld(t, seed, vms, everyRule)
		w.stubborn, w.drilling = true, drilling
		ran += w.run(steps)
		if w.broken != "" {
			t.Fatalf("world %d: %s", seed, w.broken)
		}
		counted += count(w)
		w.mem.Close()
	}
	t.Logf("%d worlds, %d %s, VMs were running in %d %% of the looks, none twice", seeds, counted, what, 100*ran/(seeds*steps*vms))
	if counted < 50 || ran < seeds*steps {
		t.Error("the simulation is too quiet to prove anything")
	}
}

// Without one of the rules a VM must be found that runs twice.
func TestTheRulesOfPassingOnAreNeeded(t *testing.T) {
	t.Parallel()
	needed(t, map[rule]ruleOff{
		statusIsCompared:  {"a change of the status requires the one that was read", 39},
		startIsCommitted:  {"a start is committed before it begins", 14},
		startNeedsBinding: {"that it begins requires the binding that was read", 19},
	}, 60, func(t *testing.T, seed uint64, off rule) *world {
		w := newWorld(t, seed, 4, off)
		w.stubborn = true
		return w
	})
}

func TestADrilledVMRunsOnce(t *testing.T) {
	t.Parallel()
	drills := func(w *world) uint64 { return uint64(w.drills) }
	stubbornWorlds(t, true, drills, "drills beside starts that failed and hosts that were lost")
}

// Without one of the rules a VM must be found that runs twice.
func TestTheRulesOfDrillsAreNeeded(t *testing.T) {
	t.Parallel()
	needed(t, map[rule]ruleOff{
		drillEndsFirst: {"a VM is given up for a drill only when its process is reaped", 55},
	}, 60, func(t *testing.T, seed uint64, off rule) *world {
		w := newWorld(t, seed, 4, off)
		w.stubborn, w.drilling = true, true
		return w
	})
}

func TestNoTwoNodesWriteOneGuardedDisk(t *testing.T) {
	t.Parallel()
	var moved uint64
	var fenced, outlived, proved int
	all := through(t, 4*each, func(seed uint64) *world {
		w := newPoolWorld(t, seed, vms, everyRule)
		w.power = w.chancy
		return w
	}, func(w *world) {
		proved += w.prove()
		bindings, err := configdb.Bindings.List(w.mem.Local())
		must(t, err)
		for i := range bindings {
			if w.pool.on[bindings[i].Meta.ID] {
				moved += bindings[i].Spec.Epoch - 1
			}
		}
		fenced, outlived = fenced+w.pool.fenced, outlived+w.pool.outlived
	})
	t.Logf("%d worlds, %d steps, %d moves of guarded VMs, %d times a host was locked out, %d looks at VMs that outlived their lease, %d losses proved, VMs were running in %d %% of the looks, no disk with two writers",
		all.worlds, all.steps, moved, fenced, outlived, proved, all.percent())
	if moved < uint64(all.worlds) || all.ran < all.looks || fenced < all.worlds || outlived == 0 || proved == 0 {
		t.Error("the simulation is too quiet to prove anything")
	}
}

func TestEachRuleOfTheStorageGuardIsNeeded(t *testing.T) {
	t.Parallel()
	needed(t, poolRules, 80, func(t *testing.T, seed uint64, off rule) *world { return newPoolWorld(t, seed, 4, off) })
}

func TestNoTwoNodesRunOneVMWithNotes(t *testing.T) {
	t.Parallel()
	var longer, carried int
	var moved uint64
	all := through(t, 2*each, func(seed uint64) *world { return newHeartWorld(t, seed, vms, everyRule) }, func(w *world) {
		moved += w.moves()
		longer, carried = longer+w.notes.longer, carried+w.carried
	})
	t.Logf("%d worlds, %d steps with notes in a pool, %d moves, VMs were running in %d %% of the looks, %d looks at leases that lived by notes, none twice; %d calls carried questions", all.worlds, all.steps, moved, all.percent(), longer, carried)
	if moved == 0 || longer < all.looks/10 || carried == 0 {
		t.Error("the simulation is too quiet to prove anything")
	}
}

func TestEachRuleOfTheStorageHeartbeatIsNeeded(t *testing.T) {
	t.Parallel()
	byChance := maps.Clone(heartRules)
	delete(byChance, whoHasVotedDoesNotCount) // see TestRareRulesOfTheStorageHeartbeatAreNeeded
	delete(byChance, oneTerm)
	delete(byChance, votersLeaveTheirTerms)
	delete(byChance, noteCountsFromQuestion)
	delete(byChance, abstentionIsRemembered)
	delete(byChance, whoAnsweredLeaves)
	needed(t, byChance, 60, func(t *testing.T, seed uint64, off rule) *world { return newHeartWorld(t, seed, 4, off) })
}
