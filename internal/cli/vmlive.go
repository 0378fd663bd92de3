// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// editTries bounds how often a change of a list is decided anew because
// somebody else changed the VM meanwhile.
const editTries = 5

// pendingMark says in a list of VMs that a change waits for the next start.
func pendingMark(o *api.VM) string {
	if _, ok := api.FindCondition(o.Status.Conditions, api.ConditionPendingRestart); ok {
		return ",pending restart"
	}
	return ""
}

// finishChange waits for the task of a change, if there is one, and tells what
// waits for the next start.
func (a *app) finishChange(ctx context.Context, c *client.Client, kind api.Kind, name, done string, r *client.Result) error {
	k := mustView(kind)
	if r.TaskID == "" || !a.flags.wait {
		return a.finished(k, name, done, r.Object, "", 0)
	}
	began := time.Now()
	task := &api.Task{}
	task.Meta.ID = r.TaskID
	if _, err := a.follow(ctx, c, task, a.newProgress("change "+name)); err != nil {
		return err
	}
	object := r.Object
	if raw, _, err := c.Get(ctx, kind, a.project, first(client.MetaOf(object).ID, name)); err == nil {
		object = raw
	} else if a.structured() {
		return err // the document must not be of before the work
	}
	if vm, err := client.As[api.VMSpec, api.VMStatus](object); err == nil && kind == api.KindVM {
		if cond, ok := api.FindCondition(vm.Status.Conditions, api.ConditionPendingRestart); ok {
			a.notice("note: %s", cond.Message)
		}
	}
	return a.finished(k, name, done, object, "", time.Since(began))
}

// editVM changes a list in a VM's spec: reads it, lets edit say what it shall
// be, and writes that unless somebody else was faster.
func (a *app) editVM(ctx context.Context, name string, edit func(vm *api.VM) (map[string]any, error)) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		raw, _, err := c.Get(ctx, api.KindVM, a.project, name)
		if err != nil {
			return err
		}
		vm, err := client.As[api.VMSpec, api.VMStatus](raw)
		if err != nil {
			return err
		}
		spec, err := edit(&vm)
		if err != nil {
			return err
		}
		r, err := c.Patch(ctx, api.KindVM, a.project, name, vm.Meta.Revision, map[string]any{"spec": spec})
		if api.CodeOf(err) == api.CodeConflict && err != nil && try < editTries {
			continue
		}
		if err != nil {
			return err
		}
		return a.finishChange(ctx, c, api.KindVM, name, "changed", r)
	}
}

func (a *app) vmDiskCmd() *cobra.Command {
	return group("disk", "Disks of a VM, also while it runs", a.vmDiskAttach(), a.vmDiskDetach(), a.vmDiskResize(), a.vmDiskSet())
}

func (a *app) vmDiskAttach() *cobra.Command {
	var size api.Size
	var image, pool string
	var slot int
	cmd := &cobra.Command{
		Use: "attach VM [VOLUME]", Short: "Attach a volume, or a new disk", Args: cobra.RangeArgs(1, 2),
		Long: `Attaches an existing volume to a VM or, with --size or --image, a new disk that is
made for it. A running VM gets it at once.`,
		Example: `  muster vm disk attach web1 data
  muster vm disk attach web1 --size 20G --pool shared`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			d := map[string]any{}
			set(d, "size", size)
			set(d, "image", image)
			set(d, "pool", pool)
			set(d, "slot", slot)
			if isNew := size != 0 || image != ""; isNew == (len(names) == 2) {
				return usagef("vm disk attach: give either the name of a volume, or --size or --image for a new disk")
			}
			if len(names) == 2 {
				d["volume"] = names[1]
			}
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				list, err := asList(vm.Spec.Disks)
				return map[string]any{"disks": append(list, d)}, err
			})
		},
	}
	cmd.Flags().Var(sizeFlag{&size}, "size", "make a new disk of this size")
	cmd.Flags().StringVar(&image, "image", "", "make a new disk: a clone of this image")
	cmd.Flags().StringVar(&pool, "pool", "", "pool for the new disk")
	cmd.Flags().IntVar(&slot, "slot", 0, "place in the guest's hardware, 1-24 (default: a free one)")
	return cmd
}

