// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package limit

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return strings.TrimSpace(string(b))
}

func TestFind(t *testing.T) {
	const v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	for text, want := range map[string]Host{
		"": {Proc: "/proc"}, v1: {Root1: "/sys/fs/cgroup", Proc: "/proc"},
		"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n":              {Root2: "/sys/fs/cgroup", Proc: "/proc"},
		v1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n": {Root1: "/sys/fs/cgroup", Root2: "/sys/fs/cgroup/unified", Proc: "/proc"},
	} {
		if got := Find(text); got != want {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// tree is a host with cgroup v2 made of plain files.
func tree(t *testing.T, controllers string, files ...string) (h Host, group string) {
	t.Helper()
	dir := t.TempDir()
	h = Host{Root2: filepath.Join(dir, "cg"), Proc: filepath.Join(dir, "proc")}
	group = filepath.Join(h.Root2, "muster", "guard-x", "vm-a")
	must(t, os.MkdirAll(group, 0o755))
	must(t, os.MkdirAll(filepath.Join(h.Proc, "7"), 0o755))
	must(t, os.WriteFile(filepath.Join(h.Proc, "7", "cgroup"), []byte("1:name=systemd:/\n0::/muster/guard-x/vm-a\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(h.Root2, "cgroup.controllers"), []byte(controllers+"\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(h.Root2, "cpuset.cpus.effective"), []byte("0-7\n"), 0o644))
	for _, d := range []string{"", "muster", "muster/guard-x"} {
		must(t, os.WriteFile(filepath.Join(h.Root2, d, "cgroup.subtree_control"), nil, 0o644))
	}
	for _, f := range files {
		must(t, os.WriteFile(filepath.Join(group, f), nil, 0o644))
	}
	return h, group
}

var full = api.VMLimits{CPUWeight: 50, CPUMax: 150, CPUSet: "0-1", MemoryMax: 640 * api.MiB, IOWeight: 200}

func TestVersion2(t *testing.T) {
	h, group := tree(t, "cpuset cpu io memory pids", "cpu.weight", "cpu.max", "cpuset.cpus", "memory.max", "io.weight")
	missing, err := h.Apply("vm-a", 7, full)
	if err != nil || len(missing) > 0 {
		t.Fatal(missing, err)
	}
	for file, want := range map[string]string{
		"cpu.weight": "50", "cpu.max": "150000 100000", "cpuset.cpus": "0-1", "memory.max": "671088640", "io.weight": "default 200",
	} {
		if got := read(t, filepath.Join(group, file)); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	for _, d := range []string{"", "muster", "muster/guard-x"} {
		if got := read(t, filepath.Join(h.Root2, d, "cgroup.subtree_control")); !strings.Contains(got, "+io") {
			t.Errorf("%q: controllers %q", d, got) // files keep the last word only
		}
	}
	if missing, err = h.Apply("vm-a", 7, api.VMLimits{}); err != nil || len(missing) > 0 {
		t.Fatal(missing, err)
	}
	for file, want := range map[string]string{"cpu.weight": "100", "cpu.max": "max 100000", "cpuset.cpus": "0-7", "memory.max": "max", "io.weight": "default 100"} {
		if got := read(t, filepath.Join(group, file)); got != want {
			t.Errorf("taken back, %s is %q, want %q", file, got, want)
		}
	}
}

func TestVersion2WithBFQ(t *testing.T) {
	h, group := tree(t, "io", "io.bfq.weight")
	missing, err := h.Apply("vm-a", 7, api.VMLimits{IOWeight: 5000})
	if got := read(t, filepath.Join(group, "io.bfq.weight")); err != nil || len(missing) > 0 || got != "1000" {
		t.Fatal(missing, err, got)
	}
}

func TestWhatTheKernelLacksIsNamed(t *testing.T) {
	h, _ := tree(t, "cpu io", "cpu.weight", "cpu.max")
	missing, err := h.Apply("vm-a", 7, full)
	must(t, err)
	got := fmt.Sprint(missing)
	want := "[{cpuSet the kernel of this host has no controller cpuset for control groups} " +
		"{memoryMax the kernel of this host has no controller memory for control groups} {ioWeight the kernel of this host has no io.bfq.weight}]"
	if got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	if missing, err = h.Apply("vm-a", 7, api.VMLimits{CPUWeight: 7}); err != nil || len(missing) > 0 {
		t.Fatal("what nobody wants is not missed:", missing, err)
	}
	if _, err := h.Apply("vm-a", 8, full); err == nil {
		t.Fatal("no error for a process that is gone")
	}
}

// This host's own control groups, with a process that counts what it gets.
func TestRealVersion1(t *testing.T) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	h := Find(string(mounts))
	if h.Root1 == "" {
		// A host of cgroup v2 alone: the same test, with its files.
		t.Fatal("this test needs the hierarchies of cgroup v1; on a host without them run go test -run Version2")
	}
	cmd := exec.Command("sh", "-c", "while :; do :; done")
	must(t, cmd.Start())
	vm := "test-" + strconv.Itoa(cmd.Process.Pid)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := h.Release(vm); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(h.path1("cpu", vm)); !os.IsNotExist(err) {
			t.Error("the group is still there:", err)
		}
	})
	missing, err := h.Apply(vm, cmd.Process.Pid, api.VMLimits{CPUWeight: 50, CPUMax: 20, CPUSet: "0", MemoryMax: 256 * api.MiB})
	if err != nil || len(missing) > 0 {
		t.Fatal(missing, err)
	}
	for _, f := range []struct{ controller, file, want string }{
		{"cpu", "cpu.shares", "512"}, {"cpu", "cpu.cfs_quota_us", "20000"}, {"cpuset", "cpuset.cpus", "0"}, {"memory", "memory.limit_in_bytes", "268435456"},
	} {
		if got := read(t, filepath.Join(h.path1(f.controller, vm), f.file)); got != f.want {
			t.Errorf("%s is %q, want %q", f.file, got, f.want)
		}
		if got := read(t, filepath.Join(h.path1(f.controller, vm), "cgroup.procs")); got != strconv.Itoa(cmd.Process.Pid) {
			t.Errorf("%s holds %q", f.controller, got)
		}
	}
	if got := read(t, fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)); !strings.Contains(got, "Cpus_allowed_list:\t0\n") {
		t.Error("it may run on other CPUs")
	}
	throttled := func() int {
		for line := range strings.Lines(read(t, filepath.Join(h.path1("cpu", vm), "cpu.stat")) + "\n") {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "nr_throttled "); ok {
				v, _ := strconv.Atoi(n)
				return v
			}
		}
		return -1
	}
	for end := time.Now().Add(20 * time.Second); throttled() < 3; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a process that wants a whole CPU was not held back:", throttled())
		}
	}

	// A change while it runs, then nothing.
	if missing, err := h.Apply(vm, cmd.Process.Pid, api.VMLimits{CPUMax: 50}); err != nil || len(missing) > 0 {
		t.Fatal(missing, err)
	}
	if got := read(t, filepath.Join(h.path1("cpu", vm), "cpu.cfs_quota_us")); got != "50000" {
		t.Errorf("quota %s", got)
	}
	if missing, err := h.Apply(vm, cmd.Process.Pid, api.VMLimits{}); err != nil || len(missing) > 0 {
		t.Fatal(missing, err)
	}
	if got := read(t, filepath.Join(h.path1("cpu", vm), "cpu.cfs_quota_us")); got != "-1" {
		t.Errorf("quota %s", got)
	}
	if got := read(t, filepath.Join(h.path1("cpuset", vm), "cpuset.cpus")); got != h.allCPUs() {
		t.Errorf("cpus %s", got)
	}
}
