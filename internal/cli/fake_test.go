// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

const fakeToken = "muster_01_secret"

// fakeCluster is two nodes over one state that answer by the contract of the
// REST interface, with the real types and their validation.
type fakeCluster struct {
	mu      sync.Mutex
	rev     uint64
	objects map[api.Kind][]*fakeObject
	raw     map[string]fakeRaw
	keys    map[string]fakeAnswer // by Idempotency-Key
	mode    map[string]string     // node → what is wrong with it
	events  []fakeEvent
	changed chan struct{} // closed at every change
	console []byte        // the ring of every VM
	ended   bool          // the VMs have stopped
	log     []string
	servers map[string]*httptest.Server
	joined  bool
	caPhase api.CAPhase
	caLife  int // seconds
	parts   int // of a revert that are done
	life    uint64
}

type fakeObject struct {
	meta  api.Meta
	raw   json.RawMessage
	polls int // looks at a task until it is final
}

type fakeRaw struct {
	value []byte
	rev   uint64
}

type fakeAnswer struct {
	status int
	body   []byte
	hash   string
}

type fakeEvent struct {
	rev  uint64
	text string
}

func newFake(t testing.TB, dir string) (f *fakeCluster, env map[string]string) {
	t.Helper()
	f = &fakeCluster{objects: map[api.Kind][]*fakeObject{}, raw: map[string]fakeRaw{}, keys: map[string]fakeAnswer{},
		mode: map[string]string{}, changed: make(chan struct{}), servers: map[string]*httptest.Server{}, rev: 10, joined: true, life: 1}
	var ca []byte
	for _, n := range []string{"m1", "m2"} {
		s := httptest.NewUnstartedServer(f.node(n))
		s.EnableHTTP2 = true
		s.Config.ErrorLog = nil
		s.StartTLS()
		f.servers[n] = s
		ca = append(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})...)
		f.seed(t, api.KindNode, fmt.Sprintf(`{"meta":{"name":%q},"spec":{"address":%q},"status":{"phase":"ready","version":"1.2.3","cpus":8,"memory":17179869184,"accelerator":"kvm","guardLevel":"softdog"}}`, n, s.Listener.Addr()))
	}
	caFile := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "data", "muster.sock"))
	if err != nil {
		t.Fatal(err)
	}
	local := &http.Server{Handler: f.node("local")}
	go local.Serve(l)
	return f, map[string]string{
		"MUSTER_SERVER": f.servers["m1"].URL + "," + f.servers["m2"].URL,
		"SERVER1":       f.servers["m1"].URL, "SERVER2": f.servers["m2"].URL,
		"MUSTER_TOKEN": fakeToken, "MUSTER_CACERT": caFile,
	}
}

func (f *fakeCluster) close() {
	for _, s := range f.servers {
		s.CloseClientConnections()
		s.Close()
	}
}

func (f *fakeCluster) seed(t testing.TB, kind api.Kind, doc string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.put(kind, []byte(doc), nil); err != nil {
		t.Fatal(err)
	}
}

// codec checks a document as the server does: strictly, with defaults.
func codec[S, T any](kind api.Kind, doc []byte) (api.Meta, json.RawMessage, error) {
	var o api.Object[S, T]
	if err := api.DecodeStrict(bytes.NewReader(doc), &o); err != nil {
		return o.Meta, nil, err
	}
	o.Meta.Kind = kind
	if kind == api.KindTask {
		return o.Meta, doc, nil
	}
	if err := o.Prepare(); err != nil {
		return o.Meta, nil, err
	}
	raw, err := json.Marshal(o)
	return o.Meta, raw, err
}

