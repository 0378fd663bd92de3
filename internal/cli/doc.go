// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package cli is the command line of a cluster. It talks REST only, through
// internal/client, and builds for Linux, macOS and Windows.
//
// Guarantees:
//   - Exit codes are decided in exitcode.go and nowhere else.
//   - Results go to stdout; progress, notices, hints and errors to stderr. With
//     -o json or yaml stdout holds exactly one document (one JSON object per
//     line for watch), and an error on stderr is a problem document.
//   - Text from the cluster cannot steer the terminal: control characters are
//     stripped from tables and messages. Only "vm console" and "raw get" pass
//     bytes as they are.
//   - The package has no global state: many commands may run in one process at
//     once, each with its Streams. With Streams.Shell a command runs inside a
//     daemon for somebody else: it opens no file, reads no environment, handles
//     no signal and never ends the process (shell.go).
//   - A terminal in raw mode is restored on every way out, signals included.
//
// Non-guarantees: tables are for people, columns may be added; programs use
// -o json.
//
// Each command runs on the goroutine of Run. The console owns two more (input
// and signals of the session); a read from a terminal that is under way when
// the console ends cannot be interrupted and ends with the process.
package cli
