// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNodeIsRebootedAsPlanned reboots the node of a real guest: its "reboot" is a
// program that ends the daemon, which is started again with another boot.
func TestNodeIsRebootedAsPlanned(t *testing.T) {
	f := newFlock(t, 3)
	for _, h := range f.nodes {
		boot := filepath.Join(f.dir, h.name+".boot")
		if err := os.WriteFile(boot, []byte("first\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		h.conf["bootIDFile"] = boot
		h.conf["rebootCommand"] = "touch " + boot + ".asked"
	}
	f.up()
	f.withGuest(f.nodes[0])
	_, c := f.counting(f.nodes[1], 90*time.Second, 1, 0)
	victim := f.byName(f.nodes[0].vm("web1").Status.Node)
	asked := f.others(victim)[0]
	asked.run("node", "reboot", victim.name, "--no-wait")
	asked.refuse(4, "wait for task", "node", "reboot", victim.name)
	asked.refuse(4, "one at a time", "node", "reboot", f.others(victim)[1].name)
	f.eventually(60*time.Second, "the host gets its command", func() error {
		_, err := os.Stat(victim.conf["bootIDFile"] + ".asked")
		return err
	})
	victim.stop()
	if err := os.WriteFile(victim.conf["bootIDFile"], []byte("second\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Longer than a node may be silent that nobody expects to be away.
	end := time.Now().Add(16 * time.Second)
	f.eventually(30*time.Second, "the time after which a node is lost", func() error {
		n := asked.node(victim.name)
		if n.Status.Phase != "ready" || n.Status.Absence == nil || n.Status.LostAt != nil {
			t.Fatalf("while it is away: %+v", n.Status)
		}
		if left := time.Until(end); left > 0 {
			return fmt.Errorf("%s to go", left)
		}
		return nil
	})
	if out := asked.run("node", "ls"); !strings.Contains(out, "rebooting (planned),maintenance") {
		t.Error(out)
	}
	victim.start()
	f.eventually(30*time.Second, "the node takes VMs again", func() error {
		if n := asked.node(victim.name); n.Spec.Maintenance || n.Status.Absence != nil || n.Status.LostAt != nil {
			return fmt.Errorf("%+v", n.Status)
		}
		return nil
	})
	f.eventually(10*time.Second, "the task is done", func() error {
		if out := asked.run("task", "ls"); !strings.Contains(out, "node.reboot") || strings.Contains(out, "failed") || strings.Contains(out, "running") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := asked.run("ha", "proof"); strings.Contains(out, victim.name) {
		t.Errorf("it was taken for a loss: %s", out)
	}
	if boot, _ := f.counting(asked, 30*time.Second, 1, c); boot != 1 || asked.vm("web1").Status.Node == victim.name {
		t.Errorf("the guest booted %d times", boot)
	}
}
