// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// Defaults of Config.
const (
	DefaultWorkers    = 4
	DefaultMinBackoff = 200 * time.Millisecond
	DefaultMaxBackoff = 15 * time.Second
)

// Result says when to look again; zero means when something changes.
type Result struct{ After time.Duration }

// Func takes one step towards the wished state of one object.
type Func func(ctx context.Context, id string) (Result, error)

// Source names the keys that matter and maps a changed key to the ids of the
// objects to look at. View is the state after the change.
type Source struct {
	Prefix string
	IDs    func(v *configdb.View, c configdb.Change) []string
}

// Config describes a loop.
type Config struct {
	Name                   string // for the log
	DB                     configdb.DB
	Sources                []Source
	Reconcile              Func
	Workers                int
	MinBackoff, MaxBackoff time.Duration
	Log                    *slog.Logger
}

// Loop is one reconciler. Make it with New, then Run it; when Run has returned
// it may be run again.
type Loop struct {
	cfg   Config
	queue *queue
	// known are the keys of each source, also between two runs: what is deleted
	// meanwhile is missed by then.
	known []map[string]struct{}
}

// New returns a loop that does nothing until Run.
func New(cfg Config) *Loop {
	if cfg.Workers == 0 {
		cfg.Workers = DefaultWorkers
	}
	if cfg.MinBackoff == 0 {
		cfg.MinBackoff = DefaultMinBackoff
	}
	if cfg.MaxBackoff == 0 {
		cfg.MaxBackoff = DefaultMaxBackoff
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	l := &Loop{cfg: cfg, queue: newQueue(cfg.MinBackoff)}
	for range cfg.Sources {
		l.known = append(l.known, map[string]struct{}{})
	}
	return l
}

// Enqueue asks for a look at an object, for events from outside the database.
func (l *Loop) Enqueue(id string) { l.queue.add(id) }

// Run works until the context ends, which is not an error. A panic outside of
// Reconcile is: the loop cannot go on with a source that it does not follow.
func (l *Loop) Run(ctx context.Context) error {
	group, ctx := contain.NewGroup(ctx)
	errs := make(chan error, len(l.cfg.Sources))
	for i, s := range l.cfg.Sources {
		group.Go(func() {
			err := l.follow(ctx, s, &l.known[i])
			if ctx.Err() == nil {
				errs <- fmt.Errorf("%s: watch %s: %w", l.cfg.Name, s.Prefix, err)
				group.Cancel()
			}
		})
	}
	for range l.cfg.Workers {
		group.Go(func() { l.work(ctx) })
	}
	err := group.Wait()
	l.queue.rest()
	if err != nil {
		return fmt.Errorf("%s: %w", l.cfg.Name, err)
	}
	select {
	case err := <-errs:
		if !errors.Is(err, configdb.ErrClosed) {
			return err
		}
	default:
	}
	return nil
}

// follow enqueues what a source's changes are about. It remembers the keys of
// the source: a watch that had to begin anew does not name what was deleted
// meanwhile, and a deleted object is often the one that needs cleaning up.
func (l *Loop) follow(ctx context.Context, s Source, known *map[string]struct{}) error {
	return configdb.Follow(ctx, l.cfg.DB, s.Prefix, func(b configdb.Batch) error {
		v := l.cfg.DB.Local()
		gone := map[string]struct{}{}
		if b.Synced {
			gone, *known = *known, map[string]struct{}{}
		}
		for _, c := range b.Changes {
			delete(gone, c.Key)
			if c.Deleted {
				delete(*known, c.Key)
			} else {
				(*known)[c.Key] = struct{}{}
			}
			l.enqueue(s.IDs(v, c))
		}
		for key := range gone {
			l.enqueue(s.IDs(v, configdb.Change{Entry: configdb.Entry{Key: key, Revision: b.Revision}, Deleted: true}))
		}
		return nil
	})
}

func (l *Loop) enqueue(ids []string) {
	for _, id := range ids {
		l.queue.changed(id)
	}
}

func (l *Loop) work(ctx context.Context) {
	failures := func(id string, err error) time.Duration {
		n := l.queue.failed(id)
		d := l.cfg.MinBackoff << min(n, 16)
		if d > l.cfg.MaxBackoff || d <= 0 {
			d = l.cfg.MaxBackoff
		}
		l.cfg.Log.Warn("reconcile failed", "loop", l.cfg.Name, "id", id, "retry", d, "err", err)
		return d
	}
	for {
		id, ok := l.queue.take(ctx)
		if !ok {
			return
		}
		res, err := l.once(ctx, id)
		switch {
		case ctx.Err() != nil:
			l.queue.finish(id, 0)
		case errors.Is(err, configdb.ErrConflict):
			// The state moved on: look at it soon, but not ever faster if it lasts.
			n := l.queue.failed(id)
			l.queue.finish(id, min(l.cfg.MinBackoff/10<<min(n, 16), l.cfg.MaxBackoff))
		case err != nil:
			l.queue.finish(id, failures(id, err))
		default:
			l.queue.succeeded(id)
			l.queue.finish(id, res.After)
		}
	}
}

func (l *Loop) once(ctx context.Context, id string) (res Result, err error) {
	err = contain.Call(func() (err error) {
		res, err = l.cfg.Reconcile(ctx, id)
		return err
	})
	var p *contain.Panic
	if errors.As(err, &p) {
		l.cfg.Log.Error("reconcile panicked", "loop", l.cfg.Name, "id", id, "panic", p.Value, "stack", p.Stack)
	}
	return res, err
}
