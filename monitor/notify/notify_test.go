// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/freeport"
)

func testAlert(rule, message string) api.Alert {
	a := api.Alert{Meta: api.NewMeta(api.KindAlert, "", "")}
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	a.Spec = api.AlertSpec{Rule: rule, Severity: api.SeverityCritical, TargetKind: api.KindNode, TargetID: "1", Target: "m1"}
	a.Status = api.AlertStatus{Phase: api.AlertFiring, Message: message, FiringAt: &now}
	return a
}

func testMessage(texts ...string) Message {
	m := Message{Phase: api.AlertFiring, At: time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)}
	for i, text := range texts {
		a := testAlert(fmt.Sprintf("rule-%d", i), text)
		m.Items = append(m.Items, ItemOf(&a))
	}
	return m
}

func testSender() *Sender { return New("prod", "c1", "m2") }

func TestARepetitionHasTheSameKey(t *testing.T) {
	a, b := testAlert("r", "one"), testAlert("r", "two")
	m := Message{Items: []Item{ItemOf(&a), ItemOf(&b)}}
	again := Message{Items: []Item{ItemOf(&b), ItemOf(&a)}}
	if m.key() != again.key() {
		t.Error("the order of alerts changes the key")
	}
	later := a.Status.FiringAt.Add(time.Hour)
	a.Status.FiringAt = &later
	if next := (Message{Items: []Item{ItemOf(&a), ItemOf(&b)}}); m.key() == next.key() {
		t.Error("another occurrence has the same key")
	}
	a.Status.Phase, a.Status.ResolvedAt = api.AlertResolved, &later
	if k := ItemOf(&a).Key; k == m.Items[0].Key {
		t.Error("another phase has the same key")
	}
}

func TestSubjectsAreOneLine(t *testing.T) {
	m := testMessage("node m1 is lost\r\nBcc: everybody@example.org\x1b[31m\u2028", "another")
	got := m.subject("prod")
	if strings.ContainsAny(got, "\r\n\x1b\u2028") || !strings.HasPrefix(got, "[muster prod] FIRING critical: 2 alerts: node m1 is lost") {
		t.Errorf("subject %q", got)
	}
	m = testMessage(strings.Repeat("ü", 1000))
	if len(m.subject("prod")) > maxSubject+10 {
		t.Error("the subject has no end")
	}
}

func webhook(t *testing.T, h http.HandlerFunc) Receiver {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return Receiver{Name: "hook", Spec: api.ReceiverSpec{Type: api.ReceiverWebhook, Address: srv.URL}, Secret: "the key of the hook"}
}

func TestAWebhookIsSigned(t *testing.T) {
	var calls atomic.Int32
	m := testMessage("node m1 is lost")
	r := webhook(t, func(w http.ResponseWriter, req *http.Request) {
		calls.Add(1)
		body, _ := io.ReadAll(req.Body)
		stamp := req.Header.Get(HeaderTimestamp)
		if req.Header.Get(HeaderSignature) != Sign([]byte("the key of the hook"), stamp, body) || stamp == "" {
			t.Errorf("signature %q", req.Header.Get(HeaderSignature))
		}
		var got webhookBody
		if err := json.Unmarshal(body, &got); err != nil || got.Cluster != "prod" || len(got.Alerts) != 1 || got.Alerts[0].Message != "node m1 is lost" || got.Key != m.key() || req.Header.Get(HeaderKey) != m.key() {
			t.Errorf("body %s, %v", body, err)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	if err := testSender().Send(t.Context(), r, m); err != nil || calls.Load() != 1 {
		t.Fatalf("%v after %d calls", err, calls.Load())
	}
}

const saysNothing = "says nothing"

// within is the time for a receiver: little for who uses up all of it.
func within(name string) time.Duration {
	if name == saysNothing {
		return 2 * time.Second
	}
	return time.Minute
}

func TestHostileWebhooks(t *testing.T) {
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	endless := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(status)
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}
	}
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		want    string // of the error; empty: delivered
	}{
		"endless body of a success": {endless(200), ""},
		"endless body of a failure": {endless(500), "answered 500"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "redirect"},
		"failure with secrets": {func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, "bad key: the key of the hook\x1b[31m", http.StatusForbidden)
		}, "not shown"},
		saysNothing: {func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body); <-r.Context().Done() }, "deadline"},
		"endless header": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			for {
				if _, err := io.WriteString(conn, "X-A: "+strings.Repeat("a", 4096)+"\r\n"); err != nil {
					return
				}
			}
		}, "header"},
		"no HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_, _ = io.WriteString(conn, "220 smtp.example.org\r\n")
				_ = conn.Close()
			}
		}, "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := webhook(t, tc.handler)
			ctx, cancel := context.WithTimeout(t.Context(), within(name))
			defer cancel()
			err := testSender().Send(ctx, r, testMessage("x"))
			switch {
			case tc.want == "" && err != nil, tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q", err, tc.want)
			case err != nil && (strings.Contains(err.Error(), r.Secret) || strings.ContainsAny(err.Error(), "\r\n\x1b")):
				t.Errorf("the error tells too much: %q", err)
			}
		})
	}
	t.Cleanup(func() {
		if elsewhere.Load() != 0 {
			t.Error("the redirect was followed")
		}
	})
}

// talker is a mail server that says what it is told to.
func talker(t *testing.T, talk func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			talk(c)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return ln.Addr().String()
}

