// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package greeting is how streams between nodes begin: who opens one says in one
// line, a JSON object, what it is for; the other end answers in lines of text. What
// comes behind the lines is the stream's own.
//
// Guarantees:
//   - A line has at most [MaxLine] bytes, so an end that says no end of a line takes
//     no more memory than that.
//   - Nothing that came behind a line is lost: it is read from the same [Conn].
//   - [Text] of an error is one line, whatever the error has in it.
//
// Non-guarantees: deadlines are the callers'. Who the ends are is proved below.
//
// It has no goroutines.
package greeting
