// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package notify sends one message to one receiver: as mail, as SNMP
// notifications or to a webhook.
//
// Guarantees:
//   - Send ends within Deadline, whatever the other side does: it reads at
//     most maxReply bytes and follows no redirect.
//   - The same alerts in the same phase give the same Message-ID and keys, so
//     that a repetition can be recognised.
//   - Text of guests and users never becomes a header of a mail.
//   - Errors never hold a secret.
//
// Non-guarantees: a trap is UDP; sent is not received.
//
// Goroutines: none besides those of one call of Send.
package notify
