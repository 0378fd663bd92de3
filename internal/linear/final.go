// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package linear

import (
	"fmt"
	"maps"
	"slices"
)

// CheckFinal compares what each node held at the end, when all is healed and
// every node is up to date, with what was acknowledged. final has the keys that
// exist, by node.
func CheckFinal(ops []Op, final map[string]map[string]Cell) []Violation {
	var out []Violation
	nodes := slices.Sorted(maps.Keys(final))
	last := lastAcknowledged(ops)
	for _, key := range slices.Sorted(maps.Keys(last)) {
		for _, n := range nodes {
			c, exists := final[n][key]
			c.Exists = exists
			if text := last[key].missing(c); text != "" {
				out = append(out, Violation{LostWrite, last[key].op.Group, fmt.Sprintf("on %s %s: %s", n, text, last[key].op)})
			}
		}
	}
	for i, n := range nodes {
		if i > 0 {
			out = append(out, diverged(nodes[0], final[nodes[0]], n, final[n])...)
		}
	}
	return few(out)
}

// LostKeys counts the keys of which some node lacks an acknowledged write.
func LostKeys(ops []Op, final map[string]map[string]Cell) int {
	n := 0
	for key, a := range lastAcknowledged(ops) {
		for _, cells := range final {
			c, exists := cells[key]
			c.Exists = exists
			if a.missing(c) != "" {
				n++
				break
			}
		}
	}
	return n
}

// acknowledged is the last acknowledged change of a key.
type acknowledged struct {
	op     *Op
	change Change
	// mayBeGone: a deletion of unknown outcome can explain that it is absent.
	mayBeGone bool
}

func (a *acknowledged) missing(c Cell) string {
	switch {
	case !c.Exists && !a.change.Delete && !a.mayBeGone:
		return fmt.Sprintf("%s is absent after the write", a.change.Key)
	case c.Exists && c.Revision > 0 && c.Revision < a.op.Revision:
		return fmt.Sprintf("%s has an older value, %q of revision %d", a.change.Key, c.Value, c.Revision)
	case c.Exists && c.Revision == a.op.Revision && (a.change.Delete || c.Value != a.change.Value):
		return fmt.Sprintf("%s has another value at that revision, %q", a.change.Key, c.Value)
	}
	return ""
}

func lastAcknowledged(ops []Op) map[string]*acknowledged {
	last := map[string]*acknowledged{}
	for i := range ops {
		o := &ops[i]
		if o.Status != Applied || o.Revision == 0 {
			continue
		}
		for _, c := range o.Changes {
			if a := last[c.Key]; a == nil || o.Revision > a.op.Revision {
				last[c.Key] = &acknowledged{op: o, change: c}
			}
		}
	}
	for i := range ops {
		o := &ops[i]
		if o.Status != Unknown {
			continue
		}
		for _, c := range o.Changes {
			if a := last[c.Key]; a != nil && c.Delete {
				a.mayBeGone = true
			}
		}
	}
	return last
}

func diverged(an string, a map[string]Cell, bn string, b map[string]Cell) []Violation {
	var out []Violation
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		x, y := a[k], b[k]
		if x.Value != y.Value || x.Revision != y.Revision {
			out = append(out, Violation{Diverged, k, fmt.Sprintf("%s has %q @%d, %s has %q @%d", an, x.Value, x.Revision, bn, y.Value, y.Revision)})
		}
	}
	return out
}
