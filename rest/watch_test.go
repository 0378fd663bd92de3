// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
)

type vmEvent struct {
	Type   string
	Kind   api.Kind
	ID     string
	Object struct {
		Meta   api.Meta
		Status struct{ Message string }
	}
	Revision uint64
}

func (e vmEvent) String() string {
	name := e.Object.Meta.Name
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Type, e.Kind, name))
}

// stream is an open watch.
type stream struct {
	t    *testing.T
	next func() (vmEvent, string, error)
}

func (s stream) want(expect ...string) []vmEvent {
	s.t.Helper()
	var out []vmEvent
	for _, x := range expect {
		e, id, err := s.next()
		if err != nil {
			s.t.Fatalf("want %s: %v", x, err)
		}
		if e.String() != x {
			s.t.Fatalf("event %v, want %s", e, x)
		}
		if id != "" && id != fmt.Sprint(e.Revision) {
			s.t.Fatalf("id %s of revision %d", id, e.Revision)
		}
		out = append(out, e)
	}
	return out
}

func (f *fixture) sse(query string, header ...string) stream {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*watchPatience)
	f.t.Cleanup(cancel)
	r, _ := http.NewRequestWithContext(ctx, "GET", f.urls["m1"]+base+"watch?"+query, nil)
	r.Header.Set("Authorization", "Bearer "+f.tokens[api.RoleViewer])
	r.Header.Set("Accept", "text/event-stream")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = resp.Body.Close() })
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		f.t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 1<<20)
	return stream{f.t, func() (e vmEvent, id string, err error) {
		for sc.Scan() {
			switch k, v, _ := strings.Cut(sc.Text(), ": "); k {
			case "id":
				id = v
			case "data":
				err = json.Unmarshal([]byte(v), &e)
			case "":
				if e.Type != "" {
					return e, id, err
				}
			}
		}
		return e, id, fmt.Errorf("the stream ended: %w", sc.Err())
	}}
}

func (f *fixture) dial(path string, role api.Role) (*websocket.Conn, *http.Response, error) {
	return f.dialNode("m1", path, role)
}

func (f *fixture) dialNode(node, path string, role api.Role) (*websocket.Conn, *http.Response, error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*watchPatience)
	f.t.Cleanup(cancel)
	c, resp, err := websocket.Dial(ctx, f.urls[node]+base+path, &websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {"Bearer " + f.tokens[role]}}})
	if err == nil {
		f.t.Cleanup(func() { _ = c.CloseNow() })
	}
	return c, resp, err
}

func (f *fixture) ws(query string) stream {
	f.t.Helper()
	c, _, err := f.dial("watch?"+query, api.RoleViewer)
	if err != nil {
		f.t.Fatal(err)
	}
	c.SetReadLimit(1 << 20)
	return stream{f.t, func() (e vmEvent, id string, err error) {
		typ, b, err := c.Read(f.t.Context())
		if err != nil {
			return e, "", err
		}
		if typ != websocket.MessageText {
			return e, "", fmt.Errorf("frame of type %v", typ)
		}
		return e, "", json.Unmarshal(b, &e)
	}}
}

