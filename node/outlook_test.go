// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/ha/plan"
)

// ground is a made-up cluster with the real placement.
type ground struct {
	tb     testing.TB
	db     *storetest.Mem
	nodes  []api.Node
	voters []ha.Voter
}

func (g *ground) commit(change func(tx *configdb.Txn) error) {
	g.tb.Helper()
	tx := &configdb.Txn{Actor: "test"}
	err := change(tx)
	if err == nil {
		_, err = g.db.Txn(context.Background(), tx)
	}
	if err != nil {
		g.tb.Fatal(err)
	}
}

func newGround(tb testing.TB, memory ...api.Size) *ground {
	tb.Helper()
	g := &ground{tb: tb, db: storetest.New(tb)}
	g.commit(func(tx *configdb.Txn) error {
		c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "test")}
		return configdb.Clusters.Create(tx, &c)
	})
	for i, size := range memory {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", fmt.Sprintf("n%d", i+1)), Spec: api.NodeSpec{Role: api.RoleVoter}}
		n.Status = api.NodeStatus{Phase: api.NodeReady, QEMUVersion: "7.2.0", Memory: size}
		g.commit(func(tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
		g.nodes = append(g.nodes, n)
		if i < 5 {
			g.voters = append(g.voters, ha.Voter{NodeID: n.Meta.ID, Leader: i == 0})
		}
	}
	pool := api.Pool{Meta: api.NewMeta(api.KindPool, "", "local"), Spec: api.PoolSpec{Type: api.PoolDir}}
	g.commit(func(tx *configdb.Txn) error { return configdb.Pools.Create(tx, &pool) })
	for _, n := range g.nodes {
		st := api.PoolState{Meta: api.Meta{ID: pool.Meta.ID + "." + n.Meta.ID}, Spec: api.PoolStateSpec{PoolID: pool.Meta.ID, NodeID: n.Meta.ID}, Status: api.PoolStateStatus{Node: n.Meta.Name, Ready: true}}
		g.commit(func(tx *configdb.Txn) error { return configdb.PoolStates.CreateUnnamed(tx, &st) })
	}
	return g
}

// vm adds a VM that is protected and runs, unless change makes it another.
func (g *ground) vm(name string, memory api.Size, at int, change func(*api.VM, *api.Binding)) api.VM {
	g.tb.Helper()
	n := g.nodes[at]
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{CPUs: 1, Memory: memory, Power: api.PowerRunning, HA: api.HARestart}}
	vm.Status = api.VMStatus{Phase: api.VMRunning, Node: n.Meta.Name, Epoch: 1}
	b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: name}, Spec: api.BindingSpec{NodeID: n.Meta.ID, Node: n.Meta.Name, Epoch: 1, Protected: true}}
	if change != nil {
		change(&vm, &b)
	}
	g.commit(func(tx *configdb.Txn) error {
		if err := configdb.VMs.Create(tx, &vm); err != nil {
			return err
		}
		return configdb.Bindings.CreateUnnamed(tx, &b)
	})
	return vm
}

func (g *ground) outlook() *ha.Outlook {
	return ha.NewOutlook(ha.OutlookConfig{DB: g.db, Placer: recoveryPlacer{}, Voters: func() ([]ha.Voter, error) { return g.voters, nil }, Node: "n1", Log: slog.New(slog.DiscardHandler)})
}

// leads is a leader whose majority always confirms it.
type leads struct{}

func (leads) Leadership() (configdb.Leadership, bool) { return configdb.Leadership{Term: 1}, true }
func (leads) Confirm(context.Context, uint64) error   { return nil }
func (leads) LastConfirmed(context.Context, uint64) (configdb.Confirmed, error) {
	return configdb.Confirmed{}, errors.New("there is nobody to ask")
}

