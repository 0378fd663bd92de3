// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// promiseKey holds what was last told of the promise.
	promiseKey = configdb.Root + "ha/promise"
	// promiseSettle is how long the promise must be as it is before it is told:
	// while VMs are being moved it changes with each.
	promiseSettle = 5 * time.Second
	promiseWrite  = 5 * time.Second
	promiseTries  = 4
)

// promiseMark is what was told.
type promiseMark struct {
	Broken bool `json:"broken"`
}

// Tell writes an event when the promise breaks and when it can be kept again. It
// runs on the leader, in one term, beside Run.
func (o *Outlook) Tell(ctx context.Context, term uint64) error {
	for {
		if a, _, ok := o.Promise(); ok {
			if err := o.tell(ctx, term, a); err != nil && ctx.Err() == nil {
				o.log.Warn("not told whether failures of nodes are survived", "err", err)
			}
		}
		select {
		case <-o.news:
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(promiseSettle):
		case <-ctx.Done():
			return nil
		}
	}
}

// tell commits the event with the mark that says that it was written.
func (o *Outlook) tell(ctx context.Context, term uint64, a api.HAAdmission) error {
	ctx, cancel := context.WithTimeout(ctx, promiseWrite)
	defer cancel()
	_, err := configdb.Transact(ctx, o.db, Actor, promiseTries, func(v *configdb.View, tx *configdb.Txn) error {
		var was promiseMark
		e, _ := v.Get(promiseKey)
		if len(e.Value) > 0 {
			if err := json.Unmarshal(e.Value, &was); err != nil {
				return fmt.Errorf("decode %s: %w", promiseKey, err)
			}
		}
		now := promiseMark{Broken: !a.Kept && a.Admission != api.AdmissionOff}
		if now == was {
			return nil
		}
		b, err := json.Marshal(now)
		if err != nil {
			return err
		}
		tx.RequireTerm(term)
		tx.RequireRevision(promiseKey, e.Revision)
		tx.Put(promiseKey, b)
		ev := promiseEvent(a, now.Broken, o.now())
		return configdb.PutEvent(tx, &ev)
	})
	return err
}

func promiseEvent(a api.HAAdmission, broken bool, now time.Time) api.Event {
	nodes := "node"
	if a.Failures > 1 {
		nodes = "nodes together"
	}
	switch {
	case broken:
		return api.NewEvent("ha.promise-broken", api.SeverityWarning, api.KindCluster, api.Meta{},
			fmt.Sprintf("the loss of %d %s would not be survived: %s", a.Failures, nodes, a.Message), now)
	case a.Admission == api.AdmissionOff:
		return api.NewEvent("ha.promise-off", api.SeverityInfo, api.KindCluster, api.Meta{}, "admission control is off: no failure is promised to be survived", now)
	}
	return api.NewEvent("ha.promise-kept", api.SeverityInfo, api.KindCluster, api.Meta{}, fmt.Sprintf("the loss of %d %s is survived again", a.Failures, nodes), now)
}
