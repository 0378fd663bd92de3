// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// ServiceState is what a supervised part of a daemon does.
type ServiceState string

// The states. A waiting service ended with an error and is started again after
// a pause; one that has done its work is done.
const (
	ServiceRunning ServiceState = "running"
	ServiceWaiting ServiceState = "waiting"
	ServiceDone    ServiceState = "done"
)

// ServiceStatus is one supervised part of one node's daemon. It lives in the
// memory of that daemon and counts from its start.
type ServiceStatus struct {
	Node  string       `json:"node"`
	Name  string       `json:"name"`
	State ServiceState `json:"state"`
	// Restarts after an error or a panic.
	Restarts int `json:"restarts"`
	// StartedAt is when the present or last run began, EndedAt when the last
	// run ended and LastSeconds how long it took.
	StartedAt   time.Time  `json:"startedAt"`
	EndedAt     *time.Time `json:"endedAt,omitempty"`
	LastSeconds float64    `json:"lastSeconds,omitempty"`
	// LastError of a run that did not end as it should.
	LastError string `json:"lastError,omitempty"`
}
