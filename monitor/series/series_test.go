// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var t0 = time.Unix(1_800_000_000, 0)

func TestARingKeepsAnHour(t *testing.T) {
	now := t0
	s := NewStore(func() time.Time { return now })
	for i := range 500 {
		now = t0.Add(time.Duration(i) * Step)
		if i%7 != 0 {
			s.Set(now, "m", float64(i))
		}
	}
	got := s.Query("m", Keep)
	if len(got) != 1 {
		t.Fatalf("%d series", len(got))
	}
	points := got[0].Points
	if first := points[0]; first.Value != 141 || !first.Time.Equal(t0.Add(141*Step)) { // 140 was left out
		t.Errorf("the first point is %+v", first)
	}
	for _, p := range points {
		if int(p.Value)%7 == 0 || !p.Time.Equal(t0.Add(time.Duration(p.Value)*Step)) {
			t.Fatalf("point %+v", p)
		}
	}
	if n := len(s.Query("m", time.Minute)[0].Points); n < 5 || n > 7 {
		t.Errorf("%d points in the last minute", n)
	}
	now = now.Add(2 * time.Hour)
	s.Set(now, "m", 1)
	if p := s.Query("m", Keep)[0].Points; len(p) != 1 {
		t.Errorf("after a gap of two hours: %d points", len(p))
	}
	now = now.Add(-30 * time.Minute)
	s.Set(now, "m", 2)
	if p := s.Query("m", Keep)[0].Points; len(p) != 1 || p[0].Value != 2 {
		t.Errorf("after the clock went back: %+v", p)
	}
}

func TestTheNumberOfSeriesIsBounded(t *testing.T) {
	s := NewStore(func() time.Time { return t0 })
	for i := range MaxSeries + 10 {
		s.Set(t0, "m", 1, Label{"i", fmt.Sprint(i)})
	}
	s.Set(t0, "m", math.NaN())
	if n := len(s.Query("", 0)); n != MaxSeries || s.dropped != 11 {
		t.Errorf("%d series, %d dropped", n, s.dropped)
	}
	s.Set(t0.Add(Keep+time.Minute), "later", 1)
	if len(s.rings) != 1 {
		t.Errorf("%d series an hour later", len(s.rings))
	}
}

func TestTextFormat(t *testing.T) {
	s := NewStore(func() time.Time { return t0 })
	s.Set(t0, VMCPU, 12.5, Label{"vm", "a\"b\\c\nd"})
	s.Set(t0, VMCPU, 1, Label{"vm", "z"})
	s.Set(t0, NICSent, 1e10, Label{"nic", "eth0"})
	s.Set(t0.Add(-2*time.Minute), NodeCPU, 5) // no longer current
	var b strings.Builder
	s.WriteText(&b)
	want := `# HELP muster_nic_sent_bytes_total Bytes sent.
# TYPE muster_nic_sent_bytes_total counter
muster_nic_sent_bytes_total{nic="eth0"} 1e+10
# HELP muster_vm_cpu_percent CPU time of QEMU; 100 is one CPU.
# TYPE muster_vm_cpu_percent gauge
muster_vm_cpu_percent{vm="a\"b\\c\nd"} 12.5
muster_vm_cpu_percent{vm="z"} 1
# HELP muster_series Series kept in memory.
`
	if !strings.HasPrefix(b.String(), want) {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// run gives a collector one run.
func run(t *testing.T, c Collector, at time.Time, s *Store) {
	t.Helper()
	if err := c.Collect(t.Context(), &Report{store: s, at: at}); err != nil {
		t.Fatalf("%s: %v", c.Name, err)
	}
}

func value(t *testing.T, s *Store, name string) float64 {
	t.Helper()
	got := s.Query(name, 0)
	if len(got) != 1 {
		t.Fatalf("%s: %d series", name, len(got))
	}
	return got[0].Points[0].Value
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

type guestList []Guest

func (g guestList) Guests(context.Context) ([]Guest, error) { return g, nil }

func TestHostAndGuestsFromProc(t *testing.T) {
	dir := t.TempDir()
	now := t0
	s := NewStore(func() time.Time { return now })
	write(t, dir, "stat", "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\n")
	write(t, dir, "loadavg", "1.25 0.5 0.1 1/100 4711\n")
	write(t, dir, "meminfo", "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    250 kB\n")
	write(t, dir, "net/dev", "Inter-|  Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 1000 1 2 3 0 0 0 0 500 1 4 5 0 0 0 0\n  tap7: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\nmt0123456789n0: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n")
	proc := Proc(dir)
	cpu, vms := proc.CPU(), proc.VMs(guestList{{Name: "web1", Project: "default", ID: "1", PID: 42, Memory: 1 << 30, Balloon: 1 << 29, Disks: true, DiskRead: 5, DiskWritten: 7}, {Name: "gone", ID: "2", PID: 43}, {Name: "off", ID: "3"}})
	write(t, dir, "42/stat", "42 (qemu (x) y) S 1 1 1 0 -1 0 0 0 0 0 100 50 0 0 20 0 4 0 777 0 1000 0\n")
	run(t, cpu, now, s)
	run(t, vms, now, s)
	run(t, proc.NICs(), now, s)
	now = now.Add(10 * time.Second)
	write(t, dir, "stat", "cpu  150 0 150 1300 100 0 0 0 0 0\n")
	write(t, dir, "42/stat", "42 (qemu (x) y) S 1 1 1 0 -1 0 0 0 0 0 900 250 0 0 20 0 4 0 777 0 1000 0\n")
	run(t, cpu, now, s)
	run(t, vms, now, s)
	for name, want := range map[string]float64{
		NodeCPU: 100 * 100.0 / 700, NodeLoad1: 1.25, NodeMemPercent: 75, NodeMemTotal: 1000 * 1024,
		NICReceived: 1000, NICSent: 500, NICErrors: 14,
		VMCPU: 100, VMRSS: 1000 * float64(os.Getpagesize()), VMMemory: 1 << 30, VMCPUSeconds: 11.5, VMBalloon: 1 << 29, VMDiskRead: 5, VMDiskWritten: 7,
	} {
		if got := value(t, s, name); math.Abs(got-want) > 1e-9 {
			t.Errorf("%s is %g, want %g", name, got, want)
		}
	}
	// The PID is used again by another process: no difference to the old one.
	now = now.Add(10 * time.Second)
	write(t, dir, "42/stat", "42 (other) S 1 1 1 0 -1 0 0 0 0 0 5 5 0 0 20 0 4 0 999 0 1000 0\n")
	run(t, vms, now, s)
	if p := s.Query(VMCPU, Keep)[0].Points; len(p) != 1 {
		t.Errorf("CPU of a new process compared with the old one: %+v", p)
	}
}

func TestBadProcIsAnErrorNotAPanic(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "short": "cpu 1 2 3\n", "words": "cpu a b c d e f g h\n"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "stat", text)
			write(t, dir, "42/stat", text)
			s := NewStore(nil)
			if err := Proc(dir).CPU().Collect(t.Context(), &Report{store: s, at: t0}); err == nil {
				t.Error("no error of the host")
			}
			if err := Proc(dir).VMs(guestList{{Name: "v", ID: "1", PID: 42}}).Collect(t.Context(), &Report{store: s, at: t0}); err == nil {
				t.Error("no error of the guest")
			}
		})
	}
}

