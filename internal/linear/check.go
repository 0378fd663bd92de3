// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package linear

import (
	"cmp"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// ViolationKind says what promise was broken.
type ViolationKind string

// The violations.
const (
	// LostWrite: an acknowledged write is not in the final state.
	LostWrite ViolationKind = "lost_write"
	// DoubleApply: one write took effect at two revisions.
	DoubleApply ViolationKind = "double_apply"
	// Phantom: a value was read that nobody wrote, or before it was asked for.
	Phantom ViolationKind = "phantom"
	// RefusedApplied: a write took effect although the client was told that it
	// did not.
	RefusedApplied ViolationKind = "refused_but_applied"
	// TornView: a view contains a value of a later revision than its own.
	TornView ViolationKind = "torn_view"
	// NotLinearizable: no order of the operations explains the answers; a
	// stale read, for instance.
	NotLinearizable ViolationKind = "not_linearizable"
	// Diverged: two nodes ended with different states.
	Diverged ViolationKind = "diverged"
)

// Violation is one broken promise.
type Violation struct {
	Kind  ViolationKind
	Group string
	Text  string
}

// String is for people.
func (v Violation) String() string { return fmt.Sprintf("%s (%s): %s", v.Kind, v.Group, v.Text) }

// Limits of a check.
const (
	// DefaultSearch bounds the search of one group.
	DefaultSearch = 20 * time.Second
	// explained is how many operations an explanation lists on either side.
	explained = 12
	// mostPerKind bounds the violations of one kind that are told one by one.
	mostPerKind = 20
)

// Options of Check. The zero value is ready for use.
type Options struct {
	// Search bounds the search of one group; 0: DefaultSearch.
	Search time.Duration
	// Pictures is a folder for an HTML page per group that is not
	// linearizable; none when empty.
	Pictures string
}

// Report is the result of a check.
type Report struct {
	Ops, Groups int
	ByStatus    map[string]int
	Violations  []Violation
	// Undecided groups were not searched to the end.
	Undecided []string
}

// OK reports whether the history is proven to be right.
func (r *Report) OK() bool { return len(r.Violations) == 0 && len(r.Undecided) == 0 }

// Count returns the number of violations of a kind.
func (r *Report) Count(kind ViolationKind) int {
	n := 0
	for _, v := range r.Violations {
		if v.Kind == kind {
			n++
		}
	}
	return n
}

// Check decides whether a history is right. An error means that the history
// itself is no good: a value written twice, or a group with too many keys.
func Check(ops []Op, o Options) (*Report, error) {
	x, err := index(ops)
	if err != nil {
		return nil, err
	}
	r := &Report{Ops: len(ops), ByStatus: map[string]int{}, Violations: x.facts(ops)}
	for i := range ops {
		r.ByStatus[ops[i].Status.String()]++
	}
	groups := x.groups(ops)
	r.Groups = len(groups)
	if o.Search <= 0 {
		o.Search = DefaultSearch
	}
	search(groups, o, r)
	return r, nil
}

// write is one change of one operation.
type write struct {
	op  *Op
	key string
}

type histIndex struct {
	writers map[string]write    // by value
	seen    map[string][]uint64 // the revisions at which a value was read
}

func index(ops []Op) (*histIndex, error) {
	x := &histIndex{writers: map[string]write{}, seen: map[string][]uint64{}}
	for i := range ops {
		o := &ops[i]
		for _, c := range o.Changes {
			if c.Delete {
				continue
			}
			if w, taken := x.writers[c.Value]; taken {
				return nil, fmt.Errorf("value %q is written twice: %s; %s", c.Value, w.op, o)
			}
			x.writers[c.Value] = write{o, c.Key}
		}
		if o.Status == Applied && len(o.Cells) != len(o.Reads) {
			return nil, fmt.Errorf("%d keys were read and %d answered: %s", len(o.Reads), len(o.Cells), o)
		}
		for _, c := range o.Cells {
			if c.Exists && c.Revision > 0 && !slices.Contains(x.seen[c.Value], c.Revision) {
				x.seen[c.Value] = append(x.seen[c.Value], c.Revision)
			}
		}
	}
	return x, nil
}

// facts checks what needs no search.
func (x *histIndex) facts(ops []Op) []Violation {
	var out []Violation
	for i := range ops {
		for _, c := range ops[i].Cells {
			if v, bad := x.cell(&ops[i], c); bad {
				out = append(out, v)
			}
		}
	}
	for value, revs := range x.seen {
		w := x.writers[value]
		if w.op != nil && w.op.Status == Applied && w.op.Revision > 0 && !slices.Contains(revs, w.op.Revision) {
			revs = append(revs, w.op.Revision)
		}
		if len(revs) > 1 {
			slices.Sort(revs)
			group := "?"
			if w.op != nil {
				group = w.op.Group
			}
			out = append(out, Violation{DoubleApply, group, fmt.Sprintf("value %q is at the revisions %v; written by %v", value, revs, w.op)})
		}
	}
	return few(out)
}

// few keeps a limited number of each kind, in a fixed order.
func few(all []Violation) []Violation {
	slices.SortFunc(all, func(a, b Violation) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Text, b.Text))
	})
	n := map[ViolationKind]int{}
	return slices.DeleteFunc(all, func(v Violation) bool {
		n[v.Kind]++
		return n[v.Kind] > mostPerKind
	})
}

