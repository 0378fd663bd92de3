// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"time"
)

// HistorySettings say how long the history of the configuration is kept.
type HistorySettings struct {
	// MaxAgeSeconds is how old a change may be: 3600 (1 h) to 315360000 (10
	// years), default 7776000 (90 days).
	MaxAgeSeconds int64 `json:"maxAgeSeconds,omitempty" minimum:"3600" maximum:"315360000"`
	// MaxBytes is how large the history may be: 1 MiB to 256 MiB, default 32 MiB.
	// It is in the memory of every node.
	MaxBytes Size `json:"maxBytes,omitempty"`
}

// Limits and defaults of HistorySettings.
const (
	MinHistorySeconds     = 3600
	MaxHistorySeconds     = 10 * 365 * 24 * 3600
	DefaultHistorySeconds = 90 * 24 * 3600
	MinHistoryBytes       = 1 * MiB
	MaxHistoryBytes       = 256 * MiB
	DefaultHistoryBytes   = 32 * MiB
)

// SetDefaults implements Spec.
func (s *HistorySettings) SetDefaults() {
	if s.MaxAgeSeconds == 0 {
		s.MaxAgeSeconds = DefaultHistorySeconds
	}
	if s.MaxBytes == 0 {
		s.MaxBytes = DefaultHistoryBytes
	}
}

// Validate implements Spec.
func (s *HistorySettings) Validate() error {
	if s.MaxAgeSeconds < MinHistorySeconds || s.MaxAgeSeconds > MaxHistorySeconds {
		return Invalid("maxAgeSeconds", "is %d; give %d (1 hour) to %d (10 years)", s.MaxAgeSeconds, MinHistorySeconds, MaxHistorySeconds)
	}
	if s.MaxBytes < MinHistoryBytes || s.MaxBytes > MaxHistoryBytes {
		return Invalid("maxBytes", "is %s; give %s to %s", s.MaxBytes, MinHistoryBytes, MaxHistoryBytes)
	}
	return nil
}

// MaxAge is how old a change may be.
func (s *HistorySettings) MaxAge() time.Duration {
	return time.Duration(s.MaxAgeSeconds) * time.Second
}

// ConfigRetention are the settings of the history with what there is of it.
type ConfigRetention struct {
	Settings HistorySettings `json:"settings"`
	// Horizon is the revision from which on the history is complete; 0 from the
	// beginning of the cluster on. HorizonReason says why it is not earlier: begun,
	// age or size.
	Horizon       uint64    `json:"horizon"`
	HorizonReason string    `json:"horizonReason,omitempty"`
	HorizonSince  time.Time `json:"horizonSince,omitzero"`
	Records       int       `json:"records"`
	Bytes         Size      `json:"bytes"`
	// Oldest is the time of the oldest record.
	Oldest time.Time `json:"oldest,omitzero"`
}

// ConfigChange is one change of one object in the log.
type ConfigChange struct {
	// Revision is the order of changes: clocks of nodes differ.
	Revision uint64 `json:"revision"`
	// Time is the clock of the node that proposed the change.
	Time time.Time `json:"time"`
	// Operation is create, update or delete; found or gone when a change was
	// noticed that was not recorded when it was made.
	Operation string `json:"operation" enum:"create,update,delete,found,gone"`
	Actor     string `json:"actor,omitempty"`
	// Source is from where: "api ADDRESS", "ssh ADDRESS" or "unix socket"; empty
	// for what the cluster did by itself. Node proposed the change.
	Source  string `json:"source,omitempty"`
	Node    string `json:"node,omitempty"`
	Note    string `json:"note,omitempty"`
	Kind    Kind   `json:"kind"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	Project string `json:"project,omitempty"`
	// Fields that an update changed, at most 32.
	Fields []string `json:"fields,omitempty"`
	// Object after the change, without secrets, if it was asked for.
	Object json.RawMessage `json:"object,omitempty"`
}

// ConfigLog is a page of the log, newest first.
type ConfigLog struct {
	Kind     string         `json:"kind"`
	Items    []ConfigChange `json:"items"`
	Continue string         `json:"continue,omitempty" doc:"give it as ?continue= for the next page"`
	// Horizon: earlier changes are not all there.
	Horizon  uint64 `json:"horizon"`
	Revision uint64 `json:"revision"`
}

// FieldChange is one field that differs.
type FieldChange struct {
	// Path such as spec.nics[0].address.
	Path string `json:"path"`
	// Before and After are left out where the field is not there.
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
	// Secret fields differ, but are not shown.
	Secret bool `json:"secret,omitempty"`
}

// ObjectDiff is one object that differs between two revisions.
type ObjectDiff struct {
	Kind    Kind   `json:"kind"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	Project string `json:"project,omitempty"`
	// Operation that leads from the one to the other.
	Operation string        `json:"operation" enum:"create,update,delete"`
	Changes   []FieldChange `json:"changes"`
}

