// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

// The node starts QEMU before it says so. Until it has answered the wish that came
// after that start, nobody knows that a volume is free.
func TestADiskIsNotFreeOnAnOldWord(t *testing.T) {
	f := newFixture(t)
	data := f.emptyVolume("data")
	vm := f.newVM("a", api.VMStopped, api.VMDisk{Volume: "data"})
	want[any](t, f.do(call{method: "POST", path: "vms/a/start"}), http.StatusAccepted)
	want[any](t, f.do(call{method: "POST", path: "vms/a/stop"}), http.StatusAccepted) // the node has said nothing of either
	want[api.VM](t, f.do(call{method: "PATCH", path: "vms/a", body: `{"spec":{"disks":[]}}`}), http.StatusOK)
	if got := f.users(data); !slices.Equal(got, []string{"vm/" + vm.Meta.ID}) {
		t.Errorf("the volume is attached to %v although its QEMU may run", got)
	}
}

// Only a migration looks whether it is to be given up. Work that does not was taken
// for cancelled, and went on.
func TestWorkThatCannotBeCancelledSaysSo(t *testing.T) {
	f := newFixture(t)
	f.runningVM("a", api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.reportNamed("a", api.VMRunning)
	r := want[vmReply](t, f.do(call{method: "POST", path: "vms/a/snapshots", body: `{"name":"one"}`}), http.StatusAccepted)
	p := wantProblem(t, f.do(call{method: "POST", path: "tasks/" + r.Task.Meta.ID + "/cancel"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "cannot be cancelled") {
		t.Error(p.Detail)
	}
}

func TestACloneIsRecoveredAsItsSource(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped, api.VMDisk{Size: api.GiB})
	want[any](t, f.do(call{method: "PATCH", path: "vms/a", body: `{"spec":{"recovery":{"priority":"highest"}}}`}), http.StatusOK)
	f.readyDisks()
	f.reportNamed("a", api.VMStopped)
	want[any](t, f.do(call{method: "POST", path: "vms/a/clone", body: `{"name":"b"}`}), http.StatusAccepted)
	if b := f.findVM("b"); b.Spec.RecoveryPriority() != api.PriorityHighest {
		t.Errorf("recovery %+v", b.Spec.Recovery)
	}
}

// A USB device of the host may be the disk that it boots from.
func TestDevicesOfTheHostAreForAdministrators(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped)
	const device = `"hostDevices":[{"usb":"046d:c52b"}]`
	for _, c := range []call{
		{method: "POST", path: "vms", body: `{"meta":{"name":"b"},"spec":{` + device + `}}`, role: api.RoleOperator},
		{method: "PATCH", path: "vms/a", body: `{"spec":{` + device + `}}`, role: api.RoleOperator},
	} {
		wantProblem(t, f.do(c), http.StatusForbidden, api.CodeForbidden, "spec.hostDevices")
	}
	want[any](t, f.do(call{method: "PATCH", path: "vms/a", body: `{"spec":{` + device + `}}`}), http.StatusOK)
	f.reportNamed("a", api.VMStopped)
	want[any](t, f.do(call{method: "PATCH", path: "vms/a", body: `{"spec":{"cpus":2}}`, role: api.RoleOperator}), http.StatusOK)
}

// A revert that has looked at the sizes of the disks took one that was enlarged
// meanwhile back to its old size, of which the database knew nothing.
func TestADiskIsNotEnlargedUnderAnOperation(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped, api.VMDisk{Size: api.GiB})
	f.readyDisks()
	f.reportNamed("a", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/a/snapshots", body: `{"name":"one"}`}), http.StatusAccepted)
	const larger = `{"spec":{"size":"2G"}}`
	p := wantProblem(t, f.do(call{method: "PATCH", path: "volumes/a-disk0", body: larger}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "is being snapshotted; wait for task") {
		t.Error(p.Detail)
	}
	f.endOperation("a")
	want[api.Volume](t, f.do(call{method: "PATCH", path: "volumes/a-disk0", body: larger}), http.StatusOK)
}

// What was asked for and does not exist is named with its field.
func TestWordsForWhatDoesNotExist(t *testing.T) {
	f := newFixture(t)
	const body = `{"meta":{"name":"b"},"spec":{"disks":[{"image":"tiny","pool":"%s"}]}}`
	p := wantProblem(t, f.do(call{method: "POST", path: "vms", body: strings.ReplaceAll(body, "%s", "nosuch")}), 404, api.CodeNotFound, "spec.disks[0].pool")
	if !strings.Contains(p.Detail, `"nosuch" does not exist`) {
		t.Error(p.Detail)
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: strings.ReplaceAll(body, "%s", "local")}), 409, api.CodeRefused, "spec.disks[0].pool")
	f.suspended("a")
	p = wantProblem(t, f.do(call{method: "DELETE", path: "vms/a"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "muster vm stop --discard-suspend a") {
		t.Errorf("the remedy is one that is refused: %s", p.Detail)
	}
}

// Nobody enlarges the disk of a suspended VM: it has no QEMU to do it, and its memory
// knows the old size. The request was taken, and waited for ever.
func TestADiskOfASuspendedVMIsNotEnlarged(t *testing.T) {
	f := newFixture(t)
	vm := f.suspended("a")
	p := wantProblem(t, f.do(call{method: "PATCH", path: "volumes/" + vm.Spec.Disks[0].Volume, body: `{"spec":{"size":"2G"}}`}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "muster vm resume a") {
		t.Error(p.Detail)
	}
}
