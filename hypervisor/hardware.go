// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/muster-vm/muster/api"
)

// noteHardware keeps beside QEMU's sockets what it is started with, because the
// spec may have changed before the first status says it, and the daemon may die
// in between. The run directory lives as long as the processes do.
func (s *step) noteHardware(p paths, hw *api.VMSpec) error {
	b, err := json.Marshal(hw)
	if err != nil {
		return fmt.Errorf("note the hardware of vm %s: %w", s.vm.Meta.Name, err)
	}
	if err := os.WriteFile(p.hardware, b, 0o600); err != nil {
		return fmt.Errorf("note the hardware of vm %s: %w", s.vm.Meta.Name, err)
	}
	return nil
}

// startedWith reads the note. Without one (QEMU was started by a version that
// left none) the spec has to do, without room for hot-plug.
func (s *step) startedWith() *api.VMSpec {
	b, err := os.ReadFile(s.h.pathsOf(s.vm.Meta.ID).hardware)
	var hw api.VMSpec
	if err == nil {
		err = json.Unmarshal(b, &hw)
	}
	if err != nil {
		s.h.log.Warn("it is not known what hardware QEMU was started with; changes take a restart", "vm", s.vm.Meta.ID, "err", err)
		return s.vm.Spec.Hardware()
	}
	return &hw
}
