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

func (a *app) poolCmd() *cobra.Command {
	var typ, path string
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a pool", Args: args("NAME"),
		Long: `Creates a pool: a directory for images and volumes. In a pool of type dir each
node has its own content below the same path; a pool of type shared is one
directory that every node sees, which the nodes check.`,
		Example: `  muster pool create fast --type dir --path /srv/fast
  muster pool create nfs --type shared --path /mnt/nfs/muster`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			spec := map[string]any{"type": typ}
			set(spec, "path", path)
			return a.create(cmd.Context(), api.KindPool, names[0], nil, spec)
		},
	}
	create.Flags().StringVar(&typ, "type", string(api.PoolDir), "dir or shared")
	create.Flags().StringVar(&path, "path", "", "absolute path of the directory, the same on every node")
	return group("pool", "Places for images and volumes", create, a.lsCmd(api.KindPool), a.showCmd(api.KindPool),
		a.rmCmd(api.KindPool, "Removes pools that hold no image and no volume. The directory itself stays."))
}
