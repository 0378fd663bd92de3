// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

// With returns a view as it would be after changes: what somebody who decides
// several steps of one transaction sees before the later ones. The revision
// and the revisions of entries that the changes leave alone stay; a changed
// entry keeps the revision that it has in v, 0 if it has none there, because
// that is what a precondition would be checked against. Nothing of it is in the
// state machine.
func (v *View) With(ops []Op) *View {
	v.copying.Lock()
	tree := v.tree.Copy()
	v.copying.Unlock()
	for _, op := range ops {
		if op.Delete {
			tree.Delete(op.Key)
			continue
		}
		old, _ := v.tree.Get(op.Key)
		tree.Set(op.Key, item{value: op.Value, revision: old.revision, created: old.created})
	}
	return &View{tree: tree, revision: v.revision, term: v.term, time: v.time, bytes: v.bytes, level: v.level}
}