// lose marks nodes as lost and lets the real recovery do its work, until done.
func (g *ground) lose(done func(v *configdb.View) bool, at ...int) {
	g.tb.Helper()
	g.commit(func(tx *configdb.Txn) error {
		for _, i := range at {
			n, err := configdb.Nodes.Get(g.db.Local(), g.nodes[i].Meta.ID)
			if err != nil {
				return err
			}
			n.Status.Phase = api.NodeLost
			if err := configdb.Nodes.UpdateStatus(g.db.Local(), tx, &n); err != nil {
				return err
			}
		}
		return nil
	})
	s := ha.NewService(ha.ServiceConfig{DB: g.db, Leader: leads{}, Placer: recoveryPlacer{}, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, 1) }()
	deadline := time.Now().Add(time.Minute)
	for !done(g.db.Local()) {
		if time.Now().After(deadline) {
			cancel()
			<-ended
			g.tb.Fatal("the recovery does not come to an end")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-ended; err != nil {
		g.tb.Fatal(err)
	}
}

// fate is what became of a VM, in the words of a plan.
func fate(v *configdb.View, s api.HAStep) (api.HAOutcome, string) {
	b, _ := configdb.Bindings.Get(v, s.VMID)
	vm, _ := configdb.VMs.Get(v, s.VMID)
	switch {
	case b.Spec.Node != s.From && vm.Status.Phase == api.VMStarting:
		return api.HARestarts, b.Spec.Node
	case b.Spec.Node != s.From:
		return api.HAMoves, b.Spec.Node
	case vm.Status.Phase == api.VMFailed:
		return api.HARefused, ""
	case vm.Status.Phase == api.VMUnknown && plan.WantsRun(&vm):
		return api.HAWaits, ""
	}
	return api.HAStays, ""
}

// random fills the cluster to a degree at which not everything fits.
func (g *ground) random(rng *rand.Rand, vms int) {
	for i := range vms {
		at := rng.IntN(len(g.nodes))
		g.vm(fmt.Sprintf("v%d", i), api.Size(64+rng.IntN(20)*64)*api.MiB, at, func(vm *api.VM, b *api.Binding) {
			vm.Spec.Recovery = &api.VMRecovery{Priority: api.RecoveryPriorities()[rng.IntN(5)]}
			switch rng.IntN(8) {
			case 0:
				vm.Spec.HA, b.Spec.Protected = api.HANone, false
			case 1:
				vm.Spec.Power, vm.Status.Phase = api.PowerStopped, api.VMStopped
				b.Spec.Protected = rng.IntN(2) == 0
			case 3:
				vm.Spec.Power, vm.Status.Phase = api.PowerSuspended, api.VMSuspended
			case 2:
				vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", vm.Meta.Name+"-disk0"), Spec: api.VolumeSpec{Pool: "local", Size: api.GiB, Node: g.nodes[at].Meta.Name}}
				g.commit(func(tx *configdb.Txn) error { return configdb.Volumes.Create(tx, &vol) })
				vm.Spec.Disks = []api.VMDisk{{Volume: vol.Meta.Name}}
			}
		})
	}
}

// What the simulation says is what the recovery then does, VM by VM, in clusters
// in which some VMs find no place.
func TestTheRecoveryDoesWhatWasSimulated(t *testing.T) {
	seen := map[api.HAOutcome]int{}
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var sizes []api.Size
		for range 4 + rng.IntN(3) {
			sizes = append(sizes, api.Size(3+rng.IntN(5))*api.GiB)
		}
		g := newGround(t, sizes...)
		g.random(rng, 25)
		kill := rng.Perm(len(sizes))[:1+rng.IntN(2)]
		var names []string
		for _, i := range kill {
			names = append(names, g.nodes[i].Meta.Name)
		}
		g.voters = nil // whoever is killed, a majority is taken for granted
		said, err := g.outlook().Simulate(t.Context(), names)
		if err != nil {
			t.Fatal(err)
		}
		differs := func(v *configdb.View) (out []string) {
			for _, s := range said.Steps {
				if o, node := fate(v, s); o != s.Outcome || node != s.Node {
					out = append(out, fmt.Sprintf("%s on %s: said %s %s, is %s %s", s.VM, s.From, s.Outcome, s.Node, o, node))
				}
			}
			return out
		}
		last := ""
		func() {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d, killed %v:\n%s", seed, names, last)
				}
			}()
			g.lose(func(v *configdb.View) bool { d := differs(v); last = strings.Join(d, "\n"); return len(d) == 0 }, kill...)
		}()
		for _, s := range said.Steps {
			seen[s.Outcome]++
		}
	}
	t.Logf("outcomes: %v", seen)
	for _, o := range []api.HAOutcome{api.HARestarts, api.HAMoves, api.HARefused, api.HAWaits, api.HAStays} {
		if seen[o] < 5 {
			t.Errorf("%s was seen %d times: the test is too easy", o, seen[o])
		}
	}
}

