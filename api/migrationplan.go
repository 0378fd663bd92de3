// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// MigrationProgress is how far a VM's migration is, at this moment. It is made
// for the answer and is in no database.
type MigrationProgress struct {
	VM   string `json:"vm"`
	Task string `json:"task"`
	From string `json:"from"`
	To   string `json:"to"`
	// Phase, Progress (in percent) and Message are the task's.
	Phase    TaskPhase `json:"phase"`
	Progress int       `json:"progress"`
	Message  string    `json:"message,omitempty"`
	// Transfer is what QEMU at the source says; absent until something flows.
	Transfer *MigrationTransfer `json:"transfer,omitempty"`
}

// MigrationTransfer is what flows (QAPI MigrationInfo, JobInfo).
type MigrationTransfer struct {
	// State is QEMU's word: active, pre-switchover, completed; disks while only
	// disks are copied.
	State string `json:"state"`
	// DisksDone and DisksTotal are bytes of the disks that go along.
	DisksDone  Size `json:"disksDone,omitempty"`
	DisksTotal Size `json:"disksTotal,omitempty"`
	// MemoryTotal is the guest's, MemoryLeft what has yet to be sent, Sent what
	// was: with what the guest changed meanwhile it may be more than the total.
	MemoryTotal Size `json:"memoryTotal,omitempty"`
	MemoryLeft  Size `json:"memoryLeft,omitempty"`
	Sent        Size `json:"sent,omitempty"`
	// Speed and DirtyRate in bytes per second: what flows, and what the guest
	// changes.
	Speed     Size `json:"speed,omitempty"`
	DirtyRate Size `json:"dirtyRate,omitempty"`
	// Passes over the memory, and how much in percent the guest is slowed down so
	// that they come to an end.
	Passes   int64 `json:"passes,omitempty"`
	Throttle int   `json:"throttle,omitempty"`
	// ElapsedMillis since it began; ExpectedDowntimeMillis as QEMU reckons now.
	ElapsedMillis          int64 `json:"elapsedMillis,omitempty"`
	ExpectedDowntimeMillis int64 `json:"expectedDowntimeMillis,omitempty"`
}

// MigrationPlan is what a migration would do, and how long it would take.
type MigrationPlan struct {
	VM   string `json:"vm"`
	From string `json:"from"`
	// To is the node that would be chosen.
	To string `json:"to"`
	// Memory that the guest has, and Volumes that would be copied along.
	Memory  Size            `json:"memory"`
	Volumes []PlannedVolume `json:"volumes,omitempty"`
	// DirtyRate is what the guest changes of its memory, in bytes per second, as
	// measured for MeasuredMillis.
	DirtyRate      Size  `json:"dirtyRate"`
	MeasuredMillis int64 `json:"measuredMillis"`
	// Bandwidth that the forecast reckons with, in bytes per second; Assumed says
	// that nobody bounds it and that it is a guess.
	Bandwidth Size `json:"bandwidth"`
	Assumed   bool `json:"assumed,omitempty"`
	// Channels that would carry the memory.
	Channels int `json:"channels"`
	// TotalMillis and DowntimeMillis are the forecast. Converges is false if the
	// guest changes its memory faster than it can be sent: then it is slowed down.
	TotalMillis    int64 `json:"totalMillis"`
	DowntimeMillis int64 `json:"downtimeMillis"`
	Converges      bool  `json:"converges"`
	// Halted says that the guest stands still while its memory is sent, see
	// HaltsToMigrate.
	Halted bool `json:"halted,omitempty"`
}

// HaltsToMigrate reports that a guest has to stand still while its memory is sent: a
// QEMU before 9.0 that emulates processors does not see all that the guest writes
// meanwhile ("physmem: Fix migration dirty bitmap coherency with TCG memory access"),
// and the copy would be broken.
func HaltsToMigrate(accelerator Accelerator, qemuMajor int) bool {
	return accelerator == AccelTCG && qemuMajor < 9
}

// PlannedVolume is a volume that would be copied along.
type PlannedVolume struct {
	Name string `json:"name"`
	Size Size   `json:"size"`
}

// What a forecast reckons with.
const (
	// AssumedBandwidth is a line of 1 Gbit/s with its overhead.
	AssumedBandwidth = 112 * MiB
	// switchMillis is what the switch takes beside the last of the memory.
	switchMillis = 60
	// maxPasses of a forecast: a guest that needs more does not come to an end.
	maxPasses = 30
)

// Forecast fills in how long the migration would take, with a bound on the
// downtime. Memory is sent in passes, each of what the guest changed during the
// one before, until the rest fits into the downtime.
func (p *MigrationPlan) Forecast(maxDowntimeMillis int) {
	if p.Bandwidth <= 0 {
		p.Bandwidth, p.Assumed = AssumedBandwidth, true
	}
	if maxDowntimeMillis == 0 {
		maxDowntimeMillis = DefaultDowntimeMillis
	}
	speed := float64(p.Bandwidth) / 1000 // bytes per millisecond
	disks := 0.0
	for _, v := range p.Volumes {
		disks += float64(v.Size) / speed
	}
	left, total := float64(p.Memory), 0.0
	if p.Halted {
		p.Converges = true
		down := left/speed + switchMillis
		p.TotalMillis, p.DowntimeMillis = int64(disks+down), int64(down)
		return
	}
	for range maxPasses {
		if left/speed <= float64(maxDowntimeMillis) {
			p.Converges = true
			break
		}
		took := left / speed
		total += took
		left = min(took*float64(p.DirtyRate)/1000, float64(p.Memory))
	}
	down := left/speed + switchMillis
	if !p.Converges {
		down = float64(maxDowntimeMillis) + switchMillis
	}
	p.TotalMillis, p.DowntimeMillis = int64(disks+total+down), int64(down)
}
