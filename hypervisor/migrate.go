// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/reconcile"
)

// Times and limits of live migration; DESIGN.md has the steps.
const (
	// PrepareTime is how long the target may take to get ready.
	PrepareTime = 2 * time.Minute
	// LoadTime is how long the target may take, after QEMU here has sent
	// everything, to say that it has it.
	LoadTime = 15 * time.Second
	// HandOverTime is how long the source's QEMU is kept after the commit.
	HandOverTime = 60 * time.Second
	// transferLook is the pause between looks at a transfer, switchLook while the
	// guest stands still.
	transferLook = 500 * time.Millisecond
	switchLook   = 20 * time.Millisecond
	// progressStep in percent and progressPause: finer progress is not written.
	progressStep  = 5
	progressPause = time.Second
	// SlowDeadline bounds a QMP command during which QEMU connects to the other
	// node.
	SlowDeadline = 10 * time.Second
	// MaxMigrations is how many VMs leave a node, and how many come to it, at once;
	// the others wait for their turn.
	MaxMigrations = 2
	// noBandwidthLimit in bytes per second; QEMU's own default is 128 MiB.
	noBandwidthLimit = int64(16 * api.GiB)
	// maxMark is more than a mark file has; markDir has them, below the run
	// directory, where no VM's user may write.
	maxMark = 128
	markDir = "incoming"
)

// migrateInfo is QMP's MigrationInfo (QAPI migration.json, query-migrate), as
// far as it is used.
type migrateInfo struct {
	Status    string `json:"status"`
	TotalTime int64  `json:"total-time"` // ms
	Downtime  int64  `json:"downtime"`   // ms
	Expected  int64  `json:"expected-downtime"`
	Error     string `json:"error-desc"`
	// Sockets are those that an incoming QEMU listens on.
	Sockets []struct{} `json:"socket-address"`
	RAM     struct {
		Transferred int64   `json:"transferred"`
		Remaining   int64   `json:"remaining"`
		Total       int64   `json:"total"`
		DirtyRate   int64   `json:"dirty-pages-rate"` // pages per second
		PageSize    int64   `json:"page-size"`
		Mbps        float64 `json:"mbps"`
		DirtySyncs  int64   `json:"dirty-sync-count"`
	} `json:"ram"`
	Throttle int `json:"cpu-throttle-percentage"`
}

// QEMU's MigrationStatus, as far as it is told apart.
const (
	migNone         = "none"
	migPreSwitch    = "pre-switchover"
	migDevice       = "device"
	migCompleted    = "completed"
	migFailed       = "failed"
	migCancelling   = "cancelling"
	migCancelled    = "cancelled"
	capPauseSwitch  = "pause-before-switchover"
	capLateActivate = "late-block-activate"
	capMultifd      = "multifd"
)

func (in *instance) queryMigrate(ctx context.Context) (migrateInfo, error) {
	var m migrateInfo
	err := in.command(ctx, "query-migrate", &m)
	if m.Status == "" {
		m.Status = migNone
	}
	return m, err
}

