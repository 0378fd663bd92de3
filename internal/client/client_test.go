// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

// serve starts TLS servers and a client that knows them all.
func serve(t *testing.T, handlers ...http.HandlerFunc) *Client {
	t.Helper()
	cfg := Config{Token: "secret"}
	for _, h := range handlers {
		s := httptest.NewUnstartedServer(h)
		s.EnableHTTP2 = true
		s.StartTLS()
		t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
		cfg.Servers = append(cfg.Servers, s.URL)
		cfg.CACert = append(cfg.CACert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})...)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func problem(w http.ResponseWriter, status int, code api.Code, detail, field string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(Problem{Status: status, Code: code, Detail: detail, Field: field})
}

func TestProblemDocumentsBecomeErrorsWithCodes(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/v1/plain":
			http.Error(w, "nginx says no", http.StatusForbidden)
		case "/api/v1/html":
			w.WriteHeader(http.StatusPreconditionFailed)
		default:
			problem(w, 422, api.CodeInvalid, "is 0; give 1", "spec.cpus")
		}
	})
	for _, tc := range []struct {
		path  string
		code  api.Code
		field string
		text  string
	}{
		{"/x", api.CodeInvalid, "spec.cpus", "spec.cpus: is 0; give 1"},
		{"/plain", api.CodeForbidden, "", "the server answered 403: nginx says no"},
		{"/html", api.CodeConflict, "", "the server answered 412: Precondition Failed"},
	} {
		_, err := c.Call(t.Context(), http.MethodGet, tc.path, nil, nil)
		var e *api.Error
		if !errors.As(err, &e) || e.Code != tc.code || e.Field != tc.field || err.Error() != tc.text {
			t.Errorf("%s: %v (%#v)", tc.path, err, e)
		}
	}
}

func TestARefusedCallIsNotTriedElsewhere(t *testing.T) {
	var second atomic.Int32
	c := serve(t,
		func(w http.ResponseWriter, _ *http.Request) { problem(w, 409, api.CodeRefused, "no", "") },
		func(http.ResponseWriter, *http.Request) { second.Add(1) })
	_, err := c.Call(t.Context(), http.MethodPost, "/vms", map[string]int{}, nil)
	if api.CodeOf(err) != api.CodeRefused || second.Load() != 0 {
		t.Errorf("err %v, second server called %d times", err, second.Load())
	}
}

func TestTheGoodServerIsAskedFirstAndRevisionsAreCarried(t *testing.T) {
	var first atomic.Int32
	var min atomic.Value
	c := serve(t,
		func(w http.ResponseWriter, _ *http.Request) {
			first.Add(1)
			problem(w, 503, api.CodeNoQuorum, "no leader", "")
		},
		func(w http.ResponseWriter, r *http.Request) {
			min.Store(r.URL.Query().Get("minRevision"))
			w.Header().Set("Muster-Revision", "42")
			fmt.Fprint(w, "{}")
		})
	for range 3 {
		if _, err := c.Call(t.Context(), http.MethodGet, "/cluster", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	if first.Load() != 1 || min.Load() != "42" || c.Revision() != 42 {
		t.Errorf("first server called %d times, minRevision %v, revision %d", first.Load(), min.Load(), c.Revision())
	}
}

func TestAllAttemptsOfAPostCarryTheSameKey(t *testing.T) {
	keys := make(chan string, 8)
	c := serve(t,
		func(_ http.ResponseWriter, r *http.Request) {
			keys <- r.Header.Get("Idempotency-Key")
			panic(http.ErrAbortHandler)
		},
		func(w http.ResponseWriter, r *http.Request) {
			keys <- r.Header.Get("Idempotency-Key")
			fmt.Fprint(w, "{}")
		})
	if _, err := c.Call(t.Context(), http.MethodPost, "/vms", map[string]int{}, nil); err != nil {
		t.Fatal(err)
	}
	close(keys)
	var seen []string
	for k := range keys {
		seen = append(seen, k)
	}
	if len(seen) < 2 || seen[0] == "" || seen[0] != seen[len(seen)-1] {
		t.Errorf("keys %q", seen)
	}
}

func TestADeletionThatWasCutOffIsDoneWhenTheObjectIsGone(t *testing.T) {
	gone := func(w http.ResponseWriter, _ *http.Request) { problem(w, 404, api.CodeNotFound, "gone", "") }
	c := serve(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, gone)
	if _, err := c.Delete(t.Context(), api.KindVM, "", "web1", false); err != nil {
		t.Error(err)
	}
	c = serve(t, gone)
	if _, err := c.Delete(t.Context(), api.KindVM, "", "web1", false); api.CodeOf(err) != api.CodeNotFound {
		t.Error(err)
	}
}

func TestAnUnknownAuthorityIsRefusedAndNotTrusted(t *testing.T) {
	reached := false
	c := serve(t, func(http.ResponseWriter, *http.Request) { reached = true })
	strict, err := New(Config{Servers: c.cfg.Servers})
	if err != nil {
		t.Fatal(err)
	}
	defer strict.Close()
	_, err = strict.Call(t.Context(), http.MethodGet, "/cluster", nil, nil)
	if api.CodeOf(err) != CodeUnavailable || !strings.Contains(err.Error(), "certificate") || reached {
		t.Errorf("err %v, reached %t", err, reached)
	}
}

func TestCancelEndsAWaitingCall(t *testing.T) {
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := c.Call(ctx, http.MethodGet, "/cluster", nil, nil)
	if api.CodeOf(err) != CodeUnavailable || time.Since(began) > 5*time.Second {
		t.Errorf("err %v after %s", err, time.Since(began))
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err = c.Call(ctx, http.MethodGet, "/cluster", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("err %v, want canceled", err)
	}
}

func TestAnUploadIsSentAgainFromItsBeginning(t *testing.T) {
	var got atomic.Value
	c := serve(t,
		func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.ReadFull(r.Body, make([]byte, 5))
			panic(http.ErrAbortHandler)
		},
		func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			got.Store(string(b))
			fmt.Fprint(w, "{}")
		})
	open := func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("content")), nil }
	if _, err := c.Upload(t.Context(), "", "tiny", "", &Stream{Open: open, Size: 7}); err != nil || got.Load() != "content" {
		t.Errorf("err %v, got %v", err, got.Load())
	}
	c.good.Store(0)
	if _, err := c.Upload(t.Context(), "", "tiny", "", &Stream{Open: open, Size: -1, Once: true}); api.CodeOf(err) != CodeUnavailable {
		t.Errorf("a pipe was sent again: %v", err)
	}
}

