// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/hypervisor"
	"github.com/muster-vm/muster/internal/guard"
	"github.com/muster-vm/muster/internal/version"
)

// factsEvery is how often the facts are compared with what is stored; they are
// written only when they differ.
const factsEvery = 2 * time.Second

// registrar writes this node's facts into its status.
type registrar struct {
	m      *member
	bootID string
	seen   bool // the replica has had this node's object
	// stopping: the daemon ends in order.
	stopping atomic.Bool
}

func (r *registrar) run(ctx context.Context) error {
	tick := time.NewTicker(factsEvery)
	defer tick.Stop()
	for {
		if r.m.askWhetherRemoved(ctx) {
			return r.m.removed(ctx)
		}
		if err := r.write(ctx); err != nil && ctx.Err() == nil {
			r.m.log.Debug("node facts not written", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (r *registrar) write(ctx context.Context) error {
	_, err := configdb.Nodes.Get(r.m.store.Local(), r.m.info.NodeID)
	switch {
	case err == nil:
		r.seen = true
	case r.seen && api.CodeOf(err) == api.CodeNotFound:
		return r.m.removed(ctx)
	default:
		return err // not replicated yet
	}
	facts := r.m.hyper.Facts()
	_, err = configdb.Transact(ctx, r.m.store, "node "+r.m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, r.m.info.NodeID)
		if err != nil {
			return err
		}
		s := &n.Status
		s.ObservedGeneration, s.Version, s.BootID = n.Meta.Generation, version.Version, r.bootID
		if boot := r.m.hostBoot(); boot != "" { // else it cannot be read for now
			s.HostBoot = boot
		}
		s.FeatureLevels = new(feature.Supported())
		// A daemon that runs again is expected only when it has been heard: until
		// its first lease its silence is that of the stop.
		_, _, leased := r.m.keeper.Current()
		s.SystemUUID, s.Stopping = systemUUID(), r.stopping.Load() || s.Stopping && !leased
		setFacts(s, facts)
		if level := r.m.guard.Level(); level != "" {
			s.GuardLevel = level
		}
		for _, c := range r.m.backups.conditions() {
			s.Conditions = api.SetCondition(s.Conditions, c, time.Now())
		}
		// Only ha may end the phase lost; see ha/DESIGN.md.
		if s.Phase == "" || s.Phase == api.NodeJoining {
			s.Phase = api.NodeReady
		}
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}

// setFacts writes what is known of the host. While a daemon that has just begun
// finds out QEMU, what the last one found stands: a node that was restarted takes VMs
// at once.
func setFacts(s *api.NodeStatus, facts hypervisor.Facts) {
	s.CPUs, s.Memory = facts.CPUs, facts.Memory
	known := facts.Known || s.QEMUVersion == ""
	if known {
		s.Accelerator, s.AcceleratorReason, s.QEMUVersion = facts.Accelerator, facts.AcceleratorReason, facts.QEMUVersion
	}
	for _, c := range facts.Conditions {
		if known || c.Type != hypervisor.ConditionHypervisor {
			s.Conditions = api.SetCondition(s.Conditions, c, time.Now())
		}
	}
}

// systemUUID is the host's by SMBIOS (DSP0134 7.2.1); empty if there is none.
func systemUUID() string {
	b, err := os.ReadFile("/sys/class/dmi/id/product_uuid")
	if err != nil {
		return ""
	}
	return strings.ToLower(strings.TrimSpace(string(b)))
}

// removed ends the daemon of a node that was taken out of its cluster, with its
// guard and what still runs: a node that leaves in order has no VM, and the VMs
// of one that was declared dead are bound to others, who may run them.
func (m *member) removed(ctx context.Context) error {
	m.setLeft()
	if c, err := m.guard.use(ctx); err == nil {
		m.endVMs(ctx, c)
	}
	err := fmt.Errorf("this node was removed from cluster %s; to join again, start with an empty data directory", m.info.Cluster)
	m.fatal(err)
	return err
}

// endAttempts is how often a guard is asked to end: until the lease is over,
// the hypervisor may start again what was killed.
const endAttempts = 3

func (m *member) endVMs(ctx context.Context, c *guard.Client) {
	ctx, cancel := context.WithTimeout(ctx, endAttempts*hypervisor.KillDeadline)
	defer cancel()
	for range endAttempts {
		running, err := c.List(ctx)
		for _, r := range running {
			if r.State == guard.StateExited {
				continue
			}
			m.log.Warn("vm ended: this node is no member of the cluster any more", "vm", r.VM, "pid", r.PID)
			_, kerr := c.Kill(ctx, r.VM)
			err = errors.Join(err, kerr)
		}
		if err == nil {
			if err = c.Stop(ctx); err == nil {
				return
			}
		}
		m.log.Warn("guard not ended", "err", err)
	}
}