// ConfigDiff is a page of the differences between two revisions.
type ConfigDiff struct {
	Kind     string       `json:"kind"`
	At       uint64       `json:"at"`
	To       uint64       `json:"to"`
	Items    []ObjectDiff `json:"items"`
	Continue string       `json:"continue,omitempty" doc:"give it as ?continue= for the next page, with to= as in the first"`
	Horizon  uint64       `json:"horizon"`
	Revision uint64       `json:"revision"`
}

// RevertRequest asks to bring objects back to what they were at a revision.
type RevertRequest struct {
	To uint64 `json:"to"`
	// Objects as KIND/NAME, KIND/ID or KIND; all when empty.
	Objects []string `json:"objects,omitempty"`
	// Project of the names, and of all objects if given.
	Project string `json:"project,omitempty"`
	// DryRun: only answer with the plan.
	DryRun bool `json:"dryRun,omitempty"`
	// SkipRefused: revert the others although some cannot be.
	SkipRefused bool `json:"skipRefused,omitempty"`
	// Partial: carry out the first part of a plan that has several; without it, such
	// a plan is refused. Ask again for the next.
	Partial bool `json:"partial,omitempty"`
	// Plan, if given, must be that of the answer to a dry run: what is to be done
	// has not changed since.
	Plan string `json:"plan,omitempty"`
}

// RevertItem is one object that differs, and what is done about it.
type RevertItem struct {
	Kind    Kind   `json:"kind"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	Project string `json:"project,omitempty"`
	// Operation that brings the object back.
	Operation string `json:"operation" enum:"create,update,delete"`
	// Changes of the object from what it is to what it will be.
	Changes []FieldChange `json:"changes,omitempty"`
	// Kept are fields that differ and stay as they are, because they are no
	// configuration.
	Kept []string `json:"kept,omitempty"`
	// Refused says why the object cannot be brought back.
	Refused string `json:"refused,omitempty"`
	// Code of the refusal.
	Code Code `json:"code,omitempty"`
	// Part is the transaction in which it is done: 1, or a later one if it does not
	// fit or if something still needs it that an earlier one changes. 0 if it is
	// refused.
	Part int `json:"part,omitempty"`
	// Task that was begun, for what takes a while.
	Task string `json:"task,omitempty"`
}

// RevertResult answers a RevertRequest: the plan, or what was done.
type RevertResult struct {
	Kind string `json:"kind"`
	To   uint64 `json:"to"`
	// Done is whether anything was written, at Revision.
	Done bool `json:"done"`
	// Plan names the plan, for RevertRequest.
	Plan  string       `json:"plan"`
	Items []RevertItem `json:"items"`
	// Refused counts the items that are, Parts the transactions that it takes.
	Refused  int    `json:"refused"`
	Parts    int    `json:"parts"`
	Revision uint64 `json:"revision"`
}
