// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"maps"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) vmCmd() *cobra.Command {
	stop := a.vmAction("stop", "stopped", "Shut VMs down", "Presses the ACPI power button and waits until the guest has shut down.\nWith --force the VM ends at once, like pulling the plug.")
	stop.Flags().Bool("force", false, "end at once, like pulling the plug")
	start := a.vmAction("start", "started", "Start VMs", "A VM that runs already is left as it is. A suspended VM goes on from its saved memory;\nwith --discard-suspend it starts without it.")
	for _, cmd := range []*cobra.Command{start, stop} {
		cmd.Flags().Bool("discard-suspend", false, "throw the saved memory of a suspended VM away")
	}
	rm := a.rmCmd(api.KindVM, "Removes VMs with the disks that were made for them. A running VM is refused;\nwith --force it ends at once, like pulling the plug, and is removed.")
	rm.Flags().Bool("force", false, "end a running VM at once and remove it")
	return group("vm", "Virtual machines",
		a.vmCreate(), a.lsCmd(api.KindVM), a.showCmd(api.KindVM), a.vmSet(),
		start,
		stop,
		a.vmAction("reboot", "rebooted", "Reset running VMs", "Resets the VM like the reset button."),
		a.vmAction("pause", "paused", "Stop the virtual CPUs of running VMs", "Memory and devices stay as they are until the VM is resumed."),
		a.vmAction("resume", "resumed", "Let paused or suspended VMs go on", "A suspended VM goes on from its saved memory."),
		a.vmAction("suspend", "suspended", "Save the memory of VMs to disk and end them", "The guest halts while its memory is written into the first disk; then the VM takes no\nmemory of its node. Start or resume lets it go on where it was."),
		a.vmMigrate(), a.vmMove(), a.snapshotCmd(), a.vmClone(),
		a.consoleCmd(), a.vncCmd(), a.screenshotCmd(), a.vmQEMU(),
		a.vmDiskCmd(), a.vmNICCmd(), a.vmCDROMCmd(),
		a.agentCmd(), a.execCmd(), a.passwordCmd(), a.freezeCmd(), a.thawCmd(),
		rm)
}

type vmCreateFlags struct {
	cpus     int
	memory   api.Size
	least    api.Size
	image    string
	diskSize api.Size
	disks    []api.Size
	volumes  []string
	networks []string
	pool, ha string
	display  string
	ci       cloudInitFlags
	start    bool
	count    int
	labels   []string
	options  string
	machineFlags
	limits   limitFlags
	recovery recoveryFlags
}

