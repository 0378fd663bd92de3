// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Metrics is what one node measured, newest values or the last hour. It is
// kept in that node's memory, never in the database.
type Metrics struct {
	Node   string         `json:"node"`
	Series []MetricSeries `json:"series"`
	// Collectors say how the measuring itself does.
	Collectors []CollectorState `json:"collectors,omitempty"`
}

// MetricSeries is one series with the values asked for, oldest first.
type MetricSeries struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
	Points []MetricPoint     `json:"points"`
}

// MetricPoint is one value with its time.
type MetricPoint struct {
	Time  time.Time `json:"time"`
	Value float64   `json:"value"`
}

// CollectorState is how a collector of metrics does.
type CollectorState struct {
	Name    string    `json:"name"`
	OK      bool      `json:"ok"`
	LastRun time.Time `json:"lastRun,omitzero"`
	// Seconds that the last run took.
	Seconds float64 `json:"seconds"`
	// Late is true while a run is over its deadline and has not returned.
	Late  bool   `json:"late,omitempty"`
	Error string `json:"error,omitempty"`
}
