// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// image makes an image that a VM reads, with its file.
func (e *env) image(name, vmID string) api.Image {
	e.t.Helper()
	path := e.runDir + "/" + name + ".iso"
	must(e.t, os.WriteFile(path, []byte(strings.Repeat(name, 4096)), 0o644))
	e.vols.put("image "+name, path)
	img := api.Image{Meta: api.NewMeta(api.KindImage, "", name)}
	tx := &configdb.Txn{}
	must(e.t, configdb.Images.Create(tx, &img))
	if vmID != "" {
		tx.Put(configdb.Images.RefPrefix(img.Meta.ID)+"vm/"+vmID, nil)
	}
	e.commit(tx)
	return img
}

// reread does what rest does: the drive gets another image, the old one is marked.
func (e *env) reread(id string, n int, image string, force bool) {
	e.t.Helper()
	_, err := configdb.Transact(e.t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		d := &vm.Spec.CDROMs[n]
		if d.Image != "" && d.Image != image {
			configdb.ReleaseImageLater(v, tx, &vm, d.Image)
		}
		if img, err := configdb.Images.Find(v, "", image); err == nil {
			configdb.Images.Refer(tx, img.Meta.ID, api.KindVM, id)
			configdb.KeepImage(v, tx, id, img.Meta.ID)
		}
		d.Image, d.Force = image, force
		return configdb.VMs.UpdateSpec(v, tx, &vm)
	})
	must(e.t, err)
}

func (e *env) read(img api.Image) bool {
	return len(configdb.Images.Referrers(e.db.Local(), img.Meta.ID)) > 0
}

// holds reports that the status says what is in a drive, and nothing else.
func holds(n int, image string) func(api.VM) bool {
	return func(vm api.VM) bool {
		hw := vm.Status.Hardware
		return hw != nil && n < len(hw.CDROMs) && hw.CDROMs[n].Image == image && len(vm.Status.Conditions) == 0
	}
}

func twoDrives() api.VMSpec {
	return api.VMSpec{CDROMs: []api.VMCDROM{{Image: "one", Bus: api.BusSATA}, {Bus: api.BusSATA}}}
}

func TestMediaChangeWhileTheVMRuns(t *testing.T) {
	e := newEnv(t, false)
	one := e.image("one", "")
	id, _ := e.running(twoDrives())
	two := e.image("two", "")
	e.reread(id, 0, "one", false) // takes the reference
	q := e.fakes.qemu()

	e.reread(id, 1, "two", false)
	e.wait(id, "inserted", holds(1, "two"))
	if q.Property("cd1", "drive") != "cdrom1" || q.Property("cd1", "open") != false || !slices.Contains(q.Nodes(), "cdfile1") {
		t.Errorf("drive %v, open %v, nodes %v", q.Property("cd1", "drive"), q.Property("cd1", "open"), q.Nodes())
	}
	e.reread(id, 0, "", false)
	e.wait(id, "ejected", holds(0, ""))
	e.until("released", func() bool { return !e.read(one) }, nothing)
	if slices.Contains(q.Nodes(), "cdrom0") || slices.Contains(q.Nodes(), "cdfile0") || q.Property("cd0", "open") != false {
		t.Errorf("left: %v, open %v", q.Nodes(), q.Property("cd0", "open"))
	}
	e.reread(id, 1, "one", false) // one for another
	e.wait(id, "exchanged", holds(1, "one"))
	e.until("released", func() bool { return !e.read(two) && e.read(one) }, nothing)

	// What the guest does to its tray is the guest's.
	before := q.Count("query-block")
	q.MoveTray("cd1", true)
	e.until("looked", func() bool { return q.Count("query-block") > before }, nothing)
	e.h.Wake()
	e.wait(id, "quiet", holds(1, "one"))
	if q.Property("cd1", "open") != true {
		t.Error("the guest's tray was closed")
	}
}

