// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// removeDeadline bounds the removal of the snapshot that copies were made from.
const removeDeadline = 5 * time.Minute

// vmClone is "muster vm clone".
func (a *app) vmClone() *cobra.Command {
	var f cloneFlags
	cmd := &cobra.Command{
		Use: "clone VM NEW", Short: "Make a new VM with copies of the disks of a VM", Args: args("VM", "NEW"),
		Long: `Makes a new VM with the hardware and labels of another and copies of its disks, as a
snapshot has them: that of --snapshot, or a temporary one that is taken now and removed
when the copies are done. The VM may run meanwhile. The new VM is itself: its ID, machine
ID, MAC addresses and reserved addresses are new. What the guest keeps on its disks, such
as its host name and SSH host keys, is copied with them, unless cloud-init is told who the
new VM is: see docs/snapshots.md.
Disks that are clones of an image stay so, and only what differs is copied; with --full
the copies are independent of images. With --count N it makes NEW-1 to NEW-N from one
snapshot.`,
		Example: `  muster vm clone web1 web2 --start
  muster vm clone web1 test1 --snapshot before-upgrade --full
  muster vm clone desk lab --count 20 --start`,
		ValidArgsFunction: func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(given) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.names(cmd.Context(), api.KindVM, nil, word), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("count") {
				return a.cloneMany(cmd.Context(), c, names[0], names[1], f)
			}
			return a.cloneOne(cmd.Context(), c, names[0], names[1], f)
		},
	}
	cmd.Flags().StringVar(&f.snapshot, "snapshot", "", "copy this snapshot of the VM")
	cmd.Flags().BoolVar(&f.full, "full", false, "copy what comes from images, too")
	cmd.Flags().BoolVar(&f.start, "start", false, "start the new VM when its disks are copied")
	cmd.Flags().IntVar(&f.count, "count", 1, "make so many VMs, NEW-1 and so on")
	return cmd
}

type cloneFlags struct {
	snapshot    string
	full, start bool
	count       int
}

func (a *app) cloneOne(ctx context.Context, c *client.Client, source, name string, f cloneFlags) error {
	body := map[string]any{"name": name}
	set(body, "snapshot", f.snapshot)
	set(body, "full", f.full)
	set(body, "start", f.start)
	r, err := c.Action(ctx, api.KindVM, a.project, source, "clone", body)
	if err != nil {
		return err
	}
	return a.finish(ctx, c, mustView(api.KindVM), name, "cloned from "+source, r)
}

// cloneMany makes all copies from one snapshot: that of --snapshot, or one that is
// taken first and removed when they are done.
func (a *app) cloneMany(ctx context.Context, c *client.Client, source, name string, f cloneFlags) (err error) {
	if f.count < 1 || f.count > maxCount {
		return usagef("--count: is %d; give 1 to %d VMs", f.count, maxCount)
	}
	names := numbered(name, f.count)
	if err := api.ValidName("name", names[f.count-1]); err != nil {
		return err
	}
	if f.snapshot == "" {
		if !a.flags.wait {
			return usagef("--count with --no-wait needs --snapshot: the snapshot that would be taken is removed when the copies are done")
		}
		f.snapshot = "clone-" + api.NewID()
		quiet := *a
		quiet.flags.quiet, quiet.Out = true, io.Discard
		r, err := c.TakeSnapshot(ctx, a.project, source, map[string]any{"name": f.snapshot, "description": "to copy the disks of " + source + " for " + names[0] + " to " + names[f.count-1]})
		if err == nil {
			err = quiet.finish(ctx, c, mustView(api.KindSnapshot), f.snapshot, "taken", r)
		}
		if err != nil {
			return fmt.Errorf("take a snapshot of vm %s to copy from: %w", source, err)
		}
		defer func() {
			// Also when the call was interrupted: nobody else would remove it.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeDeadline)
			defer cancel()
			r, rmErr := c.DeleteSnapshot(ctx, a.project, source, f.snapshot)
			if rmErr == nil {
				rmErr = quiet.finish(ctx, c, mustView(api.KindSnapshot), f.snapshot, "removed", r)
			}
			if rmErr != nil {
				err = errors.Join(err, fmt.Errorf("remove snapshot %s, which the copies were made from; remove it with muster vm snapshot rm %s %s: %w", f.snapshot, source, f.snapshot, rmErr))
			}
		}()
	}
	began := a.Now()
	failed := a.many(names, func(a *app, name string) error {
		if err := a.cloneOne(ctx, c, source, name, f); err != nil {
			return fmt.Errorf("vm %s: %w", name, err)
		}
		return nil
	})
	return a.toldMany(failed, f.count, "cloned", began)
}
