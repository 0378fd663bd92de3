// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

var t0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func vmTarget(generation uint64, power api.PowerState, st api.VMStatus, disks ...disk) target {
	return target{exists: true, disks: disks, vm: &api.VM{
		Meta: api.Meta{Name: "web1", Generation: generation}, Spec: api.VMSpec{Power: power}, Status: st,
	}}
}

func deleting(t target) target {
	at := t0
	switch {
	case t.vm != nil:
		t.vm.Meta.DeletingAt = &at
	case t.image != nil:
		t.image.Meta.DeletingAt = &at
	}
	return t
}

func imageTarget(st api.ImageStatus) target {
	return target{exists: true, image: &api.Image{Meta: api.Meta{Name: "tiny"}, Status: st}}
}

func TestEvaluate(t *testing.T) {
	const run, ok, fail, cancel = api.TaskRunning, api.TaskSucceeded, api.TaskFailed, api.TaskCancelled
	st := func(phase api.VMPhase, observed uint64) api.VMStatus {
		return api.VMStatus{Phase: phase, ObservedGeneration: observed, Epoch: 1, Message: "why"}
	}
	full := []api.Condition{{Type: "Ready", Reason: "StorageFull"}}
	for name, c := range map[string]struct {
		action   api.Action
		gen      uint64 // of the task
		epoch    uint64
		reboots  uint64
		late     bool
		what     target
		want     api.TaskPhase
		progress int
		code     api.Code
		says     string
	}{
		"create, nothing seen":            {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerStopped, api.VMStatus{}), want: run, progress: progressDisks},
		"create, disks pending":           {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerStopped, st(api.VMStopped, 1), disk{name: "a", phase: api.StorageReady}, disk{name: "b", message: "waiting for image"}), want: run, progress: 30, says: "volume \"b\": waiting for image"},
		"create, disk failed":             {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerStopped, st(api.VMCreating, 1), disk{name: "a", phase: api.StorageFailed, message: "full", conditions: full}), want: fail, code: api.CodeStorageFull, says: "volume \"a\": full"},
		"create, stopped and made":        {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerStopped, st(api.VMStopped, 1), disk{name: "a", phase: api.StorageReady}), want: ok, progress: 100},
		"create with start, stopped":      {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerRunning, st(api.VMStopped, 1)), want: run, progress: progressDisks},
		"create with start, starting":     {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerRunning, st(api.VMStarting, 1)), want: run, progress: progressBusy},
		"create with start, running":      {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerRunning, st(api.VMRunning, 1)), want: ok, progress: 100},
		"create paused":                   {action: api.ActionVMCreate, gen: 1, what: vmTarget(1, api.PowerPaused, st(api.VMPaused, 1)), want: ok, progress: 100},
		"create, deleted":                 {action: api.ActionVMCreate, gen: 1, what: target{}, want: cancel, says: "deleted meanwhile"},
		"create, being deleted":           {action: api.ActionVMCreate, gen: 1, what: deleting(vmTarget(1, api.PowerRunning, st(api.VMCreating, 1))), want: cancel},
		"start, old status":               {action: api.ActionVMStart, gen: 5, what: vmTarget(5, api.PowerRunning, st(api.VMRunning, 4)), want: run},
		"start, old epoch":                {action: api.ActionVMStart, gen: 5, epoch: 2, what: vmTarget(5, api.PowerRunning, st(api.VMRunning, 5)), want: run},
		"start, running":                  {action: api.ActionVMStart, gen: 5, epoch: 1, what: vmTarget(5, api.PowerRunning, st(api.VMRunning, 5)), want: ok, progress: 100},
		"start, overtaken by stop":        {action: api.ActionVMStart, gen: 5, what: vmTarget(6, api.PowerStopped, st(api.VMStopped, 6)), want: cancel, says: "overtaken by a later change"},
		"start, ran before the stop":      {action: api.ActionVMStart, gen: 5, what: vmTarget(6, api.PowerStopped, st(api.VMRunning, 5)), want: ok, progress: 100},
		"start, another change":           {action: api.ActionVMStart, gen: 5, what: vmTarget(6, api.PowerRunning, st(api.VMStarting, 5)), want: run, progress: progressBusy},
		"start, paused since":             {action: api.ActionVMStart, gen: 5, what: vmTarget(6, api.PowerPaused, st(api.VMPaused, 6)), want: ok, progress: 100},
		"start, failed":                   {action: api.ActionVMStart, gen: 5, what: vmTarget(5, api.PowerRunning, st(api.VMFailed, 5)), want: fail, code: api.CodeInternal, says: "why" + goesOn},
		"start, failed before":            {action: api.ActionVMStart, gen: 5, what: vmTarget(5, api.PowerRunning, st(api.VMFailed, 4)), want: run},
		"start, late":                     {action: api.ActionVMStart, gen: 5, late: true, what: vmTarget(5, api.PowerRunning, st(api.VMStarting, 5)), want: fail, progress: progressBusy, code: api.CodeTimeout, says: "why"},
		"start, late but running":         {action: api.ActionVMStart, gen: 5, late: true, what: vmTarget(5, api.PowerRunning, st(api.VMRunning, 5)), want: ok, progress: 100},
		"stop, stopping":                  {action: api.ActionVMStop, gen: 2, what: vmTarget(2, api.PowerStopped, st(api.VMStopping, 2)), want: run, progress: progressBusy},
		"stop, stopped before the wish":   {action: api.ActionVMStop, gen: 2, what: vmTarget(2, api.PowerStopped, st(api.VMStopped, 1)), want: run},
		"stop, stopped":                   {action: api.ActionVMStop, gen: 2, what: vmTarget(2, api.PowerStopped, st(api.VMStopped, 2)), want: ok, progress: 100},
		"stop, overtaken by start":        {action: api.ActionVMStop, gen: 2, what: vmTarget(3, api.PowerRunning, st(api.VMRunning, 3)), want: cancel},
		"stop, failed":                    {action: api.ActionVMStop, gen: 2, what: vmTarget(2, api.PowerStopped, st(api.VMFailed, 2)), want: fail, code: api.CodeInternal, says: "why"},
		"reboot, not yet":                 {action: api.ActionVMReboot, gen: 2, reboots: 3, what: vmTarget(2, api.PowerRunning, api.VMStatus{Phase: api.VMRunning, ObservedGeneration: 2, RebootsDone: 2}), want: run},
		"reboot, done":                    {action: api.ActionVMReboot, gen: 2, reboots: 3, what: vmTarget(2, api.PowerRunning, api.VMStatus{Phase: api.VMRunning, ObservedGeneration: 2, RebootsDone: 3}), want: ok, progress: 100},
		"reboot, stopped instead":         {action: api.ActionVMReboot, gen: 2, reboots: 3, what: vmTarget(2, api.PowerRunning, api.VMStatus{Phase: api.VMStopped, ObservedGeneration: 2, RebootsDone: 2}), want: fail, code: api.CodeRefused},
		"pause":                           {action: api.ActionVMPause, gen: 2, what: vmTarget(2, api.PowerPaused, st(api.VMPaused, 2)), want: ok, progress: 100},
		"resume, memory not loaded":       {action: api.ActionVMResume, gen: 2, what: vmTarget(3, api.PowerSuspended, st(api.VMSuspended, 3)), want: fail, code: api.CodeInternal, says: "why"},
		"resume, suspended, not yet seen": {action: api.ActionVMStart, gen: 2, what: vmTarget(3, api.PowerSuspended, st(api.VMStarting, 2)), want: run, progress: progressBusy},
		"clone, a disk half copied":       {action: api.ActionVMClone, gen: 1, what: vmTarget(1, api.PowerStopped, st(api.VMStopped, 1), disk{name: "a", phase: api.StoragePending, progress: 50, message: "copying"}), want: run, progress: 30, says: "copying"},
		"clone, all copied":               {action: api.ActionVMClone, gen: 1, what: vmTarget(1, api.PowerStopped, st(api.VMStopped, 1), disk{name: "a", phase: api.StorageReady}), want: ok, progress: 100},
		"pause, overtaken by resume":      {action: api.ActionVMPause, gen: 2, what: vmTarget(3, api.PowerRunning, st(api.VMRunning, 3)), want: cancel},
		"resume":                          {action: api.ActionVMResume, gen: 2, what: vmTarget(2, api.PowerRunning, st(api.VMRunning, 2)), want: ok, progress: 100},
		"resume, overtaken by pause":      {action: api.ActionVMResume, gen: 2, what: vmTarget(3, api.PowerPaused, st(api.VMPaused, 3)), want: cancel},
		"recover, still the old epoch":    {action: api.ActionVMRecover, gen: 1, epoch: 2, what: vmTarget(1, api.PowerRunning, st(api.VMRunning, 1)), want: run},
		"recover, failed in the old":      {action: api.ActionVMRecover, gen: 1, epoch: 2, what: vmTarget(1, api.PowerRunning, st(api.VMFailed, 1)), want: run},
		"recover, running again":          {action: api.ActionVMRecover, gen: 1, epoch: 1, what: vmTarget(1, api.PowerRunning, st(api.VMRunning, 1)), want: ok, progress: 100},
		"delete, there":                   {action: api.ActionVMDelete, gen: 2, what: deleting(vmTarget(2, api.PowerStopped, st(api.VMDeleting, 2))), want: run, says: "why"},
		"delete, gone":                    {action: api.ActionVMDelete, gen: 2, what: target{}, want: ok, progress: 100},
		"image importing":                 {action: api.ActionImageCreate, gen: 1, what: imageTarget(api.ImageStatus{Phase: api.StorageImporting, Progress: 40, ObservedGeneration: 1}), want: run, progress: 40},
		"image ready":                     {action: api.ActionImageCreate, gen: 1, what: imageTarget(api.ImageStatus{Phase: api.StorageReady, ObservedGeneration: 1}), want: ok, progress: 100},
		"image failed":                    {action: api.ActionImageCreate, gen: 1, what: imageTarget(api.ImageStatus{Phase: api.StorageFailed, ObservedGeneration: 1, Message: "bad", Conditions: []api.Condition{{Reason: "Checksum"}}}), want: fail, code: api.CodeChecksum, says: "bad"},
		"image deleted before it came":    {action: api.ActionImageCreate, gen: 1, what: deleting(imageTarget(api.ImageStatus{Phase: api.StoragePending})), want: cancel},
		"volume failed":                   {action: api.ActionVolumeCreate, gen: 1, what: target{exists: true, volume: &api.Volume{Status: api.VolumeStatus{Phase: api.StorageFailed, ObservedGeneration: 1, Conditions: full}}}, want: fail, code: api.CodeStorageFull},
		"volume deleted":                  {action: api.ActionVolumeDelete, gen: 1, what: target{}, want: ok, progress: 100},
		"image late, with its last word":  {action: api.ActionImageCreate, gen: 1, late: true, what: imageTarget(api.ImageStatus{Phase: api.StoragePending, Message: "waiting for the upload"}), want: fail, code: api.CodeTimeout, says: "waiting for the upload"},
	} {
		t.Run(name, func(t *testing.T) {
			kind := api.Kind(strings.SplitN(string(c.action), ".", 2)[0])
			task := api.NewTask(c.action, kind, api.Meta{ID: "x", Name: "web1", Generation: c.gen}, "me", time.Minute, t0)
			task.Spec.TargetEpoch, task.Spec.TargetReboots = c.epoch, c.reboots
			now := t0.Add(time.Second)
			if c.late {
				now = t0.Add(time.Minute)
			}
			got, changed := evaluate(task, c.what, now, c.late)
			if !changed || got.Phase != c.want || got.Progress != c.progress || got.Code != c.code || !strings.Contains(got.Message, c.says) {
				t.Fatalf("got %+v", got)
			}
			if got.StartedAt == nil || (got.FinishedAt != nil) != got.Phase.Final() {
				t.Errorf("times: %+v", got)
			}
			task.Status = got
			if again, changed := evaluate(task, c.what, now.Add(time.Millisecond), c.late); changed && !(c.late) {
				t.Errorf("the same state gave another status: %+v", again)
			}
		})
	}
}

