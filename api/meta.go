// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"maps"
	"regexp"
	"slices"
	"time"
)

// Kind names a type of object. Its plural is the REST path and the word of the
// command line is the singular.
type Kind string

// The kinds of this version.
const (
	KindCluster   Kind = "cluster"
	KindNode      Kind = "node"
	KindVM        Kind = "vm"
	KindBinding   Kind = "binding"
	KindOperation Kind = "operation"
	KindArrival   Kind = "arrival"
	// KindEvacuation is the emptying of a node.
	KindEvacuation Kind = "evacuation"
	// KindDrill is the last drill of a VM.
	KindDrill Kind = "drill"
	// KindReboot is the planned reboot or shutdown of a node.
	KindReboot Kind = "reboot"
	// KindRollingReboot reboots nodes one after the other.
	KindRollingReboot Kind = "rollingreboot"

	KindImage     Kind = "image"
	KindVolume    Kind = "volume"
	KindPool      Kind = "pool"
	KindPoolState Kind = "poolstate"
	KindTask      Kind = "task"
	KindToken     Kind = "token"

	KindSnapshot   Kind = "snapshot"
	KindSavedState Kind = "savedstate"

	KindNetwork     Kind = "network"
	KindSwitchState Kind = "switchstate"
	KindNodeFacts   Kind = "nodefacts"
	KindCPUBaseline Kind = "cpubaseline"
	KindUplink      Kind = "uplink"
	KindIPPool      Kind = "ippool"
	KindEvent       Kind = "event"
	KindRule        Kind = "rule"
	KindAlert       Kind = "alert"
	KindReceiver    Kind = "receiver"
	KindUser        Kind = "user"
	KindPowerDevice Kind = "powerdevice"
	KindPowerAction Kind = "poweraction"

	KindFailover     Kind = "failover"
	KindFailoverMove Kind = "failovermove"
)

// Plural returns the REST path element of k.
func (k Kind) Plural() string { return string(k) + "s" }

// DefaultProject is the project of objects whose writer names none.
const DefaultProject = "default"

// Meta is the part that every object has.
type Meta struct {
	// ID is a UUIDv7, set at creation and never changed.
	ID string `json:"id,omitempty" doc:"UUIDv7, set at creation" readOnly:"true"`
	// Kind repeats the type, so that a stored or printed object says what it is.
	Kind Kind `json:"kind,omitempty" readOnly:"true"`
	// Name is a DNS label (RFC 1123), unique per project and kind, immutable.
	Name string `json:"name" doc:"DNS label, 1-63 characters, unique per project and kind, immutable" maxLength:"63"`
	// Project groups objects; "default" when none is named.
	Project string `json:"project,omitempty" maxLength:"63"`
	// Owner is "kind/id" of the object that this one is deleted with.
	Owner string `json:"owner,omitempty" readOnly:"true"`
	// Labels are free key-value pairs for selectors: at most 64, keys and
	// values at most 63 characters.
	Labels map[string]string `json:"labels,omitempty"`
	// Revision is the store revision of the last change of meta or spec; it is
	// the ETag. It is set when the object is read, never stored.
	Revision uint64 `json:"revision,omitempty" readOnly:"true"`
	// StatusRevision is the store revision of the last change of status.
	StatusRevision uint64 `json:"statusRevision,omitempty" readOnly:"true"`
	// Generation counts the changes of spec, beginning with 1.
	Generation uint64 `json:"generation,omitempty" readOnly:"true"`
	// CreatedAt is the time of creation in UTC.
	CreatedAt time.Time `json:"createdAt,omitzero" readOnly:"true"`
	// DeletingAt is set when deletion was asked for; the object disappears
	// when its owner module has cleaned up and Finalizers is empty.
	DeletingAt *time.Time `json:"deletingAt,omitempty" readOnly:"true"`
	// Finalizers name the modules that must clean up before the object goes.
	Finalizers []string `json:"finalizers,omitempty" readOnly:"true"`
}