func checked(kind api.Kind, doc []byte) (api.Meta, json.RawMessage, error) {
	switch kind {
	case api.KindVM:
		return codec[api.VMSpec, api.VMStatus](kind, doc)
	case api.KindSnapshot:
		return codec[api.SnapshotSpec, api.SnapshotStatus](kind, doc)
	case api.KindImage:
		return codec[api.ImageSpec, api.ImageStatus](kind, doc)
	case api.KindVolume:
		return codec[api.VolumeSpec, api.VolumeStatus](kind, doc)
	case api.KindPool:
		return codec[api.PoolSpec, api.PoolStatus](kind, doc)
	case api.KindNetwork:
		return codec[api.NetworkSpec, api.NetworkStatus](kind, doc)
	case api.KindIPPool:
		return codec[api.IPPoolSpec, api.IPPoolStatus](kind, doc)
	case api.KindUplink:
		return codec[api.UplinkSpec, api.UplinkStatus](kind, doc)
	case api.KindNode:
		return codec[api.NodeSpec, api.NodeStatus](kind, doc)
	case api.KindUser:
		return codec[api.UserSpec, api.UserStatus](kind, doc)
	case api.KindEvent:
		return codec[api.EventSpec, struct{}](kind, doc)
	case api.KindAlert:
		return codec[api.AlertSpec, api.AlertStatus](kind, doc)
	case api.KindRule:
		return codec[api.RuleSpec, struct{}](kind, doc)
	case api.KindReceiver:
		return codec[api.ReceiverSpec, api.ReceiverStatus](kind, doc)
	case api.KindPowerDevice:
		return codec[api.PowerDeviceSpec, struct{}](kind, doc)
	case api.KindPowerAction:
		return codec[api.PowerActionSpec, api.PowerActionStatus](kind, doc)
	case api.KindToken:
		return codec[api.TokenSpec, api.TokenStatus](kind, doc)
	case api.KindTask:
		return codec[api.TaskSpec, api.TaskStatus](kind, doc)
	}
	return api.Meta{}, nil, errors.New("no such kind")
}

