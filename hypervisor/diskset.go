// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/rbdname"
)

// Times of QEMU's jobs.
const (
	// JobDeadline bounds one job: QEMU writes or reads the whole memory and
	// answers nothing meanwhile.
	JobDeadline = 30 * time.Minute
	// firstPoll and lastPoll are the pauses between looks at a job.
	firstPoll = 20 * time.Millisecond
	lastPoll  = time.Second
	// unlockTime is how long the disks of a QEMU that just ended may be locked.
	unlockTime  = 15 * time.Second
	unlockRetry = 200 * time.Millisecond
	// catchUpTime is how long work on disks waits for the view that a new lease needs.
	catchUpTime = 15 * time.Second
	// freezeMost is how long a guest's file systems stay frozen at most for a
	// snapshot; it is over in milliseconds, or it is not a snapshot of them.
	freezeMost = 30 * time.Second
)

// DiskSnapshots are the internal snapshots of volumes that no QEMU has open. One
// that another process has open is an error with the code conflict.
type DiskSnapshots interface {
	// CreateSnapshot makes one; one of that name that is there stays.
	CreateSnapshot(ctx context.Context, v *configdb.View, project, volume, tag string) error
	// ApplySnapshot takes the content back to one.
	ApplySnapshot(ctx context.Context, v *configdb.View, project, volume, tag string) error
	// DeleteSnapshot removes one. It is no error if there is none.
	DeleteSnapshot(ctx context.Context, v *configdb.View, project, volume, tag string) error
	HasSnapshot(ctx context.Context, v *configdb.View, project, volume, tag string) (bool, error)
}

// Quiesce freezes the file systems of a guest that has an agent.
type Quiesce interface {
	// Freeze fails, and nothing is frozen, if the guest has no agent that answers.
	// What is frozen is thawed after that time at the latest.
	Freeze(ctx context.Context, vmID string, most time.Duration) (fileSystems int, err error)
	Thaw(ctx context.Context, vmID string) error
}

// errNoSnapshots is for a node without DiskSnapshots.
var errNoSnapshots = api.Errorf(api.CodeUnsupported, "this node cannot change snapshots of disks that no QEMU has open")

// diskSet are disks of one VM and the way to their snapshots.
type diskSet struct {
	h       *Hypervisor
	in      *instance
	epoch   uint64 // of the binding under which the work began
	project string
	disks   []api.SnapshotDisk
}

