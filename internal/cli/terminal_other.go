// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build !windows

package cli

// terminalOutput prepares stdout for the guest's escape sequences, which
// terminals outside Windows understand by themselves.
func terminalOutput() (restore func(), err error) { return func() {}, nil }
