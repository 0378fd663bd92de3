// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// socketBuffer is how much the system keeps of a connection, so that few
	// messages are enough for a client that takes nothing to be felt.
	socketBuffer = 128 << 10
	bigMessage   = 32 << 10
	bigVMs       = 64
	// stalledBytes is how much a client that takes nothing may cost: one message
	// that is being sent, the buffers of its connection, and what is to follow
	// as identifiers.
	stalledBytes   = 512 << 10
	watchPatience  = time.Minute
	stalledClients = 20
)

// smallBuffers limits what the system keeps for the clients.
type smallBuffers struct{ net.Listener }

func (l smallBuffers) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return c, c.(*net.TCPConn).SetWriteBuffer(socketBuffer)
}

// serveAgain serves node m1 at another address.
func (f *fixture) serveAgain(change func(*httptest.Server)) *httptest.Server {
	f.t.Helper()
	s := f.servers["m1"]
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = s.HTTPServer(s.Handler())
	change(srv)
	f.t.Cleanup(srv.Close)
	f.urls["m1"] = srv.URL
	return srv
}

func (f *fixture) smallSockets() {
	f.serveAgain(func(srv *httptest.Server) {
		srv.Listener = smallBuffers{srv.Listener}
		srv.Start()
	})
}

// deaf opens a watch whose client will read when it is told to.
func (f *fixture) deaf(query string) *websocket.Conn {
	f.t.Helper()
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return c, c.(*net.TCPConn).SetReadBuffer(socketBuffer)
	}}}
	c, _, err := websocket.Dial(f.t.Context(), f.urls["m1"]+base+"watch?"+query, &websocket.DialOptions{
		HTTPClient: hc, HTTPHeader: http.Header{"Authorization": {"Bearer " + f.tokens[api.RoleViewer]}},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = c.CloseNow() })
	c.SetReadLimit(1 << 20)
	return c
}

func (f *fixture) readEvent(c *websocket.Conn) (e vmEvent, err error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), watchPatience)
	defer cancel()
	_, b, err := c.Read(ctx)
	if err != nil {
		return e, err
	}
	return e, json.Unmarshal(b, &e)
}

// until reads up to an event and returns how many there were.
func (f *fixture) until(c *websocket.Conn, ok func(vmEvent) bool) (last vmEvent, n int) {
	f.t.Helper()
	for {
		e, err := f.readEvent(c)
		if err != nil {
			f.t.Fatalf("after %d events: %v", n, err)
		}
		if n++; ok(e) {
			return e, n
		}
	}
}

func synced(e vmEvent) bool { return e.Type == "synced" }

// say gives a VM a long message, of which number is a part.
func (f *fixture) say(id string, number int) uint64 {
	f.t.Helper()
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, id)
		if err != nil {
			return err
		}
		vm.Status.Message = fmt.Sprint(number, strings.Repeat(" x", bigMessage/2))
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
	return f.db.Local().Revision()
}

func (f *fixture) bigVMs() []string {
	ids := make([]string, bigVMs)
	for i := range ids {
		ids[i] = f.newVM(fmt.Sprintf("big%02d", i), api.VMStopped).Meta.ID
		f.say(ids[i], -1)
	}
	return ids
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) //nolint:gosec // not so much
}