// setCapabilities states every capability that matters, on or off.
func (in *instance) setCapabilities(ctx context.Context, on ...string) error {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	var list []capability
	for _, name := range []string{
		"xbzrle", "auto-converge", "events", capPostCopy, capMultifd, "return-path", "release-ram", capPauseSwitch, capLateActivate,
	} {
		c := capability{Name: name}
		for _, o := range on {
			c.State = c.State || o == name
		}
		list = append(list, c)
	}
	return in.execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// liveMigration returns the VM's migration that has no last word yet, or nil.
func liveMigration(v *configdb.View, id string) *api.Operation {
	op, err := configdb.Operations.Get(v, id)
	if err != nil || op.Spec.Migration == nil || op.Status.Phase.Final() {
		return nil
	}
	return &op
}

// marked returns the task of the migration that brings a VM here, as the VM's
// mark file says: while that is there, the guest has never run here.
func (h *Hypervisor) marked(id string) (task string, err error) {
	f, err := os.Open(h.pathsOf(id).mark)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("see whether a migration brings vm %s here: %w", id, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMark))
	if err != nil {
		return "", fmt.Errorf("see which migration brings vm %s here: %w", id, err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (h *Hypervisor) mark(id, task string) error {
	p := h.pathsOf(id)
	if err := errors.Join(os.MkdirAll(filepath.Dir(p.mark), 0o700), os.WriteFile(p.mark, []byte(task), 0o600)); err != nil {
		return fmt.Errorf("mark the QEMU of vm %s as incoming: %w", id, err)
	}
	return nil
}

// unmark is the moment from which the guest may have run here, even after a
// power cut.
func (h *Hypervisor) unmark(id string) error {
	p := h.pathsOf(id)
	if err := os.Remove(p.mark); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("take vm %s over: %w", id, err)
	}
	d, err := os.Open(filepath.Dir(p.mark))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("take vm %s over: %w", id, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("take vm %s over: %w", id, err)
	}
	return nil
}

// sweep removes what a migration left here that brings the VM here no more.
func (h *Hypervisor) sweep(ctx context.Context, id string, proc *Process) error {
	h.notStarting(id)
	if proc != nil {
		if proc.State != ProcessExited {
			h.log.Info("the QEMU of a migration that is over is ended", "vm", id, "pid", proc.PID)
			if err := h.kill(ctx, id); err != nil {
				return err
			}
		}
		if err := h.forget(ctx, id); err != nil {
			return err
		}
	}
	h.unplug(ctx, id)
	if h.cfg.Limits != nil {
		if err := h.cfg.Limits.Release(id); err != nil {
			h.log.Warn("control groups of a VM are left for now", "vm", id, "err", err)
		}
	}
	return h.unmark(id)
}

// passing handles a VM that is bound to another node, as far as a migration
// concerns this one. done is false when the VM is none of its business.
func (s *step) passing(ctx context.Context, caughtUp bool) (done bool, err error) {
	id, me := s.vm.Meta.ID, s.h.cfg.NodeID
	op := liveMigration(s.v, id)
	mark, err := s.h.marked(id)
	switch {
	case err != nil: // nothing is touched that may have to be spared
		return true, err
	case !caughtUp && (mark != "" || op != nil && op.Spec.Migration.NodeID == me):
		s.result.After = lookSoon // the view may be older than the process
		return true, nil
	case op != nil && op.Spec.Migration.NodeID == me && s.b.Spec.NodeID == op.Spec.NodeID && s.b.Spec.Epoch == op.Spec.Epoch:
		return true, s.arrive(ctx, op, mark)
	case mark != "":
		s.h.drop(id)
		return true, s.h.sweep(ctx, id, s.proc)
	case op != nil && op.Spec.NodeID == me && gaveAway(op, &s.b):
		return true, s.handedOver(ctx, op)
	}
	s.endDeparture()
	return false, nil
}

// gaveAway reports that a binding is the one that a migration committed.
func gaveAway(op *api.Operation, b *api.Binding) bool {
	return b.Spec.NodeID == op.Spec.Migration.NodeID && b.Spec.Epoch == op.Spec.Epoch+1 && b.Spec.BroughtBy == op.Spec.TaskID
}

// moving handles a VM that is bound here, as far as a migration changes what is
// to be done with it.
func (s *step) moving(ctx context.Context) (done bool, err error) {
	id := s.vm.Meta.ID
	mark, err := s.h.marked(id)
	if err != nil {
		return true, err
	}
	if mark != "" {
		return s.arrived(ctx, mark)
	}
	op := liveMigration(s.v, id)
	if op == nil || op.Spec.NodeID != s.h.cfg.NodeID {
		return false, nil
	}
	if s.proc == nil || s.proc.State == ProcessExited {
		return true, s.endOperation(ctx, op, api.TaskFailed, api.CodeInternal, fmt.Sprintf("QEMU of vm %s ended on node %s", s.vm.Meta.Name, s.h.cfg.NodeName))
	}
	return false, nil
}

// endOperation is the source's last word.
func (s *step) endOperation(ctx context.Context, op *api.Operation, phase api.TaskPhase, code api.Code, message string) error {
	err := s.updateOperation(ctx, op, func(st *api.OperationStatus) {
		st.Phase, st.Code, st.Message = phase, code, message
		if phase == api.TaskSucceeded {
			st.Progress, st.Code = 100, ""
		}
	})
	if err != nil {
		return err
	}
	s.h.log.Info("migration ended", "vm", s.vm.Meta.ID, "task", op.Spec.TaskID, "phase", phase, "reason", message)
	s.endDeparture()
	s.in.strayAsked = false                         // QEMU may still be at it
	s.result = reconcile.Result{After: attachRetry} // the guest may have to go on
	return nil
}

// updateOperation writes the operation's status, if nobody did meanwhile.
func (s *step) updateOperation(ctx context.Context, op *api.Operation, f func(*api.OperationStatus)) error {
	next := op.Clone()
	next.Meta.Revision, next.Meta.StatusRevision = op.Meta.Revision, op.Meta.StatusRevision
	f(&next.Status)
	tx := &configdb.Txn{Actor: actor}
	if err := configdb.Operations.UpdateStatus(s.v, tx, &next); err != nil || tx.Empty() {
		return err
	}
	// A commit of which this view does not know yet is not answered with an end, nor is a
	// cancellation, for which the target may have broken the transfer off already.
	tx.RequireRevision(configdb.Bindings.SpecKey(s.vm.Meta.ID), s.b.Meta.Revision)
	tx.RequireRevision(configdb.Operations.SpecKey(s.vm.Meta.ID), op.Meta.Revision)
	wctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	if _, err := s.h.cfg.DB.Txn(wctx, tx); err != nil {
		return &storeError{fmt.Errorf("write the status of the migration of vm %s: %w", s.vm.Meta.Name, err)}
	}
	return nil
}

// storeError is a failure of the database, which says nothing about a QEMU.
type storeError struct{ error }

func (e *storeError) Unwrap() error { return e.error }