func TestServersAreParsed(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1":                          "https://10.0.0.1:7600",
		"m1:7700, https://m2":               "https://m1:7700,https://m2:7600",
		"https://[::1]":                     "https://[::1]:7600",
		"unix:///var/lib/m/s":               "unix:///var/lib/m/s",
		"http://m1":                         "",
		"https://user@m1":                   "",
		"https://m1/api":                    "",
		"":                                  "",
		"unix://":                           "",
		strings.Repeat("m1,", MaxServers+1): "",
	} {
		got, err := ParseServers(in)
		if strings.Join(got, ",") != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestRawPathsSurviveRouters(t *testing.T) {
	for key, want := range map[string]string{
		"a/b": "/raw/a/b", "a b%": "/raw/a%20b%25", "a//b": "/raw/a%2F%2Fb", "../x": "/raw/%2E%2E%2Fx", "/x": "/raw/%2Fx", "v1.2/x": "/raw/v1.2/x",
	} {
		if got, err := rawPath(key); err != nil || got != want {
			t.Errorf("%q: %q, %v", key, got, err)
		}
	}
}

// TestAWatchLosesNothingOverReconnects cuts the connection between two events
// of the same revision.
func TestAWatchLosesNothingOverReconnects(t *testing.T) {
	put := func(name string, rev int) string {
		return fmt.Sprintf(`{"type":"put","kind":"vm","object":{"meta":{"id":%q,"name":%q}},"revision":%d}`, name, name, rev)
	}
	var turn atomic.Int32
	asked := make(chan string, 8)
	sessions := [][]string{
		{put("a", 3)}, // cut off inside the first set
		{put("a", 3), put("b", 5), `{"type":"synced","revision":6}`, put("c", 7), put("d", 9)},
		{put("d", 9), put("e", 9), put("f", 10)},
	}
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Query().Get("since")
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		n := turn.Add(1) - 1
		if int(n) < len(sessions) {
			for _, e := range sessions[n] {
				_ = conn.Write(r.Context(), websocket.MessageText, []byte(e))
			}
		}
	})
	var got []string
	done := errors.New("done")
	err := c.Watch(t.Context(), WatchOptions{Kinds: []api.Kind{api.KindVM}, MaxOutage: time.Second}, func(e Event) error {
		name := e.Type
		if e.Type == EventPut {
			name = MetaOf(e.Object).Name
		}
		got = append(got, name)
		if name == "f" {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) || strings.Join(got, " ") != "a relist a b synced c d e f" {
		t.Errorf("err %v, events %q", err, got)
	}
	if a, b, s := <-asked, <-asked, <-asked; a != "" || b != "" || s != "7" {
		t.Errorf("asked since %q, %q, %q", a, b, s)
	}
}
