// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// snapshotCmd is "muster vm snapshot".
func (a *app) snapshotCmd() *cobra.Command {
	return group("snapshot", "Snapshots of a VM", a.snapshotCreate(), a.snapshotList(), a.snapshotShow(), a.snapshotRevert(), a.snapshotRemove())
}

func (a *app) snapshotCreate() *cobra.Command {
	var memory bool
	var description string
	cmd := &cobra.Command{
		Use: "create VM NAME", Short: "Take a snapshot of all disks of a VM", Args: args("VM", "NAME"),
		Long: `Takes a snapshot of all disks of a VM, all at one moment. With --memory, the memory
of a running or paused VM is part of it, and a revert lets the guest go on where it
was; the guest halts while its memory is written. Without, the disks are as after a
power cut, unless the guest agent freezes the file systems meanwhile.`,
		Example:           "  muster vm snapshot create web1 before-upgrade\n  muster vm snapshot create web1 tried --memory --description \"with the new driver\"",
		ValidArgsFunction: a.completeSnapshot,
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			body := map[string]any{"name": names[1]}
			set(body, "memory", memory)
			set(body, "description", description)
			r, err := c.TakeSnapshot(cmd.Context(), a.project, names[0], body)
			if err != nil {
				return err
			}
			return a.finish(cmd.Context(), c, mustView(api.KindSnapshot), names[1], "taken", r)
		},
	}
	cmd.Flags().BoolVar(&memory, "memory", false, "with the memory of the running VM")
	cmd.Flags().StringVar(&description, "description", "", "one line about it")
	return cmd
}

func (a *app) snapshotList() *cobra.Command {
	return &cobra.Command{
		Use: "ls VM", Aliases: []string{"list"}, Short: "List the snapshots of a VM as a tree", Args: args("VM"),
		Long:              "Lists the snapshots of a VM below those that they descend from. The row \"(now)\" is\nwhere the VM is.",
		Example:           "  muster vm snapshot ls web1",
		ValidArgsFunction: a.completeSnapshot,
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			l, err := c.Snapshots(cmd.Context(), a.project, names[0])
			if err != nil {
				return err
			}
			k := mustView(api.KindSnapshot)
			if a.flags.output != "table" {
				return a.printList(k, l)
			}
			a.warnStale(l.Reply)
			t, err := snapshotTree(l.Items, a.Now())
			if err != nil {
				return err
			}
			return a.printTable(t, "vm "+names[0]+" has no snapshots")
		},
	}
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use: "show VM NAME", Short: "Show one snapshot", Args: args("VM", "NAME"), Example: "  muster vm snapshot show web1 before-upgrade",
		ValidArgsFunction: a.completeSnapshot,
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			raw, err := c.Snapshot(cmd.Context(), a.project, names[0], names[1])
			if err != nil {
				return err
			}
			return a.printObject(mustView(api.KindSnapshot), raw)
		},
	}
}

func (a *app) snapshotRevert() *cobra.Command {
	var force, start bool
	cmd := &cobra.Command{
		Use: "revert VM NAME", Short: "Take a VM back to a snapshot", Args: args("VM", "NAME"),
		Long: `Takes the disks, the hardware and, if the snapshot has it, the memory of a VM back to a
snapshot: all disks or none. What the VM did since is lost, unless another snapshot has
it. Disks that were added since are detached, not deleted. A VM that is not stopped is
refused; with --force it ends at once first, like pulling the plug. After a revert to a
snapshot without memory the VM is stopped, or started with --start.`,
		Example:           "  muster vm snapshot revert web1 before-upgrade --start\n  muster vm snapshot revert web1 tried --force",
		ValidArgsFunction: a.completeSnapshot,
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect()
			if err != nil {
				return err
			}
			r, err := c.Revert(cmd.Context(), a.project, names[0], names[1], map[string]any{"force": force, "start": start})
			if err != nil {
				return err
			}
			return a.finish(cmd.Context(), c, mustView(api.KindSnapshot), names[1], "is where vm "+names[0]+" is again", r)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "end a running VM at once first, and throw saved memory away")
	cmd.Flags().BoolVar(&start, "start", false, "start the VM after a revert to a snapshot without memory")
	return cmd
}

