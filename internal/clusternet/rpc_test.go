// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/freeport"
)

type codedError struct{ error }

func (codedError) RPCCode() string { return "busy" }

// peer is a node that answers calls until stop.
type peer struct {
	addr string
	stop func()
	rpc  *RPCServer
}

// startPeer serves on an address; methods registers what it answers.
func startPeer(t *testing.T, id *Identity, addr string, methods func(*RPCServer)) *peer {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	port, rpc := NewPort(ln, id, log), NewRPCServer(log)
	methods(rpc)
	ctx, cancel := context.WithCancel(context.Background())
	rpcLn := port.Listener(ProtoRPC)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := port.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := rpc.Serve(ctx, rpcLn); err != nil {
			t.Error(err)
		}
	})
	p := &peer{addr: ln.Addr().String(), rpc: rpc}
	p.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(p.stop)
	return p
}

// echoes registers what answers with the question.
func echoes(s *RPCServer) {
	s.Handle("echo", func(_ context.Context, b []byte) ([]byte, error) { return b, nil })
}

// countDials counts the attempts to connect; before may delay each, or have it fail.
func countDials(id *Identity, before func(ctx context.Context, n int64) error) *atomic.Int64 {
	var dials atomic.Int64
	id.DialTCP = func(ctx context.Context, address string) (net.Conn, error) {
		if err := before(ctx, dials.Add(1)); err != nil {
			return nil, err
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}
	return &dials
}

// stand waits until so many connections with the server stand.
func stand(t *testing.T, id *Identity, want int) {
	t.Helper()
	eventually(t, func() error {
		if n := id.Connections("server"); n != want {
			return fmt.Errorf("%d connections stand, not %d", n, want)
		}
		return nil
	})
}

func newClient(t *testing.T, id *Identity) *RPCClient {
	t.Helper()
	c := NewRPCClient(id)
	t.Cleanup(c.Close)
	return c
}

func timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestCalls(t *testing.T) {
	c := newCluster(t)
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		echoes(s)
		s.Handle("who", func(ctx context.Context, _ []byte) ([]byte, error) { return []byte(CallerOf(ctx)), nil })
		s.Handle("fail", func(_ context.Context, b []byte) ([]byte, error) { return nil, errors.New(string(b)) })
		s.Handle("busy", func(context.Context, []byte) ([]byte, error) {
			return nil, fmt.Errorf("outer: %w", codedError{errors.New("inner")})
		})
		s.Handle("flood", func(_ context.Context, _ []byte) ([]byte, error) { return make([]byte, MaxCallBytes+1), nil })
		s.Handle("brim", func(_ context.Context, _ []byte) ([]byte, error) { return make([]byte, MaxCallBytes), nil })
		s.Handle("panic", func(context.Context, []byte) ([]byte, error) { panic(http.ErrAbortHandler) })
	})
	cli := newClient(t, c.identity(t, "client"))
	call := func(method string, b []byte) ([]byte, error) { // the largest take long on a busy machine
		return cli.Call(timeout(t, 5*waitTimeout), "server", p.addr, method, b)
	}
	for _, body := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("large"), MaxCallBytes/5)} {
		if got, err := call("echo", body); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes came back as %d, %v", len(body), len(got), err)
		}
	}
	if got, err := call("who", nil); err != nil || string(got) != "client" {
		t.Errorf("caller %q, %v", got, err)
	}
	var re *RemoteError
	if _, err := call("fail", []byte("no \x00 space")); !errors.As(err, &re) || re.Detail != "no \x00 space" || re.Code != "" || re.Error() != re.Detail {
		t.Errorf("remote error %#v", err)
	}
	if _, err := call("busy", nil); !errors.As(err, &re) || re.Code != "busy" || re.Detail != "outer: inner" {
		t.Errorf("coded error %#v", err)
	}
	if got, err := call("brim", nil); err != nil || len(got) != MaxCallBytes {
		t.Errorf("the largest answer: %d bytes, %v", len(got), err)
	}
	for name, x := range map[string]struct {
		method string
		body   []byte
		says   string
	}{
		"unknown method":       {"none", nil, "404"},
		"request over limit":   {"echo", make([]byte, MaxCallBytes+1), ""},
		"answer over limit":    {"flood", nil, "larger than"},
		"handler that panics":  {"panic", nil, ""},
		"method with a slash":  {"a/../echo/", nil, ""},
		"method of odd bytes":  {"\x00", nil, ""},
		"method with question": {"none?x=1", nil, "404"},
	} {
		got, err := call(x.method, x.body)
		if err == nil || errors.As(err, &re) || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := call("echo", []byte("still there")); err != nil {
		t.Errorf("after all that: %v", err)
	}
	if _, err := cli.Call(timeout(t, waitTimeout), "other", p.addr, "echo", nil); err == nil {
		t.Error("a call to another node at this address was answered")
	}
	if CallerOf(t.Context()) != "" {
		t.Error("a caller without a call")
	}
}