func TestProgressNeverGoesBack(t *testing.T) {
	task := api.NewTask(api.ActionImageCreate, api.KindImage, api.Meta{Generation: 1}, "me", time.Hour, t0)
	task.Status = api.TaskStatus{Phase: api.TaskRunning, Progress: 60}
	got, _ := evaluate(task, imageTarget(api.ImageStatus{Phase: api.StoragePending}), t0, false)
	if got.Progress != 60 {
		t.Errorf("progress %d", got.Progress)
	}
}

func TestExpired(t *testing.T) {
	var all []api.Task
	add := func(n int, phase api.TaskPhase, ended time.Time) {
		for range n {
			x := api.NewTask(api.ActionVMStart, api.KindVM, api.Meta{}, "me", time.Hour, ended)
			x.Status = api.TaskStatus{Phase: phase, FinishedAt: &ended}
			all = append(all, x)
		}
	}
	add(3, api.TaskFailed, t0.Add(-Retention-time.Second))
	add(2, api.TaskRunning, t0.Add(-2*Retention))
	add(4, api.TaskSucceeded, t0)
	if got := expired(all, t0); len(got) != 3 {
		t.Errorf("%d expired by age, want 3", len(got))
	}
	add(MaxFinal, api.TaskCancelled, t0)
	if got := expired(all, t0); len(got) != 7 || got[6].Meta.ID != all[8].Meta.ID {
		t.Errorf("%d expired by number, want the 7 oldest final ones", len(got))
	}
}

