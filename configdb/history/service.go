// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// Actor is recorded with everything that the service writes.
const Actor = "history"

// Timing and limits of the service.
const (
	// lookEvery is how often the service adds up what was recorded meanwhile.
	lookEvery = time.Minute
	// levelLook is how often it looks whether the cluster's feature level has a
	// history at last.
	levelLook = 2 * time.Second
	// surveyEvery is how often it reads all records: for their age, and to find
	// changes that were not recorded. At 10,000 VMs with four records each that
	// takes some 40 ms.
	surveyEvery = time.Hour
	// batch is how many records one transaction removes or adds, pause the rest
	// between two, so that they never stand in the way of work.
	batch        = 200
	pause        = 50 * time.Millisecond
	writeTimeout = 10 * time.Second
	// completeRounds is how often one survey looks for changes without a record.
	completeRounds = 10
)

// ServiceConfig describes a Service. DB must be set.
type ServiceConfig struct {
	DB  configdb.DB
	Log *slog.Logger
	Now func() time.Time
}

// Service begins the history, notes what was not recorded and removes what is
// beyond the limits. It runs on the leader.
type Service struct {
	cfg ServiceConfig
	log *slog.Logger
	db  configdb.DB
	// look and survey are shortened by tests.
	look, survey time.Duration
}

// New returns a service that does nothing until Run.
func New(cfg ServiceConfig) *Service {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Service{cfg: cfg, log: cfg.Log, db: cfg.DB, look: lookEvery, survey: surveyEvery}
}