func TestWatch(t *testing.T) {
	for name, open := range map[string]func(*fixture, string) stream{
		"as server-sent events": func(f *fixture, q string) stream { return f.sse(q) },
		"as a WebSocket":        (*fixture).ws,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			vm := f.newVM("a", api.VMStopped)
			f.newVM("b", api.VMStopped)
			w := open(f, "kinds=vm,node")
			seen := w.want("put node m1", "put node m2", "put vm a", "put vm b", "synced")
			for i := 1; i < len(seen); i++ {
				if seen[i].Revision < seen[i-1].Revision || seen[i].Revision == 0 {
					t.Errorf("revisions go back: %v %v", seen[i-1], seen[i])
				}
			}
			f.report(vm.Meta.ID, api.VMFailed)
			e := w.want("put vm a")
			// Not of these kinds.
			want[any](t, f.do(call{method: "PUT", path: "raw/x", body: "y"}), 201)
			f.newVM("c", api.VMStopped)
			w.want("put vm c")
			f.txn(func(v *configdb.View, tx *configdb.Txn) error {
				o, err := configdb.VMs.Get(v, vm.Meta.ID)
				configdb.VMs.Delete(tx, &o)
				return err
			})
			for { // c may be seen as created and as reported, or once
				ev, _, err := w.next()
				if err != nil {
					t.Fatal(err)
				}
				if ev.String() == "put vm c" {
					continue
				}
				if ev.Type != "delete" || ev.ID != vm.Meta.ID {
					t.Fatalf("event %+v", ev)
				}
				break
			}
			// Resumed, what was missed comes, then the mark.
			r := open(f, fmt.Sprintf("kinds=vm&since=%d", e[0].Revision))
			got := map[string]bool{}
			for {
				ev, _, err := r.next()
				if err != nil {
					t.Fatal(err)
				}
				if ev.Type == "synced" {
					break
				}
				got[ev.Type+ev.Object.Meta.Name+ev.ID] = true
			}
			if len(got) != 2 || !got["putc"] || !got["delete"+vm.Meta.ID] {
				t.Errorf("missed changes: %v", got)
			}
		})
	}
}

func TestWatchRelistsWhenTooOldOrUnknown(t *testing.T) {
	f := newFixture(t)
	f.newVM("a", api.VMStopped)
	f.ws("kinds=vm&since=99999999").want("relist", "put vm a", "synced")
	since := f.db.Local().Revision()
	f.sse("kinds=vm", "Last-Event-ID", fmt.Sprint(since)).want("synced")
	for range 2*fsm.HistoryLength/1000 + 1 {
		f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
			for i := range 1000 {
				tx.Put(fmt.Sprintf("fill/%d", i), nil)
			}
			return nil
		})
	}
	f.sse("kinds=vm", "Last-Event-ID", fmt.Sprint(since)).want("relist", "put vm a", "synced")
}

func TestWatchHidesSecretsAndChecksInput(t *testing.T) {
	f := newFixture(t)
	c, _, err := f.dial("watch?kinds=token", api.RoleAdministrator)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, b, err := c.Read(t.Context())
		if err != nil || strings.Contains(string(b), `"hash"`) || !strings.Contains(string(b), `"token"`) {
			t.Fatalf("%s %v", b, err)
		}
	}
	sse := map[string]string{"Accept": "text/event-stream"}
	wantProblem(t, f.do(call{method: "GET", path: "watch?kinds=ghost", header: sse}), 422, api.CodeInvalid, "kinds")
	wantProblem(t, f.do(call{method: "GET", path: "watch?since=x", header: sse}), 422, api.CodeInvalid, "since")
	wantProblem(t, f.do(call{method: "GET", path: "watch"}), 422, api.CodeInvalid, "Accept")
	wantProblem(t, f.do(call{method: "GET", path: "watch?kinds=token", header: sse, role: api.RoleViewer}), 403, api.CodeForbidden, "")
	f.sse("").want("put node m1") // a viewer's default leaves tokens out
}

func TestPoolIsSeenWhenANodeReportsOnIt(t *testing.T) {
	f := newFixture(t)
	w := f.ws(fmt.Sprintf("kinds=pool&since=%d", f.db.Local().Revision()))
	w.want("synced")
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		p, err := configdb.Pools.Find(v, "", "shared")
		if err != nil {
			return err
		}
		st := poolStates(v, p.Meta.ID)[0]
		st.Status.Ready = false
		return configdb.PoolStates.UpdateStatus(v, tx, &st)
	})
	w.want("put pool shared")
}

