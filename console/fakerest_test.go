// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

// fakeREST answers by the contract of the REST interface, for the few calls
// that the tests of the shell make.
type fakeREST struct {
	mu      sync.Mutex
	vms     []string
	log     []string // actor, role, source, method and path of each call
	typed   []byte   // into the console
	print   chan []byte
	uploads []string
	aborted chan error // how an upload ended that was cut off
	gone    chan struct{}
}

func newFakeREST() *fakeREST {
	return &fakeREST{vms: []string{"db1", "web1", "web2"}, print: make(chan []byte, 64), aborted: make(chan error, 4), gone: make(chan struct{}, 16)}
}

func (f *fakeREST) as(actor string, role api.Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.log = append(f.log, fmt.Sprintf("%s %s %s %s %s", actor, role, r.RemoteAddr, r.Method, r.URL.Path))
		f.mu.Unlock()
		w.Header().Set("Muster-Node", "m1")
		if role == api.RoleViewer && (r.Method != http.MethodGet || strings.HasSuffix(r.URL.Path, "/console")) {
			problem(w, 403, api.CodeForbidden, fmt.Sprintf("needs the role operator; %q has the role viewer", actor))
			return
		}
		f.route(w, r, strings.TrimPrefix(r.URL.Path, "/api/v1/"))
	})
}

func problem(w http.ResponseWriter, status int, code api.Code, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"type": "about:blank", "status": status, "code": code, "detail": detail, "title": code})
}

func (f *fakeREST) vm(name string) map[string]any {
	return map[string]any{
		"meta": map[string]any{"id": "id-" + name, "kind": "vm", "name": name, "project": "default", "revision": 7, "createdAt": "2026-01-01T00:00:00Z"},
		"spec": map[string]any{"cpus": 1, "memory": 1 << 29}, "status": map[string]any{"phase": "running", "node": "m1", "message": "evil \x1b]52;c;eA==\x07\x1b[31m message"},
	}
}

func (f *fakeREST) route(w http.ResponseWriter, r *http.Request, path string) {
	send := func(status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}
	parts := strings.Split(path, "/")
	switch {
	case path == "watch":
		f.watch(w, r)
	case path == "cluster":
		send(200, api.ClusterStatus{Cluster: "demo", Node: "m1", Quorum: true})
	case path == "vms":
		f.mu.Lock()
		defer f.mu.Unlock()
		items := []any{}
		for _, n := range f.vms {
			items = append(items, f.vm(n))
		}
		send(200, map[string]any{"kind": "vmList", "items": items, "revision": 7})
	case parts[0] == "images" && r.Method == http.MethodPost:
		_, _ = io.Copy(io.Discard, r.Body)
		send(202, map[string]any{"object": map[string]any{"meta": map[string]any{"name": "disk"}}, "revision": 8})
	case parts[0] == "images" && r.Method == http.MethodPut:
		b, err := io.ReadAll(r.Body)
		if err != nil {
			f.aborted <- err
			return
		}
		f.mu.Lock()
		f.uploads = append(f.uploads, string(b))
		f.mu.Unlock()
		send(200, map[string]any{"meta": map[string]any{"name": "disk", "kind": "image"}, "status": map[string]any{"phase": "ready"}})
	case parts[0] == "vms" && len(parts) > 1 && !f.has(parts[1]):
		problem(w, 404, api.CodeNotFound, "vm \""+parts[1]+"\" does not exist")
	case len(parts) == 3 && parts[2] == "console":
		f.console(w, r)
	case strings.HasSuffix(path, "console/log"):
		_, _ = io.WriteString(w, "boot\x1b]52;c;ZXZpbA==\x07 done\n")
	case len(parts) == 3 && parts[2] == "pause":
		problem(w, 409, api.CodeRefused, "vm web1 is not running")
	case len(parts) == 2 && parts[0] == "vms":
		send(200, f.vm(parts[1]))
	default:
		problem(w, 404, api.CodeNotFound, "no such path")
	}
}

func (f *fakeREST) has(vm string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.vms, vm)
}

func (f *fakeREST) watch(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow(); f.gone <- struct{}{} }()
	ctx := c.CloseRead(r.Context())
	b, _ := json.Marshal(map[string]any{"type": "put", "kind": "vm", "object": f.vm("web1"), "revision": 7})
	_ = c.Write(ctx, websocket.MessageText, b)
	<-ctx.Done()
}

// console prints what the test gives it and notes what is typed.
func (f *fakeREST) console(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow(); f.gone <- struct{}{} }()
	ctx := r.Context()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			_, b, err := c.Read(ctx)
			if err != nil {
				return
			}
			f.mu.Lock()
			f.typed = append(f.typed, b...)
			f.mu.Unlock()
			_ = c.Write(ctx, websocket.MessageBinary, b)
		}
	}()
	_ = c.Write(ctx, websocket.MessageBinary, []byte("login: "))
	for {
		select {
		case b := <-f.print:
			if b == nil {
				_ = c.Close(websocket.StatusNormalClosure, "the VM has stopped")
				return
			}
			_ = c.Write(ctx, websocket.MessageBinary, b)
		case <-ended:
			return
		}
	}
}
