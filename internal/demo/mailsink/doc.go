// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command mailsink is the mail server of scripts/demo: it takes every mail and
// keeps it as a file. It is built by the demo and not part of the product.
//
//	mailsink --listen 10.76.0.10:25 --dir DIR
//
// Guarantees: the server says that it has taken a mail after the file
// DIR/N.eml is complete; N counts from 1, in order of arrival. Then one line
// goes to stdout: N, the phase that Muster names in the mail's head, and the
// subject, decoded.
//
// Non-guarantees: no relaying, no TLS, no authentication; files are not synced.
//
// Goroutines: those of the SMTP server, one for each connection; SIGTERM and
// SIGINT end the program.
//
// Limits: maxBytes for a mail, maxRecipients, ioTimeout for each step.
package main