type fixture struct {
	t  *testing.T
	db *storetest.Mem
}

func (f *fixture) do(fn func(v *configdb.View, tx *configdb.Txn) error) {
	f.t.Helper()
	if _, err := configdb.Transact(f.t.Context(), f.db, "test", 20, fn); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) until(what string, ok func(v *configdb.View) bool) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 20*time.Second)
	defer cancel()
	for v := f.db.Local(); !ok(v); {
		next, err := f.db.WaitRevision(ctx, v.Revision()+1)
		if err != nil {
			f.t.Fatalf("%s: %v", what, err)
		}
		v = next
	}
}

func (f *fixture) run(term uint64, now func() time.Time) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- New(Config{DB: f.db, Now: now}).Run(ctx, term) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	}
}

func TestServiceFollowsTargets(t *testing.T) {
	f := &fixture{t, storetest.New(t)}
	stop := f.run(1, nil)
	defer stop()
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", "web1"), Spec: api.VMSpec{Power: api.PowerStopped, Disks: []api.VMDisk{{Volume: "web1-disk0"}}}}
	vol := api.Volume{Meta: api.NewMeta(api.KindVolume, "", "web1-disk0")}
	vol.Meta.Owner = "vm/" + vm.Meta.ID
	create := api.NewTask(api.ActionVMCreate, api.KindVM, vm.Meta, "me", time.Hour, time.Now())
	f.do(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.VMs.Create(tx, &vm), configdb.Volumes.Create(tx, &vol), configdb.Tasks.CreateUnnamed(tx, &create))
	})
	phase := func(id string, want api.TaskPhase) {
		t.Helper()
		f.until("task "+string(want), func(v *configdb.View) bool {
			x, err := configdb.Tasks.Get(v, id)
			return err == nil && x.Status.Phase == want
		})
	}
	phase(create.Meta.ID, api.TaskRunning)
	f.do(func(v *configdb.View, tx *configdb.Txn) error {
		x, err := configdb.VMs.Get(v, vm.Meta.ID)
		x.Status = api.VMStatus{Phase: api.VMStopped, ObservedGeneration: 1}
		return errors.Join(err, configdb.VMs.UpdateStatus(v, tx, &x))
	})
	f.do(func(v *configdb.View, tx *configdb.Txn) error { // the last thing missing is the disk
		x, err := configdb.Volumes.Get(v, vol.Meta.ID)
		x.Status = api.VolumeStatus{Phase: api.StorageReady, ObservedGeneration: 1}
		return errors.Join(err, configdb.Volumes.UpdateStatus(v, tx, &x))
	})
	phase(create.Meta.ID, api.TaskSucceeded)

	remove := api.NewTask(api.ActionVMDelete, api.KindVM, vm.Meta, "me", time.Hour, time.Now())
	f.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &remove) })
	phase(remove.Meta.ID, api.TaskRunning)
	f.do(func(v *configdb.View, tx *configdb.Txn) error {
		x, err := configdb.VMs.Get(v, vm.Meta.ID)
		configdb.VMs.Delete(tx, &x)
		return err
	})
	phase(remove.Meta.ID, api.TaskSucceeded)
	// Made by a node whose clock is an hour late, so that its deadline is over for others.
	image := api.Image{Meta: api.NewMeta(api.KindImage, "", "tiny")}
	early := api.NewTask(api.ActionImageCreate, api.KindImage, image.Meta, "me", time.Minute, time.Now().Add(-time.Hour))
	f.do(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.Images.Create(tx, &image), configdb.Tasks.CreateUnnamed(tx, &early))
	})
	phase(early.Meta.ID, api.TaskRunning)

	rev := f.db.Local().Revision()
	late := api.NewTask(api.ActionImageCreate, api.KindVolume, api.Meta{ID: vol.Meta.ID, Generation: 2}, "me", 50*time.Millisecond, time.Now())
	f.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &late) })
	phase(late.Meta.ID, api.TaskFailed)
	if now := f.db.Local().Revision(); now > rev+3 { // created, running, failed
		t.Errorf("%d writes for one task that ran into its deadline", now-rev)
	}
}

