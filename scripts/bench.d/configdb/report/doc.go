// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package report collects what several systems measured in several rounds and
// prints it: a table for people and one line of JSON for programs.
//
// Every number is the median of its rounds. Nothing is left out: a round that
// failed ends the bench elsewhere.
package report
