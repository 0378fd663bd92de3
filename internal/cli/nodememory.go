// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// nodeMemoryView is what muster node memory prints as a document.
type nodeMemoryView struct {
	Node string `json:"node"`
	// Memory of the host, Reserved for it; Held is what the VMs have now, Least
	// what they can be squeezed to.
	Memory   api.Size       `json:"memory"`
	Reserved api.Size       `json:"reserved"`
	Held     api.Size       `json:"held"`
	Least    api.Size       `json:"least"`
	VMs      []vmMemoryView `json:"vms"`
}

// vmMemoryView is one VM of it.
type vmMemoryView struct {
	VM      string   `json:"vm"`
	Project string   `json:"project"`
	Min     api.Size `json:"min"`
	Target  api.Size `json:"target"`
	Memory  api.Size `json:"memory"`
	Reason  string   `json:"reason,omitempty"`
	Silent  bool     `json:"silent,omitempty"`
}

func (a *app) nodeMemory() *cobra.Command {
	return &cobra.Command{
		Use: "memory NODE", Short: "Show how a node divides its memory among its VMs", Args: args("NODE"),
		Long: `Shows what each running VM of a node may use now. A VM with a memory minimum may be
squeezed down to it when the node is short of memory, and gets it back afterwards.`,
		Example:           "  muster node memory m1",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			raw, _, err := c.Get(cmd.Context(), api.KindNode, "", names[0])
			if err != nil {
				return err
			}
			node, err := client.As[api.NodeSpec, api.NodeStatus](raw)
			if err != nil {
				return err
			}
			list, err := c.List(cmd.Context(), api.KindVM, client.ListOptions{Project: "*", Fields: "status.node=" + node.Meta.Name})
			if err != nil {
				return err
			}
			v := nodeMemoryView{Node: node.Meta.Name, Memory: node.Status.Memory, Reserved: node.Spec.ReservedMemory, VMs: []vmMemoryView{}}
			for _, item := range list.Items {
				vm, err := client.As[api.VMSpec, api.VMStatus](item)
				if err != nil {
					return err
				}
				v.add(&vm)
			}
			return a.printNodeMemory(&v)
		},
	}
}

func (v *nodeMemoryView) add(vm *api.VM) {
	hw := vm.Status.Hardware
	if hw == nil {
		return
	}
	m := vmMemoryView{VM: vm.Meta.Name, Project: vm.Meta.Project, Min: hw.Memory, Target: hw.Memory, Memory: hw.Memory}
	if vm.Status.Elastic(&vm.Spec) {
		m.Min = vm.Spec.MemoryMin
	}
	if st := vm.Status.Memory; st != nil {
		m.Target, m.Reason, m.Silent = st.Target, st.Reason, st.Silent
	}
	v.VMs = append(v.VMs, m)
	v.Held += m.Target + api.OverheadPerVM
	v.Least += vm.Status.HeldMemory(&vm.Spec) + api.OverheadPerVM
}

func (a *app) printNodeMemory(v *nodeMemoryView) error {
	if a.structured() {
		return a.printValue(v)
	}
	a.notice("node %s has %s, %s reserved for the host; its VMs may use %s now, with QEMU's own, and can be squeezed to %s", v.Node, v.Memory, v.Reserved, v.Held, v.Least)
	t := &table{head: []string{"VM", "PROJECT", "MIN", "NOW", "MEMORY", "WHY"}}
	for _, m := range v.VMs {
		why := m.Reason
		if m.Silent {
			why = "its guest does not report: no balloon driver?"
		}
		t.add(m.VM, m.Project, sizeOr(m.Min), sizeOr(m.Target), sizeOr(m.Memory), dash(why))
	}
	return a.printTable(t, "no VM runs on node "+v.Node)
}
