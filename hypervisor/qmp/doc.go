// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package qmp is the connection to one QEMU over the QEMU Machine Protocol. It
// satisfies Monitor of github.com/digitalocean/go-qemu/qmp and uses its types;
// go-qemu's own socket monitor breaks on replies over 64 KiB, mixes buffers
// under event bursts, blocks when events are not drained and knows no context.
//
// Guarantees:
//   - Every command ends by its context, or after DefaultTimeout if the context
//     has no deadline, whatever QEMU does. A stuck QEMU holds up nobody but the
//     callers of its own connection, and those only until their deadlines.
//   - A reply goes to the command with its id. A reply that comes after its
//     command gave up is counted and dropped; the connection stays usable.
//   - Replies and events of up to MaxMessageBytes are read whole. A larger one,
//     or anything that is not QMP, ends the connection: after that nothing that
//     is read could be trusted.
//   - A subscriber that does not read never delays the connection or another
//     subscriber: its queue holds MaxQueuedEvents, then the oldest is dropped
//     and the next read says how many were lost, so that the owner asks QEMU
//     for the real state.
//   - A QEMU that floods is read at FloodPerSec messages per second, after
//     FloodBurst at once: its own replies wait behind them, nothing else does. An
//     event over MaxEventBytes ends the connection.
//   - When QEMU goes away Done is closed, Err says how, and every waiting
//     command and subscriber ends.
//
// Non-guarantees: a command that timed out may still be carried out by QEMU.
// Commands are executed by QEMU one after the other; out-of-band execution is
// not used. A Conn is used for one connection and not connected again.
//
// Goroutines: one reader per connected Conn, ended by Disconnect or by the end
// of the stream, and one per call of Events, ended by its context or with the
// connection.
package qmp
