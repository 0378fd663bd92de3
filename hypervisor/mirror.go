// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// Copies makes files for volumes that a migration without shared storage brings
// here, and marks those that it takes away. What is left when the operation is
// gone, it removes by itself.
type Copies interface {
	MakeCopy(ctx context.Context, v *configdb.View, volumeID string) (path, format string, err error)
	MarkCopied(ctx context.Context, v *configdb.View, volumeID string) error
}

// mirrorPrefix begins the names of jobs and nodes of a migration, so that they
// are not taken for those of other work.
const mirrorPrefix = "migrate-"

// mirrorName names the job that copies one of QEMU's nodes, and the node that it
// writes to.
func mirrorName(node string) string { return mirrorPrefix + node }

// copiedFile is the file of an arriving VM in place of a volume.
type copiedFile struct{ path, format string }

// traveller is a volume that a migration copies along.
type traveller struct {
	node string // QEMU's
	vol  api.Volume
}

// copied returns the volumes that a migration copies along: disks, and the
// variables of the firmware.
func (s *step) copied(op *api.Operation) (out []traveller, err error) {
	if len(op.Spec.Migration.Volumes) == 0 {
		return nil, nil
	}
	hw := s.vm.Status.Hardware
	if hw == nil {
		hw = &s.vm.Spec
	}
	add := func(volume, node string) {
		vol, ferr := configdb.Volumes.Find(s.v, s.vm.Meta.Project, volume)
		err = errors.Join(err, ferr)
		if ferr == nil && slices.Contains(op.Spec.Migration.Volumes, vol.Meta.ID) {
			out = append(out, traveller{node, vol})
		}
	}
	spec := api.VMSpec{Disks: slices.Clone(hw.Disks)}
	spec.AssignSlots(nil)
	for _, d := range spec.Disks {
		add(d.Volume, argv.DiskNode(d.Slot))
	}
	if hw.UEFI() {
		add(hw.Firmware.Volume, argv.VarsNode)
	}
	if err == nil && len(out) != len(op.Spec.Migration.Volumes) {
		err = fmt.Errorf("vm %s runs with other disks than those that are to be copied", s.vm.Meta.Name)
	}
	return out, err
}

// makeCopies makes the files that the target's QEMU opens in place of the
// volumes.
func (s *step) makeCopies(ctx context.Context, op *api.Operation) error {
	all, err := s.copied(op)
	if err != nil || len(all) == 0 {
		return err
	}
	if s.h.cfg.Copies == nil {
		return errors.New("this node cannot make copies of volumes")
	}
	s.copies = map[string]copiedFile{}
	for _, t := range all {
		path, format, err := s.h.cfg.Copies.MakeCopy(ctx, s.v, t.vol.Meta.ID)
		if err != nil {
			return err
		}
		s.copies[t.vol.Meta.Name] = copiedFile{path, format}
	}
	return nil
}

// export lets the source write the disks of the waiting QEMU.
func (s *step) export(ctx context.Context, op *api.Operation) error {
	all, err := s.copied(op)
	if err != nil || len(all) == 0 {
		return err
	}
	addr := map[string]any{"type": "unix", "data": map[string]any{"path": s.h.pathsOf(s.vm.Meta.ID).nbd}}
	if err := s.in.execute(ctx, "nbd-server-start", map[string]any{"addr": addr, "max-connections": 0}, nil); err != nil {
		return err
	}
	for _, t := range all {
		args := map[string]any{"type": "nbd", "id": mirrorName(t.node), "node-name": t.node, "name": t.node, "writable": true}
		if err := s.in.execute(ctx, "block-export-add", args, nil); err != nil {
			return err
		}
	}
	return nil
}

// diskConnections is how many connections QEMU may make for one disk that is copied:
// one, and another for each time that this node has it try anew.
const diskConnections = 4

// mirror begins to copy the disks.
func (s *step) mirror(ctx context.Context, op *api.Operation, out *departure, all []traveller) error {
	p := s.h.pathsOf(s.vm.Meta.ID)
	for _, t := range all {
		// What an earlier migration may have left.
		if err := s.in.execute(ctx, "blockdev-del", map[string]any{"node-name": mirrorName(t.node)}, nil); err != nil && !refusal(err) {
			return err
		}
	}
	var err error
	if out.copying, err = s.h.newSender(p.nbdOut, op.Spec.Migration.NodeID, diskConnections*len(op.Spec.Migration.Volumes), streamHello{VM: s.vm.Meta.ID, Task: op.Spec.TaskID, Purpose: purposeDisk}); err != nil {
		return err
	}
	out.mirrored = true
	for _, t := range all {
		if s.h.cfg.Copies == nil {
			return errors.New("this node cannot mark volumes that are copied")
		}
		if err := s.h.cfg.Copies.MarkCopied(ctx, s.v, t.vol.Meta.ID); err != nil {
			return err
		}
		node := map[string]any{
			"driver": "nbd", "node-name": mirrorName(t.node), "export": t.node,
			"server": map[string]any{"type": "unix", "path": p.nbdOut},
		}
		if err := s.in.slowly(ctx, "blockdev-add", node); err != nil {
			return err
		}
		job := map[string]any{
			"job-id": mirrorName(t.node), "device": t.node, "target": mirrorName(t.node), "sync": "full", "copy-mode": "background",
			"auto-dismiss": false, "on-target-error": "report",
		}
		if limit := s.bandwidth(op); limit > 0 {
			job["speed"] = limit
		}
		if err := s.in.execute(ctx, "blockdev-mirror", job, nil); err != nil {
			return err
		}
	}
	return nil
}