func (a *app) vmDiskDetach() *cobra.Command {
	return &cobra.Command{
		Use: "detach VM VOLUME", Short: "Detach a volume, which stays", Args: args("VM", "VOLUME"),
		Long: `Takes a volume from a VM; the volume and its data stay. A running guest has to let
go of the disk: unmount it there first. Until then the volume cannot be attached
elsewhere.`,
		Example:           "  muster vm disk detach web1 data",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				left := slices.DeleteFunc(slices.Clone(vm.Spec.Disks), func(d api.VMDisk) bool {
					return d.Volume == names[1] || names[1] == strconv.Itoa(d.Slot)
				})
				if len(left) == len(vm.Spec.Disks) {
					return nil, api.Errorf(api.CodeNotFound, "vm %s has no volume %s attached; see muster vm show %s", names[0], names[1], names[0])
				}
				list, err := asList(left)
				return map[string]any{"disks": list}, err
			})
		},
	}
}

func (a *app) vmDiskResize() *cobra.Command {
	return &cobra.Command{
		Use: "resize VM VOLUME SIZE", Short: "Enlarge a disk", Args: args("VM", "VOLUME", "SIZE"),
		Long: `Enlarges a volume of a VM, also while it runs: the guest sees a larger disk, and
grows its partition and file system itself. Disks never shrink.`,
		Example:           "  muster vm disk resize web1 web1-disk0 20G",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			size, err := api.ParseSize(names[2])
			if err != nil {
				return usagef("vm disk resize: %v", err)
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			raw, _, err := c.Get(cmd.Context(), api.KindVM, a.project, names[0])
			if err != nil {
				return err
			}
			vm, err := client.As[api.VMSpec, api.VMStatus](raw)
			if err != nil {
				return err
			}
			at := slices.IndexFunc(vm.Spec.Disks, func(d api.VMDisk) bool {
				return d.Volume == names[1] || names[1] == strconv.Itoa(d.Slot)
			})
			if at < 0 {
				return api.Errorf(api.CodeNotFound, "vm %s has no volume %s attached; see muster vm show %s", names[0], names[1], names[0])
			}
			return a.patch(cmd.Context(), api.KindVolume, vm.Spec.Disks[at].Volume, patchOf(map[string]any{"size": size}, nil))
		},
	}
}

func (a *app) vmNICCmd() *cobra.Command {
	return group("nic", "Network cards of a VM, also while it runs", a.vmNICAdd(), a.vmNICRm(), a.vmNICSet())
}

func (a *app) vmNICAdd() *cobra.Command {
	return &cobra.Command{
		Use: "add VM NETWORK[,ip=ADDRESS][,mac=ADDRESS][,in=BYTES][,out=BYTES]", Short: "Add a network card", Args: args("VM", "NETWORK"),
		Example:           "  muster vm nic add web1 lab\n  muster vm nic add web1 office,mac=52:54:00:12:34:56",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			added, err := parseNICs(names[1:])
			if err != nil {
				return err
			}
			if len(added) != 1 {
				return usagef("vm nic add: %q does not name one network", names[1])
			}
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				list, err := asList(vm.Spec.NICs)
				return map[string]any{"nics": append(list, added[0])}, err
			})
		},
	}
}

func (a *app) vmNICRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm VM CARD", Aliases: []string{"remove"}, Short: "Remove a network card, by its slot or MAC address", Args: args("VM", "CARD"),
		Example:           "  muster vm nic rm web1 2\n  muster vm nic rm web1 52:54:00:12:34:56",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.editVM(cmd.Context(), names[0], func(vm *api.VM) (map[string]any, error) {
				at, err := cardIn(vm, names[1])
				if err != nil {
					return nil, err
				}
				list, err := asList(slices.Delete(slices.Clone(vm.Spec.NICs), at, at+1))
				return map[string]any{"nics": list}, err
			})
		},
	}
}

// cardIn finds a network card by its slot or MAC address.
func cardIn(vm *api.VM, card string) (int, error) {
	at := slices.IndexFunc(vm.Spec.NICs, func(n api.VMNIC) bool {
		return strings.EqualFold(n.MAC, card) || card == strconv.Itoa(n.Slot)
	})
	if at < 0 {
		return 0, api.Errorf(api.CodeNotFound, "vm %s has no network card %s; see muster vm show %s", vm.Meta.Name, card, vm.Meta.Name)
	}
	return at, nil
}

// asList turns a typed list into one that unlike things can be added to.
func asList[T any](in []T) ([]any, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	out := []any{}
	if string(b) == "null" {
		return out, nil
	}
	err = json.Unmarshal(b, &out)
	return out, err
}
