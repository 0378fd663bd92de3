// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Retention.
const (
	// MaxEvents is how many events are kept.
	MaxEvents = 10_000
	// MaxLogins is how many of them may be logins and logouts when there are
	// more events than that.
	MaxLogins = 2000
	// MaxResolved is how many resolved alerts are kept.
	MaxResolved = 500
	sweepEvery  = time.Minute
	// sweepBatch is how many objects go in one transaction, and sweepPause the
	// rest between two, so that a sweep never stands in the way of work.
	sweepBatch = 200
	sweepPause = 50 * time.Millisecond
)

// retention is how many of each are kept.
type retention struct{ events, logins, resolved int }

// sweepLoop removes what is beyond the limits.
func (s *Service) sweepLoop(ctx context.Context, term uint64) {
	tick := time.NewTicker(s.timing.sweep)
	defer tick.Stop()
	for {
		for more := true; more && ctx.Err() == nil; {
			var err error
			if more, err = s.sweep(ctx, term); err != nil {
				if ctx.Err() == nil {
					s.log.Warn("old events not removed", "err", err)
				}
				break
			}
			if more {
				select {
				case <-time.After(sweepPause):
				case <-ctx.Done():
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// sweep removes one batch; more says that there is another.
func (s *Service) sweep(ctx context.Context, term uint64) (more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	v := s.db.Local()
	tx := &configdb.Txn{Actor: Actor}
	n := s.keep.oldEvents(v, tx)
	n += s.keep.oldAlerts(v, tx)
	if n == 0 {
		return false, nil
	}
	tx.RequireTerm(term)
	_, err = s.db.Txn(ctx, tx)
	return n >= sweepBatch, err
}

// oldEvents deletes the oldest events beyond the limit: their IDs sort by time.
// Logins beyond theirs go first: anybody with a key can make them all day long,
// and must not push out what was done meanwhile.
func (r retention) oldEvents(v *configdb.View, tx *configdb.Txn) int {
	count := 0
	for range v.Scan(configdb.Events.SpecPrefix(), "") {
		count++
	}
	n := min(count-r.events, sweepBatch)
	if n <= 0 {
		return 0
	}
	var logins, others []string
	for e := range v.Scan(configdb.Events.SpecPrefix(), "") {
		if isLogin(e.Value) {
			logins = append(logins, e.Key)
		} else {
			others = append(others, e.Key)
		}
	}
	victims := logins[:min(n, max(0, len(logins)-r.logins))]
	if rest := n - len(victims); rest > 0 {
		left := slices.Concat(logins[len(victims):], others)
		slices.Sort(left)
		victims = append(slices.Clone(victims), left[:rest]...)
	}
	for _, key := range victims {
		id, _ := configdb.Events.IDOf(key)
		tx.Delete(key)
		if status := configdb.Events.StatusKey(id); hasKey(v, status) { // of an older version
			tx.Delete(status)
		}
	}
	return n
}

func hasKey(v *configdb.View, key string) bool {
	_, ok := v.Get(key)
	return ok
}

// isLogin reports that a stored event is of a login or its end.
func isLogin(value []byte) bool {
	if !bytes.Contains(value, []byte("audit.log")) { // most are not, and decoding all takes long
		return false
	}
	var e struct {
		Spec struct {
			Type string `json:"type"`
		} `json:"spec"`
	}
	if json.Unmarshal(value, &e) != nil {
		return false
	}
	return e.Spec.Type == "audit.login" || e.Spec.Type == "audit.logout"
}

// oldAlerts deletes the alerts that were resolved longest ago.
func (r retention) oldAlerts(v *configdb.View, tx *configdb.Txn) int {
	all, _ := configdb.Alerts.List(v) // what cannot be read is logged by the evaluation
	resolved := slices.DeleteFunc(all, func(a api.Alert) bool { return a.Status.Phase != api.AlertResolved || a.Status.ResolvedAt == nil })
	n := min(len(resolved)-r.resolved, sweepBatch)
	if n <= 0 {
		return 0
	}
	slices.SortFunc(resolved, func(a, b api.Alert) int {
		return cmp.Or(a.Status.ResolvedAt.Compare(*b.Status.ResolvedAt), cmp.Compare(a.Meta.ID, b.Meta.ID))
	})
	for i := range resolved[:n] {
		// Only as it was read: it may begin anew meanwhile.
		tx.RequireRevision(configdb.Alerts.StatusKey(resolved[i].Meta.ID), resolved[i].Meta.StatusRevision)
		configdb.Alerts.DeleteUnnamed(tx, &resolved[i])
	}
	return n
}
