// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package ptytest gives tests a terminal to run programs on.
package ptytest

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts a program on a new terminal of 80 by 24, which becomes what it
// reads, its controlling terminal, and where it writes unless cmd says something
// else. What it writes is read from the file that Start returns, with EIO once
// nobody has the terminal open any more; nothing is lost as long as that file is
// not closed earlier.
func Start(cmd *exec.Cmd) (*os.File, error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	master := os.NewFile(uintptr(fd), "ptmx")
	if err := startOn(cmd, fd); err != nil {
		_ = master.Close()
		return nil, err
	}
	return master, nil
}

func startOn(cmd *exec.Cmd, fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock the terminal: %w", err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return fmt.Errorf("number of the terminal: %w", err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = slave.Close() }()
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: 80, Row: 24}); err != nil {
		return fmt.Errorf("size of the terminal: %w", err)
	}
	cmd.Stdin = slave
	if cmd.Stdout == nil {
		cmd.Stdout = slave
	}
	if cmd.Stderr == nil {
		cmd.Stderr = slave
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	return cmd.Start()
}