func TestHostileMailServers(t *testing.T) {
	for name, tc := range map[string]struct {
		talk func(net.Conn)
		tls  string
		want string
	}{
		saysNothing: {func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) }, "none", "timeout"},
		"a line without end": {func(c net.Conn) {
			for {
				if _, err := c.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}, "none", "without end"},
		"no STARTTLS where it is demanded": {func(c net.Conn) {
			_, _ = io.WriteString(c, "220 hi\r\n")
			_, _ = c.Read(make([]byte, 512))
			_, _ = io.WriteString(c, "250 hi\r\n")
			_, _ = c.Read(make([]byte, 512))
		}, "starttls", "STARTTLS"},
		"no TLS where it is demanded": {func(c net.Conn) { _, _ = io.WriteString(c, "220 hi\r\n"); _, _ = c.Read(make([]byte, 512)) }, "tls", "tls"},
		"is another protocol":         {func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }, "none", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := Receiver{Name: "ops", Secret: "the password", Spec: api.ReceiverSpec{
				Type: api.ReceiverSMTP, Address: talker(t, tc.talk), TLS: tc.tls, From: "a@example.org", To: []string{"b@example.org"}, User: "a",
			}}
			ctx, cancel := context.WithTimeout(t.Context(), within(name))
			defer cancel()
			began := time.Now()
			err := testSender().Send(ctx, r, testMessage("x"))
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(tc.want)) || strings.Contains(err.Error(), r.Secret) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestUnreachableReceivers(t *testing.T) {
	addr := freeport.Loopback(t)
	for name, spec := range map[string]api.ReceiverSpec{
		"mail":         {Type: api.ReceiverSMTP, Address: addr, TLS: "none", From: "a@example.org", To: []string{"b@example.org"}},
		"webhook":      {Type: api.ReceiverWebhook, Address: "http://" + addr},
		"no such type": {Type: "pigeon", Address: addr},
	} {
		t.Run(name, func(t *testing.T) {
			if err := testSender().Send(t.Context(), Receiver{Name: "r", Spec: spec}, testMessage("x")); err == nil {
				t.Error("no error")
			}
		})
	}
}

// TestErrorsHoldNoSecret: errors are stored, shown and logged. A hostile server
// repeats what it was told, in a form of its choice.
func TestErrorsHoldNoSecret(t *testing.T) {
	const user, password = "muster", "correct horse battery staple"
	pad := strings.Repeat("x", 500)
	for name, reply := range map[string]string{
		"as it is":               "535 no: " + password,
		"cut off in its middle":  "535 " + pad[:2*maxSubject-len("send to receiver ")-50] + password,
		"as SASL sends it":       "535 you said " + base64.StdEncoding.EncodeToString([]byte("\x00"+user+"\x00"+password)),
		"in base64 by itself":    "535 you said " + base64.StdEncoding.EncodeToString([]byte(password)),
		"in base64, not padded":  "535 <" + base64.RawURLEncoding.EncodeToString([]byte("x"+password)) + ">",
		"over two lines":         "535-correct horse\r\n535 battery staple",
		"with control sequences": "535 correct\x1b[0m horse battery staple\x07",
	} {
		t.Run(name, func(t *testing.T) {
			addr := talker(t, func(c net.Conn) {
				in := bufio.NewReader(c)
				say := func(s string) { _, _ = io.WriteString(c, s+"\r\n") }
				say("220 hi")
				_, _ = in.ReadString('\n')
				say("250-hi\r\n250 AUTH PLAIN")
				_, _ = in.ReadString('\n')
				say(reply)
				_, _ = in.ReadString('\n')
			})
			r := Receiver{Name: "ops", Secret: password, Spec: api.ReceiverSpec{
				Type: api.ReceiverSMTP, Address: addr, TLS: "none", From: "a@example.org", To: []string{"b@example.org"}, User: user,
			}}
			err := testSender().Send(t.Context(), r, testMessage("x"))
			if err == nil {
				t.Fatal("no error")
			}
			text := err.Error()
			for _, word := range []string{"horse", "battery", "staple"} {
				if strings.Contains(text, word) {
					t.Errorf("the error has %q of the password: %s", word, text)
				}
			}
			for run := range strings.FieldsFuncSeq(text, func(r rune) bool { return !strings.ContainsRune(base64Letters, r) }) {
				if plain, err := base64.RawURLEncoding.DecodeString(strings.NewReplacer("+", "-", "/", "_").Replace(run)); err == nil && strings.Contains(string(plain), "battery") {
					t.Errorf("the error has the password in base64: %s", text)
				}
			}
		})
	}
}

const base64Letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"

// The address of many chat services is itself a secret.
func TestErrorsOfWebhooksNameTheHostOnly(t *testing.T) {
	refusing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no such hook: "+r.URL.Path, http.StatusNotFound)
	}))
	defer refusing.Close()
	moving := httptest.NewServer(http.RedirectHandler("/elsewhere", http.StatusFound))
	defer moving.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for name, base := range map[string]string{"refuses": refusing.URL, "redirects": moving.URL, "is not there": gone.URL} {
		t.Run(name, func(t *testing.T) {
			r := Receiver{Name: "chat", Spec: api.ReceiverSpec{Type: api.ReceiverWebhook, Address: base + "/services/T0PSECRET/hook?token=T0PSECRET"}}
			err := testSender().Send(t.Context(), r, testMessage("x"))
			if err == nil || strings.Contains(err.Error(), "T0PSECRET") || !strings.Contains(err.Error(), strings.TrimPrefix(base, "http://")) {
				t.Errorf("error %v", err)
			}
		})
	}
}