func TestAPoolThatHangsHurtsOnlyItself(t *testing.T) { synctest.Test(t, aPoolThatHangs) }

func aPoolThatHangs(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	var asked atomic.Int32
	statfs := func(path string, st *syscall.Statfs_t) error {
		if path == "/dead" {
			asked.Add(1)
			<-hang
		}
		st.Blocks, st.Bfree, st.Bavail, st.Bsize = 100, 30, 20, 4096
		return nil
	}
	s := NewStore(func() time.Time { return t0 })
	c := pools(func() []Mount { return []Mount{{"nfs", "/dead"}, {"fast", "/fast"}} }, statfs)
	for i := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := c.Collect(ctx, &Report{store: s, at: t0})
		cancel()
		if err == nil || i > 0 && !strings.Contains(err.Error(), "nfs") {
			t.Errorf("run %d: %v", i, err)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("the dead pool was asked %d times", asked.Load())
	}
	if got := value(t, s, PoolPercent); math.Abs(got-100*70.0/90) > 1e-9 {
		t.Errorf("the live pool is %g %% full", got)
	}
}

func TestACollectorThatHangsHurtsOnlyItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(nil)
		hang := make(chan struct{})
		var stuck, late, good, panics atomic.Int32
		r := NewRunner(s, slog.New(slog.NewTextHandler(t.Output(), nil)),
			Collector{Name: "stuck", Period: time.Second, Deadline: 500 * time.Millisecond, Collect: func(_ context.Context, rep *Report) error {
				stuck.Add(1)
				<-hang
				rep.Set("late_sample", 1)
				late.Add(1)
				return nil
			}},
			Collector{Name: "good", Period: time.Second, Deadline: 500 * time.Millisecond, Collect: func(_ context.Context, rep *Report) error {
				good.Add(1)
				rep.Set("good_sample", 1)
				return nil
			}},
			Collector{Name: "heedful", Period: time.Second, Deadline: 500 * time.Millisecond, Collect: func(ctx context.Context, _ *Report) error {
				<-ctx.Done()
				return errors.New("was told to stop")
			}},
			Collector{Name: "panics", Period: time.Second, Deadline: 500 * time.Millisecond, Collect: func(context.Context, *Report) error {
				panics.Add(1)
				panic("boom")
			}},
		)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(10500 * time.Millisecond)
		synctest.Wait()
		st := r.States()
		if stuck.Load() != 1 || good.Load() != 11 || panics.Load() != 11 {
			t.Errorf("runs: stuck %d, good %d, panics %d", stuck.Load(), good.Load(), panics.Load())
		}
		if !st[0].Late || st[0].OK || !st[1].OK || st[2].Late || st[2].Error != "was told to stop" || !strings.Contains(st[3].Error, "boom") {
			t.Errorf("states %+v", st)
		}
		close(hang)
		time.Sleep(time.Second)
		synctest.Wait()
		if late.Load() == 0 || len(s.Query("late_sample", Keep)) != 1 { // of the run after
			t.Errorf("late runs %d", late.Load())
		}
		if r.States()[0].Late {
			t.Error("a collector that came back is still late")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRealHost(t *testing.T) {
	s := NewStore(nil)
	for _, c := range []Collector{Proc("/proc").CPU(), Proc("/proc").NICs(), DataDir(t.TempDir()), Proc("/proc").VMs(guestList{{Name: "self", ID: "1", PID: os.Getpid()}})} {
		run(t, c, time.Now(), s)
	}
	if value(t, s, NodeMemTotal) <= 0 || value(t, s, VMRSS) <= 0 || value(t, s, DiskTotal) <= 0 {
		t.Error("nothing measured")
	}
}
