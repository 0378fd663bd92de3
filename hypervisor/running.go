// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

// Running counts the VMs of this host whose QEMU answers. It asks nobody.
func (h *Hypervisor) Running() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, in := range h.instances {
		if in.openConn() != nil {
			n++
		}
	}
	return n
}
