// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// TestABugOrAHangOfOneServiceStopsNoOther runs services as the daemon does: one
// that panics in a goroutine of its own making, one that hangs and does not
// heed its context, and one that works.
func TestABugOrAHangOfOneServiceStopsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newServiceTable(slog.New(slog.DiscardHandler))
		sup := newSupervisor("test", table.log)
		add := func(name string, run func(context.Context) error) { table.supervise(sup, name, run) }
		var panics, ticks atomic.Int64
		add("buggy", func(ctx context.Context) error {
			group, ctx := contain.NewGroup(ctx)
			group.Go(func() {
				if panics.Add(1) <= 3 {
					panic("a bug")
				}
				<-ctx.Done()
			})
			return group.Wait()
		})
		hang := make(chan struct{})
		add("hangs", func(context.Context) error { <-hang; return nil })
		add("fails", func(context.Context) error { return errors.New("no such device") })
		add("works", func(ctx context.Context) error {
			for ctx.Err() == nil {
				ticks.Add(1)
				time.Sleep(time.Second)
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := sup.ServeBackground(ctx)
		time.Sleep(time.Minute) // fake time
		if n := ticks.Load(); n != 60 && n != 61 {
			t.Errorf("the good service did %d of 60 rounds", n)
		}
		got := map[string]api.ServiceStatus{}
		for _, s := range table.list("m1") {
			got[s.Name] = s
		}
		if s := got["buggy"]; s.State != api.ServiceRunning || s.Restarts != 3 || s.LastError != "panic: a bug" || s.EndedAt == nil {
			t.Errorf("the one with the bug: %+v", s)
		}
		if s := got["fails"]; s.Restarts < 4 || !strings.Contains(s.LastError, "no such device") {
			t.Errorf("the one that fails: %+v", s)
		}
		if s := got["works"]; s.State != api.ServiceRunning || s.Restarts != 0 || s.LastError != "" || s.Node != "m1" {
			t.Errorf("the one that works: %+v", s)
		}
		began := time.Now()
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Logf("the supervisor says: %v", err)
		}
		if took := time.Since(began); took > shutdownGrace+2*time.Second {
			t.Errorf("the end took %s for the sake of the one that hangs", took)
		}
		close(hang)
		synctest.Wait()
		if s := table.list("m1"); s[0].Name != "buggy" || s[0].State != api.ServiceDone {
			t.Errorf("at the end: %+v", s)
		}
	})
}

// TestARequestUnderWayIsAnsweredBeforeTheEnd: the request may be what ends the daemon,
// the removal of its node.
func TestARequestUnderWayIsAnsweredBeforeTheEnd(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	d := &Daemon{log: log, sup: newSupervisor("test", log), table: newServiceTable(log)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked, ending, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-ending
		select {
		case <-ended:
			t.Error("the services ended before the answer")
		case <-time.After(300 * time.Millisecond):
		}
		w.WriteHeader(http.StatusNoContent)
	})}
	// Shutdown has begun, and the listener is closed.
	srv.RegisterOnShutdown(func() { close(ending) })
	d.serve("web", srv, ln)
	ctx, cancel := context.WithCancel(t.Context())
	done := d.sup.ServeBackground(ctx)
	answer := make(chan error, 1)
	go func() {
		r, err := http.Get("http://" + ln.Addr().String())
		if err == nil && r.StatusCode != http.StatusNoContent {
			err = errors.New(r.Status)
		}
		answer <- err
	}()
	<-asked
	cancel()
	<-done
	close(ended)
	if err := <-answer; err != nil {
		t.Error(err)
	}
}

// TestAServiceThatFailsAllTheTimeDelaysNoOtherRestart: an SNMP port in use must
// not keep the lease from being renewed.
func TestAServiceThatFailsAllTheTimeDelaysNoOtherRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newServiceTable(slog.New(slog.DiscardHandler))
		sup := newSupervisor("test", table.log)
		table.supervise(sup, "snmp", func(context.Context) error { return errors.New("the port is in use") })
		var mu sync.Mutex
		var began []time.Time
		table.supervise(sup, "lease", func(ctx context.Context) error {
			mu.Lock()
			began = append(began, time.Now())
			n := len(began)
			mu.Unlock()
			if n > 8 {
				<-ctx.Done()
				return nil
			}
			time.Sleep(3 * time.Second)
			return errors.New("a failure now and then")
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := sup.ServeBackground(ctx)
		time.Sleep(2 * time.Minute)
		mu.Lock()
		defer mu.Unlock()
		for i := range len(began) - 1 {
			if pause := began[i+1].Sub(began[i]) - 3*time.Second; pause > 1500*time.Millisecond {
				t.Errorf("restart %d took %s", i, pause)
			}
		}
		if len(began) != 9 {
			t.Errorf("the good one began %d times", len(began))
		}
		var failing api.ServiceStatus
		for _, s := range table.list("m1") {
			if s.Name == "snmp" {
				failing = s
			}
		}
		if failing.Restarts < 4 || failing.Restarts > 60 || failing.LastError != "the port is in use" {
			t.Errorf("the one that fails all the time: %+v", failing)
		}
		cancel()
		<-done
	})
}
