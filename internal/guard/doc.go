// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package guard is the small process that starts and parents every QEMU of one
// host, and the client the daemon talks to it with.
//
// The guard keeps one promise: a protected VM does not run past the deadline of
// the lease under which it lives, whatever happens to the daemon (crash, hang,
// SIGSTOP, upgrade). It knows deadlines, process ids and VM ids; it knows
// nothing of the cluster, of bindings or of QMP.
//
// # Guarantees
//
//   - When the deadline passes, every protected VM gets SIGKILL, again every
//     [KillRepeat] until its parent (the guard) has reaped it. The deadline is
//     compared with CLOCK_BOOTTIME under the lock in every operation; the timer
//     only makes sure somebody looks in time.
//   - A lapsed session is never extended. A new session is refused with
//     [CodeKilling] until every protected VM of the lapsed one is reaped.
//   - No VM starts outside a session that is current and unexpired. This is
//     checked before the fork and again after it; a child whose lease ended in
//     between is killed and the start is answered as refused.
//   - No VM outlives its guard: children carry PDEATHSIG=SIGKILL, and a new
//     guard kills what an earlier one left in the same run directory before it
//     serves. What cannot be killed blocks its VM id ([CodeStranger]).
//   - A VM with a [User] never runs as root, not even for a moment after exec: ids
//     and groups are set in the child before it executes the program, new
//     privileges are forbidden, the environment is what the request says, and no
//     descriptor but stdin (/dev/null), stdout and stderr (the log) is passed on.
//   - One guard per run directory (flock on guard.lock).
//   - A slow or stopped client never delays a kill: no lock is held across
//     client I/O, queues are bounded, and a client that lets its queue fill up
//     is disconnected.
//
// # Non-guarantees
//
//   - A process in uninterruptible sleep cannot be killed by anybody, and a
//     stopped or starved guard kills nobody. With a watchdog the machine is reset
//     then, [KillTime] after the deadline at the latest: while a protected VM is
//     there, the guard pets only if the device, petted for the last time, would
//     bite by then. So petting ends three seconds before the deadline of a lease
//     that is not renewed, and goes on once what had to die is dead. A VM all of
//     whose threads are in the kernel's exit counts as dead. A device that bites
//     later than ten seconds after the last petting is not counted on. Without one
//     (level "process only") nothing can be done.
//   - SCHED_RR, mlockall and the OOM score are best effort.
//   - The kernel clears PDEATHSIG when a process changes its user id. A VM with a
//     [User] is not concerned: its ids are set before PDEATHSIG, and it has no
//     right to change them again. A program that runs as the guard's own user and
//     drops its privileges by itself survives a SIGKILLed guard until the next
//     guard on this run directory sweeps it up by environment or by cgroup. A process
//     that does not show its environment, since it is stuck or the guard itself stood
//     still, is waited for for [LeftoverWait], and killed later when it does.
//   - Only the started process, its process group and its cgroup are killed.
//   - Exited records live in memory: a new guard knows nothing of earlier VMs.
//   - The epoch and the extra value are stored and returned, never interpreted.
//
// # Sessions
//
// The daemon picks a session number >= 1, one per uninterrupted lease, and none
// that an earlier daemon may have used since the host's boot. The same
// session may only move its deadline forward, and only before it lapsed; a
// higher one starts a new lease at any time (its deadline replaces the old one,
// also when earlier); a lower one is refused.
//
// protect(on) in a lapsed session is refused with [CodeLapsed] and leaves the VM
// unchanged: marking it would mean killing it at once, and the daemon that asks
// has just lost the right to decide about it. It stays unprotected and alive,
// and the refusal tells the daemon to start a new session before asking again.
//
// # Control
//
// A daemon lists what runs and acts on it: it says that a VM is stopped, which lets
// the VM run elsewhere. A start that an earlier connection still has on its way, its
// own or that of the daemon before, would make that wrong, and the session that it
// names may go on. So one connection has control ([Client.Control]), and is what a
// daemon asks by. Whoever takes it ends the connection that had it; of what came over
// that one, no request is carried out any more, and what was begun (a VM of state
// starting counts) is in the list. Connections that never took control are left alone.
//
// # Goroutines
//
// A [Server] owns: one enforcer (deadline, kills, reaping, petting), one forker
// locked to its OS thread for as long as the server lives (PDEATHSIG fires when
// the forking thread dies), one cgroup janitor, the acceptor, and per connection
// one reader, one writer and at most [MaxInFlight] waiting requests. [Server.Serve]
// returns when all but the forker have ended. A request inside a fork that
// hangs on dead storage is not waited for. A [Client] owns one reader goroutine, ended by
// [Client.Close]. [Launch] leaves one goroutine that waits for the guard it
// started, to reap it; it ends with the guard.
//
// # Limits
//
// See the constants in protocol.go: line length, connections, running VMs,
// exited records, event queue, lease length, waits.
package guard