func TestManyCallsAtOnce(t *testing.T) {
	c := newCluster(t)
	srv, id := c.identity(t, "server"), c.identity(t, "client")
	dials := countDials(id, func(context.Context, int64) error { return nil })
	release := make(chan struct{})
	var inside atomic.Int64
	p := startPeer(t, srv, "127.0.0.1:0", func(s *RPCServer) {
		echoes(s)
		s.Handle("meet", func(ctx context.Context, b []byte) ([]byte, error) {
			inside.Add(1)
			select {
			case <-release:
			case <-ctx.Done():
			}
			return b, nil
		})
	})
	cli := newClient(t, id)
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
		t.Fatal(err)
	}
	first := dials.Load()
	const many = 300
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			want := fmt.Sprint(i)
			got, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "meet", []byte(want))
			if err != nil || string(got) != want {
				t.Errorf("%s: %q, %v", want, got, err)
			}
		})
	}
	// All of them are under way at once, and a call goes past them.
	eventually(t, func() error {
		if n := inside.Load(); n != many {
			return fmt.Errorf("%d of %d calls are under way", n, many)
		}
		return nil
	})
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
		t.Errorf("past waiting calls: %v", err)
	}
	close(release)
	wg.Wait()
	if n := dials.Load(); n != first {
		t.Errorf("%d attempts to connect beside the connection that stood", n-first)
	}
	oneStands(t, id, first)
}

// oneStands checks that a client has one connection. On a machine that is slow enough it
// has begun another attempt.
func oneStands(t *testing.T, id *Identity, dials int64) {
	t.Helper()
	if most := int64(DialTimeout / redialAfter); dials > most {
		t.Errorf("%d attempts to connect", dials)
	}
	stand(t, id, 1)
}

func TestACrowdMakesOneConnection(t *testing.T) {
	c := newCluster(t)
	srv, id := c.identity(t, "server"), c.identity(t, "client")
	p := startPeer(t, srv, "127.0.0.1:0", echoes)
	dials := countDials(id, func(context.Context, int64) error { return nil })
	client := newClient(t, id)
	var wg sync.WaitGroup
	const many = 300
	for range many {
		wg.Go(func() {
			if _, err := client.Call(timeout(t, 20*time.Second), srv.NodeID, p.addr, "echo", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	oneStands(t, id, dials.Load())
}

// A call that cannot wait for the handshake leaves the connection to the next.
func TestAConnectionOutlastsTheCallThatWantedIt(t *testing.T) {
	c := newCluster(t)
	srv, id := c.identity(t, "server"), c.identity(t, "client")
	p := startPeer(t, srv, "127.0.0.1:0", echoes)
	slow := make(chan struct{})
	dials := countDials(id, func(context.Context, int64) error { <-slow; return nil })
	cli := newClient(t, id)
	if _, err := cli.Call(timeout(t, 20*time.Millisecond), "server", p.addr, "echo", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it connects: %v", err)
	}
	close(slow)
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
		t.Error(err)
	}
	oneStands(t, id, dials.Load())
}

// The network comes back after an attempt has begun that never ends: others do not wait
// for that one.
func TestAStaleAttemptHoldsUpNobody(t *testing.T) {
	c := newCluster(t)
	srv, id := c.identity(t, "server"), c.identity(t, "client")
	p := startPeer(t, srv, "127.0.0.1:0", echoes)
	over := make(chan struct{})
	defer close(over)
	countDials(id, func(_ context.Context, n int64) error {
		if n > 1 {
			return nil
		}
		<-over
		return errors.New("nobody waits any more")
	})
	cli := newClient(t, id)
	began := time.Now()
	var wg sync.WaitGroup
	for range 3 { // they join the attempt, and have what comes after it
		wg.Go(func() {
			if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took < redialAfter {
		t.Errorf("answered after %v", took)
	}
}

// A peer that ends connections as soon as they stand is not asked without an end.
func TestAPeerThatHangsUpIsNotBesieged(t *testing.T) {
	c := newCluster(t)
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(*RPCServer) {})
	cli := newClient(t, c.identity(t, "client"))
	peer := cli.peer("server", p.addr)
	dial := peer.dial
	var dials atomic.Int64
	peer.dial = func() (*http.ClientConn, error) {
		dials.Add(1)
		conn, err := dial()
		if err == nil {
			_ = conn.Close()
		}
		return conn, err
	}
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a peer that hangs up: %v", err)
	}
	if n := dials.Load(); n > 3 {
		t.Errorf("%d attempts for one call", n)
	}
}

// What was sent is not sent again: it may have been carried out.
func TestACallIsCarriedOutOnce(t *testing.T) {
	c := newCluster(t)
	id := c.identity(t, "client")
	var calls atomic.Int64
	began := make(chan struct{}, 2)
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		s.Handle("hang", func(ctx context.Context, _ []byte) ([]byte, error) {
			calls.Add(1)
			began <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		})
	})
	cli := newClient(t, id)
	go func() {
		<-began
		id.Drop("server", Dialled)
	}()
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "hang", nil); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("over a connection that broke: %v", err)
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("carried out %d times", n)
	}
}

