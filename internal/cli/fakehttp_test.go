// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

// node is the handler of one node.
func (f *fakeCluster) node(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Muster-Node", name)
		f.mu.Lock()
		mode := f.mode[name]
		f.log = append(f.log, fmt.Sprintf("%s %s %s key=%t min=%s", name, r.Method, r.URL.EscapedPath(), r.Header.Get("Idempotency-Key") != "", r.URL.Query().Get("minRevision")))
		f.mu.Unlock()
		switch {
		case mode == "no_quorum":
			f.fail(w, api.Errorf(api.CodeNoQuorum, "no leader is known to node %s", name))
			return
		case mode == "not_initialized":
			f.fail(w, api.Errorf(api.CodeNotMember, "this host belongs to no cluster; run muster cluster init or join"))
			return
		case mode == "proxy":
			http.Error(w, "bad gateway", http.StatusBadGateway)
			return
		case mode == "abort":
			panic(http.ErrAbortHandler)
		case name != "local" && r.Header.Get("Authorization") != "Bearer "+fakeToken:
			f.fail(w, api.Errorf(api.CodeUnauthorized, "the token is unknown"))
			return
		}
		path := strings.TrimPrefix(r.URL.EscapedPath(), "/api/v1/")
		if r.Method == http.MethodPost {
			f.once(w, r, name, path)
			return
		}
		f.route(w, r, name, path)
	})
}

