// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Retention.
const (
	// keepPercent of the limit is what is left after the history was over it, so
	// that not every change makes it prune again.
	keepPercent = 90
	// clockTolerance is how far in the future the time of a record may be to be
	// believed. One that is not decides nothing: a node with a wrong clock must
	// neither hold up the removal of what is old nor bring it on. Old by whose
	// clock? By the leader's.
	clockTolerance = time.Hour
)

// mark is what the decision needs of one record.
type mark struct {
	revision uint64
	key      string
	size     int64
	time     time.Time
	object   int // index
	ends     bool
}

// survey reads the marks of all records.
func survey(v *configdb.View) (marks []mark, total int64) {
	object, last := -1, ""
	for e := range v.Scan(configdb.HistoryRoot, "") {
		if _, _, ok := configdb.SplitHistoryKey(e.Key); !ok {
			continue
		}
		if of := e.Key[:strings.LastIndexByte(e.Key, '/')]; of != last {
			object, last = object+1, of
		}
		op, _ := configdb.HistoryEffect(e)
		m := mark{
			revision: e.Revision, key: e.Key, size: int64(sizeOf(e)), time: configdb.HistoryTime(e.Value), object: object,
			ends: op == configdb.HistoryDelete || op == configdb.HistoryGone,
		}
		marks = append(marks, m)
		total += m.size
	}
	slices.SortFunc(marks, func(a, b mark) int {
		return cmp.Or(cmp.Compare(a.revision, b.revision), strings.Compare(a.key, b.key))
	})
	return marks, total
}

// plan says what to remove. horizon is the new horizon, which is the old one if
// only what an interrupted removal left has to go.
type plan struct {
	horizon uint64
	reason  string
	keys    []string
	freed   int64
}

// decide raises the horizon revision by revision, oldest first, as long as the
// next one is too old, or the history too large. Below the horizon, each object
// keeps its newest record, if the object is there after it.
func decide(marks []mark, total int64, s api.HistorySettings, now time.Time, horizon uint64) plan {
	p := plan{horizon: horizon}
	old := oldUpTo(marks, s.MaxAge(), now)
	target := int64(s.MaxBytes)
	if total > target {
		target = target * keepPercent / 100
	}
	newest := map[int]int{} // by object, its newest record so far
	drop := func(i int) {
		p.keys = append(p.keys, marks[i].key)
		p.freed += marks[i].size
	}
	for from := 0; from < len(marks); {
		rev := marks[from].revision
		if rev > horizon && rev > old && total-p.freed <= target {
			break
		}
		before, to := len(p.keys), from
		for ; to < len(marks) && marks[to].revision == rev; to++ {
			m := &marks[to]
			if had, ok := newest[m.object]; ok {
				drop(had)
			}
			newest[m.object] = to
			if m.ends {
				drop(to)
				delete(newest, m.object)
			}
		}
		if len(p.keys) > before && rev > horizon {
			p.horizon, p.reason = rev, ReasonAge
			if rev > old {
				p.reason = ReasonSize
			}
		}
		from = to
	}
	return p
}

// oldUpTo returns the revision up to which everything is older than an age: the
// last record that is, before the first that is not.
func oldUpTo(marks []mark, age time.Duration, now time.Time) uint64 {
	var old uint64
	for i := range marks {
		m := &marks[i]
		switch {
		case m.time.After(now.Add(clockTolerance)):
		case m.time.After(now.Add(-age)):
			if old == m.revision {
				old-- // all of one revision go together
			}
			return old
		default:
			old = m.revision
		}
	}
	return old
}
