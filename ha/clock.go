// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"time"

	"github.com/muster-vm/muster/internal/hostboot"
)

// Times of the safety argument; see DESIGN.md.
const (
	// LeaseDuration is how long a node may act without hearing from a leader.
	LeaseDuration = 10 * time.Second
	// RenewEvery is the pause between two requests.
	RenewEvery = time.Second
	// driftPerMille is the most that two clocks may differ in rate.
	driftPerMille = 10
	// KillTime is what the guard has to end the protected VMs.
	KillTime = 2 * time.Second
	// Margin is added for good measure.
	Margin = time.Second
	// LostAfter is when the leader declares a silent node lost.
	LostAfter = LeaseDuration + LeaseDuration*driftPerMille/1000 + KillTime + Margin
	// maxCredit is how much sooner than by the beginning of its own leadership a new
	// leader may take the leases of before for ended: an election and a bit. More would
	// leave the nodes no time to be heard by it.
	maxCredit = 3 * time.Second
	// maxFenceCredit is how much sooner the node that led before may be switched off or
	// locked out: a request that hangs, and the next, still fit in what is left.
	maxFenceCredit = FenceAfter - renewTimeout - RenewEvery
	// renewTimeout bounds one request for a lease.
	renewTimeout = 3 * time.Second
	// detectEvery is how often the leader looks for silent nodes.
	detectEvery = 200 * time.Millisecond
)

// BootTime returns CLOCK_BOOTTIME: it cannot be set and goes on during suspend.
func BootTime() time.Duration { return hostboot.Clock() }