func refusal(err error) bool {
	var refused *qmp.CommandError
	return errors.As(err, &refused)
}

// jobInfo is QMP's JobInfo (QAPI job.json, query-jobs).
type jobInfo struct {
	ID      string `json:"id"`
	Status  string `json:"status"`
	Current int64  `json:"current-progress"`
	Total   int64  `json:"total-progress"`
	Error   string `json:"error"`
}

// mirrorJobs returns the jobs of migrations.
func (in *instance) mirrorJobs(ctx context.Context) ([]jobInfo, error) {
	var all []jobInfo
	if err := in.command(ctx, "query-jobs", &all); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(j jobInfo) bool { return !strings.HasPrefix(j.ID, mirrorPrefix) }), nil
}

// copyDisks takes one step of the copy of the disks before memory is sent; done
// is true when all of them follow what the guest writes.
func (s *step) copyDisks(ctx context.Context, op *api.Operation, out *departure, all []traveller) (done bool, err error) {
	if !out.mirrored {
		if err := s.mirror(ctx, op, out, all); err != nil {
			if !refusal(err) && s.in.openConn() == nil {
				return false, err
			}
			out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "the disks cannot be copied: "+err.Error()
			return false, s.giveUpCopy(ctx, op, out)
		}
	}
	if out.reason != "" {
		return false, s.giveUpCopy(ctx, op, out)
	}
	jobs, err := s.in.mirrorJobs(ctx)
	if err != nil {
		return false, err
	}
	ready, current, total := 0, int64(0), int64(0)
	for _, j := range jobs {
		if j.Status == "concluded" || j.Error != "" {
			out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "the copy of a disk broke off: "+j.Error+sendingError(out.copying)
			return false, s.giveUpCopy(ctx, op, out)
		}
		if j.Status == "ready" {
			ready++
		}
		current, total = current+j.Current, total+j.Total
	}
	if len(jobs) != len(all) {
		out.phase, out.code, out.reason = api.TaskFailed, api.CodeInternal, "the copy of a disk is not there any more"
		return false, s.giveUpCopy(ctx, op, out)
	}
	if ready == len(jobs) {
		return true, nil
	}
	out.moved(op, current, s.now)
	return false, s.copyProgress(ctx, op, out, current, total)
}

func sendingError(s *sender) string {
	if s == nil {
		return ""
	}
	if err := s.err(); err != nil {
		return " (" + err.Error() + ")"
	}
	return ""
}

// copyProgress is the first half of the bar.
func (s *step) copyProgress(ctx context.Context, op *api.Operation, out *departure, current, total int64) error {
	if total <= 0 || s.now.Sub(out.wroteAt) < progressPause {
		return nil
	}
	done := int(current * 50 / total)
	done -= done % progressStep
	if done <= op.Status.Progress {
		return nil
	}
	out.wroteAt = s.now
	return s.updateOperation(ctx, op, func(st *api.OperationStatus) {
		st.Progress, st.Message = done, "disks go to node "+op.Spec.Migration.Node
	})
}

func (s *step) giveUpCopy(ctx context.Context, op *api.Operation, out *departure) error {
	if out.copying != nil {
		out.copying.close() // a job ends only when what is on its way has arrived, or failed
	}
	if done, err := s.clearMirrors(ctx); !done || err != nil {
		s.result.After = lookSoon
		return err
	}
	return s.endOperation(ctx, op, out.phase, out.code, out.reason)
}

// finishMirrors ends the jobs while the guest stands still: everything it wrote
// is then at the target. done is false as long as one has not ended.
func (s *step) finishMirrors(ctx context.Context, out *departure, all []traveller) (done bool, err error) {
	jobs, err := s.in.mirrorJobs(ctx)
	if err != nil {
		return false, err
	}
	left := 0
	for _, j := range jobs {
		switch {
		case j.Status == "concluded" && j.Error == "" && out.ending:
			continue
		case j.Status == "concluded":
			return false, fmt.Errorf("the copy of a disk broke off: %s", j.Error)
		case !out.ending && j.Status != "ready":
			return false, fmt.Errorf("the copy of a disk is %s again", j.Status)
		}
		left++
		if !out.ending {
			// Of a job that is ready this is the end in order, without a switch to the
			// copy (QAPI block-job-cancel).
			if err := s.in.execute(ctx, "block-job-cancel", map[string]any{"device": j.ID}, nil); err != nil {
				return false, err
			}
		}
	}
	if len(jobs) != len(all) {
		return false, errors.New("the copy of a disk is not there any more")
	}
	out.ending = true
	if left > 0 {
		return false, nil
	}
	return s.clearMirrors(ctx)
}

// clearMirrors removes jobs and nodes of migrations, whatever their state.
func (s *step) clearMirrors(ctx context.Context) (done bool, err error) {
	jobs, err := s.in.mirrorJobs(ctx)
	if err != nil {
		return false, err
	}
	left := 0
	for _, j := range jobs {
		var err error
		if j.Status == "concluded" {
			err = s.in.execute(ctx, "job-dismiss", map[string]any{"id": j.ID}, nil)
			if err == nil {
				err = s.in.execute(ctx, "blockdev-del", map[string]any{"node-name": j.ID}, nil)
			}
		} else {
			left++
			err = s.in.execute(ctx, "block-job-cancel", map[string]any{"device": j.ID, "force": true}, nil)
		}
		if err != nil && !refusal(err) {
			return false, err
		}
	}
	return left == 0, nil
}
