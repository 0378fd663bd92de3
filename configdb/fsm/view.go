// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"iter"
	"strings"
	"sync"

	"github.com/tidwall/btree"
)

// Entry is one key with its value. The value must not be changed.
type Entry struct {
	Key   string
	Value []byte
	// Revision of the last change and of the creation.
	Revision, Created uint64
}

type item struct {
	value             []byte
	revision, created uint64
}

// View is the whole state at one revision. It is immutable and may be read
// from any number of goroutines for any length of time.
type View struct {
	tree     *btree.Map[string, item]
	revision uint64
	term     uint64
	time     int64
	bytes    int64
	level    int
	// copying: a copy of a tree marks the original, too, and many may want one.
	copying sync.Mutex
}

// Revision is the Raft index of the last entry that this view contains.
func (v *View) Revision() uint64 { return v.revision }

// Term is the Raft term of that entry.
func (v *View) Term() uint64 { return v.term }

// Time is the leader's clock in that entry, nanoseconds since 1970.
func (v *View) Time() int64 { return v.time }

// LogLevel is the highest feature level that an entry up to this one named, at
// least 1. A snapshot of the view names it.
func (v *View) LogLevel() int { return v.level }

// Len returns the number of keys.
func (v *View) Len() int { return v.tree.Len() }

// Bytes returns the size of all keys and values.
func (v *View) Bytes() int64 { return v.bytes }

// Get returns one key.
func (v *View) Get(key string) (Entry, bool) {
	it, ok := v.tree.Get(key)
	if !ok {
		return Entry{}, false
	}
	return Entry{Key: key, Value: it.value, Revision: it.revision, Created: it.created}, true
}

// Scan yields the keys that begin with prefix and are greater than after, in
// order of bytes.
func (v *View) Scan(prefix, after string) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		from := max(prefix, after)
		v.tree.Ascend(from, func(key string, it item) bool {
			if !strings.HasPrefix(key, prefix) {
				return false
			}
			if key == after && after != "" {
				return true
			}
			return yield(Entry{Key: key, Value: it.value, Revision: it.revision, Created: it.created})
		})
	}
}

// Empty reports whether no key begins with prefix.
func (v *View) Empty(prefix string) bool { return treeEmpty(v.tree, prefix) }

func treeEmpty(t *btree.Map[string, item], prefix string) bool {
	empty := true
	t.Ascend(prefix, func(key string, _ item) bool {
		empty = !strings.HasPrefix(key, prefix)
		return false
	})
	return empty
}