// NewMeta returns the metadata of a new object of a kind.
func NewMeta(kind Kind, project, name string) Meta {
	if project == "" {
		project = DefaultProject
	}
	return Meta{ID: NewID(), Kind: kind, Name: name, Project: project, Generation: 1, CreatedAt: time.Now().UTC()}
}

// Deleting reports whether deletion was asked for.
func (m *Meta) Deleting() bool { return m.DeletingAt != nil }

// HasFinalizer reports whether f still has to clean up.
func (m *Meta) HasFinalizer(f string) bool { return slices.Contains(m.Finalizers, f) }

func (m Meta) clone() Meta {
	m.Labels = maps.Clone(m.Labels)
	m.Finalizers = slices.Clone(m.Finalizers)
	if m.DeletingAt != nil {
		t := *m.DeletingAt
		m.DeletingAt = &t
	}
	return m
}

// Limits of names and labels.
const (
	MaxNameLength  = 63
	MaxLabels      = 64
	MaxLabelLength = 63
)

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName checks a DNS label (RFC 1123 section 2.1): 1-63 characters, lower
// case letters, digits and inner hyphens. Nothing that passes can leave a
// directory when it is used as a file name.
func ValidName(field, name string) error {
	if name == "" {
		return Invalid(field, "is missing; give a name of 1-63 lower-case letters, digits or hyphens")
	}
	if !dnsLabel.MatchString(name) {
		return Invalid(field, "%q is not a valid name; use 1-63 lower-case letters, digits or hyphens, beginning and ending with a letter or digit", clip(name))
	}
	return nil
}

var labelKey = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// Validate checks names and labels.
func (m *Meta) Validate() error {
	if err := ValidName("meta.name", m.Name); err != nil {
		return err
	}
	if err := ValidName("meta.project", m.Project); err != nil {
		return err
	}
	if len(m.Labels) > MaxLabels {
		return Invalid("meta.labels", "has %d labels; at most %d are allowed", len(m.Labels), MaxLabels)
	}
	for _, k := range slices.Sorted(maps.Keys(m.Labels)) {
		if len(k) > MaxLabelLength || !labelKey.MatchString(k) {
			return Invalid("meta.labels", "key %q must be 1-%d letters, digits, '.', '_', '/' or '-'", clip(k), MaxLabelLength)
		}
		if v := m.Labels[k]; len(v) > MaxLabelLength {
			return Invalid("meta.labels."+k, "value is longer than %d characters", MaxLabelLength)
		}
	}
	return nil
}

func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// Condition is one aspect of an object's state, with a reason that programs
// can match and a message that a person can act on.
type Condition struct {
	// Type is the aspect, such as "Ready" or "Protected".
	Type string `json:"type"`
	// OK is true when all is well in this aspect.
	OK bool `json:"ok"`
	// Reason is one CamelCase word.
	Reason string `json:"reason,omitempty"`
	// Message says what happened and what to do.
	Message string `json:"message,omitempty"`
	// Since is when OK or Reason last changed, in UTC.
	Since time.Time `json:"since,omitzero"`
}

// SetCondition returns list with c put in place of the condition of its type.
// Since is kept when neither OK nor Reason changed, so that an equal state
// encodes to equal bytes and writes nothing.
func SetCondition(list []Condition, c Condition, now time.Time) []Condition {
	out := slices.Clone(list)
	for i := range out {
		if out[i].Type != c.Type {
			continue
		}
		c.Since = now.UTC()
		if out[i].OK == c.OK && out[i].Reason == c.Reason {
			c.Since = out[i].Since
		}
		out[i] = c
		return out
	}
	c.Since = now.UTC()
	return append(out, c)
}

// FindCondition returns the condition of a type, if present.
func FindCondition(list []Condition, typ string) (Condition, bool) {
	for _, c := range list {
		if c.Type == typ {
			return c, true
		}
	}
	return Condition{}, false
}
