// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func testServer(t *testing.T, h http.HandlerFunc) (conn *httpConn, connections *atomic.Int32) {
	t.Helper()
	connections = new(atomic.Int32)
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		connections.Add(1)
		return nil, nil
	}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	conf := srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	c, err := dialHTTP(t.Context(), srv.Listener.Addr().String(), conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, connections
}

func TestCallsShareOneConnection(t *testing.T) {
	c, connections := testServer(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if r.Header.Get("X") == "chunks" {
			w.(http.Flusher).Flush()
		}
		_, _ = fmt.Fprintf(w, "%s %s", r.Method, b)
	})
	for _, head := range []string{"", "X: chunks\r\n"} {
		for range 3 {
			status, b, err := c.call(t.Context(), "PUT /x HTTP/1.1\r\nHost: h\r\n"+head, []byte("body"))
			if err != nil || status != http.StatusOK || string(b) != "PUT body" {
				t.Fatalf("status %d, %q, %v", status, b, err)
			}
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestALateAnswerIsNotTakenForTheNext(t *testing.T) {
	slow := make(chan struct{})
	c, connections := testServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-slow
		}
		_, _ = io.WriteString(w, r.URL.Path)
	})
	defer close(slow)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := c.call(ctx, "GET /slow HTTP/1.1\r\nHost: h\r\n", nil); err == nil {
		t.Fatal("no error after the deadline")
	}
	_, b, err := c.call(t.Context(), "GET /next HTTP/1.1\r\nHost: h\r\n", nil)
	if err != nil || string(b) != "/next" {
		t.Errorf("%q, %v", b, err)
	}
	if n := connections.Load(); n != 2 {
		t.Errorf("%d connections, want a new one after the failure", n)
	}
}

func TestLongAnswersAreWhole(t *testing.T) {
	long := strings.Repeat("0123456789", 5000)
	c, _ := testServer(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, long) })
	for range 2 {
		if _, b, err := c.call(t.Context(), "GET / HTTP/1.1\r\nHost: h\r\n", nil); err != nil || string(b) != long {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
	}
}