func (x *histIndex) cell(o *Op, c Cell) (Violation, bool) {
	if !c.Exists {
		return Violation{}, false
	}
	w, known := x.writers[c.Value]
	switch {
	case !known || w.key != c.Key:
		return Violation{Phantom, o.Group, fmt.Sprintf("nobody wrote what was read: %s", o)}, true
	case o.Return < w.op.Call:
		return Violation{Phantom, o.Group, fmt.Sprintf("read before it was written: %s; %s", o, w.op)}, true
	case w.op.Status == Refused || w.op.Status == Failed:
		return Violation{RefusedApplied, o.Group, fmt.Sprintf("%s; yet %s", w.op, o)}, true
	case o.Revision > 0 && c.Revision > o.Revision:
		return Violation{TornView, o.Group, o.String()}, true
	}
	return Violation{}, false
}

// resolve returns the revision of a transaction, if anybody learned it.
func (x *histIndex) resolve(o *Op) uint64 {
	if o.Revision > 0 || o.IsRead() {
		return o.Revision
	}
	for _, c := range o.Changes {
		if revs := x.seen[c.Value]; !c.Delete && len(revs) == 1 {
			return revs[0]
		}
	}
	if len(o.Changes) > 0 && o.Status != Refused {
		return unresolved + uint64(o.ID)
	}
	return 0
}

// group is what is searched as one.
type group struct {
	name  string
	steps []porcupine.Operation
	// idle are the operations of unknown outcome that left no trace: most
	// likely they never took effect. They are looked at only if needed.
	idle []porcupine.Operation
	err  error
}

func (x *histIndex) groups(ops []Op) []*group {
	byName := map[string]*group{}
	keys := map[string]map[string]int{}
	var out []*group
	for i := range ops {
		o := &ops[i]
		if o.Stale || o.Status == Failed || o.IsRead() && o.Status != Applied {
			continue
		}
		g := byName[o.Group]
		if g == nil {
			g = &group{name: o.Group}
			byName[o.Group], keys[o.Group] = g, map[string]int{}
			out = append(out, g)
		}
		number := func(key string) int {
			n, ok := keys[o.Group][key]
			if !ok {
				n = len(keys[o.Group])
				keys[o.Group][key] = n
			}
			if n >= MaxCells {
				g.err = fmt.Errorf("group %s has more than %d keys", o.Group, MaxCells)
				return 0
			}
			return n
		}
		p := &step{op: o, revision: x.resolve(o)}
		for _, k := range o.Reads {
			p.reads = append(p.reads, number(k))
		}
		for _, c := range o.Require {
			p.require = append(p.require, number(c.Key))
		}
		for _, c := range o.Changes {
			p.changes = append(p.changes, number(c.Key))
		}
		po := porcupine.Operation{ClientId: o.Client, Input: p, Call: o.Call, Return: o.Return}
		if o.Status == Unknown && p.revision >= unresolved {
			g.idle = append(g.idle, po)
			continue
		}
		g.steps = append(g.steps, po)
	}
	return out
}

// search looks at all groups, a few at a time.
func search(groups []*group, o Options, r *Report) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	next := make(chan *group)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for g := range next {
				result, text := g.search(o)
				mu.Lock()
				switch result {
				case porcupine.Illegal:
					r.Violations = append(r.Violations, Violation{NotLinearizable, g.name, text})
				case porcupine.Unknown:
					r.Undecided = append(r.Undecided, g.name+": "+text)
				case porcupine.Ok:
				}
				mu.Unlock()
			}
		})
	}
	for _, g := range groups {
		next <- g
	}
	close(next)
	wg.Wait()
	slices.SortFunc(r.Violations, func(a, b Violation) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Group, b.Group)) })
	slices.Sort(r.Undecided)
}

func (g *group) search(o Options) (porcupine.CheckResult, string) {
	if g.err != nil {
		return porcupine.Unknown, g.err.Error()
	}
	// A history that needs none of the idle ones is right without them: they
	// may as well never happen.
	first := porcupine.CheckOperationsTimeout(model(), g.steps, o.Search)
	if first == porcupine.Ok || len(g.idle) == 0 && first == porcupine.Unknown {
		return first, fmt.Sprintf("%d operations, no end of the search in %s", len(g.steps), o.Search)
	}
	all := append(slices.Clone(g.steps), g.idle...)
	result := porcupine.CheckOperationsTimeout(model(), all, o.Search)
	if result != porcupine.Illegal {
		return result, fmt.Sprintf("%d operations, no end of the search in %s", len(all), o.Search)
	}
	_, info := porcupine.CheckOperationsVerbose(model(), all, o.Search)
	text := explain(all, info)
	if o.Pictures != "" {
		name := filepath.Join(o.Pictures, strings.NewReplacer("/", "_", ":", "_").Replace(g.name)+".html")
		if err := porcupine.VisualizePath(model(), info, name); err != nil {
			text += "\n  no picture: " + err.Error()
		} else {
			text += "\n  picture: " + name
		}
	}
	return porcupine.Illegal, text
}

// explain tells how far an order goes and what does not follow.
func explain(all []porcupine.Operation, info porcupine.LinearizationInfo) string {
	var best []int
	for _, part := range info.PartialLinearizations() {
		for _, l := range part {
			if len(l) > len(best) {
				best = l
			}
		}
	}
	line := func(op porcupine.Operation) string { return "\n    " + op.Input.(*step).op.String() }
	var b strings.Builder
	fmt.Fprintf(&b, "no order explains %d operations; the longest explains %d, which ends with", len(all), len(best))
	done := map[int]bool{}
	for i, id := range best {
		done[id] = true
		if i >= len(best)-explained {
			b.WriteString(line(all[id]))
		}
	}
	b.WriteString("\n  and cannot go on with any of")
	var rest []porcupine.Operation
	for i, op := range all {
		if !done[i] {
			rest = append(rest, op)
		}
	}
	slices.SortFunc(rest, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	for i, op := range rest {
		if i == explained {
			break
		}
		b.WriteString(line(op))
	}
	return b.String()
}
