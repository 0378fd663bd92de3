// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// cgroupEmptyWait is how long a start waits for what an earlier life of the
	// VM left in its cgroup.
	cgroupEmptyWait = time.Second
	// cgroupPoll is the pause between two attempts to remove a cgroup.
	cgroupPoll = 10 * time.Millisecond
	// janitorQueue bounds the waiting cgroup jobs. Kills are repeated by the
	// enforcer; a lost removal is made good at the next start of the VM.
	janitorQueue = 4 * MaxRunning
	// janitorCloseWait bounds the wait for the last removals.
	janitorCloseWait = 3 * time.Second
)

// errCgroupBusy means that processes of an earlier life do not go away.
var errCgroupBusy = errors.New("cgroup of an earlier life is not empty")

// cgroupTree is <mount>/muster/<guard key>/, which has one child per VM. The key
// keeps two guards on one host apart. No controllers are enabled in it.
type cgroupTree struct {
	base string
	mu   sync.Mutex // create against remove
	cur  map[string]*cgroup
}

type cgroup struct {
	vm   string
	path string
	dir  *os.File // tells this instance from a later one of the same path
	// removed belongs to the janitor: jobs behind a removal find a closed dir.
	removed bool
}

// findCgroupMount returns the mount point of cgroup v2, from the text of
// /proc/self/mountinfo (proc_pid_mountinfo(5)), or "".
func findCgroupMount(mountinfo string) string {
	for line := range strings.Lines(mountinfo) {
		pre, post, ok := strings.Cut(line, " - ")
		if !ok || !strings.HasPrefix(post, "cgroup2 ") {
			continue
		}
		if f := strings.Fields(pre); len(f) >= 5 {
			return f[4]
		}
	}
	return ""
}

// openCgroupTree makes the base below mount. An error means: run without.
func openCgroupTree(mount, guardDir string) (*cgroupTree, error) {
	if mount == "" {
		return nil, errors.New("cgroup v2 is not mounted")
	}
	sum := sha256.Sum256([]byte(guardDir))
	base := filepath.Join(mount, "muster", "guard-"+hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Access(filepath.Join(base, "cgroup.procs"), unix.W_OK); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", base, err)
	}
	return &cgroupTree{base: base, cur: make(map[string]*cgroup)}, nil
}

// create makes the cgroup of one start. What an earlier life left is removed.
func (t *cgroupTree) create(vm string) (*cgroup, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	path := filepath.Join(t.base, vm)
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, os.ErrExist) {
		if err := clearCgroup(path, cgroupEmptyWait); err != nil {
			return nil, fmt.Errorf("%w: %w", errCgroupBusy, err)
		}
		err = os.Mkdir(path, 0o755)
	}
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		_ = os.Remove(path)
		return nil, err
	}
	cg := &cgroup{vm: vm, path: path, dir: dir}
	t.cur[vm] = cg
	return cg, nil
}

// remove kills what is left in cg and removes it, unless a later start has
// taken its place.
func (t *cgroupTree) remove(cg *cgroup) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cur[cg.vm] == cg {
		delete(t.cur, cg.vm)
		_ = clearCgroup(cg.path, cgroupEmptyWait)
	}
	_ = cg.dir.Close()
}

// close removes the empty base directories; other guards' ones stay.
func (t *cgroupTree) close() {
	_ = os.Remove(t.base)
	_ = os.Remove(filepath.Dir(t.base))
}

// leftovers returns the VM ids that have a cgroup from an earlier guard.
func (t *cgroupTree) leftovers() []string {
	entries, err := os.ReadDir(t.base)
	if err != nil {
		return nil
	}
	var vms []string
	for _, e := range entries {
		if e.IsDir() {
			vms = append(vms, e.Name())
		}
	}
	return vms
}

// pids returns the processes in the cgroup of vm.
func (t *cgroupTree) pids(vm string) []int {
	data, err := os.ReadFile(filepath.Join(t.base, vm, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for f := range strings.FieldsSeq(string(data)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// clearCgroup kills everything in path and removes it, trying for wait.
func clearCgroup(path string, wait time.Duration) error {
	for end := time.Now().Add(wait); ; time.Sleep(cgroupPoll) {
		err := os.Remove(path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if time.Now().After(end) {
			return err
		}
		_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
	}
}

// kill kills everything in this very cgroup; if it was removed, nothing.
func (cg *cgroup) kill() {
	fd, err := unix.Openat(int(cg.dir.Fd()), "cgroup.kill", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = unix.Write(fd, []byte("1"))
	_ = unix.Close(fd)
}

// janitor does the cgroup work that may block in the kernel, away from the
// enforcer.
type janitor struct {
	tree *cgroupTree
	jobs chan janitorJob
	done chan struct{}
	mu   sync.Mutex
	shut bool
}

type janitorJob struct {
	cg     *cgroup
	remove bool
}

func newJanitor(tree *cgroupTree) *janitor {
	j := &janitor{tree: tree, jobs: make(chan janitorJob, janitorQueue), done: make(chan struct{})}
	go j.run()
	return j
}

func (j *janitor) run() {
	defer close(j.done)
	for job := range j.jobs {
		switch {
		case job.cg.removed:
		case job.remove:
			j.tree.remove(job.cg)
			job.cg.removed = true
		default:
			job.cg.kill()
		}
	}
}

func (j *janitor) kill(cg *cgroup)   { j.post(janitorJob{cg: cg}) }
func (j *janitor) remove(cg *cgroup) { j.post(janitorJob{cg: cg, remove: true}) }

func (j *janitor) post(job janitorJob) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.shut {
		return
	}
	select {
	case j.jobs <- job:
	default:
	}
}

// close works off the queue, for janitorCloseWait at most, and removes the tree.
func (j *janitor) close() {
	j.mu.Lock()
	if j.shut {
		j.mu.Unlock()
		return
	}
	j.shut = true
	close(j.jobs)
	j.mu.Unlock()
	select {
	case <-j.done:
	case <-time.After(janitorCloseWait):
		return
	}
	if j.tree != nil {
		j.tree.close()
	}
}
