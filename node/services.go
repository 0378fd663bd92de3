// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/thejerf/suture/v4"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// serviceTable remembers how the supervised services fare.
type serviceTable struct {
	log *slog.Logger
	mu  sync.Mutex
	all map[string]*api.ServiceStatus
}

func newServiceTable(log *slog.Logger) *serviceTable {
	return &serviceTable{log: log, all: map[string]*api.ServiceStatus{}}
}

// list returns the services in order of name.
func (t *serviceTable) list(node string) []api.ServiceStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]api.ServiceStatus, 0, len(t.all))
	for _, name := range slices.Sorted(maps.Keys(t.all)) {
		s := *t.all[name]
		s.Node = node
		out = append(out, s)
	}
	return out
}

// watched is a service that the table watches. A panic is an error of the
// service: the supervisor starts it again and the others go on.
type watched struct {
	run   func(ctx context.Context) error
	name  string
	table *serviceTable
}

// String names the service in the supervisor's log.
func (w *watched) String() string { return w.name }

// Serve implements suture.Service.
func (w *watched) Serve(ctx context.Context) error {
	w.table.began(w.name)
	err := contain.Call(func() error { return w.run(ctx) })
	var p *contain.Panic // of this goroutine or of one that the service started
	if errors.As(err, &p) {
		w.table.log.Error("service panicked", "service", w.name, "panic", p.Value, "stack", p.Stack)
	}
	w.table.ended(w.name, err, ctx.Err() != nil)
	return err
}

func (t *serviceTable) began(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.all[name]
	if s == nil {
		s = &api.ServiceStatus{Name: name}
		t.all[name] = s
	}
	if s.State == api.ServiceWaiting {
		s.Restarts++
	}
	s.State, s.StartedAt = api.ServiceRunning, time.Now().UTC()
}

// ended records the end of a run. One that was asked for is no failure.
func (t *serviceTable) ended(name string, err error, asked bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, now := t.all[name], time.Now().UTC()
	s.EndedAt, s.LastSeconds = &now, now.Sub(s.StartedAt).Seconds()
	switch {
	case asked || errors.Is(err, suture.ErrDoNotRestart):
		s.State = api.ServiceDone
	default:
		s.State = api.ServiceWaiting
		s.LastError = "ended without a reason"
		if err != nil {
			s.LastError = err.Error()
		}
	}
}
