// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package raftlog keeps Raft's log in preallocated segment files, with a
// checksum for every entry. It implements raft.LogStore.
//
// A segment is a file of fixed size, named after the index of its first entry:
// a header and then records, each aligned to 8 bytes. An append is one write
// and one fdatasync(2) into space that was written before, so that the file
// system has no metadata to make durable. Space is taken when a segment is
// made, before any entry needs it. Cutting the end of the log, as a follower does
// whose last entries a new leader does not know, begins a new segment; the old one
// is cut to what it keeps.
//
// Guarantees:
//   - StoreLogs returns nil only after the entries are on the disk.
//   - An entry that cannot be read back as it was written is reported as
//     *CorruptError with file, offset and index; it is never skipped and never
//     taken for the end of the log, if a later record proves that it was
//     acknowledged.
//   - A torn write (a batch that was under way at a power cut) is cut off.
//   - A full disk fails StoreLogs with ErrNoSpace and changes nothing; the same
//     call succeeds once there is space.
//   - After a failed fdatasync every call fails with ErrFailed: the kernel may
//     have dropped the dirty pages, so that a second fdatasync would lie.
//
// Non-guarantees: a damaged record at the very end of the log, behind which
// nothing was written, looks like a torn write. Entries are expected in order,
// as Raft writes them; a gap begins a new log (after a snapshot was installed).
//
// One goroutine, which makes the next segment in advance, ends with Close.
package raftlog
