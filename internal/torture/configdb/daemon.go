// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// restartPause is how long a daemon that ended by itself stays down, as a
// service manager has it.
const restartPause = time.Second

// exit is the end of a daemon that nobody asked for.
type exit struct {
	At   time.Duration
	Node string
	Why  string
	// Full: its disk was full, or had been a moment ago.
	Full bool
}

// daemon is one musterd, started again whenever it ends and should not.
type daemon struct {
	index   int
	name    string
	program []string // with its arguments
	logPath string
	now     func() time.Duration
	onExit  func(exit)

	life atomic.Int64 // starts so far

	mu      sync.Mutex
	cmd     *exec.Cmd // nil when it is down
	wanted  bool
	full    bool
	fullEnd time.Duration
	down    chan struct{} // closed when cmd has ended
	wg      sync.WaitGroup
}

// start brings the daemon up and keeps it so.
func (d *daemon) start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wanted = true
	return d.launch()
}

func (d *daemon) launch() error {
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
	// Not with this program's signals: the campaign ends its daemons itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	fmt.Fprintf(log, "--- start %d at %.3f s\n", d.life.Load()+1, d.now().Seconds())
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", d.name, err)
	}
	d.life.Add(1)
	down := make(chan struct{})
	d.cmd, d.down = cmd, down
	d.wg.Go(func() { d.attend(cmd, down) })
	return nil
}

// attend waits for the end of one start.
func (d *daemon) attend(cmd *exec.Cmd, down chan struct{}) {
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
	d.onExit(exit{At: d.now(), Node: d.name, Why: fmt.Sprint(err), Full: full})
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

// kill ends the daemon at once and keeps it down.
func (d *daemon) kill() error {
	d.mu.Lock()
	d.wanted = false
	cmd, down := d.cmd, d.down
	d.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", d.name, err)
	}
	<-down
	return nil
}

// signal is for SIGSTOP and SIGCONT.
func (d *daemon) signal(s syscall.Signal) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s to %s: %w", s, d.name, err)
	}
	return nil
}

// setFull notes whether the disk is full.
func (d *daemon) setFull(full bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = full
	if !full {
		d.fullEnd = d.now()
	}
}

// end kills the daemon and waits for all that attends it.
func (d *daemon) end() {
	_ = d.signal(syscall.SIGCONT)
	_ = d.kill()
	d.wg.Wait()
}

func (c *campaign) newDaemon(i int) *daemon {
	h := c.hosts
	args := inHost(h.namespace(i), filepath.Join(c.bin, "musterd"), "--data-dir", h.data(i), "--listen", h.listen(i),
		"--node-name", h.name(i), "--run-dir", filepath.Join(c.runDir, h.name(i)))
	return &daemon{
		index: i, name: h.name(i), program: append([]string{"ip"}, args...), now: c.rec.Now,
		logPath: filepath.Join(c.work, "log", h.name(i)+".log"), onExit: c.noteExit,
	}
}
