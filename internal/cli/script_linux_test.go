// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/muster-vm/muster/internal/ptytest"
)

func init() { scriptPrograms["terminal"] = terminalProgram }

// terminalProgram is "terminal KEYS SCREEN PROGRAM ARGS...": it runs a program on
// a terminal, types the file KEYS and an end of file, and leaves all that was
// written to the terminal in the file SCREEN. (testscript's own ttyin closes the
// terminal as soon as the program ends, and what nobody had read by then is lost.)
func terminalProgram() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: terminal KEYS SCREEN PROGRAM ARGS...")
		os.Exit(2)
	}
	if err := onTerminal(os.Args[1], os.Args[2], exec.Command(os.Args[3], os.Args[4:]...)); err != nil {
		fmt.Fprintln(os.Stderr, "terminal:", err)
		os.Exit(1)
	}
}

func onTerminal(keys, screen string, cmd *exec.Cmd) error {
	typed, err := os.ReadFile(keys)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	terminal, err := ptytest.Start(cmd)
	if err != nil {
		return err
	}
	defer func() { _ = terminal.Close() }()
	const endOfFile = 4 // VEOF of a new terminal, as Ctrl-D
	go func() { _, _ = terminal.Write(append(typed, endOfFile)) }()
	shown, _ := io.ReadAll(terminal) // ends with EIO when the program's side is closed
	return errors.Join(cmd.Wait(), os.WriteFile(screen, shown, 0o600))
}
