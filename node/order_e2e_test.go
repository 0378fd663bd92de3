// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// begun is when a process was started, since the boot of the machine (proc(5):
// field 22 of stat, in hundredths of a second).
func begun(t *testing.T, pid string) time.Duration {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		t.Fatal(err)
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	ticks, err := strconv.ParseInt(string(fields[19]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// TestAppWaitsForItsDatabaseAndTheDatabaseGoesBack: the host of both dies with all
// its processes. The database is web1, a guest that counts on its disk.
func TestAppWaitsForItsDatabaseAndTheDatabaseGoesBack(t *testing.T) {
	t.Parallel()
	const delay = 6 * time.Second
	f := newFlock(t, 3)
	f.up()
	victim := f.others(f.leader(f.nodes[0]))[0]
	rest := f.others(victim)
	for _, h := range rest {
		victim.run("node", "maintenance", "on", h.name)
	}
	f.withGuest(victim, "--failback", "return", "--failback-after", "1m")
	victim.run("vm", "create", "app", "--memory", "64M", "--disk", "64M", "--pool", "shared", "--ha", "restart", "--ha-priority", "highest",
		"--after", "web1", "--after-delay", delay.String(), "--start")
	for _, h := range rest {
		victim.run("node", "maintenance", "off", h.name)
	}
	_, c := f.counting(victim, bootPatience, 1, 0)
	db, app := rest[0].vm("web1").Meta.ID, rest[0].vm("app").Meta.ID

	victim.end()
	started := func(id, name string) (pid string) {
		f.eventually(bootPatience, name+" runs elsewhere", func() error {
			vm := rest[0].vm(name)
			pids := qemus(t, id)
			if vm.Status.Phase != api.VMRunning || vm.Status.Node == victim.name || len(pids) != 1 {
				return fmt.Errorf("%s on %s, QEMUs %v: %s", vm.Status.Phase, vm.Status.Node, pids, vm.Status.Message)
			}
			pid = pids[0]
			return nil
		})
		return pid
	}
	dbAt, appAt := begun(t, started(db, "web1")), begun(t, started(app, "app"))
	// The database is up some time after its QEMU began, so that no machine is too slow for this.
	if after := appAt - dbAt; after < delay || after > time.Minute {
		t.Errorf("the app's QEMU began %v after the database's; the delay is %v", after, delay)
	}
	if e := rest[0].events("vm.not-awaited"); len(e) != 0 {
		t.Errorf("the app did not wait: %+v", e)
	}
	_, c = f.counting(rest[1], bootPatience, 2, c)

	appOn := rest[0].vm("app").Status.Node
	back := time.Now() // it counts from when the node is ready, which is later
	victim.start()
	twice := watchQEMUs(t, app)
	f.eventually(4*time.Minute, "the database is back on "+victim.name, func() error {
		if vm := rest[0].vm("web1"); vm.Status.Node != victim.name || vm.Status.Phase != api.VMRunning {
			return fmt.Errorf("%s on %s: %s", vm.Status.Phase, vm.Status.Node, vm.Status.Message)
		}
		return nil
	})
	if after := time.Since(back); after < time.Minute {
		t.Errorf("it was back %v after its host was started", after)
	}
	if boot, _ := f.counting(rest[1], bootPatience, 2, c); boot != 2 {
		t.Errorf("the database booted %d times: it did not migrate", boot)
	}
	f.eventually(60*time.Second, "one QEMU is left of the database", func() error {
		if pids := qemus(t, db); len(pids) != 1 {
			return fmt.Errorf("%v", pids)
		}
		return nil
	})
	if n, on := twice(), rest[0].vm("app").Status.Node; n != 1 || on != appOn {
		t.Errorf("the app, which need not go back, had %d QEMUs at once and is on %s; it was on %s", n, on, appOn)
	}
	if e := rest[0].events("vm.failback"); len(e) != 1 {
		t.Errorf("events of the way back: %+v", e)
	}
}
