// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package storage keeps pools, images and volumes of one node in step with
// what the configuration database says.
//
// A pool is a directory with the folders images, volumes, tmp and nodes and a
// marker file with the pool's ID. A dir pool is this node's own; a shared pool
// is one directory that every node sees, which each node proves before it
// calls the pool ready (poolshared.go says how). A pool of type rbd is in a Ceph
// cluster (rbd.go), and can lock out a host that is lost (fence.go).
//
// Guarantees:
//   - A file below images/ was inspected before it got there and never changes
//     afterwards; nothing that qemu-img opens can make it open another file.
//   - A file below volumes/ is put there by link(2), which never replaces: two
//     executors of one volume cannot overwrite each other.
//   - Unfinished work is below tmp/ under names with the node's ID and is
//     removed on failure and at the next start.
//   - A volume that is copied comes from an internal snapshot of its source, which
//     never changes, and is put in its place when it is complete.
//   - A volume that moves is its old file until one transaction says that it is the
//     new one; only files that are marked as part of a move are ever removed.
//   - Status is written on change only; an idle pool writes nothing.
//   - Every call into a pool's file system has a deadline and a goroutine of
//     its own, so that a hung NFS server stalls its own pool only.
//
// Non-guarantees: content that qemu-img calls "raw" is accepted as raw,
// whatever it is, because a raw disk has no signature; give a SHA-256 to be
// sure of it. A copy of a shared pool's directory cannot be told from the
// original while no other node that has the pool ready is alive. Ready volumes
// are not re-read: QEMU reports a file that was removed behind our back.
//
// Goroutines: Run owns five reconcile loops (pools, images, volumes, moves and what
// these left) and waits for them; ServeStream is its caller's. Each pool of type rbd whose
// notes are used has one that waits for their qemu-nbd; the end of Run ends that, too. A
// call that hangs in the kernel outlives its deadline; at most maxWorkCalls and one check
// per pool can hang at a time.
//
// Limits are the constants in storage.go, lane.go, qemuimg.go, cephcmd.go, rbdpool.go,
// rbdfence.go, notes.go, noteimage.go, copy.go, move.go and movestream.go. DESIGN.md has the reasons and the steps of a move.
package storage
