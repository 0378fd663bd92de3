// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/accel"
	"github.com/muster-vm/muster/hypervisor/hostfacts"
	"github.com/muster-vm/muster/internal/uefi"
)

// asked is what QEMU said of itself, for one program, version and accelerator.
type asked struct {
	of   accel.Result
	qemu hostfacts.QEMU
}

// Report writes the facts about the host when they were found out, and looks for
// news now and then, because devices come and go. It works beside Run until the
// context ends, which is no error.
func (h *Hypervisor) Report(ctx context.Context) error {
	t := time.NewTicker(ResyncInterval)
	defer t.Stop()
	for {
		h.reportFacts(ctx)
		select {
		case <-t.C:
		case <-h.tell:
		case <-ctx.Done():
			return nil
		}
	}
}

// reportFacts writes what this host can give its VMs, if it differs from what is
// stored. It is called by one goroutine at a time.
func (h *Hypervisor) reportFacts(ctx context.Context) {
	found, known := h.facts.result()
	if !known {
		return
	}
	facts := hostfacts.Host(h.cfg.SysRoot)
	facts.Node, facts.QEMUVersion, facts.Accelerator = h.cfg.NodeName, found.Version, found.Accelerator
	if found.Binary != "" {
		if h.asked.of != found {
			q, err := hostfacts.Ask(ctx, found.Binary, h.cfg.RunDir, found.Accelerator)
			if err != nil {
				if ctx.Err() == nil {
					h.log.Warn("QEMU does not tell its machines and CPUs", "err", err)
				}
				return // asked again with the next look
			}
			h.asked = asked{found, q}
		}
		q := &h.asked.qemu
		facts.Machines, facts.GuestFeatures, facts.CPUModels = q.Machines, q.GuestFeatures, q.CPUModels
	}
	maps.Copy(facts.Missing, h.missing())
	if err := h.writeFacts(ctx, facts); err != nil && ctx.Err() == nil {
		h.log.Warn("facts about the host not written", "err", err)
	}
}

// missing are the programs that features need and the host has not.
func (h *Hypervisor) missing() map[api.HostFeature]string {
	out := map[api.HostFeature]string{}
	for feature, secure := range map[api.HostFeature]bool{api.FeatureUEFI: false, api.FeatureUEFISecure: true} {
		if _, err := uefi.Find(h.cfg.FirmwareDirs, secure, 0); err != nil {
			out[feature] = err.Error()
		}
	}
	if _, err := exec.LookPath(swtpmProgram); err != nil {
		out[api.FeatureTPM] = "this node has no swtpm; install the package swtpm"
	}
	if h.users.on() && !userfaults(h.cfg.SysRoot) {
		out[api.FeaturePostCopy] = "its kernel lets no unprivileged process handle page faults of the kernel, as QEMU must for post-copy; set it there: sysctl vm.unprivileged_userfaultfd=1"
	}
	return out
}

// userfaults reports whether a process without privileges may handle page faults
// that the kernel meets (Documentation/admin-guide/sysctl/vm.rst). Where the
// kernel does not say, QEMU will.
func userfaults(root string) bool {
	b, err := os.ReadFile(filepath.Join(root, "proc/sys/vm/unprivileged_userfaultfd"))
	return err != nil || strings.TrimSpace(string(b)) != "0"
}

func (h *Hypervisor) writeFacts(ctx context.Context, facts api.NodeFactsStatus) error {
	ctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	_, err := configdb.Transact(ctx, h.cfg.DB, actor, factsAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		if _, err := configdb.Nodes.Get(v, h.cfg.NodeID); err != nil {
			return api.IgnoreNotFound(err) // not replicated yet, or removed
		}
		f, err := configdb.NodeFacts.Get(v, h.cfg.NodeID)
		switch {
		case err == nil:
			f.Status = facts
			return configdb.NodeFacts.UpdateStatus(v, tx, &f)
		case api.CodeOf(err) != api.CodeNotFound:
			return err
		}
		f = api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", h.cfg.NodeName), Spec: api.NodeFactsSpec{NodeID: h.cfg.NodeID}, Status: facts}
		f.Meta.ID = h.cfg.NodeID
		tx.RequireExists(configdb.Nodes.SpecKey(h.cfg.NodeID))
		return configdb.NodeFacts.CreateUnnamed(tx, &f)
	})
	return err
}