// goneAway is a connection that stands, and whose other side takes no requests any more.
func goneAway(t *testing.T) *http.ClientConn {
	t.Helper()
	here, there := net.Pipe()
	t.Cleanup(func() { _ = there.Close() })
	go func() { _, _ = io.Copy(io.Discard, there) }()
	go func() { // SETTINGS, GOAWAY (RFC 9113 sections 6.5 and 6.8)
		_, _ = there.Write([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00"))
	}()
	tr := &http.Transport{Protocols: h2only(), DialContext: func(context.Context, string, string) (net.Conn, error) { return here, nil }}
	conn, err := tr.NewClientConn(t.Context(), "http", "server:0")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if conn.Available() > 0 {
			return errors.New("it takes requests")
		}
		return nil
	})
	return conn
}

// What could not be sent is sent over another connection.
func TestAConnectionThatTakesNothingIsReplaced(t *testing.T) {
	c := newCluster(t)
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", echoes)
	cli := newClient(t, c.identity(t, "client"))
	peer, old := cli.peer("server", p.addr), goneAway(t)
	if peer.conn = old; old.Err() != nil {
		t.Fatal(old.Err())
	}
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
		t.Error(err)
	}
	if old.Err() == nil || len(peer.retired) != 0 {
		t.Errorf("the old connection is open; %d are kept", len(peer.retired))
	}
}

// An attempt that ends after Close leaves nothing.
func TestAnAttemptOutlastsItsClient(t *testing.T) {
	c := newCluster(t)
	id := c.identity(t, "client")
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", echoes)
	cli := newClient(t, id)
	peer := cli.peer("server", p.addr)
	dial, made, release := peer.dial, make(chan struct{}), make(chan struct{})
	peer.dial = func() (*http.ClientConn, error) {
		conn, err := dial()
		close(made)
		<-release
		return conn, err
	}
	called := make(chan error, 1)
	go func() {
		_, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil)
		called <- err
	}()
	<-made
	cli.Close()
	close(release)
	if err := <-called; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the call that waited for it: %v", err)
	}
	stand(t, id, 0)
}

// A connection that takes no further call is left to those under way, and closed
// after them.
func TestAConnectionRetires(t *testing.T) {
	c := newCluster(t)
	id := c.identity(t, "client")
	began, release := make(chan struct{}), make(chan struct{})
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		echoes(s)
		s.Handle("hang", func(context.Context, []byte) ([]byte, error) {
			close(began)
			<-release
			return []byte("done"), nil
		})
	})
	cli := newClient(t, id)
	hung := make(chan error, 1)
	go func() {
		got, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "hang", nil)
		if err == nil && string(got) != "done" {
			err = fmt.Errorf("answer %q", got)
		}
		hung <- err
	}()
	<-began
	peer := cli.peer("server", p.addr)
	old := peer.conn
	peer.retire(old)
	if _, err := cli.Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err != nil {
		t.Error(err)
	}
	if peer.conn == old || old.Err() != nil {
		t.Errorf("the call went over the old connection, or that is closed (%v)", old.Err())
	}
	close(release)
	if err := <-hung; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	eventually(t, func() error {
		if old.Err() == nil {
			return errors.New("the old connection is open")
		}
		return nil
	})
	stand(t, id, 1)
}

func TestAClosedClientCallsNobody(t *testing.T) {
	t.Run("", func(t *testing.T) { closeWhileCalling(t, false) })
	t.Run("retired", func(t *testing.T) { closeWhileCalling(t, true) })
}

