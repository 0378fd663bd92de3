// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
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

// Pauses after five failures within half a minute.
const (
	restartPause = 15 * time.Second
	// urgentPause is for what the node's lease and its VMs hang on.
	urgentPause = time.Second
)

var urgent = map[string]bool{"port": true, "rpc": true, "guard": true, "lease": true, "hypervisor": true, "leader": true, "leader/ha": true}

// newSupervisor returns what the services of supervise run under.
func newSupervisor(name string, log *slog.Logger) *suture.Supervisor {
	return suture.New(name, suture.Spec{EventHook: logSuture(log), Timeout: shutdownGrace + time.Second})
}

// logSuture logs how the services fare. The same failure of a service again is
// no news: it would fill the log.
func logSuture(log *slog.Logger) suture.EventHook {
	var mu sync.Mutex
	last := map[string]string{}
	return func(e suture.Event) {
		switch e := e.(type) {
		case suture.EventServiceTerminate:
			text := fmt.Sprint(e.Err)
			mu.Lock()
			level := slog.LevelWarn
			if last[e.ServiceName] == text {
				level = slog.LevelDebug
			}
			last[e.ServiceName] = text
			mu.Unlock()
			log.Log(context.Background(), level, "service ended", "service", e.ServiceName, "restarting", e.Restarting, "err", text)
		case suture.EventBackoff, suture.EventResume:
			log.Debug("service event", "event", e.String())
		default:
			log.Warn("service event", "event", e.String())
		}
	}
}

// supervise adds a service. Each has a supervisor of its own: one that fails
// often makes its supervisor pause, and that must not delay another's restart.
func (t *serviceTable) supervise(sup *suture.Supervisor, name string, run func(context.Context) error) {
	spec := suture.Spec{EventHook: logSuture(t.log), Timeout: shutdownGrace, FailureBackoff: restartPause}
	if urgent[name] {
		spec.FailureBackoff = urgentPause
	}
	own := suture.New(name, spec)
	own.Add(&watched{run, name, t})
	sup.Add(own)
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
