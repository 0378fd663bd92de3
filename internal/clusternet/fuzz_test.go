// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/pki"
)

// fuzzIdentity is the identity of a node of a new cluster.
func fuzzIdentity(f *testing.F) *Identity {
	f.Helper()
	ca, caKey, err1 := pki.NewCA("test", "c")
	key, err2 := pki.NewKey()
	csrPEM, err3 := pki.NewCSR(key, "n")
	csr, err4 := pki.ParseCSR(csrPEM)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		f.Fatal(err)
	}
	cert, err := pki.SignNode(ca, caKey, csr, "node", "n1", "127.0.0.1")
	if err != nil {
		f.Fatal(err)
	}
	id, err := NewIdentity(cert, key, ca)
	if err != nil {
		f.Fatal(err)
	}
	return id
}

// Whatever a stranger sends first, the port lets go of the connection.
func FuzzFirstBytes(f *testing.F) {
	f.Add([]byte("SSH-2.0-OpenSSH_9.2\r\n"))
	f.Add([]byte("SSH"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0x16, 3, 1, 0, 5, 1, 0, 0, 1, 3})
	id := fuzzIdentity(f)
	f.Fuzz(func(t *testing.T, said []byte) {
		here, there := net.Pipe()
		p := NewPort(nil, id, slog.New(slog.DiscardHandler))
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			p.handshake(t.Context(), here)
		}()
		go func() {
			buf := make([]byte, 4096)
			for {
				if _, err := there.Read(buf); err != nil {
					return
				}
			}
		}()
		_ = there.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = there.Write(said)
		_ = there.Close()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Fatal("the handshake goes on without a peer")
		}
	})
}

// Whatever a node answers to a call, the caller gets bytes or an error.
func FuzzCallAnswers(f *testing.F) {
	f.Add(200, []byte("answer"))
	f.Add(422, []byte(`{"code":"not_leader","detail":"ask n2"}`))
	f.Add(422, []byte(`{`))
	f.Add(500, []byte{})
	id := fuzzIdentity(f)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	type answer struct {
		status int
		body   []byte
	}
	answers := make(chan answer, 1)
	port, rpc := NewPort(ln, id, slog.New(slog.DiscardHandler)), NewRPCServer(slog.New(slog.DiscardHandler))
	rpc.mux.HandleFunc("POST /any", func(w http.ResponseWriter, _ *http.Request) {
		a := <-answers
		w.WriteHeader(a.status)
		_, _ = w.Write(a.body)
	})
	ctx, stop := context.WithCancel(context.Background())
	rpcLn := port.Listener(ProtoRPC)
	ended := make(chan struct{}, 2)
	go func() { _ = port.Serve(ctx); ended <- struct{}{} }()
	go func() { _ = rpc.Serve(ctx, rpcLn); ended <- struct{}{} }()
	client := NewRPCClient(id)
	f.Cleanup(func() {
		client.Close()
		stop()
		<-ended
		<-ended
	})
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		if status < 200 || status > 599 || status == 204 || status == 304 {
			return // no server of ours sends these with a body
		}
		answers <- answer{status, body}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		got, err := client.Call(ctx, "node", ln.Addr().String(), "any", nil)
		if ctx.Err() != nil {
			t.Fatal("the call did not end")
		}
		if (err == nil) != (status == http.StatusOK) || err == nil && string(got) != string(body) {
			t.Fatalf("status %d and %q became %q, %v", status, body, got, err)
		}
	})
}

// FuzzSplitWire: a protocol's name with a life comes apart only if it was put
// together so.
func FuzzSplitWire(f *testing.F) {
	f.Add(wireName(ProtoRaft, 7))
	f.Add(ProtoRPC + ".1")
	f.Add(ProtoRPC + ".+2")
	f.Add("h2.2")
	f.Fuzz(func(t *testing.T, name string) {
		if proto, life := splitWire(name); life != 1 && wireName(proto, life) != name || life == 1 && proto != name {
			t.Fatalf("%q became %q of life %d", name, proto, life)
		}
	})
}