// Run does the leader's work in one Raft term until the context ends, which is
// not an error.
func (s *Service) Run(ctx context.Context, term uint64) error {
	c := counter{db: s.db}
	tick := time.NewTicker(s.look)
	defer tick.Stop()
	raised := time.NewTicker(min(s.look, levelLook))
	defer raised.Stop()
	for {
		v := s.db.Local()
		settings := Settings(v)
		if now := s.cfg.Now(); feature.History.InForce(v) && c.due(settings, now, s.survey) {
			left, at, err := s.keep(ctx, term)
			if err == nil {
				c.surveyed(left, at, settings, now)
			} else if ctx.Err() == nil {
				s.log.Warn("history not kept within its limits; it is tried again", "err", err)
			}
		}
		if feature.History.InForce(v) {
			raised.Stop()
		}
		select {
		case <-raised.C:
		case <-tick.C:
			c.count(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// counter knows how large the history is between two surveys: it adds up what
// is recorded. What is removed only the service removes.
type counter struct {
	db       configdb.DB
	total    int64
	watch    *configdb.Watch
	at       time.Time // of the last survey, zero if there has to be one
	settings api.HistorySettings
}

func (c *counter) due(s api.HistorySettings, now time.Time, every time.Duration) bool {
	return c.at.IsZero() || s != c.settings || c.total > int64(s.MaxBytes) || now.Sub(c.at) >= every
}

func (c *counter) surveyed(total int64, revision uint64, s api.HistorySettings, now time.Time) {
	c.total, c.at, c.settings = total, now, s
	c.watch = c.db.Watch(configdb.HistoryRoot, max(revision, 1))
}

// count adds up what was recorded since the last count.
func (c *counter) count(ctx context.Context) {
	if c.watch == nil {
		return
	}
	over, cancel := context.WithCancel(ctx)
	cancel() // only what is there already
	b, err := c.watch.Next(over)
	if err != nil && !errors.Is(err, context.Canceled) {
		c.at = time.Time{} // too far behind
		return
	}
	for _, ch := range b.Changes {
		if !ch.Deleted {
			c.total += int64(sizeOf(ch.Entry))
		}
	}
}

// keep brings the history up to date and within its limits. It returns how
// large it then is, at which revision.
func (s *Service) keep(ctx context.Context, term uint64) (left int64, revision uint64, err error) {
	if err := s.complete(ctx, term); err != nil {
		return 0, 0, err
	}
	v := s.db.Local()
	marks, total := survey(v)
	h, hrev, ok := HorizonOf(v)
	if !ok {
		return total, v.Revision(), nil
	}
	p := decide(marks, total, Settings(v), s.cfg.Now(), h.Revision)
	err = s.remove(ctx, term, p, h, hrev)
	return total - p.freed, v.Revision(), err
}

// remove carries out a plan. The horizon is raised before or with the first
// removal: whoever reads at or above it misses nothing.
func (s *Service) remove(ctx context.Context, term uint64, p plan, h Horizon, hrev uint64) error {
	for i := 0; i < len(p.keys); i += batch {
		tx := &configdb.Txn{Actor: Actor}
		if i == 0 && p.horizon > h.Revision {
			if err := putHorizon(tx, hrev, Horizon{Revision: p.horizon, Reason: p.reason, Since: s.cfg.Now().UTC()}); err != nil {
				return err
			}
		}
		for _, key := range p.keys[i:min(i+batch, len(p.keys))] {
			tx.Delete(key)
		}
		if err := s.write(ctx, term, tx); err != nil {
			return err
		}
	}
	if len(p.keys) > 0 {
		s.log.Info("old changes removed from the history", "records", len(p.keys), "bytes", p.freed, "horizon", p.horizon, "reason", p.reason)
	}
	return nil
}

func putHorizon(tx *configdb.Txn, revision uint64, h Horizon) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	tx.RequireRevision(configdb.HistoryHorizonKey, revision)
	tx.Put(configdb.HistoryHorizonKey, b)
	return nil
}

// write commits one transaction in the service's term, then rests.
func (s *Service) write(ctx context.Context, term uint64, tx *configdb.Txn) error {
	wctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	tx.RequireTerm(term)
	if _, err := s.db.Txn(wctx, tx); err != nil {
		return err
	}
	select {
	case <-time.After(pause):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// complete records what was not recorded when it was changed: all objects when
// the history begins, later what nodes of an older version changed.
func (s *Service) complete(ctx context.Context, term uint64) error {
	for range completeRounds {
		v := s.db.Local()
		gaps, found := unrecorded(v)
		for i := 0; i < len(gaps); i += batch {
			tx := &configdb.Txn{Actor: Actor}
			for _, g := range gaps[i:min(i+batch, len(gaps))] {
				s.note(tx, &g)
			}
			if err := s.write(ctx, term, tx); err != nil {
				return err
			}
		}
		if len(gaps) > 0 {
			s.log.Info("changes that were not recorded are in the history now", "objects", len(gaps))
			continue // until a view has none: others change objects meanwhile
		}
		if _, _, ok := HorizonOf(v); ok {
			return nil
		}
		// What no record says that it was found has one from its creation on.
		h := Horizon{Reason: ReasonBegun, Since: s.cfg.Now().UTC()}
		if found {
			h.Revision = v.Revision()
		}
		tx := &configdb.Txn{Actor: Actor}
		if err := putHorizon(tx, 0, h); err != nil {
			return err
		}
		return s.write(ctx, term, tx)
	}
	return fmt.Errorf("objects keep changing without a record, through %d rounds", completeRounds)
}

// hole is an object whose newest change has no record.
type hole struct {
	Object
	last uint64          // revision of its newest record
	spec *configdb.Entry // nil: it is gone
	// name and project of one that is gone.
	name, project string
}

// unrecorded returns the objects whose newest change has no record; found
// reports whether there is any record of an earlier such case.
func unrecorded(v *configdb.View) (holes []hole, found bool) {
	last := map[Object]configdb.Entry{}
	for e := range v.Scan(configdb.HistoryRoot, "") {
		kind, id, ok := configdb.SplitHistoryKey(e.Key)
		if !ok {
			continue
		}
		op, _ := configdb.HistoryEffect(e)
		found = found || op == configdb.HistoryFound
		if o := (Object{kind, id}); last[o].Revision <= e.Revision {
			last[o] = e
		}
	}
	for _, kind := range configdb.HistoryKinds() {
		for e := range v.Scan(configdb.SpecPrefixOf(kind), "") {
			o := Object{kind, e.Key[len(configdb.SpecPrefixOf(kind)):]}
			if last[o].Revision < e.Revision && !strings.Contains(o.ID, "/") {
				holes = append(holes, hole{Object: o, last: last[o].Revision, spec: &e})
			}
			delete(last, o)
		}
	}
	for o, e := range last {
		r, err := configdb.DecodeHistoryHead(e.Value)
		if err == nil && r.Exists() && configdb.HasHistory(o.Kind) {
			holes = append(holes, hole{Object: o, last: e.Revision, name: r.Name, project: r.Project})
		}
	}
	return holes, found
}

func (s *Service) note(tx *configdb.Txn, g *hole) {
	r := configdb.HistoryRecord{Time: s.cfg.Now(), Actor: Actor, Name: g.name, Project: g.project, Note: "noticed; who changed it was not recorded"}
	if g.spec != nil {
		var stored struct {
			Meta api.Meta `json:"meta"`
		}
		if err := json.Unmarshal(g.spec.Value, &stored); err != nil {
			s.log.Error("object without readable metadata in the history", "key", g.spec.Key, "err", err)
		}
		r.Name, r.Project = stored.Meta.Name, stored.Meta.Project
	}
	tx.Unrecorded(g.Kind, g.ID, g.last, g.spec, r)
}
