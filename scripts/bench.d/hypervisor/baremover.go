// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// bareMover is one QEMU of the pair that is driven by hand.
type bareMover struct {
	dir string
	cmd *exec.Cmd
	qmp *monitor
}

// monitor speaks QMP, one command at a time; events are passed over.
type monitor struct {
	conn net.Conn
	r    *bufio.Reader
}

func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	m := &monitor{}
	if err := until(ctx, ready, "QEMU opens its monitor", func() (ok bool) {
		var err error
		m.conn, err = net.Dial("unix", socket)
		return err == nil
	}); err != nil {
		return nil, err
	}
	m.r = bufio.NewReader(m.conn)
	if _, err := m.r.ReadBytes('\n'); err != nil {
		return nil, errors.Join(err, m.conn.Close())
	}
	return m, m.do("qmp_capabilities", nil, nil)
}

// do has a command done; into may be nil.
func (m *monitor) do(cmd string, args, into any) error {
	if args == nil {
		args = struct{}{}
	}
	line, err := json.Marshal(map[string]any{"execute": cmd, "arguments": args})
	if err != nil {
		return err
	}
	if _, err := m.conn.Write(append(line, '\n')); err != nil {
		return err
	}
	for {
		line, err := m.r.ReadBytes('\n')
		if err != nil {
			return err
		}
		var reply struct {
			Event  string          `json:"event"`
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(line, &reply); err != nil {
			return err
		}
		switch {
		case reply.Event != "":
			continue
		case reply.Error != nil:
			return fmt.Errorf("QEMU refuses %s: %s", cmd, reply.Error.Desc)
		case into == nil:
			return nil
		}
		return json.Unmarshal(reply.Return, into)
	}
}

// startBare starts a QEMU with the arguments of the VM and more.
func (m *movers) startBare(ctx context.Context, more ...string) (*bareMover, error) {
	m.n++
	b := &bareMover{dir: filepath.Join(m.dir, fmt.Sprint(m.n))}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	args := append(m.argv.moved(b.dir, m.argv.disk+".bare"), more...)
	b.cmd = exec.Command(args[0], args[1:]...)
	b.cmd.Dir = b.dir
	if err := b.cmd.Start(); err != nil {
		return nil, err
	}
	var err error
	if b.qmp, err = dialMonitor(ctx, filepath.Join(b.dir, "qmp")); err != nil {
		return nil, errors.Join(err, b.end())
	}
	return b, nil
}

// begin lets a guest that was started without -S run, or that with it.
func (b *bareMover) begin(context.Context) error { return b.qmp.do("cont", nil, nil) }

func (b *bareMover) log() string { return filepath.Join(b.dir, "log") }

// shell types a command at the guest's console and waits until it has said a line.
// Only then it hangs up: QEMU forgets what it has not read when that happens.
func (b *bareMover) shell(command, said string) error {
	c, err := net.Dial("unix", filepath.Join(b.dir, "serial"))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(step)); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	await := func(what string, ok func(line string) bool) error {
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return fmt.Errorf("wait for %s: %w", what, err)
			}
			if ok(strings.TrimSpace(line)) {
				return nil
			}
		}
	}
	if _, err := fmt.Fprint(c, "\n"); err != nil { // asks for the shell
		return err
	}
	if err := await("the shell of the guest", func(line string) bool { return strings.HasSuffix(line, shellPrompt) }); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "%s\n", command); err != nil {
		return err
	}
	return await(said, func(line string) bool { return line == said })
}

// shellPrompt is what the guest's shell says before each command.
const shellPrompt = "muster-guest shell (exit to leave)"

func (b *bareMover) end() error {
	if b.qmp != nil {
		_ = b.qmp.conn.Close()
	}
	err := b.cmd.Process.Kill()
	_ = b.cmd.Wait() // it was killed
	return errors.Join(err, os.RemoveAll(b.dir))
}

// prepare sets the capabilities that Muster sets, and its limits.
func (b *bareMover) prepare(channels int, capabilities ...string) error {
	if channels > 1 {
		capabilities = append(capabilities, "multifd")
	}
	var list []map[string]any
	for _, c := range []string{"auto-converge", "events", "pause-before-switchover", "late-block-activate", "multifd"} {
		on := false
		for _, want := range capabilities {
			on = on || c == want
		}
		list = append(list, map[string]any{"capability": c, "state": on})
	}
	if err := b.qmp.do("migrate-set-capabilities", map[string]any{"capabilities": list}, nil); err != nil {
		return err
	}
	const unbounded, downtime = 16 << 30, 300 // as Muster, unless told otherwise
	return b.qmp.do("migrate-set-parameters", map[string]any{"max-bandwidth": unbounded, "downtime-limit": downtime, "multifd-channels": max(channels, 2)}, nil)
}

// awaitMigration asks until QEMU is at a state and returns its time, which only the
// source says, a moment later.
func (b *bareMover) awaitMigration(ctx context.Context, want string, timed bool) (time.Duration, error) {
	var info struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
		Total  int64  `json:"total-time"`
	}
	var failed error
	err := until(ctx, step, "the migration is "+want, func() bool {
		failed = b.qmp.do("query-migrate", nil, &info)
		if failed == nil && info.Status == "failed" {
			failed = errors.New(info.Error)
		}
		return failed != nil || info.Status == want && (!timed || info.Total > 0)
	})
	return time.Duration(info.Total) * time.Millisecond, errors.Join(err, failed)
}

// moveBare does by hand what a migration is: another QEMU that waits, the memory,
// the word to switch over, the word to run there, the end of the first one.
func (m *movers) moveBare(ctx context.Context, channels int) (moved, error) {
	from := m.at
	next := filepath.Join(m.dir, fmt.Sprint(m.n+1), "log")
	logs := func() []string { return []string{from.log(), next} }
	return heard(logs, func() (took time.Duration, err error) {
		to, err := m.startBare(ctx, "-S", "-incoming", "defer")
		if err != nil {
			return 0, err
		}
		uri := map[string]any{"uri": "unix:" + filepath.Join(to.dir, "in")}
		steps := []func() error{
			func() error { return to.prepare(channels, "events", "late-block-activate") },
			func() error { return to.qmp.do("migrate-incoming", uri, nil) },
			func() error { return from.prepare(channels, "auto-converge", "events", "pause-before-switchover") },
			func() error { return from.qmp.do("migrate", uri, nil) },
			func() error { _, err := from.awaitMigration(ctx, "pre-switchover", false); return err },
			func() error {
				return from.qmp.do("migrate-continue", map[string]any{"state": "pre-switchover"}, nil)
			},
			func() error { took, err = from.awaitMigration(ctx, "completed", true); return err },
			func() error { _, err := to.awaitMigration(ctx, "completed", false); return err },
			func() error { return to.qmp.do("cont", nil, nil) },
		}
		for _, s := range steps {
			if err := s(); err != nil {
				return 0, errors.Join(err, to.end())
			}
		}
		m.at = to
		return took, from.end()
	})
}