func TestDeletedTokenEndsItsStreams(t *testing.T) {
	f := newFixture(t)
	for _, s := range f.servers {
		s.pingEvery = 5 * time.Millisecond
	}
	vm := f.newVM("web1", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	f.report(vm.Meta.ID, api.VMRunning)
	f.console.rings[vm.Meta.ID] = nil
	watch, sse := f.ws("kinds=task"), f.sse("kinds=task")
	var consoles []*websocket.Conn
	for _, node := range []string{"m1", "m2"} { // one of them is proxied
		c, _, err := f.dialNode(node, "vms/web1/console", api.RoleOperator)
		if err != nil {
			t.Fatal(err)
		}
		consoles = append(consoles, c)
	}
	want[any](t, f.do(call{method: "DELETE", path: "tokens/viewer"}), 204)
	want[any](t, f.do(call{method: "DELETE", path: "tokens/operator"}), 204)
	for _, s := range []stream{watch, sse} {
		for {
			if _, _, err := s.next(); err != nil {
				break
			}
		}
	}
	for _, c := range consoles {
		if _, _, err := c.Read(t.Context()); err == nil {
			t.Error("a console outlived its token")
		}
	}
}

// shutDown ends a server as the daemon's end does.
func (f *fixture) shutDown(srv *httptest.Server) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 20*time.Second)
	defer cancel()
	if err := srv.Config.Shutdown(ctx); err != nil {
		f.t.Fatal(err)
	}
}

func TestShutdownEndsStreams(t *testing.T) {
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	f.report(vm.Meta.ID, api.VMRunning)
	f.console.rings[vm.Meta.ID] = nil
	srv := f.serveAgain((*httptest.Server).Start)
	w, sse := f.ws("kinds=node"), f.sse("kinds=node")
	con, _, err := f.dial("vms/web1/console", api.RoleOperator)
	if err != nil {
		t.Fatal(err)
	}
	f.shutDown(srv)
	for _, st := range []stream{w, sse} {
		for {
			if _, _, err := st.next(); err != nil {
				break
			}
		}
	}
	if _, _, err := con.Read(t.Context()); err == nil {
		t.Error("the console is still open")
	}
}

// Whoever waits for a task when the node shuts down is told how far it is.
func TestShutdownEndsTheWaitForATask(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	srv := f.serveAgain((*httptest.Server).Start)
	done := make(chan answer, 1)
	go func() {
		a, _ := f.try(call{method: "POST", path: "vms/web1/stop?wait=60s"})
		done <- a
	}()
	id := f.awaitTask(func(task api.Task) bool { return task.Spec.Action == api.ActionVMStop })
	f.shutDown(srv)
	if r := want[vmReply](t, <-done, 202); r.Task.Meta.ID != id || r.Task.Status.Phase.Final() {
		t.Fatalf("%+v", r.Task)
	}
}

func TestWatchesAreLimited(t *testing.T) {
	f := newFixture(t)
	for range maxWatches {
		f.servers["m1"].watches <- struct{}{}
	}
	wantProblem(t, f.do(call{method: "GET", path: "watch", header: map[string]string{"Accept": "text/event-stream"}}), 409, api.CodeRefused, "")
}

func TestResumePoints(t *testing.T) {
	put := func(rev uint64) touch { return touch{id: "x", revision: rev} }
	del := touch{id: "x", deleted: true}
	tests := []struct {
		name        string
		before, end uint64
		list        []touch
		want        []uint64
	}{
		{"each has its own", 5, 9, []touch{put(6), put(8)}, []uint64{7, 9}},
		{"together", 5, 9, []touch{put(6), put(6), put(6)}, []uint64{5, 5, 9}},
		{"a deletion at the end", 5, 9, []touch{put(6), del}, []uint64{5, 9}},
		{"a deletion at the beginning", 5, 9, []touch{del, put(8)}, []uint64{7, 9}},
		{"deletions between", 5, 20, []touch{put(8), del, del, put(15)}, []uint64{7, 7, 14, 20}},
		{"deletions only", 5, 9, []touch{del, del}, []uint64{5, 9}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resumePoints(tt.list, tt.before, tt.end)
			for i, x := range tt.list {
				if x.resume != tt.want[i] {
					t.Errorf("event %d resumes at %d, want %d", i, x.resume, tt.want[i])
				}
			}
		})
	}
}
