// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Report takes the samples of one run of a collector. It is closed when the
// run's deadline has passed.
type Report struct {
	store *Store
	from  string // name of the collector
	at    time.Time

	mu     sync.Mutex
	closed bool
}

// Set adds a sample, unless it comes too late.
func (r *Report) Set(name string, value float64, labels ...Label) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.store.set(r.from, r.at, name, value, labels)
	}
}

// At is the time of the run.
func (r *Report) At() time.Time { return r.at }

func (r *Report) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}

// Collector measures one thing.
type Collector struct {
	Name string
	// Period between runs and Deadline of one run.
	Period, Deadline time.Duration
	// Collect reports samples; it is never called twice at a time.
	Collect func(ctx context.Context, r *Report) error
}

// Runner runs collectors.
type Runner struct {
	store *Store
	log   *slog.Logger
	list  []Collector

	mu    sync.Mutex
	state map[string]api.CollectorState
}

// NewRunner returns a runner that does nothing until Run.
func NewRunner(store *Store, log *slog.Logger, list ...Collector) *Runner {
	return &Runner{store: store, log: log, list: list, state: map[string]api.CollectorState{}}
}

// Run collects until the context ends. It does not wait for a collector that
// is over its deadline then.
func (r *Runner) Run(ctx context.Context) error {
	group, ctx := contain.NewGroup(ctx)
	for _, c := range r.list {
		group.Go(func() { r.drive(ctx, c) })
	}
	return group.Wait()
}

// States returns how the collectors do, in the order they were given.
func (r *Runner) States() []api.CollectorState {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]api.CollectorState, 0, len(r.list))
	for _, c := range r.list {
		st := r.state[c.Name]
		st.Name = c.Name
		out = append(out, st)
	}
	return out
}

// drive runs one collector. running is closed when the run in the background
// has returned; while it has not, no other is begun.
func (r *Runner) drive(ctx context.Context, c Collector) {
	tick := time.NewTicker(c.Period)
	defer tick.Stop()
	var running chan error
	for {
		if running == nil {
			running = r.once(ctx, c)
		} else {
			select {
			case err := <-running: // a late run came back: the next one may begin
				r.log.Info("late collector came back", "collector", c.Name, "err", err)
				running = r.once(ctx, c)
			default:
			}
		}
		r.note(c, running != nil)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

var errLate = errors.New("no answer within the deadline")

// once runs the collector and waits for it at most its deadline. It returns
// the channel of a run that is late, else nil.
func (r *Runner) once(ctx context.Context, c Collector) chan error {
	rep := &Report{store: r.store, from: c.Name, at: r.store.now()}
	defer rep.close()
	cctx, cancel := context.WithTimeout(ctx, c.Deadline)
	defer cancel()
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		err := contain.Call(func() error { return c.Collect(cctx, rep) })
		var p *contain.Panic
		if errors.As(err, &p) {
			r.log.Error("collector panicked", "collector", c.Name, "panic", p.Value, "stack", p.Stack)
		}
		done <- err
	}()
	var late chan error
	var err error
	select {
	case err = <-done:
	case <-cctx.Done():
		select {
		case err = <-done: // it heeds the context
		case <-time.After(graceful):
			err, late = errLate, done
		}
	}
	if ctx.Err() != nil {
		return late
	}
	r.record(c, rep.at, time.Since(began), err, late != nil)
	return late
}

// graceful is how long a collector may take to return after its deadline.
const graceful = 100 * time.Millisecond

func (r *Runner) record(c Collector, at time.Time, took time.Duration, err error, late bool) {
	st := api.CollectorState{Name: c.Name, OK: err == nil, LastRun: at.UTC(), Seconds: took.Seconds(), Late: late}
	if err != nil {
		st.Error = err.Error()
	}
	r.mu.Lock()
	was, known := r.state[c.Name]
	r.state[c.Name] = st
	r.mu.Unlock()
	if err != nil && (!known || was.Error != st.Error) {
		r.log.Warn("collector failed", "collector", c.Name, "err", err)
	} else if err == nil && known && !was.OK {
		r.log.Info("collector works again", "collector", c.Name)
	}
}

// note stores the state as series, also while a late run blocks the next.
func (r *Runner) note(c Collector, late bool) {
	r.mu.Lock()
	st := r.state[c.Name]
	r.mu.Unlock()
	if st.LastRun.IsZero() {
		return
	}
	up := 0.0
	if st.OK && !late {
		up = 1
	}
	now := r.store.now()
	r.store.Set(now, CollectorUp, up, Label{"collector", c.Name})
	r.store.Set(now, CollectorTime, st.Seconds, Label{"collector", c.Name})
}
