// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"regexp"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// QEMU tells what the QEMU of a VM that runs here was started with, and the last
// messages on its monitor, at most log of them.
func (h *Hypervisor) QEMU(ctx context.Context, vmID string, log int) (api.VMQEMU, error) {
	out := api.VMQEMU{Node: h.cfg.NodeName}
	procs, err := h.procs.get(ctx)
	if err != nil {
		return out, err
	}
	p, ok := procs[vmID]
	if !ok || p.State != ProcessRunning || p.PID == 0 {
		name := vmID
		if vm, err := configdb.VMs.Get(h.cfg.DB.Local(), vmID); err == nil {
			name = vm.Meta.Name
		}
		return out, api.Errorf(api.CodeRefused, "vm %s does not run on node %s now, so it has no QEMU; see muster vm show %s", name, h.cfg.NodeName, name)
	}
	out.PID = p.PID
	args, err := cmdline(p.PID)
	if err != nil {
		return out, fmt.Errorf("read the arguments of QEMU (pid %d): %w", p.PID, err)
	}
	for _, a := range args {
		out.Argv = append(out.Argv, withoutSecrets(a))
	}
	h.mu.Lock()
	in := h.instances[vmID]
	h.mu.Unlock()
	if in != nil {
		out.Log = in.said.Last(log)
	}
	return out, nil
}

var secretOption = regexp.MustCompile(`(?i)((?:^|,)[a-z0-9_.-]*(?:password|passphrase|secret|token|data)[a-z0-9_.-]*=)(?:[^,]|,,)*`)

// withoutSecrets hides the values of options that are secrets.
func withoutSecrets(arg string) string { return secretOption.ReplaceAllString(arg, "${1}hidden") }
