// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package console is the console shell: SSH on the cluster's one port, with
// the commands of the command line and the serial consoles of VMs.
//
// Guarantees:
//   - A login takes a public key of a user in the database, nothing else. A
//     user who is disabled or removed, whose role changes or whose key is taken
//     away is out within 20 s, with all that runs for them.
//   - A session acts through the REST interface as its user and has no other
//     way to the cluster. It opens no file of the node, starts no program and
//     does not see the daemon's environment.
//   - No forwarding of ports, agents or X11, no sftp or other subsystem.
//   - What comes from the cluster cannot steer the person's terminal: tables and
//     messages hold no control characters; the output of guests passes a filter
//     (filter.go), and after a console the terminal is reset.
//   - Memory per session is bounded, whatever is typed or pasted.
//   - A panic in a command ends that command.
//
// Non-guarantees: a command that is under way when its session ends may have
// taken effect. The terminal must be set to UTF-8. With 64 KiB typed ahead the
// session reads no more until a command takes it, so that Ctrl-C behind a long
// paste is heard late.
//
// Goroutines: those of Serve (one that accepts, one that looks after live
// connections, three per connection, three per channel), all of which have
// ended when Serve returns; and those of a Transport, until its Close.
//
// The limits are constants in limits.go.
package console
