// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"cmp"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Object names an object.
type Object struct {
	Kind api.Kind
	ID   string
}

// Past is the newest record of an object at or below a revision.
type Past struct {
	Entry
	Exists bool
}

// At returns how the selected objects were at a revision, which must have passed
// Check. Objects that were not there yet have no entry.
func At(v *configdb.View, s Selection, revision uint64) map[Object]Past {
	out := map[Object]Past{}
	for e := range s.entries(v) {
		op, from := configdb.HistoryEffect(e.entry)
		if from > revision {
			continue
		}
		o := Object{e.Kind, e.ID}
		if had, ok := out[o]; ok && had.Revision() > e.Revision() {
			continue
		}
		out[o] = Past{Entry: e, Exists: op != configdb.HistoryDelete && op != configdb.HistoryGone}
	}
	return out
}

// Last returns the newest record of an object.
func Last(v *configdb.View, o Object) (Entry, bool) {
	var last Entry
	for ce := range v.Scan(configdb.HistoryPrefix(o.Kind, o.ID), "") {
		if ce.Revision > last.Revision() {
			last = Entry{Kind: o.Kind, ID: o.ID, entry: ce}
		}
	}
	return last, last.Revision() > 0
}

// Difference is one object that differs between two revisions.
type Difference struct {
	Object
	Name, Project string
	// Before and After are stored specs, nil where there is no object.
	Before, After []byte
}

// Diff returns the selected objects that differ between two revisions, in order
// of kind, project, name and ID.
func Diff(v *configdb.View, s Selection, from, to uint64) ([]Difference, error) {
	before, after := At(v, s, from), At(v, s, to)
	var out []Difference
	for o := range union(before, after) {
		b, a := before[o], after[o]
		if b.entry.Key == a.entry.Key || !b.Exists && !a.Exists {
			continue
		}
		d := Difference{Object: o}
		for _, side := range []struct {
			past Past
			spec *[]byte
		}{{b, &d.Before}, {a, &d.After}} {
			if side.past.entry.Key == "" {
				continue
			}
			r, err := side.past.Record()
			if err != nil {
				return nil, err
			}
			d.Name, d.Project = r.Name, r.Project
			if side.past.Exists {
				*side.spec = r.Spec
			}
		}
		out = append(out, d)
	}
	rank := map[api.Kind]int{}
	for i, k := range s.Kinds {
		rank[k] = i
	}
	slices.SortFunc(out, func(a, b Difference) int {
		return cmp.Or(cmp.Compare(rank[a.Kind], rank[b.Kind]), strings.Compare(a.Project, b.Project), strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID))
	})
	return out, nil
}

func union(a, b map[Object]Past) map[Object]bool {
	out := make(map[Object]bool, len(b))
	for o := range a {
		out[o] = true
	}
	for o := range b {
		out[o] = true
	}
	return out
}

// Operation leads from the one state of an object to the other.
func (d *Difference) Operation() string {
	switch {
	case d.Before == nil:
		return configdb.HistoryCreate.String()
	case d.After == nil:
		return configdb.HistoryDelete.String()
	}
	return configdb.HistoryUpdate.String()
}
