// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
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
		or, err := o.original(ctx, name, o.data)
		if err != nil {
			return d, err
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

// original is the command line of a VM whose disk is below a folder.
func (o *ours) original(ctx context.Context, name, pool string) (or original, err error) {
	if or.args, or.dir, err = o.arguments(ctx, name); err != nil {
		return or, err
	}
	for _, a := range or.args {
		if _, rest, ok := strings.Cut(a, "filename="+pool); ok {
			file, _, _ := strings.Cut(rest, ",")
			or.disk = pool + file
		}
	}
	if or.disk == "" {
		return or, fmt.Errorf("no disk in %q", or.args)
	}
	return or, nil
}

// moved are the arguments with another run directory and disk.
func (or *original) moved(dir, disk string) []string {
	args := make([]string, len(or.args))
	for i, a := range or.args {
		args[i] = strings.ReplaceAll(strings.ReplaceAll(a, or.dir, dir), or.disk, disk)
	}
	return args
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
	args := or.moved(dir, disk)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	d.running[name] = cmd
	return cmd
}

// awaitRunning talks QMP until query-status says running.
func awaitRunning(ctx context.Context, socket string) error {
	m, err := dialMonitor(ctx, socket)
	if err != nil {
		return err
	}
	defer func() { _ = m.conn.Close() }()
	for {
		var is struct {
			Status string `json:"status"`
		}
		if err := m.do("query-status", nil, &is); err != nil || is.Status == "running" {
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