func (a *app) vmCreate() *cobra.Command {
	var f vmCreateFlags
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create a VM", Args: args("NAME"),
		Long: `Creates a VM. Its disks, in boot order: a clone of --image, then the existing
volumes of --volume, then an empty disk for each --disk. With --count N it creates
N such VMs, NAME-1 to NAME-N (as many digits as N has), several at a time.`,
		Example: `  muster vm create web1 --cpu 1 --memory 512M --image tiny --ha restart --start
  muster vm create db1 --cpu 4 --memory 8G --image debian --disk-size 20G --disk 100G --pool shared
  muster vm create desk --image tiny --memory 256M --count 100 --start
  muster vm create lab --memory 1G --disk 10G --label env=test --network lab
  muster vm create win --cpu 4 --memory 8G --disk 60G --uefi --secure-boot --tpm --cdrom windows --cdrom virtio-win
  muster vm create app1 --memory 2G --image debian --network lab --ci-user ops --ssh-key ~/.ssh/id_ed25519.pub --user-data app.yaml --start
  muster vm create gate --disk 10G --network lab,ip=10.20.0.1 --network office,mac=52:54:00:12:34:56`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			spec, err := f.spec()
			if err != nil {
				return err
			}
			if err := f.machineFlags.spec(spec, cmd.Flags().Changed); err != nil {
				return err
			}
			ci, err := f.ci.spec(a)
			if err != nil {
				return err
			}
			if ci != nil {
				spec["cloudInit"] = ci
			}
			labels, err := parseLabels(f.labels, false)
			if err != nil {
				return err
			}
			a.warnHA(cmd.Context(), &f)
			switch {
			case !cmd.Flags().Changed("count"):
				return a.create(cmd.Context(), api.KindVM, names[0], labels, spec)
			case f.count < 1 || f.count > maxCount:
				return usagef("--count: is %d; give 1 to %d VMs", f.count, maxCount)
			case len(f.volumes) > 0:
				return usagef("--volume names one volume, which --count VMs cannot share; give --image or --disk")
			}
			return a.createMany(cmd.Context(), names[0], f.count, labels, spec)
		},
	}
	fs := cmd.Flags()
	fs.IntVar(&f.cpus, "cpu", 1, "virtual CPUs")
	f.memory = 512 * api.MiB
	fs.Var(sizeFlag{&f.memory}, "memory", "guest memory, such as 512M or 4G")
	fs.Var(sizeFlag{&f.least}, "memory-min", "memory that the node may squeeze the VM to when it is short")
	fs.StringVar(&f.image, "image", "", "first disk: a clone of this image")
	fs.Var(sizeFlag{&f.diskSize}, "disk-size", "enlarge the clone of --image to this size")
	fs.Var(sizesFlag{&f.disks}, "disk", "an empty disk of this size (repeatable)")
	fs.StringArrayVar(&f.volumes, "volume", nil, "attach this existing volume (repeatable)")
	fs.StringVar(&f.options, "disk-options", "", diskOptionHelp)
	f.machineFlags.add(fs, true)
	fs.StringArrayVar(&f.networks, "network", nil, networkHelp)
	fs.StringVar(&f.pool, "pool", "", "pool for the new disks (default the image's pool for a clone, else \"local\")")
	fs.StringVar(&f.ha, "ha", "", "what to do when the node is lost: none or restart (default \"none\")")
	f.ci.bind(fs)
	fs.StringVar(&f.display, "display", "", "screen: vnc or none (default \"vnc\")")
	f.limits.add(fs)
	f.recovery.add(fs)
	fs.BoolVar(&f.start, "start", false, "start the VM when it is created")
	fs.IntVar(&f.count, "count", 1, "create so many VMs, NAME-1 and so on")
	fs.StringArrayVar(&f.labels, "label", nil, "label KEY=VALUE (repeatable)")
	return cmd
}

// spec composes the wish and finds contradictions of flags.
func (f *vmCreateFlags) spec() (map[string]any, error) {
	if err := checkCPUs(f.cpus); err != nil {
		return nil, err
	}
	if f.diskSize != 0 && f.image == "" {
		u := usagef("--disk-size enlarges the clone of --image, which is not given")
		u.hint = "for an empty disk use --disk SIZE"
		return nil, u
	}
	disks := []map[string]any{}
	options, err := parseDiskOptions(f.options)
	if err != nil {
		return nil, err
	}
	add := func(d map[string]any) {
		maps.Copy(d, options)
		if d["volume"] == nil {
			set(d, "pool", f.pool)
		}
		disks = append(disks, d)
	}
	if f.image != "" {
		d := map[string]any{"image": f.image}
		set(d, "size", f.diskSize)
		add(d)
	}
	for _, v := range f.volumes {
		add(map[string]any{"volume": v})
	}
	for _, n := range f.disks {
		add(map[string]any{"size": n})
	}
	if f.pool != "" && f.image == "" && len(f.disks) == 0 {
		return nil, usagef("--pool is for new disks, but neither --image nor --disk is given")
	}
	spec := map[string]any{"cpus": f.cpus, "memory": f.memory}
	if len(disks) > 0 {
		spec["disks"] = disks
	}
	nics, err := parseNICs(f.networks)
	if err != nil {
		return nil, err
	}
	if len(nics) > 0 {
		spec["nics"] = nics
	}
	set(spec, "memoryMin", f.least)
	set(spec, "ha", f.ha)
	f.recovery.into(spec)
	set(spec, "display", f.display)
	f.limits.into(spec)
	if f.start {
		spec["power"] = api.PowerRunning
	}
	return spec, nil
}

// checkCPUs refuses 0 here, because the cluster takes it for "not given".
func checkCPUs(n int) error {
	if n < 1 {
		return usagef("--cpu: is %d; give 1 to %d virtual CPUs", n, api.MaxCPUs)
	}
	return nil
}

