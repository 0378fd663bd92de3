// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/kvwire"
)

// kvDial opens a key stream at a node.
func (f *fixture) kvDial(node string, role api.Role) *websocket.Conn {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*watchPatience)
	f.t.Cleanup(cancel)
	c, _, err := websocket.Dial(ctx, f.urls[node]+base+"kv", &websocket.DialOptions{
		HTTPHeader: http.Header{"Authorization": {"Bearer " + f.tokens[role]}}, Subprotocols: []string{kvwire.Protocol},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = c.CloseNow() })
	c.SetReadLimit(kvwire.MaxMessageBytes)
	return c
}

// kvAsk sends requests in one message and returns the answers by number.
func (f *fixture) kvAsk(c *websocket.Conn, requests ...kvwire.Request) map[uint64]kvwire.Answer {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*watchPatience)
	defer cancel()
	var b []byte
	for i := range requests {
		b = kvwire.AppendRequest(b, &requests[i])
	}
	if err := c.Write(ctx, websocket.MessageBinary, b); err != nil {
		f.t.Fatal(err)
	}
	out := map[uint64]kvwire.Answer{}
	for len(out) < len(requests) {
		_, b, err := c.Read(ctx)
		if err != nil {
			f.t.Fatal(err)
		}
		for len(b) > 0 {
			var a kvwire.Answer
			if a, b, err = kvwire.NextAnswer(b); err != nil {
				f.t.Fatal(err)
			}
			out[a.Number] = a
		}
	}
	return out
}

func TestKeyStream(t *testing.T) {
	f := newFixture(t)
	c := f.kvDial("m1", api.RoleAdministrator)
	put := func(n uint64, key, value string, cond uint64) kvwire.Request {
		return kvwire.Request{Number: n, Op: kvwire.Put, Key: []byte(key), Value: []byte(value), Condition: cond}
	}
	get := func(n uint64, key string) kvwire.Request {
		return kvwire.Request{Number: n, Op: kvwire.Get, Key: []byte(key)}
	}
	first := f.kvAsk(c, put(1, "notes/a", "one", 0))[1]
	if first.Status != kvwire.Done || first.Revision == 0 {
		t.Fatalf("put: %+v", first)
	}
	got := f.kvAsk(c, get(2, "notes/a"), get(3, "notes/b"), put(4, "notes/a", "two", 1), put(5, "notes/c", "c", 1),
		put(6, "muster/spec/x", "x", 0), get(7, configdb.Tokens.SpecPrefix()+"x"))
	for n, want := range map[uint64]kvwire.Status{2: kvwire.Value, 3: kvwire.None, 4: kvwire.Conflict, 5: kvwire.Done, 6: kvwire.Error, 7: kvwire.Error} {
		if got[n].Status != want {
			t.Errorf("request %d: %+v, want status %d", n, got[n], want)
		}
	}
	if string(got[2].Value) != "one" || got[2].Revision != first.Revision || got[4].Revision != first.Revision {
		t.Errorf("read %+v, conflict %+v, want revision %d", got[2], got[4], first.Revision)
	}
	if got[6].Code != string(api.CodeForbidden) || got[7].Code != string(api.CodeForbidden) {
		t.Errorf("a reserved key: %+v, a secret one: %+v", got[6], got[7])
	}
	if a := f.kvAsk(c, put(8, "notes/a", "two", first.Revision+1))[8]; a.Status != kvwire.Done {
		t.Errorf("put at the right revision: %+v", a)
	}
	if a := f.kvAsk(c, kvwire.Request{Number: 9, Op: kvwire.Delete, Key: []byte("notes/a")})[9]; a.Status != kvwire.Done {
		t.Errorf("delete: %+v", a)
	}
	if a := f.kvAsk(c, get(10, "notes/a"))[10]; a.Status != kvwire.None {
		t.Errorf("a deleted key: %+v", a)
	}
	if a := f.kvAsk(c, put(11, strings.Repeat("k", 600), "", 0))[11]; a.Code != string(api.CodeTooLarge) {
		t.Errorf("a key that is too long: %+v", a)
	}
	// Many at once, more than may be worked on.
	var many []kvwire.Request
	for i := range uint64(3 * kvwire.MaxInFlight) {
		if i%2 == 0 {
			many = append(many, put(i, fmt.Sprintf("many/%d", i%100), "v", 0))
		} else {
			many = append(many, get(i, "many/1"))
		}
	}
	for n, a := range f.kvAsk(c, many...) {
		if a.Status == kvwire.Error || a.Status == kvwire.Conflict {
			t.Fatalf("request %d: %+v", n, a)
		}
	}
	_ = c.Close(websocket.StatusNormalClosure, "")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		begin, sums := false, false
		events, _ := configdb.Events.List(f.db.Local())
		for _, e := range events {
			begin = begin || strings.Contains(e.Spec.Message, "begins to change keys")
			sums = sums || strings.Contains(e.Spec.Message, "keys written") && strings.Contains(e.Spec.Details["below"], "many")
		}
		if begin && sums {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the audit log has the beginning: %v, the sums: %v", begin, sums)
		}
	}
}

func TestKeyStreamRefusals(t *testing.T) {
	f := newFixture(t)
	if _, resp, err := f.dial("kv", api.RoleOperator); err == nil || resp == nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("an operator: %v", err)
	}
	c := f.kvDial("m1", api.RoleAdministrator)
	if err := c.Write(t.Context(), websocket.MessageBinary, []byte{1, 99}); err != nil {
		t.Fatal(err)
	}
	_, _, err := c.Read(t.Context())
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.StatusProtocolError {
		t.Errorf("a malformed message: %v", err)
	}
}