// once honours the Idempotency-Key. In the mode "drop" the work is done but
// the answer is lost.
func (f *fakeCluster) once(w http.ResponseWriter, r *http.Request, node, path string) {
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	sum := fmt.Sprintf("%x", sha256.Sum256(append([]byte(path), body...)))
	key := r.Header.Get("Idempotency-Key")
	f.mu.Lock()
	known, ok := f.keys[key]
	drop := f.mode[node] == "drop"
	f.mu.Unlock()
	if ok && key != "" {
		if known.hash != sum {
			f.fail(w, api.Errorf(api.CodeRefused, "the Idempotency-Key was used for another request"))
			return
		}
		f.send(w, known.status, known.body)
		return
	}
	rec := &recorder{header: w.Header(), status: 200}
	f.route(rec, r, node, path)
	f.mu.Lock()
	if rec.status < 500 {
		f.keys[key] = fakeAnswer{rec.status, rec.body.Bytes(), sum}
	}
	f.mu.Unlock()
	if drop {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(rec.status)
	_, _ = w.Write(rec.body.Bytes())
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(s int)           { r.status = s }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

func (f *fakeCluster) route(w http.ResponseWriter, r *http.Request, node, path string) {
	if f.serveMonitor(w, r, path) {
		return
	}
	parts := strings.Split(path, "/")
	switch {
	case parts[0] == "raw":
		f.serveRaw(w, r, strings.TrimPrefix(r.URL.Path, "/api/v1/raw/"))
		return
	case parts[0] == "config":
		f.serveConfig(w, r, path)
		return
	case parts[0] == "failovers":
		f.serveFailovers(w, r, path)
		return
	case parts[0] == "ha":
		f.serveHA(w, r, path)
		return
	case parts[0] == "cluster":
		f.serveCluster(w, r, node, path)
		return
	case path == "watch":
		f.serveWatch(w, r, node)
		return
	}
	kind := api.Kind(strings.TrimSuffix(parts[0], "s"))
	if _, _, err := checked(kind, []byte("{}")); err != nil && err.Error() == "no such kind" {
		f.fail(w, api.Errorf(api.CodeNotFound, "no such path"))
		return
	}
	if len(parts) == 1 {
		f.serveKind(w, r, kind)
		return
	}
	f.mu.Lock()
	o := f.find(kind, parts[1])
	f.mu.Unlock()
	if o == nil {
		f.fail(w, api.Errorf(api.CodeNotFound, "%s %q does not exist in project default", kind, parts[1]))
		return
	}
	if len(parts) > 2 {
		f.serveSub(w, r, node, o, strings.Join(parts[2:], "/"))
		return
	}
	f.serveObject(w, r, kind, o)
}

func (f *fakeCluster) serveKind(w http.ResponseWriter, r *http.Request, kind api.Kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodGet {
		f.list(w, r, kind)
		return
	}
	body, _ := io.ReadAll(r.Body)
	o, err := f.put(kind, body, nil)
	if err != nil {
		f.fail(w, err)
		return
	}
	switch kind {
	case api.KindVM, api.KindImage, api.KindVolume:
		f.accept(w, api.Action(string(kind)+".create"), o)
	case api.KindToken:
		b, _ := json.Marshal(map[string]any{"token": "muster_07_fresh", "object": o.raw})
		f.send(w, http.StatusCreated, b)
	default:
		f.send(w, http.StatusCreated, o.raw)
	}
}

// list pages by two, so that every list is followed.
func (f *fakeCluster) list(w http.ResponseWriter, r *http.Request, kind api.Kind) {
	const page = 2
	from, _ := strconv.Atoi(r.URL.Query().Get("continue"))
	items := []json.RawMessage{}
	next := ""
	for i, o := range f.objects[kind] {
		if i >= from && len(items) < page {
			items = append(items, o.raw)
			if i < len(f.objects[kind])-1 {
				next = strconv.Itoa(i + 1)
			} else {
				next = ""
			}
		}
	}
	if f.mode["cluster"] == "stale" {
		w.Header().Set("Muster-Consistency", "stale")
		w.Header().Set("Muster-Age", "12.5")
	}
	b, _ := json.Marshal(map[string]any{"kind": string(kind) + "List", "items": items, "continue": next, "revision": f.rev})
	f.send(w, http.StatusOK, b)
}

func (f *fakeCluster) accept(w http.ResponseWriter, action api.Action, o *fakeObject) {
	var spec struct {
		Spec api.ImageSpec
	}
	_ = json.Unmarshal(o.raw, &spec)
	t, err := f.task(action, o, action == api.ActionImageCreate && spec.Spec.Awaits())
	if err != nil {
		f.fail(w, err)
		return
	}
	b, _ := json.Marshal(map[string]any{"task": t.raw, "object": o.raw, "revision": f.rev})
	w.Header().Set("Location", "/api/v1/tasks/"+t.meta.ID)
	f.send(w, http.StatusAccepted, b)
}

// settled is a pool or network as it is shown: made on m2 only at the second
// look, and never if its name begins with "broken".
func settled(o *fakeObject) json.RawMessage {
	var doc map[string]any
	if json.Unmarshal(o.raw, &doc) != nil {
		return o.raw
	}
	o.polls++
	m2 := map[string]any{"node": "m2", "ready": true}
	switch {
	case o.polls == 1:
		m2 = map[string]any{"node": "m2", "ready": false, "reason": api.NotMadeYet}
	case strings.HasPrefix(o.meta.Name, "broken"):
		m2 = map[string]any{"node": "m2", "ready": false, "reason": "the disk is on fire"}
	}
	doc["status"] = map[string]any{"nodes": []any{map[string]any{"node": "m1", "ready": true}, m2}}
	raw, _ := json.Marshal(doc)
	return raw
}

func (f *fakeCluster) serveObject(w http.ResponseWriter, r *http.Request, kind api.Kind, o *fakeObject) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch r.Method {
	case http.MethodGet:
		raw := o.raw
		switch kind {
		case api.KindTask:
			f.look(o)
			raw = o.raw
		case api.KindPool, api.KindNetwork:
			raw = settled(o)
		}
		w.Header().Set("ETag", fmt.Sprintf("%q", fmt.Sprint(o.meta.Revision)))
		f.send(w, http.StatusOK, raw)
	case http.MethodPatch:
		var patch, doc map[string]any
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("Content-Type") != "application/merge-patch+json" || json.Unmarshal(body, &patch) != nil || json.Unmarshal(o.raw, &doc) != nil {
			f.fail(w, api.Invalid("", "no merge patch"))
			return
		}
		b, _ := json.Marshal(merge(doc, patch))
		if _, err := f.put(kind, b, o); err != nil {
			f.fail(w, err)
			return
		}
		f.send(w, http.StatusOK, o.raw)
	case http.MethodDelete:
		if strings.HasPrefix(o.meta.Name, "busy") {
			f.fail(w, api.Errorf(api.CodeRefused, "%s %s is used by vm web1", kind, o.meta.Name))
			return
		}
		var vm api.VM
		if kind == api.KindVM && json.Unmarshal(o.raw, &vm) == nil && vm.Status.Phase == api.VMRunning && r.URL.Query().Get("force") != "true" {
			f.fail(w, api.Errorf(api.CodeRefused, "vm %s is running; stop it first or use ?force=true", o.meta.Name))
			return
		}
		f.remove(kind, o)
		switch kind {
		case api.KindVM, api.KindImage, api.KindVolume:
			f.accept(w, api.Action(string(kind)+".delete"), o)
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	}
}

// merge is RFC 7396.
func merge(target, patch map[string]any) map[string]any {
	for k, v := range patch {
		switch v := v.(type) {
		case nil:
			delete(target, k)
		case map[string]any:
			t, _ := target[k].(map[string]any)
			if t == nil {
				t = map[string]any{}
			}
			target[k] = merge(t, v)
		default:
			target[k] = v
		}
	}
	return target
}

func (f *fakeCluster) serveSub(w http.ResponseWriter, r *http.Request, node string, o *fakeObject, sub string) {
	switch {
	case f.serveGuest(w, r, sub):
	case sub == "content" && r.Method == http.MethodPut:
		f.content(w, r, o)
	case sub == "snapshots" || strings.HasPrefix(sub, "snapshots/"):
		f.serveSnapshots(w, r, o, strings.TrimPrefix(strings.TrimPrefix(sub, "snapshots"), "/"))
	case sub == "console":
		f.serveConsole(w, r, node)
	case sub == "console/log":
		f.mu.Lock()
		defer f.mu.Unlock()
		n, _ := strconv.Atoi(r.URL.Query().Get("bytes"))
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write(f.console[max(0, len(f.console)-n):])
	case sub == "renew-certificate" && r.Method == http.MethodPost:
		f.renewNode(w, o)
	case r.Method == http.MethodPost:
		f.serveAction(w, r, o, sub)
	default:
		f.fail(w, api.Errorf(api.CodeNotFound, "no such path"))
	}
}

func (f *fakeCluster) serveAction(w http.ResponseWriter, r *http.Request, o *fakeObject, verb string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var vm api.VM
	_ = json.Unmarshal(o.raw, &vm)
	switch verb {
	case "start":
		vm.Spec.Power, vm.Status.Phase, vm.Status.Node = api.PowerRunning, api.VMRunning, "m2"
	case "stop":
		vm.Spec.Power, vm.Status.Phase = api.PowerStopped, api.VMStopped
	case "clone":
		f.serveClone(w, r, &vm)
		return
	case "move":
		f.serveMove(w, r, o)
		return
	default:
		if vm.Status.Phase != api.VMRunning {
			f.fail(w, api.Errorf(api.CodeRefused, "vm %s is not running; start it first", o.meta.Name))
			return
		}
	}
	doc, _ := json.Marshal(vm)
	if _, err := f.put(api.KindVM, doc, o); err != nil {
		f.fail(w, err)
		return
	}
	f.accept(w, api.Action("vm."+verb), o)
}

func (f *fakeCluster) serveConsole(w http.ResponseWriter, r *http.Request, node string) {
	f.mu.Lock()
	mode := f.mode[node]
	n, _ := strconv.Atoi(r.URL.Query().Get("history"))
	at := max(0, len(f.console)-n)
	f.mu.Unlock()
	if mode == "stopped" {
		f.fail(w, api.Errorf(api.CodeRefused, "the VM is not running"))
		return
	}
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer c.CloseNow()
	ctx := r.Context()
	go func() {
		for {
			_, b, err := c.Read(ctx)
			if err != nil {
				return
			}
			f.print("got: " + string(b))
		}
	}()
	for {
		f.mu.Lock()
		out, ended, changed, mode := slices.Clone(f.console[at:]), f.ended, f.changed, f.mode[node]
		at = len(f.console)
		f.mu.Unlock()
		if len(out) > 0 && c.Write(ctx, websocket.MessageBinary, out) != nil || mode == "cut" {
			return
		}
		if ended {
			_ = c.Close(websocket.StatusNormalClosure, "the VM has stopped")
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (f *fakeCluster) print(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.console = append(f.console, s...)
	f.wake()
}

func (f *fakeCluster) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeCluster) serveWatch(w http.ResponseWriter, r *http.Request, node string) {
	since, _ := strconv.ParseUint(r.URL.Query().Get("since"), 10, 64)
	kinds := r.URL.Query().Get("kinds")
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer c.CloseNow()
	ctx := c.CloseRead(r.Context())
	wanted := func(k api.Kind) bool { return kinds == "" || slices.Contains(strings.Split(kinds, ","), string(k)) }
	f.mu.Lock()
	var out []string
	at := len(f.events)
	if since == 0 {
		for k, list := range f.objects {
			for _, o := range list {
				if wanted(k) {
					out = append(out, fmt.Sprintf(`{"type":"put","kind":%q,"object":%s,"revision":%d}`, k, o.raw, o.meta.Revision))
				}
			}
		}
	} else {
		at = slices.IndexFunc(f.events, func(e fakeEvent) bool { return e.rev > since })
		if at < 0 {
			at = len(f.events)
		}
	}
	out = append(out, fmt.Sprintf(`{"type":"synced","revision":%d}`, f.rev))
	f.mu.Unlock()
	for {
		for _, e := range out {
			if c.Write(ctx, websocket.MessageText, []byte(e)) != nil {
				return
			}
		}
		f.mu.Lock()
		out = nil
		for ; at < len(f.events); at++ {
			var e struct{ Kind api.Kind }
			_ = json.Unmarshal([]byte(f.events[at].text), &e)
			if wanted(e.Kind) {
				out = append(out, f.events[at].text)
			}
		}
		changed, mode := f.changed, f.mode[node]
		f.mu.Unlock()
		if mode == "cut" {
			return
		}
		if len(out) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (f *fakeCluster) serveRaw(w http.ResponseWriter, r *http.Request, key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key == "" {
		var items []map[string]any
		for k, v := range f.raw {
			if strings.HasPrefix(k, r.URL.Query().Get("prefix")) {
				items = append(items, map[string]any{"key": k, "value": v.value, "revision": v.rev})
			}
		}
		slices.SortFunc(items, func(a, b map[string]any) int { return strings.Compare(a["key"].(string), b["key"].(string)) })
		b, _ := json.Marshal(map[string]any{"items": items, "revision": f.rev})
		f.send(w, http.StatusOK, b)
		return
	}
	if strings.HasPrefix(key, "muster/") && r.Method != http.MethodGet {
		f.fail(w, api.Errorf(api.CodeForbidden, "key %q is reserved for typed objects", key))
		return
	}
	old, exists := f.raw[key]
	match := strings.Trim(r.Header.Get("If-Match"), `"`)
	if match != "" && match != fmt.Sprint(old.rev) || r.Header.Get("If-None-Match") == "*" && exists {
		f.fail(w, api.Errorf(api.CodeConflict, "key %q is at revision %d", key, old.rev))
		return
	}
	if !exists && r.Method != http.MethodPut {
		f.fail(w, api.Errorf(api.CodeNotFound, "key %q does not exist", key))
		return
	}
	switch r.Method {
	case http.MethodGet:
		w.Header().Set("ETag", fmt.Sprintf("%q", fmt.Sprint(old.rev)))
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(old.value)
	case http.MethodPut:
		b, _ := io.ReadAll(r.Body)
		f.rev++
		f.raw[key] = fakeRaw{b, f.rev}
		status := http.StatusOK
		if !exists {
			status = http.StatusCreated
		}
		out, _ := json.Marshal(map[string]any{"key": key, "revision": f.rev})
		f.send(w, status, out)
	case http.MethodDelete:
		f.rev++
		delete(f.raw, key)
		w.WriteHeader(http.StatusNoContent)
	}
}