func TestSimulationRefusesWhatIsNoNode(t *testing.T) {
	g := newGround(t, api.GiB, api.GiB, api.GiB)
	o := g.outlook()
	for _, c := range []struct {
		kill []string
		says string
	}{
		{nil, "names no node"}, {[]string{"n9"}, "kill[0]: node \"n9\" does not exist"}, {[]string{"n1", "n1"}, "kill[1]"}, {[]string{"n1", g.nodes[0].Meta.ID}, "again"}, {[]string{""}, "does not exist"},
	} {
		_, err := o.Simulate(t.Context(), c.kill)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("kill %q: %v, want %q", c.kill, err, c.says)
		}
	}
}

func TestHigherPrioritiesGetTheirPlacesFirst(t *testing.T) {
	g := newGround(t, 8*api.GiB, 2*api.GiB)
	g.voters = nil
	for name, p := range map[string]api.RecoveryPriority{"a": api.PriorityLow, "b": api.PriorityHighest, "c": "", "d": api.PriorityHigh} {
		g.vm(name, 700*api.MiB, 0, func(vm *api.VM, _ *api.Binding) {
			if p != "" {
				vm.Spec.Recovery = &api.VMRecovery{Priority: p}
			}
		})
	}
	g.vm("e", 1500*api.MiB, 0, func(vm *api.VM, _ *api.Binding) {
		vm.Spec.Recovery = &api.VMRecovery{Priority: api.PriorityLowest}
	})
	l, err := g.outlook().Simulate(t.Context(), []string{"n1"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range l.Steps {
		got = append(got, fmt.Sprintf("%s %s %s", s.VM, s.Priority, s.Outcome))
	}
	want := []string{"b highest restarts", "d high restarts", "c medium refused", "a low refused", "e lowest refused"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTheLossOfTheMajorityRestartsNothing(t *testing.T) {
	g := newGround(t, 8*api.GiB, 8*api.GiB, 8*api.GiB)
	g.vm("a", api.GiB, 1, nil)
	g.vm("b", api.GiB, 0, nil)
	l, err := g.outlook().Simulate(t.Context(), []string{"n2", "n3"})
	if err != nil {
		t.Fatal(err)
	}
	if l.Quorum.Kept || l.Quorum.Left != 1 || l.Quorum.Needed != 2 || len(l.Steps) != 2 || l.Steps[0].Outcome != api.HARefused || !strings.Contains(l.Steps[0].Reason, "1 of 3 voters") || l.Steps[1].Outcome != api.HAEnds || l.Steps[1].VM != "b" {
		t.Errorf("%+v", l)
	}
	g.vm("c", api.GiB, 2, func(vm *api.VM, b *api.Binding) { vm.Spec.HA, b.Spec.Protected = api.HANone, false })
	g.voters = g.voters[:2]
	st, err := g.outlook().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Admission.Kept || !strings.Contains(st.Admission.Message, "witness") || st.Quorum.Spare != 0 || !st.Quorum.Kept {
		t.Errorf("two voters: %+v %+v", st.Quorum, st.Admission)
	}
	if got := st.IfQuorumLost; got != (api.HAQuorumLost{Ends: 2, RunsOn: 1}) {
		t.Errorf("if the quorum were lost: %+v", got)
	}
}

func TestThePromiseFollowsTheState(t *testing.T) {
	g := newGround(t, 5*api.GiB, 5*api.GiB, 5*api.GiB)
	o := g.outlook()
	promise := func() api.HAAdmission {
		st, err := o.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Admission
	}
	for i := range 3 {
		g.vm(fmt.Sprintf("v%d", i), 2*api.GiB, i, nil)
	}
	if p := promise(); !p.Kept || p.Sets != 3 || p.OfAll != 3 || p.Failures != 1 || p.Admission != api.AdmissionWarn {
		t.Errorf("half full: %+v", p)
	}
	for i := range 3 {
		g.vm(fmt.Sprintf("w%d", i), 2*api.GiB, i, nil)
	}
	p := promise()
	if p.Kept || p.RefusedVMs != 2 || len(p.Worst) != 1 || len(p.Refused) != 2 || !strings.Contains(p.Message, "2 protected VMs would not restart") {
		t.Errorf("full: %+v", p)
	}
	g.set(api.HASettings{Failures: 2})
	if p := promise(); p.Kept || p.Sets != 3 || len(p.Worst) != 2 || !strings.Contains(p.Message, "1 of 3 voters are left and 2 are needed") {
		t.Errorf("two failures: %+v", p)
	}
}

func TestThePromiseIsToldOnceWhenItBreaksAndWhenItIsKeptAgain(t *testing.T) {
	g := newGround(t, 5*api.GiB, 5*api.GiB, 5*api.GiB)
	o := g.outlook()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- o.Run(ctx) }()
	go func() { ended <- o.Tell(ctx, 1) }()
	defer func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}()
	types := func(v *configdb.View) (out []string) {
		events, err := configdb.Events.List(v)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			out = append(out, e.Spec.Type)
		}
		return out
	}
	wait := func(want ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		v := g.db.Local()
		for !slices.Equal(types(v), want) {
			var err error
			if v, err = g.db.WaitRevision(ctx, v.Revision()+1); err != nil {
				t.Fatalf("events %v, want %v", types(g.db.Local()), want)
			}
		}
	}
	for i := range 6 {
		g.vm(fmt.Sprintf("v%d", i), 2*api.GiB, i%3, nil)
	}
	wait("ha.promise-broken")
	for _, name := range []string{"v3", "v4", "v5"} {
		g.commit(func(tx *configdb.Txn) error {
			vm, err := configdb.VMs.Find(g.db.Local(), "", name)
			if err != nil {
				return err
			}
			vm.Spec.Power, vm.Status.Phase = api.PowerStopped, api.VMStopped
			if err := configdb.VMs.UpdateStatus(g.db.Local(), tx, &vm); err != nil {
				return err
			}
			return configdb.VMs.UpdateSpec(g.db.Local(), tx, &vm)
		})
	}
	wait("ha.promise-broken", "ha.promise-kept")
}

// set changes the promise.
func (g *ground) set(ha api.HASettings) {
	g.tb.Helper()
	g.commit(func(tx *configdb.Txn) error {
		all, err := configdb.Clusters.List(g.db.Local())
		if err != nil {
			return err
		}
		all[0].Spec.HA = ha
		return configdb.Clusters.UpdateSpec(g.db.Local(), tx, &all[0])
	})
}

func TestAStartIsJudgedByWhatItBreaks(t *testing.T) {
	g := newGround(t, 5*api.GiB, 5*api.GiB, 5*api.GiB)
	o := g.outlook()
	for i := range 3 {
		g.vm(fmt.Sprintf("v%d", i), 2*api.GiB, i, nil)
	}
	// start judges a start of a new VM, and makes it if that is wished.
	start := func(name string, memory api.Size, at int, protected, really bool) (string, error) {
		t.Helper()
		before := g.db.Local()
		make := func(tx *configdb.Txn) error {
			vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{CPUs: 1, Memory: memory, Power: api.PowerRunning}}
			b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: name}, Spec: api.BindingSpec{NodeID: g.nodes[at].Meta.ID, Node: g.nodes[at].Meta.Name, Epoch: 1, Protected: protected}}
			if err := configdb.VMs.Create(tx, &vm); err != nil {
				return err
			}
			return configdb.Bindings.CreateUnnamed(tx, &b)
		}
		tx := &configdb.Txn{Actor: "test"}
		if err := make(tx); err != nil {
			t.Fatal(err)
		}
		warning, err := o.Admit(before, tx.Seen(before))
		if really {
			g.commit(make)
		}
		return warning, err
	}
	if w, err := start("small", 512*api.MiB, 0, true, false); w != "" || err != nil {
		t.Errorf("one that keeps it: %q, %v", w, err)
	}
	// 2 GiB more on each of two nodes, and the third's VM has no place.
	if w, err := start("w0", 2*api.GiB, 0, false, true); w != "" || err != nil {
		t.Errorf("one that keeps it, unprotected: %q, %v", w, err)
	}
	w, err := start("w1", 2*api.GiB, 1, false, false)
	if err != nil || !strings.Contains(w, "the loss of a node is survived: if n3 died, 1 protected VMs would not restart: v2") {
		t.Errorf("one that breaks it: %q, %v", w, err)
	}
	g.set(api.HASettings{Failures: 1, Admission: api.AdmissionRefuse})
	if w, err := start("w1", 2*api.GiB, 1, false, false); api.CodeOf(err) != api.CodeRefused || w != "" || !strings.Contains(err.Error(), "muster ha set") {
		t.Errorf("refused: %q, %v", w, err)
	}
	g.set(api.HASettings{Failures: 1, Admission: api.AdmissionOff})
	if w, err := start("w1", 2*api.GiB, 1, false, true); w != "" || err != nil {
		t.Errorf("off: %q, %v", w, err)
	}
	g.set(api.HASettings{Failures: 1, Admission: api.AdmissionRefuse})
	if _, err := start("plain", 64*api.MiB, 0, false, false); err != nil {
		t.Errorf("one that makes a broken promise no worse: %v", err)
	}
	if _, err := start("more", 64*api.MiB, 2, true, false); err != nil {
		t.Errorf("one that fits where a larger one does not: %v", err)
	}
	if _, err := start("large", 2*api.GiB, 2, true, false); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("one that makes a broken promise worse: %v", err)
	}
}