func (a *app) snapshotRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm VM NAME...", Aliases: []string{"remove", "delete"}, Short: "Remove snapshots of a VM", Args: between(2, 1+api.MaxSnapshots, "VM", "NAME"),
		Long:              "Removes snapshots. The VM, and what descends from them, stays as it is.",
		Example:           "  muster vm snapshot rm web1 before-upgrade",
		ValidArgsFunction: a.completeSnapshot,
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(names[1:], func(c *client.Client, name string) error {
				r, err := c.DeleteSnapshot(cmd.Context(), a.project, names[0], name)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindSnapshot), name, "removed", r)
			})
		},
	}
}

// completeSnapshot completes the VM, then its snapshots.
func (a *app) completeSnapshot(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(given) == 0 {
		return a.names(cmd.Context(), api.KindVM, nil, word), cobra.ShellCompDirectiveNoFileComp
	}
	if cmd.Name() == "create" || cmd.Name() == "ls" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	a.flags.quiet = true
	c, err := a.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), a.soon())
	defer cancel()
	l, err := c.Snapshots(ctx, a.project, given[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, raw := range l.Items {
		out = append(out, client.MetaOf(raw).Name)
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// Pieces of a tree.
const (
	treeChild = "├─ "
	treeLast  = "└─ "
	treeLine  = "│  "
	treeSpace = "   "
	treeNow   = "(now)"
)

// snapshotTree draws each snapshot below its parent. What names a parent that is
// not there is a root.
func snapshotTree(items []json.RawMessage, now time.Time) (*table, error) {
	t := &table{head: []string{"NAME", "STATUS", "TAKEN", "MEMORY", "CONSISTENCY", "DESCRIPTION"}}
	byName := map[string]bool{}
	var all []api.Snapshot
	for _, raw := range items {
		o, err := client.As[api.SnapshotSpec, api.SnapshotStatus](raw)
		if err != nil {
			return nil, err
		}
		byName[o.Meta.Name] = true
		all = append(all, o)
	}
	var below func(parent, indent string)
	below = func(parent, indent string) {
		var children []*api.Snapshot
		here := false
		for i := range all {
			o := &all[i]
			if up := o.Spec.Parent; up == parent || parent == "" && !byName[up] {
				children = append(children, o)
			}
			here = here || o.Meta.Name == parent && o.Status.Current
		}
		for i, o := range children {
			mark, next := treeChild, treeLine
			if i == len(children)-1 && !here {
				mark, next = treeLast, treeSpace
			}
			if parent == "" {
				mark, next = "", ""
			}
			t.add(append([]string{indent + mark + o.Meta.Name}, snapshotCells(o, now)...)...)
			below(o.Meta.Name, indent+next)
		}
		if here {
			t.add(indent+treeLast+treeNow, "", "", "", "", "")
		}
	}
	below("", "")
	return t, nil
}

func snapshotCells(o *api.Snapshot, now time.Time) []string {
	taken := "-"
	if o.Status.TakenAt != nil {
		taken = age(*o.Status.TakenAt, now)
	}
	return []string{status(&o.Meta, string(o.Status.Phase)), taken, sizeOr(o.Status.MemorySize), dash(string(o.Status.Consistency)), dash(o.Spec.Description)}
}

func snapshotRow(o *api.Snapshot, now time.Time) []string {
	return append([]string{o.Meta.Name, o.Spec.VM}, snapshotCells(o, now)...)
}

func snapshotShow(s *sections, o *api.Snapshot, now time.Time) {
	st := &o.Status
	s.title("State")
	s.field("VM", o.Spec.VM)
	s.field("Status", status(&o.Meta, string(st.Phase)))
	s.field("Message", st.Message)
	s.field("Description", o.Spec.Description)
	s.field("Descends from", o.Spec.Parent)
	if st.Current {
		s.field("The VM", "descends from this one now")
	}
	if st.TakenAt != nil {
		s.field("Taken", moment(*st.TakenAt, now))
	}
	s.field("Consistency", string(st.Consistency))
	s.field("The VM was", string(st.Power))
	if o.Spec.Memory {
		s.field("Memory takes", sizeOr(st.MemorySize))
	}
	if len(st.Disks) > 0 {
		s.title("Disks")
		t := &table{head: []string{"VOLUME", "SIZE"}}
		for _, d := range st.Disks {
			t.add(d.Volume, sizeOr(d.Size))
		}
		s.table(t)
	}
}