func TestALockedTrayIsForcedOnlyWhenAskedFor(t *testing.T) {
	e := newEnv(t, false)
	one := e.image("one", "")
	id, _ := e.running(twoDrives())
	e.reread(id, 0, "one", false)
	q := e.fakes.qemu()
	q.LockTray("cd0", true)
	e.reread(id, 0, "", false)
	e.wait(id, "asked", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionChanging), "drive cdrom0, which it has locked")
	})
	e.clock.advance(UnplugTimeout)
	e.h.Wake()
	vm := e.wait(id, "the condition", func(vm api.VM) bool { return condition(vm, ConditionTrayLocked) != "" })
	if m := condition(vm, ConditionTrayLocked); !strings.Contains(m, "muster vm cdrom eject --force web1") || !e.read(one) || vm.Status.Hardware.CDROMs[0].Image != "one" || condition(vm, ConditionPendingRestart) != "" {
		t.Fatalf("%s, %+v", m, vm.Status.Hardware.CDROMs)
	}
	// The wish is taken back, and the guest opens the tray all the same.
	e.reread(id, 0, "one", false)
	e.wait(id, "taken back", holds(0, "one"))
	e.reread(id, 0, "", true)
	e.wait(id, "forced", holds(0, ""))
	e.until("released", func() bool { return !e.read(one) }, nothing)
}

// A daemon that dies between a command and the status finds what QEMU holds, and
// nothing that it holds is released.
func TestAMediumIsFoundAgain(t *testing.T) {
	e := newEnv(t, false)
	e.image("one", "")
	id, _ := e.running(twoDrives())
	e.reread(id, 0, "one", false)
	two := e.image("two", "")
	e.reread(id, 0, "two", false)
	e.wait(id, "exchanged", holds(0, "two"))
	q := e.fakes.qemu()
	forget := func(image string) {
		e.stop()
		_, err := configdb.Transact(t.Context(), e.db, "test", 10, func(v *configdb.View, tx *configdb.Txn) error {
			vm, err := configdb.VMs.Get(v, id)
			must(t, err)
			vm.Status.Hardware.CDROMs[0].Image = image
			return configdb.VMs.UpdateStatus(v, tx, &vm)
		})
		must(t, err)
	}
	forget("one")
	n := q.Count("blockdev-insert-medium")
	e.begin()
	e.wait(id, "found", holds(0, "two"))
	if q.Count("blockdev-insert-medium") != n {
		t.Error("it was inserted again")
	}
	// It died after two was in, the status still says one, and by now the drive shall be
	// empty; the guest has locked it.
	q.LockTray("cd0", true)
	forget("one")
	e.reread(id, 0, "", false)
	e.begin()
	e.wait(id, "asked", func(vm api.VM) bool { return condition(vm, ConditionChanging) != "" })
	e.h.Wake()
	if !e.read(two) {
		t.Fatal("released while QEMU reads it")
	}
	q.LockTray("cd0", false)
	e.clock.advance(UnplugInterval)
	e.h.Wake()
	e.wait(id, "ejected", holds(0, ""))
	e.until("released", func() bool { return !e.read(two) }, nothing)
}

func TestAMediumThatQEMURefusesLeavesNothingBehind(t *testing.T) {
	e := newEnv(t, false)
	e.image("one", "")
	id, _ := e.running(twoDrives())
	e.image("two", "")
	q := e.fakes.qemu()
	q.Refuse("blockdev-insert-medium", "no such medium")
	e.reread(id, 1, "two", false)
	vm := e.wait(id, "the condition", func(vm api.VM) bool { return condition(vm, ConditionHotplugFailed) != "" })
	if m := condition(vm, ConditionHotplugFailed); !strings.Contains(m, "image two in drive cdrom1: no such medium") || slices.Contains(q.Nodes(), "cdrom1") || q.Property("cd1", "open") != false {
		t.Fatalf("%s, nodes %v", m, q.Nodes())
	}
	// QEMU tells that the tray moved; that is no reason to try again.
	looks := q.Count("query-block")
	for i := range 5 {
		e.h.Wake()
		e.until("looked at", func() bool { return q.Count("query-block") > looks+i }, nothing)
	}
	if n := q.Count("blockdev-insert-medium"); n != 1 {
		t.Errorf("tried %d times at once", n)
	}
	e.wait(id, "the condition stays", func(vm api.VM) bool { return condition(vm, ConditionHotplugFailed) != "" })
	q.Refuse("blockdev-insert-medium", "")
	e.clock.advance(HotplugRetry)
	e.h.Wake()
	e.wait(id, "inserted", holds(1, "two"))
}