// offline does something to each disk while the VM is this node's: no QEMU may have it
// open. The images' locks say so, too, but not on every file system, and a QEMU that was
// taken over may let go of them.
func (d *diskSet) offline(ctx context.Context, disks []api.SnapshotDisk, do func(v *configdb.View, volume string) error) error {
	if d.h.cfg.Snapshots == nil {
		return errNoSnapshots
	}
	for _, disk := range disks {
		v, err := d.ours(ctx, disk.Volume)
		if err != nil {
			return err
		}
		if err := unlocked(ctx, func() error { return d.nobodyHas(ctx, v, disk) }); err != nil {
			return err
		}
		if err := do(v, disk.Volume); err != nil {
			return fmt.Errorf("volume %s: %w", disk.Volume, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// ours returns a view by which the VM is this node's now, as it was when the work began.
// The lease may be another one than then: between the two the VM may have run elsewhere,
// which a view that is older than the lease does not show.
func (d *diskSet) ours(ctx context.Context, volume string) (*configdb.View, error) {
	for end := time.Now().Add(catchUpTime); ; {
		_, revision, lease := d.h.cfg.Lease.Current()
		v := d.h.cfg.DB.Local()
		switch {
		case !lease:
			return nil, api.Errorf(api.CodeRefused, "node %s has no lease now, so it must not touch volume %s", d.h.cfg.NodeName, volume)
		case v.Revision() >= revision:
			_, err := d.h.boundHere(v, d.in.id, d.epoch)
			return v, err
		case time.Now().After(end):
			return nil, api.Errorf(api.CodeRefused, "node %s has not caught up with the cluster yet, so it must not touch volume %s", d.h.cfg.NodeName, volume)
		}
		if err := pause(ctx, unlockRetry); err != nil {
			return nil, err
		}
	}
}

// nobodyHas refuses a disk that a guest may be using: this VM's, whose QEMU runs and
// does not say what it has open, or one of another VM that has the volume now.
func (d *diskSet) nobodyHas(ctx context.Context, v *configdb.View, disk api.SnapshotDisk) error {
	procs, err := d.h.procs.get(ctx)
	if err != nil {
		return err
	}
	if p, ok := procs[d.in.id]; ok && p.State != ProcessExited && d.in.openConn() == nil {
		d.h.procs.invalidate()
		return api.Errorf(api.CodeConflict, "volume %s: QEMU (pid %d) runs and does not answer, so it may be using it; wait, or stop the vm with force", disk.Volume, p.PID)
	}
	for _, by := range configdb.Volumes.Referrers(v, disk.VolumeID) {
		id, ok := strings.CutPrefix(by, string(api.KindVM)+"/")
		if !ok || id == d.in.id {
			continue
		}
		vm, err := configdb.VMs.Get(v, id)
		if err == nil && (vm.Status.PID != 0 || vm.Status.Hardware != nil || vm.Spec.Power != api.PowerStopped) {
			return api.Errorf(api.CodeRefused, "volume %s belongs to vm %s now, which is %s; stop that first", disk.Volume, vm.Meta.Name, vm.Status.Phase)
		}
	}
	return nil
}

// untouched refuses if one of the disks cannot be read, before any is changed.
func (d *diskSet) untouched(ctx context.Context, tag string) error {
	return d.offline(ctx, d.disks, func(v *configdb.View, volume string) error {
		return unlocked(ctx, func() error {
			_, err := d.h.cfg.Snapshots.HasSnapshot(ctx, v, d.project, volume, tag)
			return err
		})
	})
}

// unlocked repeats what a QEMU that has just ended may still keep from working.
func unlocked(ctx context.Context, do func() error) error {
	end := time.Now().Add(unlockTime)
	for {
		err := do()
		if err == nil || api.CodeOf(err) != api.CodeConflict || time.Now().After(end) {
			return err
		}
		if err := pause(ctx, unlockRetry); err != nil {
			return err
		}
	}
}

// existing leaves out the disks whose volumes are gone, or are others now.
func (d *diskSet) existing(v *configdb.View) []api.SnapshotDisk {
	var out []api.SnapshotDisk
	for _, disk := range d.disks {
		if vol, err := configdb.Volumes.Get(v, disk.VolumeID); err == nil && vol.Meta.Name == disk.Volume {
			out = append(out, disk)
		}
	}
	return out
}

// drop removes a tag from all disks: through QEMU from those that it has open,
// else from their files.
func (d *diskSet) drop(ctx context.Context, jobID, tag string) error {
	left := d.existing(d.h.cfg.DB.Local())
	if d.in.openConn() != nil {
		closed, err := d.dropLive(ctx, left, jobID, tag)
		switch {
		case err == nil:
			left = closed
		case !gone(err):
			return err
		}
	}
	if len(left) == 0 {
		return nil
	}
	return d.offline(ctx, left, func(v *configdb.View, volume string) error {
		return unlocked(ctx, func() error { return d.h.cfg.Snapshots.DeleteSnapshot(ctx, v, d.project, volume, tag) })
	})
}

// dropLive returns the disks that QEMU does not have open.
func (d *diskSet) dropLive(ctx context.Context, disks []api.SnapshotDisk, jobID, tag string) (closed []api.SnapshotDisk, err error) {
	// What an earlier life of the daemon began ends first.
	if _, err := d.in.endJob(ctx, jobID); err != nil {
		return nil, err
	}
	nodes, err := d.nodes(ctx, disks)
	if err != nil {
		return nil, err
	}
	var tagged []string
	for _, disk := range disks {
		n, open := nodes[disk.VolumeID]
		switch {
		case !open:
			closed = append(closed, disk)
		case n.has(tag):
			tagged = append(tagged, n.name)
		}
	}
	if len(tagged) == 0 {
		return closed, nil
	}
	return closed, d.in.job(ctx, jobID, "snapshot-delete", map[string]any{"tag": tag, "devices": tagged})
}

// blockNode is a disk as the running QEMU has it.
type blockNode struct {
	name, driver string
	tags         map[string]api.Size // internal snapshots, with the size of their memory
}

func (n blockNode) has(tag string) bool { _, ok := n.tags[tag]; return ok }

// nodes finds disks in the running QEMU by their files (QAPI query-block); the
// result is by volume and leaves out what QEMU does not have.
func (d *diskSet) nodes(ctx context.Context, disks []api.SnapshotDisk) (map[string]blockNode, error) {
	conn := d.in.openConn()
	if conn == nil {
		return nil, fmt.Errorf("QMP query-block: %w", qmp.ErrClosed)
	}
	var all []struct {
		Inserted *struct {
			Node  string `json:"node-name"`
			File  string `json:"file"`
			Drv   string `json:"drv"`
			Image struct {
				Snapshots []struct {
					Name   string `json:"name"`
					Memory int64  `json:"vm-state-size"`
				} `json:"snapshots"`
			} `json:"image"`
		} `json:"inserted"`
	}
	ctx, cancel := context.WithTimeout(ctx, QMPDeadline)
	defer cancel()
	if err := conn.Execute(ctx, "query-block", nil, &all); err != nil {
		return nil, err
	}
	out := map[string]blockNode{}
	v := d.h.cfg.DB.Local()
	for _, disk := range disks {
		path, _, err := d.h.cfg.Volumes.Resolve(v, d.project, disk.Volume)
		if err != nil {
			return nil, err
		}
		for _, b := range all {
			if b.Inserted == nil || !rbdname.Same(b.Inserted.File, path) {
				continue
			}
			n := blockNode{name: b.Inserted.Node, driver: b.Inserted.Drv, tags: map[string]api.Size{}}
			for _, s := range b.Inserted.Image.Snapshots {
				n.tags[s.Name] = api.Size(s.Memory)
			}
			out[disk.VolumeID] = n
		}
	}
	return out, nil
}

// names returns QEMU's nodes of all disks in order of the disks, and refuses if
// one cannot have snapshots.
func (d *diskSet) names(ctx context.Context) ([]string, error) {
	nodes, err := d.nodes(ctx, d.disks)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, disk := range d.disks {
		n, ok := nodes[disk.VolumeID]
		switch {
		case !ok:
			return nil, api.Errorf(api.CodeRefused, "QEMU does not have volume %s open; stop and start the VM first", disk.Volume)
		case n.driver != "qcow2":
			return nil, errRaw(disk.Volume, n.driver)
		}
		out = append(out, n.name)
	}
	return out, nil
}

func errRaw(volume, format string) error {
	return api.Errorf(api.CodeRefused, "volume %s has the format %s, and only qcow2 volumes (those in pools of type dir and shared) have snapshots; detach it, or copy its content to a qcow2 volume", volume, format)
}

// jobError is how a job of QEMU ended.
type jobError struct{ kind, text string }

func (e *jobError) Error() string { return fmt.Sprintf("QEMU's job %s failed: %s", e.kind, e.text) }

// job runs one job of QEMU (QAPI job.json) to its end and dismisses it. A job
// of that ID that is there is of an earlier life of the daemon: it is waited
// for and its result dropped.
func (in *instance) job(ctx context.Context, id, cmd string, args map[string]any) error {
	ctx, cancel := context.WithTimeout(ctx, JobDeadline)
	defer cancel()
	if _, err := in.endJob(ctx, id); err != nil {
		return err
	}
	conn := in.openConn()
	if conn == nil {
		return fmt.Errorf("QMP %s: %w", cmd, qmp.ErrClosed)
	}
	args["job-id"] = id
	if err := conn.Execute(ctx, cmd, args, nil); err != nil {
		return err
	}
	text, err := in.endJob(ctx, id)
	if err != nil {
		return err
	}
	if text != "" {
		return jobFailed(cmd, text)
	}
	return nil
}

// endJob waits until a job is concluded, dismisses it and returns its error.
func (in *instance) endJob(ctx context.Context, id string) (text string, err error) {
	wait := firstPoll
	for {
		conn := in.openConn()
		if conn == nil {
			return "", fmt.Errorf("QMP query-jobs: %w", qmp.ErrClosed)
		}
		var jobs []struct {
			ID     string `json:"id"`
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		if err := conn.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
			return "", err
		}
		there := false
		for _, j := range jobs {
			if j.ID != id {
				continue
			}
			if there = true; j.Status == "concluded" {
				return j.Error, conn.Execute(ctx, "job-dismiss", map[string]any{"id": id}, nil)
			}
		}
		if !there {
			return "", nil
		}
		if err := pause(ctx, wait); err != nil {
			return "", err
		}
		wait = min(2*wait, lastPoll)
	}
}

// jobFailed turns what a job says into an error with a code.
func jobFailed(cmd, text string) error {
	err := error(&jobError{cmd, text})
	if isFull(text) {
		return api.Errorf(api.CodeStorageFull, "%w; the pool of the disk is most likely full: free some space", err)
	}
	return err
}

// gone reports whether an error is the end of QEMU rather than its refusal.
func gone(err error) bool {
	for _, end := range []error{qmp.ErrClosed, io.EOF, io.ErrUnexpectedEOF, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, end) {
			return true
		}
	}
	return false
}
