// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/internal/power/powersim"
)

const fencePassword = "f3nce-Pa55-w0rd" // looked for in every file

// bmcOf starts a BMC whose off is the end of daemon, guard and QEMUs of a host,
// and adds it to the host's node.
func (f *flock) bmcOf(h, at *host) *powersim.Host {
	f.t.Helper()
	machine := powersim.NewHost(h.end)
	bmc, err := powersim.NewIPMI(powersim.IPMIConfig{Host: machine, User: "fence", Password: fencePassword})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = bmc.Close() })
	r := at.tryFrom(strings.NewReader(fencePassword+"\n"), "node", "power", "add", h.name, "bmc-"+h.name, "--driver", "ipmi",
		"--address", "127.0.0.1", "--port", strconv.Itoa(bmc.Port), "--user", "fence", "--password-file", "-")
	if r.code != 0 {
		f.t.Fatalf("power add: %s%s", r.stdout, r.stderr)
	}
	return machine
}

func TestSilentHostIsSwitchedOffAndItsVMIsSoonElsewhere(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	f.sharedPool(f.nodes[0], 3)
	f.nodes[0].run("vm", "create", "web1", "--cpu", "1", "--memory", "64M", "--disk", "16M", "--pool", "shared", "--ha", "restart", "--start") // no system: QEMU is what counts
	vm := f.nodes[0].vm("web1")
	victim := f.byName(vm.Status.Node)
	rest := f.others(victim)
	if rest[0].members().Leader == victim.name {
		rest[0].run("cluster", "transfer", rest[0].name)
	}
	machine := f.bmcOf(victim, rest[0])

	t.Run("the test switches nothing", func(t *testing.T) {
		var r api.PowerReport
		for _, h := range f.nodes {
			f.decode(h.run("node", "power", "test", victim.name, "--via", rest[1].name, "-o", "json"), &r)
			if len(r.Checks) != 1 || !r.Checks[0].OK || r.Checks[0].State != "on" || r.Via != rest[1].name {
				t.Errorf("test at %s: %+v", h.name, r)
			}
		}
		rest[0].refuse(4, "needs a person's word", "node", "power", "off", victim.name)
		if c := machine.Commands(); len(c) != 0 {
			t.Errorf("commands: %v", c)
		}
	})

	t.Run("a daemon that is stopped in order is left alone", func(t *testing.T) {
		victim.stop()
		f.eventually(60*time.Second, "its node says so", func() error {
			if !rest[0].node(victim.name).Status.Stopping {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		for end := time.Now().Add(ha.FenceAfter + time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if c := machine.Commands(); len(c) != 0 {
				t.Fatalf("commands: %v", c)
			}
		}
		victim.start()
		f.eventually(60*time.Second, "it is back", func() error {
			if n := rest[0].node(victim.name); n.Status.Stopping || n.Status.Phase != api.NodeReady {
				return fmt.Errorf("%s, stopping %v", n.Status.Phase, n.Status.Stopping)
			}
			return nil
		})
	})

	f.eventually(60*time.Second, "the vm runs where it was", func() error {
		now := rest[0].vm("web1")
		if now.Status.Node != victim.name && now.Status.Phase == api.VMRunning { // the start of its daemon took too long
			rest[0].try("vm", "migrate", "web1", "--to", victim.name)
		}
		if now.Status.Node != victim.name || now.Status.Phase != api.VMRunning || len(qemus(t, vm.Meta.ID)) != 1 {
			return fmt.Errorf("%s on %s, QEMUs %v", now.Status.Phase, now.Status.Node, qemus(t, vm.Meta.ID))
		}
		return nil
	})
	twice := watchQEMUs(t, vm.Meta.ID)
	began := time.Now()
	victim.signal(syscall.SIGSTOP) // it hangs; its guard and its VM live
	var took time.Duration
	f.eventually(60*time.Second, "the vm runs elsewhere", func() error {
		if now := rest[0].vm("web1"); now.Status.Node == victim.name || now.Status.Phase != api.VMRunning {
			return fmt.Errorf("%s on %s", now.Status.Phase, now.Status.Node)
		}
		took = time.Since(began)
		return nil
	})
	t.Logf("silent to running elsewhere: %.1f s; the lease alone takes %.1f s until it is even lost", took.Seconds(), ha.LostAfter.Seconds())
	n := rest[0].node(victim.name)
	if n.Status.LostAction == "" || n.Status.LostAt == nil || n.Status.LostAt.Sub(began) >= ha.LostAfter {
		t.Errorf("it was not the power device: %+v", n.Status)
	}
	if took >= ha.LostAfter {
		t.Errorf("running elsewhere after %v, not sooner than without a power device", took)
	}
	// A command whose answer takes long, as this end of a host may, is sent once more.
	if c := machine.Commands(); len(c) == 0 || slices.ContainsFunc(c, func(word string) bool { return word != "off" }) || machine.On() {
		t.Errorf("commands %v, on %v", c, machine.On())
	}
	var actions struct{ Items []api.PowerAction }
	if f.decode(rest[1].run("get", "poweraction", "-o", "json"), &actions); len(actions.Items) != 1 {
		t.Errorf("it was decided more than once: %+v", actions.Items)
	}
	if most := twice(); most != 1 || len(qemus(t, vm.Meta.ID)) != 1 {
		t.Errorf("%d QEMUs of the VM ran at once, %v run now", most, qemus(t, vm.Meta.ID))
	}
	var evidence api.PowerAction
	f.decode(rest[1].run("get", "poweraction", n.Status.LostAction, "-o", "json"), &evidence)
	if evidence.Status.Phase != api.PowerActionConfirmed || evidence.Spec.Trigger != api.TriggerHA || len(evidence.Status.Steps) < 5 {
		t.Errorf("evidence: %+v", evidence)
	}

	victim.start() // somebody switches it on
	machine.Switch(true)
	f.eventually(60*time.Second, "the node is back", func() error {
		if p := rest[0].node(victim.name).Status.Phase; p != api.NodeReady {
			return fmt.Errorf("phase %s", p)
		}
		return nil
	})
	f.noTraceOf(fencePassword)
}

// noTraceOf looks for a secret in whatever the daemons have written.
func (f *flock) noTraceOf(secret string) {
	f.t.Helper()
	files := 0
	err := filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // it went away, or is a socket
		}
		if info, err := d.Info(); err != nil || info.Size() > 64<<20 {
			return nil
		}
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, []byte(secret)) {
			f.t.Errorf("%s holds the password", path)
		}
		files++
		return nil
	})
	if err != nil || files < 20 {
		f.t.Errorf("%d files looked at, %v", files, err)
	}
}
