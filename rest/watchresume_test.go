// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/client"
)

// socketServer serves node m1 on a unix socket and returns what ends it.
func (f *fixture) socketServer(path string) (stop func()) {
	f.t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		f.t.Fatal(err)
	}
	s := f.servers["m1"]
	srv, done := s.HTTPServer(s.LocalHandler()), make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), watchPatience)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			f.t.Error(err)
		}
		<-done
		f.eventually("the streams do not end", func() bool { return len(s.watches) == 0 })
	}
}

// overrun makes more changes than are kept for those who resume.
func (f *fixture) overrun() {
	f.t.Helper()
	for range 2*fsm.HistoryLength/1000 + 2 {
		f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
			for i := range 1000 {
				tx.Put(fmt.Sprintf("fill/%d", i), nil)
			}
			return nil
		})
	}
}

func (f *fixture) removeVM(name string) {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Find(v, api.DefaultProject, name)
		if err == nil {
			configdb.VMs.Delete(tx, &o)
		}
		return err
	})
}

// The client goes on where it left off, through a node that was restarted
// meanwhile, and begins anew, with a relist, when what it missed is not kept
// any more.
func TestTheClientResumesAndRelistsThroughARestartedNode(t *testing.T) {
	c := storetest.NewCluster(t, 1)
	node := c.Leader()
	f := newFixtureOn(t, node)
	path := filepath.Join(t.TempDir(), "s")
	stop := f.socketServer(path)
	cl, err := client.New(client.Config{Servers: []string{"unix://" + path}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	type told struct {
		text     string
		revision uint64
	}
	events, ctx := make(chan told), t.Context()
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		ended <- cl.Watch(ctx, client.WatchOptions{Kinds: []api.Kind{api.KindVM}, MaxOutage: time.Hour}, func(e client.Event) error {
			text := e.Type
			if e.Type == client.EventPut {
				text += " " + client.MetaOf(e.Object).Name
			}
			select {
			case events <- told{text, e.Revision}:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	expect := func(list ...string) {
		t.Helper()
		for _, want := range list {
			select {
			case got := <-events:
				if got.text != want {
					t.Fatalf("event %q, want %q of %q", got.text, want, list)
				}
			case <-time.After(watchPatience):
				t.Fatalf("no event, want %q", want)
			}
		}
	}
	expect("synced")
	f.newVM("a", api.VMStopped)
	f.newVM("b", api.VMStopped)
	// Each was created and reported, which may come as one event.
	for last, got := f.rev(), (told{}); got.revision < last; {
		if got = <-events; !strings.HasPrefix(got.text, "put ") {
			t.Fatal(got)
		}
	}

	// A short time: what was missed, no more, no less.
	stop()
	f.removeVM("a")
	node.Stop()
	node.Start()
	c.Leader()
	f.report(f.vm("b").Meta.ID, api.VMFailed)
	stop = f.socketServer(path)
	expect("delete", "put b")

	// A long one.
	stop()
	f.removeVM("b")
	f.newVM("c", api.VMStopped)
	f.overrun()
	node.Stop()
	node.Start()
	c.Leader()
	stop = f.socketServer(path)
	expect("relist", "put c", "synced")
	f.report(f.vm("c").Meta.ID, api.VMFailed)
	expect("put c")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v", err)
	}
	stop()
}

// A node that began a moment ago has less than a client has seen, and no leader
// to ask. The client is not taken back: it waits until the node has caught up.
func TestAResumingWatchWaitsForANodeThatIsBehind(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped)
	const ahead = 10
	for name, open := range map[string]func(uint64) stream{
		"WebSocket":          func(since uint64) stream { return f.ws(fmt.Sprintf("kinds=vm&since=%d", since)) },
		"server-sent events": func(since uint64) stream { return f.sse("kinds=vm", "Last-Event-ID", fmt.Sprint(since)) },
	} {
		t.Run(name, func(t *testing.T) {
			seen := f.rev() + ahead
			f.db.alone.Store(true)
			defer f.db.alone.Store(false)
			asked := f.db.asked.Load()
			got := make(chan string, 1)
			go func() {
				e, _, err := open(seen).next()
				got <- fmt.Sprint(e, err)
			}()
			f.eventually("nobody asked the cluster twice", func() bool { return f.db.asked.Load() >= asked+2 })
			for f.db.Local().Revision() < seen {
				tx := &configdb.Txn{}
				tx.Put("other", nil)
				if _, err := f.db.DB.Txn(t.Context(), tx); err != nil {
					t.Fatal(err)
				}
			}
			if e := <-got; e != fmt.Sprint(vmEvent{Type: "synced", Revision: seen}, nil) {
				t.Errorf("the first event is %s", e)
			}
		})
	}
}

// A node that begins from a snapshot, after a restart or because it was away for
// long, has nothing of what went before: who wants that begins anew.
func TestWatchThroughANodeThatBeganFromASnapshot(t *testing.T) {
	old := storetest.New(t)
	f := newFixtureOn(t, old)
	f.newVM("a", api.VMStopped)
	before := f.rev() - 1
	var b bytes.Buffer
	if _, err := old.Snapshot().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	at := f.rev()
	state := fsm.New()
	if err := state.Restore(&b); err != nil {
		t.Fatal(err)
	}
	fresh := configdb.NewOffline(state, 1)
	t.Cleanup(fresh.Close)
	f.db.DB = fresh
	for name, open := range map[string]func(uint64) stream{
		"WebSocket":          func(since uint64) stream { return f.ws(fmt.Sprintf("kinds=vm&since=%d", since)) },
		"server-sent events": func(since uint64) stream { return f.sse("kinds=vm", "Last-Event-ID", fmt.Sprint(since)) },
	} {
		t.Run(name, func(t *testing.T) {
			open(before).want("relist", "put vm a", "synced")
			open(at).want("synced")
		})
	}
}
