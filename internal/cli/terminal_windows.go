// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"os"

	"golang.org/x/sys/windows"
)

// terminalOutput lets the Windows console understand the guest's escape
// sequences.
func terminalOutput() (restore func(), err error) {
	h := windows.Handle(os.Stdout.Fd())
	var mode uint32
	if err := windows.GetConsoleMode(h, &mode); err != nil {
		return nil, err
	}
	if err := windows.SetConsoleMode(h, mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING); err != nil {
		return nil, err
	}
	return func() { _ = windows.SetConsoleMode(h, mode) }, nil
}