func (f *fixture) eventually(what string, ok func() bool) {
	f.t.Helper()
	deadline := time.Now().Add(watchPatience)
	for !ok() {
		if time.Now().After(deadline) {
			f.t.Fatal(what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Clients that take nothing, some in the middle of their first set and some
// later, while all they wait for is replaced many times: the node keeps next to
// nothing for them, and those that read get all.
func TestClientsThatTakeNothingCostLittleMemory(t *testing.T) {
	f := newFixture(t)
	f.servers["m1"].sendWithin = time.Hour // they stay
	f.smallSockets()
	ids := f.bigVMs()
	live := f.deaf("kinds=vm")
	f.until(live, synced)
	from := f.db.Local().Revision()
	rewrite := func(turn int) {
		for i, id := range ids {
			f.say(id, turn)
			if turn >= 0 {
				f.until(live, func(e vmEvent) bool { return e.Object.Meta.ID == ids[i] })
			}
		}
	}
	rewrite(0)
	before := heap()
	var deaf []*websocket.Conn
	for i := range stalledClients {
		query := "kinds=vm"
		if i%2 == 1 {
			query = fmt.Sprintf("kinds=vm&since=%d", from)
		}
		deaf = append(deaf, f.deaf(query))
		f.eventually("the watches do not begin", func() bool { return len(f.servers["m1"].watches) == len(deaf)+1 })
		rewrite(i + 1) // each meets another state
	}
	each := (heap() - before) / stalledClients
	t.Logf("%d bytes of heap for each of %d clients that take nothing, while %d MiB were replaced %d times", each, stalledClients, bigVMs*bigMessage>>20, stalledClients)
	if each > stalledBytes {
		t.Errorf("%d bytes, want at most %d", each, stalledBytes)
	}
	// Now they read, and have it all.
	for i, c := range deaf {
		seen := map[string]string{}
		f.until(c, func(e vmEvent) bool {
			if e.Type == "put" {
				seen[e.Object.Meta.ID] = e.Type
			}
			return e.Type == "synced" || len(seen) == len(ids)
		})
		if len(seen) != len(ids) {
			t.Errorf("client %d saw %d objects of %d", i, len(seen), len(ids))
		}
	}
}

// A client that takes nothing for too long is cut off, by name in the log and,
// when it reads again, with an error after whole messages. It resumes with the
// last revision that it has, and loses nothing. Others feel nothing of it.
func TestAClientThatTakesNothingIsCutOffAndResumes(t *testing.T) {
	f := newFixture(t)
	f.servers["m1"].sendWithin = 3 * time.Second // longer than the machine stands still: the others read
	f.smallSockets()
	ids := f.bigVMs()
	// One who reads all the time sees everything to the end.
	live, saw, ended := f.deaf("kinds=vm"), map[string]int{}, make(chan error, 1)
	var mu sync.Mutex
	go func() {
		for {
			e, err := f.readEvent(live)
			if err != nil {
				ended <- err
				return
			}
			if e.Type == "put" {
				mu.Lock()
				var number int
				_, _ = fmt.Sscan(e.Object.Status.Message, &number)
				saw[e.Object.Meta.ID] = number
				mu.Unlock()
			}
		}
	}()
	deaf := f.deaf("kinds=vm")
	at, _ := f.until(deaf, synced)
	open := len(f.servers["m1"].watches)
	turn := 0
	f.eventually("the client is not cut off", func() bool {
		turn++
		for _, id := range ids {
			f.say(id, turn)
		}
		return len(f.servers["m1"].watches) < open
	})
	var err error
	has := map[string]int{} // what the client has of each object, with what was on its way when it was cut off
	note := func(e vmEvent) {
		var number int
		if _, err := fmt.Sscan(e.Object.Status.Message, &number); err == nil {
			has[e.Object.Meta.ID] = number
		}
	}
	for e := at; err == nil; e, err = f.readEvent(deaf) {
		at = e
		note(e)
	}
	if code := websocket.CloseStatus(err); code != -1 || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cut off in the middle of a message, the client has code %d, %v", code, err)
	}
	f.until(f.deaf(fmt.Sprintf("kinds=vm&since=%d", at.Revision)), func(e vmEvent) bool {
		if e.Type == "relist" || e.Type == "delete" {
			t.Errorf("resumed from %d: %v", at.Revision, e)
		}
		note(e)
		return synced(e)
	})
	for _, id := range ids {
		if has[id] != turn {
			t.Errorf("after it resumed, the client has number %d of %s, which is at %d", has[id], id, turn)
		}
	}
	f.eventually("the other client does not see everything", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(ended) > 0 || !slices.ContainsFunc(ids, func(id string) bool { return saw[id] != turn })
	})
	select {
	case err := <-ended:
		t.Errorf("the other client was cut off: %v", err)
	default:
	}
	_ = live.CloseNow()
}

// Between messages there is room for a reason.
func TestAClientThatAnswersNoPingIsTold(t *testing.T) {
	f := newFixture(t)
	f.servers["m1"].sendWithin, f.servers["m1"].pingEvery = time.Second, 10*time.Millisecond
	f.newVM("a", api.VMStopped)
	c := f.deaf("kinds=vm")
	f.eventually("the client is not cut off", func() bool { return len(f.servers["m1"].watches) == 0 })
	var err error
	for err == nil {
		_, err = f.readEvent(c)
	}
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.StatusTryAgainLater || closed.Reason != errStalled.Error() {
		t.Errorf("closed with %v", err)
	}
}
