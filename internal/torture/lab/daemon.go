// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// restartPause is how long a daemon that ended by itself stays down, as a
// service manager has it.
const restartPause = time.Second

// Exit is the end of a daemon that nobody asked for.
type Exit struct {
	At   time.Duration
	Node string
	Why  string
	// Full: its disk was full, or had been a moment ago.
	Full bool
}

// Daemon is one musterd, started again whenever it ends and should not.
type Daemon struct {
	Name string
	// Env is what its environment has beside the campaign's own; set before Start.
	Env     []string
	program []string // with its arguments
	logPath string
	now     func() time.Duration
	onExit  func(Exit)

	life atomic.Int64 // starts so far

	mu      sync.Mutex
	cmd     *exec.Cmd // nil when it is down
	wanted  bool
	full    bool
	fullEnd time.Duration
	down    chan struct{} // closed when cmd has ended
	wg      sync.WaitGroup
}

// Start brings the daemon up and keeps it so.
func (d *Daemon) Start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wanted = true
	return d.launch()
}

func (d *Daemon) launch() error {
	if d.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(d.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(d.program[0], d.program[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), d.Env...)
	// Not with this program's signals: the campaign ends its daemons itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	fmt.Fprintf(log, "--- start %d at %.3f s\n", d.life.Load()+1, d.now().Seconds())
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", d.Name, err)
	}
	d.life.Add(1)
	down := make(chan struct{})
	d.cmd, d.down = cmd, down
	d.wg.Go(func() { d.attend(cmd, down) })
	return nil
}

// attend waits for the end of one start.
func (d *Daemon) attend(cmd *exec.Cmd, down chan struct{}) {
	err := cmd.Wait()
	d.mu.Lock()
	d.cmd = nil
	close(down)
	again := d.wanted
	full := d.full || d.fullEnd > 0 && d.now()-d.fullEnd < 30*time.Second
	d.mu.Unlock()
	if !again {
		return
	}
	d.onExit(Exit{At: d.now(), Node: d.Name, Why: fmt.Sprint(err), Full: full})
	for {
		time.Sleep(restartPause)
		d.mu.Lock()
		if !d.wanted {
			d.mu.Unlock()
			return
		}
		err := d.launch()
		d.mu.Unlock()
		if err == nil {
			return
		}
	}
}

// Kill ends the daemon at once and keeps it down.
func (d *Daemon) Kill() error {
	d.mu.Lock()
	d.wanted = false
	cmd, down := d.cmd, d.down
	d.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", d.Name, err)
	}
	<-down
	return nil
}

// Signal is for SIGSTOP and SIGCONT.
func (d *Daemon) Signal(s syscall.Signal) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s to %s: %w", s, d.Name, err)
	}
	return nil
}

// SetFull notes whether the disk is full.
func (d *Daemon) SetFull(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = full
	if !full {
		d.fullEnd = d.now()
	}
}

// End kills the daemon and waits for all that attends it.
func (d *Daemon) End() {
	_ = d.Signal(syscall.SIGCONT)
	_ = d.Kill()
	d.wg.Wait()
}

// KeepToOneself sees to it that what this program inherited beyond the standard
// files, such as a lock, does not go on to daemons that may outlive it.
func KeepToOneself() {
	open, _ := os.ReadDir("/proc/self/fd") // without it there is nothing to do
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

// NewDaemon describes the daemon of a host, in the program file bin/musterd, with
// further arguments.
func (h *Hosts) NewDaemon(i int, bin, runDir, logPath string, now func() time.Duration, onExit func(Exit), further ...string) *Daemon {
	args := InHost(h.Namespace(i), filepath.Join(bin, "musterd"), "--data-dir", h.Data(i), "--listen", h.Listen(i),
		"--node-name", h.Name(i), "--run-dir", runDir)
	return &Daemon{
		Name: h.Name(i), program: append(append([]string{"ip"}, args...), further...), now: now, logPath: logPath, onExit: onExit,
	}
}

// Life counts the starts so far.
func (d *Daemon) Life() int64 { return d.life.Load() }

// Down reports that the daemon was killed and is not to be started.
func (d *Daemon) Down() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.wanted
}