// put stores a new object, or a changed one in place of old.
func (f *fakeCluster) put(kind api.Kind, doc []byte, old *fakeObject) (*fakeObject, error) {
	meta, raw, err := checked(kind, doc)
	if err != nil {
		return nil, err
	}
	if old != nil && sameDoc(raw, old.raw) {
		return old, nil
	}
	f.rev++
	meta.Kind, meta.Revision = kind, f.rev
	if old == nil {
		if kind != api.KindTask && f.find(kind, meta.Name) != nil {
			return nil, api.Errorf(api.CodeExists, "%s %q exists already", kind, meta.Name)
		}
		meta.ID, meta.Generation, meta.CreatedAt = first(meta.ID, api.NewID()), 1, time.Now().UTC()
	} else {
		meta.ID, meta.Generation, meta.CreatedAt = old.meta.ID, old.meta.Generation+1, old.meta.CreatedAt
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	m["meta"] = meta
	if raw, err = json.Marshal(m); err != nil {
		return nil, err
	}
	o := old
	if o == nil {
		o = &fakeObject{}
		f.objects[kind] = append(f.objects[kind], o)
	}
	o.meta, o.raw = meta, raw
	f.event(`{"type":"put","kind":%q,"object":%s,"revision":%d}`, kind, raw, f.rev)
	return o, nil
}

func sameDoc(a, b []byte) bool {
	strip := func(doc []byte) string {
		var m map[string]any
		_ = json.Unmarshal(doc, &m)
		meta, _ := m["meta"].(map[string]any)
		out, _ := json.Marshal([]any{meta["labels"], m["spec"], m["status"]})
		return string(out)
	}
	return strip(a) == strip(b)
}

func (f *fakeCluster) event(format string, args ...any) {
	f.events = append(f.events, fakeEvent{f.rev, fmt.Sprintf(format, args...)})
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeCluster) find(kind api.Kind, name string) *fakeObject {
	for _, o := range f.objects[kind] {
		if o.meta.Name == name || o.meta.ID == name {
			return o
		}
	}
	return nil
}

func (f *fakeCluster) remove(kind api.Kind, o *fakeObject) {
	f.rev++
	f.objects[kind] = slices.DeleteFunc(f.objects[kind], func(x *fakeObject) bool { return x == o })
	f.event(`{"type":"delete","kind":%q,"id":%q,"revision":%d}`, kind, o.meta.ID, f.rev)
}

// task makes a task that succeeds at the second look, or fails for targets
// whose name begins with "fail" or "huge".
func (f *fakeCluster) task(action api.Action, target *fakeObject, open bool) (*fakeObject, error) {
	doc, err := json.Marshal(api.Task{
		Meta:   api.Meta{Name: ""},
		Spec:   api.TaskSpec{Action: action, TargetKind: target.meta.Kind, TargetID: target.meta.ID, Target: target.meta.Name, Actor: "admin"},
		Status: api.TaskStatus{Phase: api.TaskRunning, Progress: 10, Message: "working"},
	})
	if err != nil {
		return nil, err
	}
	o, err := f.put(api.KindTask, doc, nil)
	if err == nil {
		o.polls = 2
		if open {
			o.polls = -1
		}
	}
	return o, err
}

func (f *fakeCluster) look(o *fakeObject) {
	if o.polls--; o.polls != 0 {
		return
	}
	var t api.Task
	_ = json.Unmarshal(o.raw, &t)
	now := time.Now().UTC()
	t.Status = api.TaskStatus{Phase: api.TaskSucceeded, Progress: 100, FinishedAt: &now}
	switch {
	case strings.HasPrefix(t.Spec.Target, "fail"):
		t.Status.Phase, t.Status.Message, t.Status.Code = api.TaskFailed, "node m1: QEMU ended: out of \x1b[31mmemory", api.CodeInternal
	case strings.HasPrefix(t.Spec.Target, "huge"):
		t.Status.Phase, t.Status.Message, t.Status.Code = api.TaskFailed, "no node has 8 TiB free", api.CodeUnplaceable
	}
	o.raw, _ = json.Marshal(t)
}

// image content ends the open task of an image.
func (f *fakeCluster) content(w http.ResponseWriter, r *http.Request, o *fakeObject) {
	body, err := io.ReadAll(r.Body)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil || r.ContentLength >= 0 && int64(len(body)) != r.ContentLength {
		f.fail(w, api.Errorf(api.CodeIncomplete, "the upload ended early"))
		return
	}
	switch {
	case strings.HasPrefix(o.meta.Name, "full"):
		f.fail(w, api.Errorf(api.CodeStorageFull, "pool local has 0 B free on node m1"))
		return
	case strings.HasPrefix(o.meta.Name, "torn"):
		f.fail(w, api.Errorf(api.CodeIncomplete, "the upload ended early"))
		return
	}
	sum := sha256.Sum256(body)
	got := hex.EncodeToString(sum[:])
	if want := r.URL.Query().Get("sha256"); want != "" && want != got {
		f.fail(w, api.Errorf(api.CodeChecksum, "got %s", got))
		return
	}
	var image api.Image
	_ = json.Unmarshal(o.raw, &image)
	image.Spec.Node = "m1"
	image.Status = api.ImageStatus{Phase: api.StorageReady, Format: "raw", VirtualSize: api.Size(len(body)), SHA256: got}
	if strings.HasPrefix(o.meta.Name, "liar") {
		image.Status.SHA256 = strings.Repeat("0", 64)
	}
	doc, _ := json.Marshal(image)
	if _, err := f.put(api.KindImage, doc, o); err != nil {
		f.fail(w, err)
		return
	}
	f.send(w, http.StatusOK, o.raw)
}

func (f *fakeCluster) send(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Muster-Revision", fmt.Sprint(f.rev))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

var fakeStatus = map[api.Code]int{
	api.CodeInvalid: 422, api.CodeUnauthorized: 401, api.CodeForbidden: 403, api.CodeNotFound: 404, api.CodeExists: 409,
	api.CodeConflict: 412, api.CodeRefused: 409, api.CodeNoQuorum: 503, api.CodeNotMember: 503, api.CodeIncomplete: 400, api.CodeChecksum: 422,
}

func (f *fakeCluster) fail(w http.ResponseWriter, err error) {
	code := api.CodeOf(err)
	var e *api.Error
	errors.As(err, &e)
	status := fakeStatus[code]
	if status == 0 {
		status = 500
	}
	doc := map[string]any{"type": "https://muster-vm.org/problems/" + code, "title": code, "status": status, "code": code, "detail": err.Error()}
	if e != nil {
		doc["detail"] = e.Detail
		if e.Field != "" {
			doc["field"] = e.Field
		}
	}
	b, _ := json.Marshal(doc)
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_, _ = w.Write(b)
}
