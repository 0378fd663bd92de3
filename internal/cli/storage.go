// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) volumeCmd() *cobra.Command {
	var size api.Size
	var image, pool, node string
	var labels []string
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a volume: empty, or a clone of an image", Args: args("NAME"),
		Example: `  muster volume create data1 --size 10G
  muster volume create root1 --image tiny --pool shared`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if size == 0 && image == "" {
				return usagef("volume create: --size or --image is missing")
			}
			l, err := parseLabels(labels, false)
			if err != nil {
				return err
			}
			spec := map[string]any{}
			set(spec, "size", size)
			set(spec, "image", image)
			set(spec, "pool", pool)
			set(spec, "node", node)
			return a.create(cmd.Context(), api.KindVolume, names[0], l, spec)
		},
	}
	create.Flags().Var(sizeFlag{&size}, "size", "size that a guest sees, such as 10G")
	create.Flags().StringVar(&image, "image", "", "clone this image")
	create.Flags().StringVar(&pool, "pool", "", "pool (default the image's pool for a clone, else \"local\")")
	create.Flags().StringVar(&node, "node", "", "node that makes the file and, in a dir pool, keeps it (default: the cluster chooses)")
	create.Flags().StringArrayVar(&labels, "label", nil, "label KEY=VALUE (repeatable)")
	return group("volume", "Virtual disks", create, a.volumeMove(), a.lsCmd(api.KindVolume), a.showCmd(api.KindVolume),
		a.rmCmd(api.KindVolume, "Removes volumes with their data. A volume that a VM uses is not removed."))
}
