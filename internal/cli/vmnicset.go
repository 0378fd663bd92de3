// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

// nicLimitFlags are the flags of what a network card may do.
type nicLimitFlags struct {
	limit api.NICLimit
}

func (f *nicLimitFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.Var(limitSizeFlag{sizeFlag{&f.limit.BPSIn}}, "limit-in", "bytes that the guest may receive in a second, such as 10M; 0 for no limit")
	fs.Var(limitSizeFlag{sizeFlag{&f.limit.BPSOut}}, "limit-out", "bytes that the guest may send in a second, such as 10M; 0 for no limit")
	fs.IntVar(&f.limit.Burst, "burst", 0, "how many times the limits may be passed after a quiet time; 0 for never")
	fs.IntVar(&f.limit.BurstSeconds, "burst-seconds", 0, "for how long; 1 when left out")
}

// into changes what was given, and reports whether anything was.
func (f *nicLimitFlags) into(cmd *cobra.Command, limit *api.NICLimit) (given bool) {
	for name, set := range map[string]func(){
		"limit-in":      func() { limit.BPSIn = f.limit.BPSIn },
		"limit-out":     func() { limit.BPSOut = f.limit.BPSOut },
		"burst":         func() { limit.Burst = f.limit.Burst },
		"burst-seconds": func() { limit.BurstSeconds = f.limit.BurstSeconds },
	} {
		if cmd.Flags().Changed(name) {
			set()
			given = true
		}
	}
	return given
}

func (a *app) vmNICSet() *cobra.Command {
	var network, link string
	var limits nicLimitFlags
	cmd := &cobra.Command{
		Use: "set VM CARD", Short: "Move a network card to another network, pull its cable, or limit it", Args: args("VM", "CARD"),
		Long: `Changes a network card, given by its slot or MAC address. On another network the
guest sees the cable go out and come back, so that it asks for a new address. Limits
are in force at once; in and out are as the guest sees them.`,
		Example: `  muster vm nic set web1 1 --network office
  muster vm nic set web1 1 --link down
  muster vm nic set web1 1 --limit-in 10M --limit-out 2M --burst 4`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			if network == "" && link == "" && !limits.into(cmd, &api.NICLimit{}) {
				return usagef("vm nic set: nothing to change; give --network, --link or a limit")
			}
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				at, err := cardIn(vm, names[1])
				if err != nil {
					return nil, err
				}
				n := &vm.Spec.NICs[at]
				if network != "" && network != n.Network {
					n.Network, n.Address = network, "" // the address belongs to the old one
				}
				n.Link = api.LinkState(first(link, string(n.Link)))
				limits.into(cmd, &n.Limit)
				list, err := asList(vm.Spec.NICs)
				return map[string]any{"nics": list}, err
			})
		},
	}
	cmd.Flags().StringVar(&network, "network", "", "the network that it shall be on")
	cmd.Flags().StringVar(&link, "link", "", "the cable: up or down")
	limits.add(cmd)
	return cmd
}

// nicLimitText is what a card may receive and send, for people.
func nicLimitText(l api.NICLimit) (in, out string) {
	text := func(n api.Size) string {
		if n == 0 {
			return "-"
		}
		return n.String() + "/s"
	}
	return text(l.BPSIn), text(l.BPSOut)
}

// nicTable lists network cards, with their limits if any has one.
func nicTable(nics []api.VMNIC) *table {
	t := &table{head: []string{"SLOT", "NETWORK", "MAC", "ADDRESS", "LINK"}}
	limited := slices.ContainsFunc(nics, func(n api.VMNIC) bool { return n.Limit != (api.NICLimit{}) })
	if limited {
		t.head = append(t.head, "LIMIT IN", "LIMIT OUT")
	}
	for _, n := range nics {
		row := []string{dash(number(uint64(n.Slot))), n.Network, dash(n.MAC), dash(n.Address), first(string(n.Link), string(api.LinkUp))}
		if limited {
			in, out := nicLimitText(n.Limit)
			row = append(row, in, out)
		}
		t.add(row...)
	}
	return t
}