func closeWhileCalling(t *testing.T, retired bool) {
	t.Helper()
	c := newCluster(t)
	id := c.identity(t, "client")
	began := make(chan struct{})
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		s.Handle("hang", func(ctx context.Context, _ []byte) ([]byte, error) {
			close(began)
			<-ctx.Done()
			return nil, ctx.Err()
		})
	})
	cli := newClient(t, id)
	hung := make(chan error, 1)
	go func() {
		_, err := cli.Call(timeout(t, 10*waitTimeout), "server", p.addr, "hang", nil)
		hung <- err
	}()
	<-began
	if retired {
		peer := cli.peer("server", p.addr)
		peer.retire(peer.conn)
	}
	cli.Close()
	select {
	case err := <-hung:
		if err == nil {
			t.Error("answered")
		}
	case <-time.After(waitTimeout):
		t.Error("the call under way goes on")
	}
	for _, node := range []string{"server", "other"} {
		if _, err := cli.Call(timeout(t, waitTimeout), node, p.addr, "hang", nil); !errors.Is(err, net.ErrClosed) && !errors.Is(err, context.Canceled) {
			t.Errorf("a call to %s after Close: %v", node, err)
		}
	}
	stand(t, id, 0)
}

func eventually(t *testing.T, try func() error) {
	t.Helper()
	deadline := time.Now().Add(waitTimeout)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestCallsEndWithTheirContext(t *testing.T) {
	c := newCluster(t)
	began, ended := make(chan struct{}, 2), make(chan error, 2)
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		s.Handle("hang", func(ctx context.Context, _ []byte) ([]byte, error) {
			began <- struct{}{}
			<-ctx.Done()
			ended <- ctx.Err()
			return nil, ctx.Err()
		})
	})
	cli := newClient(t, c.identity(t, "client"))
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := cli.Call(short, "server", p.addr, "hang", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past its deadline: %v", err)
	}
	gone, giveUp := context.WithCancel(t.Context())
	go func() {
		for range cap(began) { // the deadline may have passed before the handler ran
			select {
			case <-began:
			case <-time.After(waitTimeout):
			}
			giveUp()
		}
	}()
	_, err := cli.Call(gone, "server", p.addr, "hang", nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	var re *RemoteError
	if errors.As(err, &re) {
		t.Errorf("taken for an answer: %v", err)
	}
	// The other side learns of it, so that it does not work for nobody.
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the handler's context: %v", err)
		}
	case <-time.After(waitTimeout):
		t.Error("the handler was not told")
	}
}

func TestAPeerThatRestartsIsFoundAgain(t *testing.T) {
	c := newCluster(t)
	srv := c.identity(t, "server")
	p := startPeer(t, srv, freeport.Loopback(t), echoes)
	cli := newClient(t, c.identity(t, "client"))
	echo := func(d time.Duration) error {
		_, err := cli.Call(timeout(t, d), "server", p.addr, "echo", []byte("x"))
		return err
	}
	for range 3 {
		if err := echo(waitTimeout); err != nil {
			t.Fatal(err)
		}
		p.stop()
		if err := echo(time.Second); err == nil {
			t.Fatal("a peer that is gone answered")
		}
		p = startPeer(t, srv, p.addr, echoes)
		eventually(t, func() error { return echo(time.Second) })
	}
}

// A call under way when the peer dies ends at once, not at its deadline.
func TestCallsToADyingPeerEnd(t *testing.T) {
	c := newCluster(t)
	began := make(chan struct{})
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		s.Handle("hang", func(ctx context.Context, _ []byte) ([]byte, error) {
			close(began)
			<-ctx.Done()
			return nil, ctx.Err()
		})
	})
	cli := newClient(t, c.identity(t, "client"))
	done := make(chan error, 1)
	go func() {
		_, err := cli.Call(timeout(t, 10*waitTimeout), "server", p.addr, "hang", nil)
		done <- err
	}()
	<-began
	p.stop()
	select {
	case err := <-done:
		if err == nil {
			t.Error("answered by a dead peer")
		}
	case <-time.After(waitTimeout):
		t.Error("the call still waits")
	}
}

// Only nodes reach the methods: a certificate of another cluster, or none,
// never gets as far as a handler.
func TestStrangersCannotCall(t *testing.T) {
	c := newCluster(t)
	var calls atomic.Int64
	p := startPeer(t, c.identity(t, "server"), "127.0.0.1:0", func(s *RPCServer) {
		s.Handle("echo", func(context.Context, []byte) ([]byte, error) { calls.Add(1); return nil, nil })
	})
	stranger := newCluster(t).identity(t, "client")
	if _, err := newClient(t, stranger).Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err == nil {
		t.Error("a stranger's call was answered")
	}
	half := c.identity(t, "client") // trusts this cluster, but shows another's certificate
	half.shown.Load().cert = stranger.shown.Load().cert
	if _, err := newClient(t, half).Call(timeout(t, waitTimeout), "server", p.addr, "echo", nil); err == nil {
		t.Error("a call with a strange certificate was answered")
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("%d calls reached the handler", n)
	}
}