// The clock of the node that made a task may be wrong by hours: the task has its time
// all the same, and no more than that.
func TestATaskHasItsTimeWhateverTheClockOfItsCreator(t *testing.T) {
	for _, wrong := range []time.Duration{-24 * time.Hour, -time.Hour, time.Hour, 24 * time.Hour} {
		s := New(Config{})
		s.seen = map[string]time.Time{}
		task := api.NewTask(api.ActionVMDelete, api.KindVM, api.Meta{ID: api.NewID()}, "me", time.Minute, t0.Add(wrong))
		for _, c := range []struct{ after, left time.Duration }{{0, time.Minute}, {59 * time.Second, time.Second}, {time.Minute, 0}} {
			if got := s.left(&task, t0.Add(c.after)); got != c.left {
				t.Errorf("made by a clock that is %v wrong, %v after the leader saw it: %v left, want %v", wrong, c.after, got, c.left)
			}
		}
	}
}

func TestServiceOfAnOldTermChangesNothing(t *testing.T) {
	f := &fixture{t, storetest.New(t)}
	f.db.SetTerm(2)
	x := api.NewTask(api.ActionVMDelete, api.KindVM, api.Meta{ID: api.NewID()}, "me", time.Hour, time.Now())
	f.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &x) })
	before := f.db.Local().Revision()
	stop := f.run(1, nil)
	f.until("an attempt", func(v *configdb.View) bool { return v.Revision() > before }) // refused entries count too
	stop()
	if got, _ := configdb.Tasks.Get(f.db.Local(), x.Meta.ID); got.Status.Phase != api.TaskPending {
		t.Errorf("status is %+v", got.Status)
	}
	defer f.run(2, nil)()
	f.until("the new leader's word", func(v *configdb.View) bool {
		got, err := configdb.Tasks.Get(v, x.Meta.ID)
		return err == nil && got.Status.Phase == api.TaskSucceeded
	})
}

func TestOldTasksGo(t *testing.T) {
	f := &fixture{t, storetest.New(t)}
	const old = sweepBatch + 50
	for range old {
		x := api.NewTask(api.ActionVMStart, api.KindVM, api.Meta{}, "me", time.Hour, t0.Add(-2*Retention))
		ended := t0.Add(-2 * Retention)
		x.Status.Phase, x.Status.FinishedAt = api.TaskSucceeded, &ended
		f.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &x) })
	}
	fresh := api.NewTask(api.ActionVMStart, api.KindVM, api.Meta{}, "me", time.Hour, t0)
	fresh.Status.Phase = api.TaskSucceeded
	f.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Tasks.CreateUnnamed(tx, &fresh) })
	before := f.db.Local().Revision()
	s := New(Config{DB: f.db, Now: func() time.Time { return t0 }})
	for range 2 {
		if err := s.sweep(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	left, err := configdb.Tasks.List(f.db.Local())
	if err != nil || len(left) != 1 || left[0].Meta.ID != fresh.Meta.ID {
		t.Errorf("%d tasks left, %v", len(left), err)
	}
	if writes := f.db.Local().Revision() - before; writes != 2 {
		t.Errorf("%d writes, want 2 batches and then none", writes)
	}
}
