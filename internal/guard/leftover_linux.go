// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// leftoverPoll is the pause between two looks at killed leftovers.
	leftoverPoll = 20 * time.Millisecond
	// environWait bounds the reading of one /proc/PID/environ, which hangs when
	// a process is stuck in the kernel with its memory map locked.
	environWait = time.Second
)

// leftover is a process of an earlier guard of this run directory. It is not
// our child, so its pid is good only together with its start time.
type leftover struct {
	vm         string
	pid        int
	startTicks uint64
}

// gone tells whether the process has ended, by its state and start time.
func (l leftover) gone() bool {
	st, err := readProcStat(l.pid)
	return err != nil && os.IsNotExist(err) || err == nil && (st.startTicks != l.startTicks || st.gone())
}

// kill sends SIGKILL. The pidfd pins the process between the look and the kill.
func (l leftover) kill() {
	fd, err := unix.PidfdOpen(l.pid, 0)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(fd) }()
	if !l.gone() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// sweeper finds and kills what an earlier guard of the run directory left.
type sweeper struct {
	guardDir string
	tree     *cgroupTree // may be nil
	read     func(name string) ([]byte, error)
	open     map[int]question // by pid
}

// question is a reading of an environ that has not ended in environWait.
type question struct {
	answer     chan []byte
	startTicks uint64 // whose it is
}

// environ reads the environment of a process. It waits for environWait once: a process
// may be stuck, and its cgroup may still tell whose it is. But this process may also
// have stood still, so that an answer counts whenever it comes.
func (s *sweeper) environ(dir string, pid int) []byte {
	q, asked := s.open[pid]
	if !asked {
		q.answer = make(chan []byte, 1)
		go func() {
			env, err := s.read(filepath.Join(dir, "environ"))
			if err != nil {
				env = nil // gone, or not ours to read
			}
			q.answer <- env
		}()
		select {
		case env := <-q.answer:
			return env
		case <-time.After(environWait):
		}
	}
	st, err := readProcStat(pid)
	if same := err == nil && (!asked || st.startTicks == q.startTicks); !same {
		delete(s.open, pid)
		return nil // it ended; another one of its number is asked by the next look
	}
	select {
	case env := <-q.answer:
		delete(s.open, pid)
		return env
	default:
		q.startTicks = st.startTicks
		s.open[pid] = q
		return nil
	}
}

func newSweeper(guardDir string, tree *cgroupTree) *sweeper {
	return &sweeper{guardDir: guardDir, tree: tree, read: os.ReadFile, open: map[int]question{}}
}

// find looks for processes whose environment names the run directory and for
// members of the cgroups of an earlier guard.
func (s *sweeper) find() []leftover {
	found := make(map[int]leftover)
	add := func(pid int, vm string) {
		st, err := readProcStat(pid)
		if pid == os.Getpid() || err != nil || st.gone() {
			return
		}
		found[pid] = leftover{vm: vm, pid: pid, startTicks: st.startTicks}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	maps.DeleteFunc(s.open, func(pid int, _ question) bool { return !slices.Contains(procs, fmt.Sprint("/proc/", pid)) })
	for _, dir := range procs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if vm, ok := parseEnviron(s.environ(dir, pid), s.guardDir); ok {
			add(pid, vm)
		}
	}
	if s.tree != nil {
		for _, vm := range s.tree.leftovers() {
			for _, pid := range s.tree.pids(vm) {
				add(pid, vm)
			}
		}
	}
	ls := make([]leftover, 0, len(found))
	for _, l := range found {
		ls = append(ls, l)
	}
	return ls
}

// parseEnviron tells whether an environ block names guardDir, and which VM. An
// id that is missing or malformed is returned as "".
func parseEnviron(env []byte, guardDir string) (vm string, ok bool) {
	for kv := range bytes.SplitSeq(env, []byte{0}) {
		name, value, _ := bytes.Cut(kv, []byte{'='})
		switch string(name) {
		case EnvGuardDir:
			ok = string(value) == guardDir
		case EnvVM:
			vm = string(value)
		}
	}
	if checkVM(vm) != nil {
		vm = ""
	}
	return vm, ok
}

// sweep kills what is found until nothing is and all processes have said whose they are,
// or wait has passed, and returns those that would not go. It calls tick (petting) all
// the while.
func (s *sweeper) sweep(wait time.Duration, tick func()) []leftover {
	end := time.Now().Add(wait)
	for {
		// Look anew each time: a leftover may have forked.
		ls := s.find()
		if len(ls) == 0 && len(s.open) == 0 {
			break
		}
		for _, l := range ls {
			l.kill()
		}
		if time.Now().After(end) {
			if len(ls) == 0 {
				break
			}
			return ls
		}
		tick()
		time.Sleep(leftoverPoll)
	}
	if s.tree != nil {
		for _, vm := range s.tree.leftovers() {
			_ = clearCgroup(filepath.Join(s.tree.base, vm), 0)
		}
	}
	return nil
}