// BenchmarkOutlook is one look at a large cluster, three quarters full.
func BenchmarkOutlook(b *testing.B) {
	for _, failures := range []int{1, 2} {
		b.Run(fmt.Sprintf("64 nodes 5000 VMs %d failures", failures), func(b *testing.B) {
			sizes := make([]api.Size, 64)
			for i := range sizes {
				sizes[i] = 256 * api.GiB
			}
			g := newGround(b, sizes...)
			g.set(api.HASettings{Failures: failures})
			rng := rand.New(rand.NewPCG(1, 1))
			for i := range 5000 {
				g.vm(fmt.Sprintf("v%d", i), api.Size(1+rng.IntN(4))*api.GiB, i%64, func(vm *api.VM, _ *api.Binding) {
					vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", vm.Meta.Name+"-disk0"), Spec: api.VolumeSpec{Pool: "local", Size: api.GiB}}
					g.commit(func(tx *configdb.Txn) error { return configdb.Volumes.Create(tx, &vol) })
					vm.Spec.Disks = []api.VMDisk{{Volume: vol.Meta.Name}}
				})
			}
			// The pool is one that all nodes share.
			g.commit(func(tx *configdb.Txn) error {
				p, err := configdb.Pools.Find(g.db.Local(), "", "local")
				if err != nil {
					return err
				}
				p.Spec.Type, p.Spec.Path = api.PoolShared, "/srv"
				return configdb.Pools.UpdateSpec(g.db.Local(), tx, &p)
			})
			b.ResetTimer()
			for b.Loop() {
				st, err := g.outlook().Status(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				if len(st.Nodes) != 64 {
					b.Fatal(st)
				}
			}
		})
	}
}