func TestADriveComesAtTheNextStart(t *testing.T) {
	e := newEnv(t, false)
	e.image("one", "")
	id, _ := e.running(twoDrives())
	e.image("two", "")
	e.change(id, func(vm *api.VM) { vm.Spec.CDROMs = append(vm.Spec.CDROMs, api.VMCDROM{Image: "two", Bus: api.BusSATA}) })
	e.wait(id, "pending", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), "cdroms (drive 2)")
	})
	e.reread(id, 1, "two", false) // those that are there go on changing
	e.wait(id, "inserted", func(vm api.VM) bool { return vm.Status.Hardware.CDROMs[1].Image == "two" })
	e.change(id, func(vm *api.VM) { vm.Spec.CDROMs = vm.Spec.CDROMs[1:2] })
	vm := e.wait(id, "pending", func(vm api.VM) bool {
		return strings.Contains(condition(vm, ConditionPendingRestart), "cdroms (medium of drive 0), cdroms (drive 1)")
	})
	if vm.Status.Hardware.CDROMs[0].Image != "one" {
		t.Error("the first drive got what belongs to the second")
	}
}

// The real QEMU, without a guest.
func TestRealMedia(t *testing.T) {
	e := newEnv(t, true)
	e.image("one", "")
	two := e.image("two", "")
	id, _ := e.running(twoDrives())
	e.reread(id, 0, "one", false)
	file := func(drive string) string {
		var list []struct {
			QDev     string `json:"qdev"`
			Open     bool   `json:"tray_open"`
			Inserted *struct {
				File string `json:"file"`
			} `json:"inserted"`
		}
		e.ask(id, "query-block", nil, &list)
		for _, d := range list {
			if d.QDev == drive && d.Open {
				return "open"
			}
			if d.QDev == drive && d.Inserted != nil {
				return d.Inserted.File
			}
		}
		return ""
	}
	if f := file("cd0"); !strings.HasSuffix(f, "/one.iso") {
		t.Fatalf("the first drive holds %q", f)
	}
	e.reread(id, 1, "two", false)
	e.wait(id, "inserted", holds(1, "two"))
	e.reread(id, 0, "two", false)
	e.wait(id, "exchanged", holds(0, "two"))
	for _, drive := range []string{"cd0", "cd1"} {
		if f := file(drive); !strings.HasSuffix(f, "/two.iso") {
			t.Errorf("%s holds %q", drive, f)
		}
	}
	var open []struct {
		Node string `json:"node-name"`
		File string `json:"file"`
	}
	e.ask(id, "query-named-block-nodes", map[string]any{"flat": true}, &open)
	for _, n := range open { // or a new daemon would take it for another medium
		if strings.HasPrefix(n.Node, "cdfile") && n.File != e.runDir+"/two.iso" {
			t.Errorf("%s is of %q", n.Node, n.File)
		}
	}
	e.stop() // a new daemon finds all of it
	e.begin()
	e.reread(id, 0, "", false)
	e.wait(id, "ejected", holds(0, ""))
	e.reread(id, 1, "", false)
	e.wait(id, "ejected", holds(1, ""))
	e.until("released", func() bool { return !e.read(two) }, nothing)
	if f, g := file("cd0"), file("cd1"); f != "" || g != "" {
		t.Errorf("the drives hold %q and %q", f, g)
	}
	var nodes []struct {
		Node string `json:"node-name"`
	}
	e.ask(id, "query-named-block-nodes", nil, &nodes)
	for _, n := range nodes {
		if strings.HasPrefix(n.Node, "cd") {
			t.Errorf("QEMU has %s open", n.Node)
		}
	}
}
