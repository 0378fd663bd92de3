// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package backupfile is the form of a backup of the configuration database. It
// knows nothing of what is inside, so that the command line can check a file
// anywhere.
//
// A file is
//
//	"MUSTERB" and one byte, the format
//	4 bytes, the length of the header, and the header (JSON, in clear)
//	chunks: 4 bytes, the length, and the sealed bytes
//	4 zero bytes and the SHA-256 of everything before
//
// All lengths are big endian. Chunks are sealed with AES-256-GCM under a key of
// this file alone, derived (HKDF, RFC 5869) from the cluster key and the salt in
// the header. A chunk's nonce is its number and whether it is the last; its
// additional data is the hash of magic and header.
//
// Guarantees: Verify needs no key and finds every accidental change; a reader
// with the key finds every change, of the header too, and returns no byte that
// was not sealed by a holder of the key. A file that was cut anywhere is none.
//
// Non-guarantees: the header is readable by anybody. Whoever has the cluster
// key, or the pass phrase of a file that holds it, can read all and can forge.
//
// The package owns no goroutine. Limits: a header has at most MaxHeader bytes, a
// chunk MaxChunk, and opening a pass phrase takes at most maxScryptBytes.
package backupfile
