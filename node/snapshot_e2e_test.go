// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// savedAndCopied takes the running guest web1, in its first boot, through a
// snapshot with memory, a suspend that it resumes from on another node, a clone
// and a revert, and returns its counter after that.
func (f *flock) savedAndCopied(t *testing.T) int {
	at := f.nodes[0]
	at.run("vm", "snapshot", "create", "web1", "base", "--memory")
	_, base := f.counting(at, bootPatience, 1, 0)
	_, later := f.counting(at, bootPatience, 1, base+3)

	was := at.vm("web1")
	at.run("vm", "suspend", "web1")
	f.eventually(60*time.Second, "suspended", func() error {
		vm, pids := at.vm("web1"), qemus(t, was.Meta.ID)
		if vm.Status.Phase != api.VMSuspended || vm.Status.PID != 0 || len(pids) != 0 {
			return api.Errorf(api.CodeInternal, "phase %s, processes %v: %s", vm.Status.Phase, pids, vm.Status.Message)
		}
		return nil
	})
	at.refuse(4, "suspended", "vm", "stop", "--force", "web1")
	at.run("node", "maintenance", "on", was.Status.Node)
	at.run("vm", "resume", "web1")
	at.run("node", "maintenance", "off", was.Status.Node)
	boot, resumed := f.counting(at, bootPatience, 1, later)
	now := at.vm("web1")
	if boot != 1 || now.Status.Node == was.Status.Node {
		t.Errorf("resumed in boot %d on node %s, was on %s", boot, now.Status.Node, was.Status.Node)
	}

	at.run("vm", "clone", "web1", "web2", "--start")
	clone := at.vm("web2")
	if clone.Meta.ID == now.Meta.ID || clone.Status.Phase != api.VMRunning {
		t.Errorf("%+v", clone)
	}
	f.eventually(bootPatience, "the clone boots under its own name", func() error {
		if out := at.try("vm", "console", "web2", "--log").stdout; !strings.Contains(out, "muster-guest name=web2 boot=2 ") {
			return api.Errorf(api.CodeInternal, "%s", out[max(0, len(out)-200):])
		}
		return nil
	})
	f.eventually(60*time.Second, "the temporary snapshot is gone", func() error {
		if out := at.run("vm", "snapshot", "ls", "web1"); strings.Contains(out, "clone-") {
			return api.Errorf(api.CodeInternal, "%s", out)
		}
		return nil
	})
	at.run("vm", "rm", "--force", "web2")
	at.run("vm", "clone", "web1", "many", "--count", "2")
	if a, b := at.vm("many-1"), at.vm("many-2"); a.Meta.ID == b.Meta.ID || a.Status.Phase != api.VMStopped || b.Status.Phase != api.VMStopped {
		t.Errorf("%+v %+v", a, b)
	}
	f.eventually(60*time.Second, "the snapshot that was copied is gone", func() error {
		if out := at.run("vm", "snapshot", "ls", "web1"); strings.Contains(out, "clone-") {
			return api.Errorf(api.CodeInternal, "%s", out)
		}
		return nil
	})
	at.run("vm", "rm", "many-1", "many-2")

	// So far on that nobody can look too late at how far it is back.
	_, far := f.counting(at, bootPatience, 1, resumed+20)
	at.run("vm", "snapshot", "revert", "web1", "base", "--force")
	f.eventually(60*time.Second, "the guest is back where it was", func() error {
		if b, c := at.counter(); b != 1 || c >= far {
			return api.Errorf(api.CodeInternal, "boot %d, counter %d", b, c)
		}
		return nil
	})
	at.run("vm", "snapshot", "rm", "web1", "base")
	_, c := f.counting(at, bootPatience, 1, 0)
	return c
}
