// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"strings"
	"time"
)

// Drill is the last failover of one protected VM that was made on purpose, to see that
// one works. Its ID is the VM's; see ha/DESIGN.md.
type Drill = Object[DrillSpec, DrillStatus]

// DrillSpec is the wish, written with the task. The next drill of the VM replaces it.
type DrillSpec struct {
	TaskID string `json:"taskID,omitempty"` // none for one that was left out
	VM     string `json:"vm"`
	// NodeID, Epoch and Generation are those of the VM that is to be ended.
	NodeID     string `json:"nodeID"`
	Node       string `json:"node"`
	Epoch      uint64 `json:"epoch"`
	Generation uint64 `json:"generation"`
	// Schedule is that of the VM when the drill was begun.
	Schedule string `json:"schedule,omitempty"`
	// Due is when the schedule wanted it; absent if a person did.
	Due     *time.Time `json:"due,omitempty"`
	BegunAt time.Time  `json:"begunAt"`
	Actor   string     `json:"actor,omitempty"`
	// Cancel asks for the VM to be left, or started, where it is.
	Cancel bool `json:"cancel,omitempty"`
}

// DrillStatus is written by the VM's owner as far as Ended, then by the leader.
type DrillStatus struct {
	// Phase is that of the task; a final one is the last word. Cancelled without a
	// task: left out.
	Phase   TaskPhase `json:"phase,omitempty"`
	Message string    `json:"message,omitempty"`
	Code    Code      `json:"code,omitempty"`
	// PID of the QEMU that the owner ends, written before it does.
	PID int `json:"pid,omitempty"`
	// Ended is what the guard said of its end.
	Ended *DrillEnd `json:"ended,omitempty"`
	// Refusal is why no other node could take it.
	Refusal string `json:"refusal,omitempty"`
	// Node, Epoch and MovedAt are of the binding that the leader made, Failover is
	// the ID of its evidence.
	NodeID   string     `json:"nodeID,omitempty"`
	Node     string     `json:"node,omitempty"`
	Epoch    uint64     `json:"epoch,omitempty"`
	MovedAt  *time.Time `json:"movedAt,omitempty"`
	Failover string     `json:"failover,omitempty"`
	// DoneAt is when the leader saw the end of the drill.
	DoneAt *time.Time `json:"doneAt,omitempty"`
	// SucceededAt is when a drill of this VM ended well last, perhaps an earlier one.
	SucceededAt *time.Time `json:"succeededAt,omitempty"`
}

// DrillEnd is the end of the QEMU of a drill, as its guard reported it.
type DrillEnd struct {
	PID    int    `json:"pid"`
	Reason string `json:"reason"`
	Signal int    `json:"signal,omitempty"`
	// At is when the owner knew of it, by its clock.
	At time.Time `json:"at"`
}

// Over reports whether the drill has its last word.
func (d *DrillStatus) Over() bool { return d.Phase.Final() }

// Stands reports that the drill still concerns the VM of an epoch and generation.
func Stands(d *Drill, vm *VM, epoch uint64) bool {
	return !d.Status.Over() && !d.Spec.Cancel && d.Spec.Epoch == epoch && d.Spec.Generation == vm.Meta.Generation && d.Status.Epoch == 0
}

// SetDefaults implements Spec.
func (s *DrillSpec) SetDefaults() {}

// Validate implements Spec.
func (s *DrillSpec) Validate() error { return nil }

// DrillManual makes a VM one that is drilled only when a person asks for it.
const DrillManual = "manual"

// drillDays are the days of a weekly schedule.
var drillDays = map[string]time.Weekday{
	"sun": time.Sunday, "mon": time.Monday, "tue": time.Tuesday, "wed": time.Wednesday, "thu": time.Thursday, "fri": time.Friday, "sat": time.Saturday,
}

// DrillSchedule is when a VM is drilled, in UTC.
type DrillSchedule struct {
	of     time.Duration // of the day
	day    time.Weekday
	weekly bool
}

// ParseDrill reads spec.recovery.drill: "daily HH:MM" or "weekly DAY HH:MM". ok is
// false for no schedule: "" and "manual".
func ParseDrill(text string) (s DrillSchedule, ok bool, err error) {
	if text == "" || text == DrillManual {
		return s, false, nil
	}
	words := strings.Split(text, " ")
	clock := words[len(words)-1]
	switch {
	case len(words) == 2 && words[0] == "daily":
	case len(words) == 3 && words[0] == "weekly":
		s.weekly = true
		if s.day, ok = drillDays[words[1]]; !ok {
			return s, false, Invalid("spec.recovery.drill", "has the day %q; give mon, tue, wed, thu, fri, sat or sun", clip(words[1]))
		}
	default:
		return s, false, Invalid("spec.recovery.drill", "is %q; give manual, or a time in UTC: daily 03:00, or weekly sun 03:00", clip(text))
	}
	at, err := time.Parse("15:04", clock)
	if err != nil || len(clock) != len("15:04") {
		return s, false, Invalid("spec.recovery.drill", "has the time %q; give hours and minutes in UTC, such as 03:00", clip(clock))
	}
	s.of = time.Duration(at.Hour())*time.Hour + time.Duration(at.Minute())*time.Minute
	return s, true, nil
}

// Last is the latest time of the schedule that is not after now.
func (s DrillSchedule) Last(now time.Time) time.Time {
	now = now.UTC()
	due := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC).Add(s.of)
	for due.After(now) || s.weekly && due.Weekday() != s.day {
		due = due.AddDate(0, 0, -1)
	}
	return due
}

// Next is the first time of the schedule after now.
func (s DrillSchedule) Next(now time.Time) time.Time {
	days := 1
	if s.weekly {
		days = 7
	}
	return s.Last(now).AddDate(0, 0, days)
}

// Drilled reports whether a VM may be drilled.
func (s *VMSpec) Drilled() bool { return s.Recovery != nil && s.Recovery.Drill != "" }

// Progress of a drill in percent.
func (d *DrillStatus) Progress() int {
	switch {
	case d.Epoch != 0:
		return 60
	case d.Ended != nil:
		return 30
	}
	return 0
}

// Took is from the end of QEMU until it ran on the other node; 0 unless it did.
func (d *DrillStatus) Took() time.Duration {
	if d.Phase != TaskSucceeded || d.Ended == nil || d.DoneAt == nil {
		return 0
	}
	return max(time.Millisecond, d.DoneAt.Sub(d.Ended.At))
}
