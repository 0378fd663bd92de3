// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Host is this machine, on which all servers run.
type Host struct {
	// Programs is the folder of the servers' programs, Data that of their data
	// and logs.
	Programs, Data string

	mu   sync.Mutex
	list string // on disk, of what servers started and the kernel would leave
}

// NewHost makes this process the parent of what its servers leave behind, keeps
// its open files to itself, and ends what an earlier run left.
func NewHost(programs, data string) (*Host, error) {
	const setChildSubreaper = 36 // PR_SET_CHILD_SUBREAPER, prctl(2)
	if _, _, e := syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0); e != 0 {
		return nil, fmt.Errorf("become the parent of orphans: %w", e)
	}
	if err := keepFiles(); err != nil {
		return nil, err
	}
	h := &Host{Programs: programs, Data: data, list: filepath.Join(data, "processes")}
	if err := os.MkdirAll(data, 0o700); err != nil {
		return nil, fmt.Errorf("folder of the data: %w", err)
	}
	b, err := os.ReadFile(h.list)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list of leftovers: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		var i ident
		if _, err := fmt.Sscan(line, &i.pid, &i.started); err != nil {
			return nil, fmt.Errorf("list of leftovers %s: line %q: %w", h.list, line, err)
		}
		if err := i.end(); err != nil {
			return nil, err
		}
	}
	return h, os.WriteFile(h.list, nil, 0o600)
}

// keepFiles sees to it that the servers inherit no open file of this process,
// such as the lock of the script that called it, which a server could hold on to.
func keepFiles() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list of open files: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	return nil
}

// Fresh returns an empty folder for a cluster.
func (h *Host) Fresh(name string) (string, error) {
	dir := filepath.Join(h.Data, name)
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("old data of %s: %w", name, err)
	}
	return dir, os.MkdirAll(dir, 0o700)
}

// record notes a process for the next run.
func (h *Host) record(i ident) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	f, err := os.OpenFile(h.list, os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, i.pid, i.started)
	return errors.Join(err, f.Close())
}
