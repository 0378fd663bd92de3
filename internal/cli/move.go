// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) vmMove() *cobra.Command {
	return a.moveCmd(api.KindVM, &cobra.Command{
		Use: "move NAME...", Short: "Move stopped VMs with their volumes to another node or pool",
		Long: `Moves stopped VMs: to the node of --node, to the pool of --pool, or both. Their volumes
go along, with UEFI variables, the state of a TPM and all snapshots; what a pool that all
nodes see has stays there. Until the move is over nothing else is done with the VM; if it
fails, everything is where it was. A disk that is a clone of an image becomes independent
of it. muster task cancel gives a move up. A VM that runs is moved by muster vm migrate.`,
		Example: `  muster vm move web1 --node m2
  muster vm move web1 --pool shared
  muster vm move web1 web2 --node m2 --pool fast`,
	})
}

func (a *app) volumeMove() *cobra.Command {
	return a.moveCmd(api.KindVolume, &cobra.Command{
		Use: "move NAME...", Short: "Move volumes that no guest uses to another pool or node",
		Long: `Moves volumes to the pool of --pool: those of stopped VMs to another pool of the VM's
node, those that no VM has to the node of --node, too. If it fails, everything is where
it was. A clone of an image becomes independent of it.`,
		Example: `  muster volume move web1-disk0 --pool shared
  muster volume move data1 --pool local --node m2`,
	})
}

func (a *app) moveCmd(kind api.Kind, cmd *cobra.Command) *cobra.Command {
	var node, pool string
	cmd.Args, cmd.ValidArgsFunction = atLeastOne("NAME"), a.completeNames(kind)
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		if node == "" && pool == "" {
			return usagef("%s move: give --pool, --node or both", kind)
		}
		body := map[string]any{}
		set(body, "node", node)
		set(body, "pool", pool)
		return a.each(names, func(c *client.Client, name string) error {
			r, err := c.Action(cmd.Context(), kind, a.project, name, "move", body)
			if err != nil {
				return err
			}
			return a.finish(cmd.Context(), c, mustView(kind), name, "moved", r)
		})
	}
	cmd.Flags().StringVar(&node, "node", "", "node to move to (default the present one)")
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "to" { // as vm migrate has it
			name = "node"
		}
		return pflag.NormalizedName(name)
	})
	cmd.Flags().StringVar(&pool, "pool", "", "pool to move to (default that of each volume)")
	a.completeFlag(cmd, "node", a.completeNames(api.KindNode))
	a.completeFlag(cmd, "pool", a.completeNames(api.KindPool))
	return cmd
}
