// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package plan

import (
	"fmt"
	"slices"
	"testing"

	"github.com/muster-vm/muster/api"
)

func TestTheOrderOfStarts(t *testing.T) {
	s := &State{VMs: map[string]*api.VM{}}
	vm := func(name string, power api.PowerState, after ...string) *api.VM {
		vm := &api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{Power: power}}
		vm.Spec.Recovery = &api.VMRecovery{StartAfter: api.StartAfter{After: after, AfterCondition: api.AfterHealthy}}
		s.VMs[vm.Meta.ID] = vm
		return vm
	}
	vm("stopped", api.PowerStopped)
	vm("alive", api.PowerRunning) // on a node that lives
	steps := []Step{}
	for _, v := range []*api.VM{
		vm("web", api.PowerRunning, "app", "gone"), vm("app", api.PowerRunning, "db", "stopped"), vm("db", api.PowerRunning),
		vm("tool", api.PowerRunning, "alive"), vm("a", api.PowerRunning, "b"), vm("b", api.PowerRunning, "a"),
	} {
		steps = append(steps, Step{VM: v, From: &api.Node{}, Outcome: api.HARestarts})
	}
	lost := vm("refused", api.PowerRunning, "db")
	steps = append(steps, Step{VM: lost, From: &api.Node{}, Outcome: api.HARefused})
	s.starts(steps)
	got := []string{}
	for i := range steps {
		got = append(got, fmt.Sprint(steps[i].VM.Meta.Name, steps[i].Wave, steps[i].After))
	}
	want := []string{"web3 [app]", "app2 [db]", "db1 []", "tool1 [alive]", "a3 [b]", "b2 [a]", "refused0 []"}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if h := steps[0].show(1); h.StartsAfter != "app healthy, at most 2m0s" || h.Wave != 3 {
		t.Errorf("%+v", h)
	}
}
