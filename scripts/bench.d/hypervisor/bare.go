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

// direct starts QEMU by itself, with the arguments that Muster gave its own.
type direct struct {
	dir     string
	running map[string]*exec.Cmd
	// argv by kind of VM, with the run directory and disk of the original.
	argv map[string]original
}

type original struct {
	args []string
	dir  string
	disk string
}

func beginBare(ctx context.Context, o *ours) (*direct, error) {
	dir, err := os.MkdirTemp("/run", "bq")
	if err != nil {
		return nil, err
	}
	d := &direct{dir: dir, running: map[string]*exec.Cmd{}, argv: map[string]original{}}
	for kind, create := range kinds {
		name := "pattern-" + kind
		if _, err := o.command(ctx, append([]string{"vm", "create", name, "--start"}, create...)...); err != nil {
			return d, err
		}
		args, vmDir, err := o.arguments(ctx, name)
		if err != nil {
			return d, err
		}
		or := original{args: args, dir: vmDir}
		for _, a := range args {
			if _, rest, ok := strings.Cut(a, "filename="+o.data); ok {
				file, _, _ := strings.Cut(rest, ",")
				or.disk = o.data + file
			}
		}
		if or.disk == "" {
			return d, fmt.Errorf("no disk in %q", args)
		}
		if err := o.stop(ctx, name); err != nil {
			return d, err
		}
		// A copy beside the original: its backing file has a relative name.
		disk := or.disk + ".bare"
		if out, err := exec.Command("cp", or.disk, disk).CombinedOutput(); err != nil {
			return d, fmt.Errorf("copy the disk: %w: %s", err, out)
		}
		d.argv[kind] = or
	}
	return d, nil
}

// kinds of VMs: one whose firmware finds no system, one with a guest.
var kinds = map[string][]string{
	stub:  {"--memory", "64M", "--disk", "64M"},
	guest: {"--memory", "96M", "--image", "guest"},
}

const (
	stub  = "stub"
	guest = "guest"
)

// start runs the QEMU of a kind and returns when it says that it runs.
func (d *direct) start(ctx context.Context, kind, name string) error {
	dir := filepath.Join(d.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	or := d.argv[kind]
	cmd := d.command(or, name, dir, or.disk+".bare")
	if err := cmd.Start(); err != nil {
		return err
	}
	return awaitRunning(ctx, filepath.Join(dir, "qmp"))
}

// lay makes the folder and the disk of one of many VMs of the kind stub.
func (d *direct) lay(name string) error {
	dir := filepath.Join(d.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if out, err := exec.Command("cp", d.argv[stub].disk, filepath.Join(dir, "disk")).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the disk: %w: %s", err, out)
	}
	return nil
}

// prepare returns the command of such a VM, and what waits until it runs.
func (d *direct) prepare(name string) (*exec.Cmd, func(context.Context) error, error) {
	dir := filepath.Join(d.dir, name)
	if _, err := os.Stat(filepath.Join(dir, "disk")); err != nil {
		return nil, nil, err
	}
	cmd := d.command(d.argv[stub], name, dir, filepath.Join(dir, "disk"))
	return cmd, func(ctx context.Context) error { return awaitRunning(ctx, filepath.Join(dir, "qmp")) }, nil
}

func (d *direct) command(or original, name, dir, disk string) *exec.Cmd {
	args := make([]string, len(or.args))
	for i, a := range or.args {
		args[i] = strings.ReplaceAll(strings.ReplaceAll(a, or.dir, dir), or.disk, disk)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	d.running[name] = cmd
	return cmd
}

// awaitRunning talks QMP until query-status says running.
func awaitRunning(ctx context.Context, socket string) error {
	var conn net.Conn
	if err := until(ctx, ready, "QEMU opens its monitor", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", socket)
		return err == nil
	}); err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	r := bufio.NewReader(conn)
	if _, err := r.ReadBytes('\n'); err != nil {
		return err
	}
	ask := func(cmd string) (string, error) {
		if _, err := fmt.Fprintf(conn, "{\"execute\":%q}\n", cmd); err != nil {
			return "", err
		}
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return "", err
			}
			var reply struct {
				Event  string `json:"event"`
				Return struct {
					Status string `json:"status"`
				} `json:"return"`
			}
			if err := json.Unmarshal(line, &reply); err != nil {
				return "", err
			}
			if reply.Event == "" {
				return reply.Return.Status, nil
			}
		}
	}
	if _, err := ask("qmp_capabilities"); err != nil {
		return err
	}
	for {
		state, err := ask("query-status")
		if err != nil || state == "running" {
			return err
		}
		time.Sleep(look)
	}
}

func (d *direct) serialLog(name string) string { return filepath.Join(d.dir, name, "log") }

func (d *direct) stop(name string) error {
	cmd := d.running[name]
	if cmd == nil {
		return nil
	}
	delete(d.running, name)
	var err error
	if cmd.Process != nil {
		err = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(d.dir, name)))
}

func (d *direct) end() error {
	var errs []error
	for name := range d.running {
		errs = append(errs, d.stop(name))
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}
