// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package alert decides which alerts there are. It is pure: facts, rules and
// the alerts of before go in, the changes come out; the caller commits them.
//
// Guarantees:
//   - One rule and one target have one alert, whose ID is computed from both,
//     so that two evaluators cannot make two.
//   - All that a decision needs is in the alert itself (pendingAt, firingAt),
//     so that another evaluator goes on where the last one stopped.
//   - What is not known changes nothing: an alert is resolved only when its
//     target was seen well, or is gone.
//
// Non-guarantees: a state that came and went between two evaluations is not
// seen. Limits: MaxVerdicts per rule.
package alert