// vmAction makes the command of a verb.
func (a *app) vmAction(verb, done, short, long string) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME...", Short: short, Long: long, Args: atLeastOne("NAME"),
		Example:           "  muster vm " + verb + " web1",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			body := map[string]any{}
			for flag, field := range map[string]string{"force": "force", "discard-suspend": "discardSuspend"} {
				if f := cmd.Flags().Lookup(flag); f != nil && f.Value.String() == "true" {
					body[field] = true
				}
			}
			return a.eachAtOnce(names, func(a *app, c *client.Client, name string) error {
				r, err := c.Action(cmd.Context(), api.KindVM, a.project, name, verb, body)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(api.KindVM), name, done, r)
			})
		},
	}
}

func (a *app) vmSet() *cobra.Command {
	var cpus int
	var memory, least api.Size
	var ha, display string
	var labels, networks []string
	var machine machineFlags
	var limits limitFlags
	var recovery recoveryFlags
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change CPUs, memory, machine, networks, HA policy or labels", Args: args("NAME"),
		Long: `Changes what is given and leaves the rest. A VM that
runs is changed at once as far as that is possible; what takes a restart is said
and waits for the next start. --network names all network cards that the VM
shall have: one that it has on a network keeps its addresses, the others are
removed; --network none removes all. --label KEY- removes a label.
Limits (--cpu-weight to --io-weight) are in force at once, also of a running VM.`,
		Example: `  muster vm set web1 --memory 1G --cpu 2
  muster vm set web1 --network lab --network office
  muster vm set web1 --cpu-model cluster --watchdog reset --uefi
  muster vm set web1 --cpu-max 150 --cpu-weight 50
  muster vm set web1 --ha restart --label env=prod --label old-`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			changed := cmd.Flags().Changed
			spec := map[string]any{}
			if changed("cpu") {
				if err := checkCPUs(cpus); err != nil {
					return err
				}
				spec["cpus"] = cpus
			}
			if changed("memory") {
				spec["memory"] = memory
			}
			if changed("memory-min") {
				spec["memoryMin"] = least
			}
			if changed("ha") {
				spec["ha"] = ha
			}
			if changed("display") {
				spec["display"] = display
			}
			limits.into(spec)
			recovery.into(spec)
			if changed("network") {
				nics, err := parseNICs(networks)
				if err != nil {
					return err
				}
				spec["nics"] = nics
			}
			if err := machine.spec(spec, changed); err != nil {
				return err
			}
			l, err := parseLabels(labels, true)
			if err != nil {
				return err
			}
			if len(spec) == 0 && len(l) == 0 {
				return usagef("vm set: nothing to change; give --cpu, --memory, --network, --ha, --display, --label, a limit or a flag of the machine")
			}
			return a.patch(cmd.Context(), api.KindVM, names[0], patchOf(spec, l))
		},
	}
	machine.add(cmd.Flags(), false)
	limits.add(cmd.Flags())
	recovery.add(cmd.Flags())
	cmd.Flags().IntVar(&cpus, "cpu", 0, "virtual CPUs")
	cmd.Flags().Var(sizeFlag{&memory}, "memory", "guest memory, such as 512M or 4G")
	cmd.Flags().Var(sizeFlag{&least}, "memory-min", "memory that the node may squeeze it to when it is short; as much as its memory for never")
	cmd.Flags().StringArrayVar(&networks, "network", nil, networkHelp)
	cmd.Flags().StringVar(&ha, "ha", "", "what to do when the node is lost: none or restart")
	cmd.Flags().StringVar(&display, "display", "", "screen: vnc or none, from the next start on")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label KEY=VALUE, or KEY- to remove it (repeatable)")
	return cmd
}

// patchOf builds a merge patch without empty parts, which would reset nothing
// but count as a change of the document.
func patchOf(spec, labels map[string]any) map[string]any {
	p := map[string]any{}
	if len(spec) > 0 {
		p["spec"] = spec
	}
	if len(labels) > 0 {
		p["meta"] = map[string]any{"labels": labels}
	}
	return p
}
