// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// leftoverPoll is the pause between two looks at killed leftovers, openPoll that
	// between looks at processes that have not said whose they are.
	leftoverPoll = 20 * time.Millisecond
	openPoll     = 200 * time.Millisecond
	// leastLooks are taken, however long this process stands still in them.
	leastLooks = 5
	// environWait bounds in a look the reading of /proc/PID/environ, which hangs when a
	// process is stuck in the kernel with its memory map locked; environLeast is for each.
	environWait  = time.Second
	environLeast = 10 * time.Millisecond
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
	open     map[int]question // by pid: those that have not been answered
}

// question is a reading of an environ, and whose it is.
type question struct {
	answer     chan []byte
	startTicks uint64
}

func newSweeper(guardDir string) *sweeper {
	return &sweeper{guardDir: guardDir, read: os.ReadFile, open: map[int]question{}}
}

// ask reads the environ of a process, which it may never show.
func (s *sweeper) ask(pid int, startTicks uint64) question {
	q := question{make(chan []byte, 1), startTicks}
	go func() {
		env, err := s.read(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			env = nil // gone, or not ours to read
		}
		q.answer <- env
	}()
	return q
}

// find looks for processes whose environment names the run directory and for
// members of the cgroups of an earlier guard. It waits for environWait in all, and hardly
// for each more that does not answer: an answer counts in whatever look it comes.
func (s *sweeper) find(tick func()) []leftover {
	found := make(map[int]leftover)
	procs, _ := filepath.Glob("/proc/[0-9]*")
	s.forget()
	end := time.Now().Add(environWait)
	for _, dir := range procs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		st, err := readProcStat(pid)
		if err != nil {
			continue
		}
		q, asked := s.open[pid]
		var wait time.Duration
		if !asked {
			q, wait = s.ask(pid, st.startTicks), max(time.Until(end), environLeast)
		}
		if l, answered := s.answered(pid, q, wait); !answered {
			tick()
		} else if l != nil {
			found[pid] = *l
		}
	}
	if s.tree != nil {
		for _, vm := range s.tree.leftovers() {
			for _, pid := range s.tree.pids(vm) {
				if st, err := readProcStat(pid); err == nil {
					found[pid] = leftover{vm: vm, pid: pid, startTicks: st.startTicks}
				}
			}
		}
	}
	ls := make([]leftover, 0, len(found))
	for pid, l := range found {
		if pid != os.Getpid() && !l.gone() {
			ls = append(ls, l)
		}
	}
	return ls
}

// answered takes the answer to a question, if it comes in time: what is left of an
// earlier guard, or nil. Else the question stays open.
func (s *sweeper) answered(pid int, q question, wait time.Duration) (l *leftover, ok bool) {
	var env []byte
	select {
	case env = <-q.answer:
	case <-time.After(wait):
		select { // both may be so when this process has stood still
		case env = <-q.answer:
		default:
			s.open[pid] = q
			return nil, false
		}
	}
	delete(s.open, pid)
	if vm, ok := parseEnviron(env, s.guardDir); ok {
		return &leftover{vm: vm, pid: pid, startTicks: q.startTicks}, true
	}
	return nil, true
}

// late returns what was left by answers that came since the last look.
func (s *sweeper) late() (ls []leftover) {
	for pid, q := range s.open {
		if l, _ := s.answered(pid, q, 0); l != nil {
			ls = append(ls, *l)
		}
	}
	s.forget()
	return ls
}

// forget drops the questions to processes that have ended; others may have their numbers.
func (s *sweeper) forget() {
	maps.DeleteFunc(s.open, func(pid int, q question) bool { return leftover{pid: pid, startTicks: q.startTicks}.gone() })
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
	for looks := 1; ; looks++ {
		// Look anew each time: a leftover may have forked.
		ls := s.find(tick)
		if len(ls) == 0 && len(s.open) == 0 {
			break
		}
		for _, l := range ls {
			l.kill()
		}
		if time.Now().After(end) && (looks >= leastLooks || wait <= 0) {
			if len(ls) == 0 {
				break
			}
			return ls
		}
		tick()
		if len(ls) == 0 {
			time.Sleep(openPoll)
		} else {
			time.Sleep(leftoverPoll)
		}
	}
	if s.tree != nil {
		for _, vm := range s.tree.leftovers() {
			_ = clearCgroup(filepath.Join(s.tree.base, vm), 0)
		}
	}
	return nil
}
