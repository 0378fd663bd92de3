// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"cmp"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
)

// A QEMU that sends its guest away waits for the other end: while it ends the copies
// of disks, and while it sends the last of the memory, with its guest halted and its
// monitor silent. If the other end is halted, too, or its host has lost its power, no
// connection breaks for a quarter of an hour, or ever. So this node breaks it: then
// QEMU gives the migration up, and the guest goes on here.

// StallTime is how long the end of a migration may take beyond twice the standstill
// that was allowed.
const StallTime = 30 * time.Second

func stallTime(op *api.Operation) time.Duration {
	downtime := cmp.Or(op.Spec.Migration.MaxDowntimeMillis, api.DefaultDowntimeMillis)
	return StallTime + 2*time.Duration(downtime)*time.Millisecond
}

// stalled notes that the switch to the other node takes too long.
func (out *departure) stalled(op *api.Operation, since, now time.Time) {
	if most := stallTime(op); out.reason == "" && !since.IsZero() && now.Sub(since) > most {
		out.phase, out.code = api.TaskFailed, api.CodeTimeout
		out.reason = fmt.Sprintf("the guest stood still for more than %v for the switch to node %s; the vm runs on here", most, op.Spec.Migration.Node)
	}
}

// IdleTime is how long nothing may reach the target while its disks or its memory are
// on their way.
const IdleTime = time.Minute

// moved notes how many bytes have left, and gives the migration up when that has not
// changed for too long: the target does not read, and would never.
func (out *departure) moved(op *api.Operation, sent int64, now time.Time) {
	if sent != out.sent || out.sentAt.IsZero() {
		out.sent, out.sentAt = sent, now
		return
	}
	if out.reason == "" && now.Sub(out.sentAt) > IdleTime {
		out.phase, out.code = api.TaskFailed, api.CodeTimeout
		out.reason = fmt.Sprintf("nothing has reached node %s for more than %v; the vm runs on here", op.Spec.Migration.Node, IdleTime)
	}
}

// cutStalled breaks the streams of a QEMU that does not answer, if nobody wants its
// migration any more or it has been silent for too long. A commit that is on its way
// is not touched: its guest is at the other node.
func (s *step) cutStalled() {
	out := s.in.out
	if out == nil || out.cut || out.committing || out.sending == nil && out.copying == nil {
		return
	}
	if out.silentSince.IsZero() {
		out.silentSince = s.now
	}
	if op := liveMigration(s.v, s.vm.Meta.ID); op != nil && op.Spec.TaskID == out.task {
		if arr, err := s.arrivalOf(op); err == nil && out.reason == "" {
			out.phase, out.code, out.reason = s.reasonAgainst(op, arr)
		}
		out.stalled(op, out.silentSince, s.now)
		if out.reason == "" {
			return
		}
	}
	s.h.log.Warn("QEMU waits for the target of its migration; the connections to it are broken", "vm", s.vm.Meta.ID, "task", out.task, "reason", out.reason)
	out.cut = true
	out.closeStreams()
}

func (out *departure) closeStreams() {
	for _, s := range []*sender{out.sending, out.copying} {
		if s != nil {
			s.close()
		}
	}
}
