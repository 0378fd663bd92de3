// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

// Bare returns the snapshot without its sessions. Where it is restored begins a
// new life, in which no request of the old one can be under way.
func (p *Snapshot) Bare() *Snapshot {
	return &Snapshot{view: p.view, sessions: map[[16]byte]*session{}}
}
