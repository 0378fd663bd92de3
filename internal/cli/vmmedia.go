// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) vmCDROMCmd() *cobra.Command {
	return group("cdrom", "What is in the CD-ROM drives of a VM, also while it runs", a.vmCDROMInsert(), a.vmCDROMEject())
}

const forceTrayHelp = "also if the guest has locked the tray"

func (a *app) vmCDROMInsert() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "insert VM [DRIVE] IMAGE", Short: "Put an image into a drive", Args: driveArgs("IMAGE"),
		Long: `Puts an image into a CD-ROM drive; what is in there comes out first. A running VM gets
it at once. A guest that has locked the tray is asked to open it; --force does not ask.
Drives are counted from 0, as vm show lists them; a VM that has one needs no DRIVE. vm set
--cdrom adds and removes drives.`,
		Example:           "  muster vm cdrom insert win cdrom1 virtio-win",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.editVM(cmd.Context(), names[0], changeMedium(driveOf(names, 3), names[len(names)-1], force))
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, forceTrayHelp)
	return cmd
}

func (a *app) vmCDROMEject() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "eject VM [DRIVE]", Short: "Empty a drive", Args: driveArgs(""),
		Long: `Takes out what is in a CD-ROM drive, also while the VM runs. A guest that has locked the
tray is asked to open it; --force does not ask, and what it reads then fails. A VM that
has one drive needs no DRIVE.`,
		Example:           "  muster vm cdrom eject win cdrom0",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.editVM(cmd.Context(), names[0], changeMedium(driveOf(names, 2), "", force))
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, forceTrayHelp)
	return cmd
}

// driveArgs are a VM, a drive that may be left out, and what is named last, if anything.
func driveArgs(last string) cobra.PositionalArgs {
	short, long := []string{"VM"}, []string{"VM", "DRIVE"}
	if last != "" {
		short, long = append(short, last), append(long, last)
	}
	return func(cmd *cobra.Command, names []string) error {
		if len(names) > len(short) {
			return args(long...)(cmd, names)
		}
		return args(short...)(cmd, names)
	}
}

// driveOf is the drive of arguments of which there are all if it is named; else "".
func driveOf(names []string, all int) string {
	if len(names) < all {
		return ""
	}
	return names[1]
}

// changeMedium is the edit that puts an image into a drive, or empties it.
func changeMedium(drive, image string, force bool) func(*api.VM) (map[string]any, error) {
	return func(vm *api.VM) (map[string]any, error) {
		if drive == "" {
			if len(vm.Spec.CDROMs) > 1 {
				return nil, usagef("vm cdrom: vm %s has %d drives; say which, such as cdrom0", vm.Meta.Name, len(vm.Spec.CDROMs))
			}
			drive = "0"
		}
		n, err := strconv.Atoi(strings.TrimPrefix(drive, "cdrom"))
		if err != nil {
			return nil, usagef("vm cdrom: %q is no drive; give its number, such as 0 or cdrom0", drive)
		}
		if n < 0 || n >= len(vm.Spec.CDROMs) {
			return nil, api.Errorf(api.CodeNotFound, "vm %s has no drive cdrom%d, it has %d; add one with muster vm set %s --cdrom …, for the next start", vm.Meta.Name, n, len(vm.Spec.CDROMs), vm.Meta.Name)
		}
		vm.Spec.CDROMs[n].Image, vm.Spec.CDROMs[n].Force = image, force
		list, err := asList(vm.Spec.CDROMs)
		return map[string]any{"cdroms": list}, err
	}
}
