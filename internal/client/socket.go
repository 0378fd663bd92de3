// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

const (
	// MaxHistory is the most output that a console sends on connect.
	MaxHistory = 256 << 10
	// consoleFrame and watchFrame are the largest messages that are read.
	consoleFrame = 1 << 20
	watchFrame   = 8 << 20
	// socketDial is how long one server may take to open a WebSocket.
	socketDial = answerTimeout
)

// socket is a WebSocket with a keep-alive that finds dead connections, such
// as to a host that lost its power.
type socket struct {
	conn *websocket.Conn
	stop context.CancelFunc
	done sync.WaitGroup
	// Server that was dialled and Node that answered.
	server, node string
	// lost moves the client on to the next server.
	lost func()
}

// read returns the next message. When the connection is lost, the next dial
// begins at another server: this one may still accept connections but serve
// none.
func (s *socket) read(ctx context.Context) ([]byte, error) {
	_, b, err := s.conn.Read(ctx)
	if err != nil && ctx.Err() == nil && websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		s.lost()
	}
	return b, err
}

// dial opens a WebSocket on the first server that takes it.
func (c *Client) dial(ctx context.Context, path string, q url.Values, limit int64, protocols ...string) (*socket, error) {
	if rev := c.revision.Load(); rev > 0 {
		q.Set("minRevision", strconv.FormatUint(rev, 10))
	}
	failed := c.settle(ctx)
	if failed != nil {
		return nil, c.giveUp(ctx, failed)
	}
	first := int(c.good.Load())
	for i := range c.endpoints {
		at := (first + i) % len(c.endpoints)
		e := c.endpoints[at]
		s, err := c.dialOne(ctx, e, path, q, limit, protocols)
		if err == nil {
			c.good.Store(int32(at))
			s.lost = func() { c.good.CompareAndSwap(int32(at), int32((at+1)%len(c.endpoints))) }
			return s, nil
		}
		var p *Problem
		if errors.As(err, &p) && !passOver(p) {
			c.good.Store(int32(at))
			return nil, err
		}
		failed = append(failed, attemptError{server: e.name, err: err})
		if ctx.Err() != nil {
			break
		}
		if i < len(c.endpoints)-1 {
			c.notify(e.name + ": " + brief(err) + "; trying the next server")
		}
	}
	return nil, c.giveUp(ctx, failed)
}

func (c *Client) dialOne(ctx context.Context, e *endpoint, path string, q url.Values, limit int64, protocols []string) (*socket, error) {
	dialCtx, cancel := context.WithTimeoutCause(ctx, socketDial, errNoAnswer)
	defer cancel()
	h := http.Header{}
	c.sign(h, e)
	//nolint:bodyclose // "You never need to close resp.Body yourself", says Dial
	conn, resp, err := websocket.Dial(dialCtx, e.base+Base+path+"?"+q.Encode(), &websocket.DialOptions{HTTPClient: e.ws, HTTPHeader: h, Subprotocols: protocols})
	if err != nil {
		if resp != nil && resp.StatusCode >= 400 {
			body, _ := io.ReadAll(resp.Body)
			return nil, problemFrom(resp.StatusCode, resp.Header, body)
		}
		if ctx.Err() == nil && dialCtx.Err() != nil {
			err = errNoAnswer
		}
		var u *url.Error // it has the whole query, which may hold a ticket
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, err
	}
	conn.SetReadLimit(limit)
	s := &socket{conn: conn, server: e.name, node: resp.Header.Get(headerNode)}
	pingCtx, stop := context.WithCancel(ctx)
	s.stop = stop
	s.done.Go(func() { s.keepAlive(pingCtx) })
	return s, nil
}

// keepAlive closes the connection when a ping stays unanswered.
func (s *socket) keepAlive(ctx context.Context) {
	for pause(ctx, pingIdle) {
		pingCtx, cancel := context.WithTimeout(ctx, pingTimeout)
		err := s.conn.Ping(pingCtx)
		cancel()
		if err != nil {
			_ = s.conn.CloseNow()
			return
		}
	}
}

func (s *socket) close() {
	s.stop()
	_ = s.conn.CloseNow()
	s.done.Wait()
}

// Console is an open serial console. Read and Write may be called from
// different goroutines.
type Console struct {
	s *socket
}

// ErrConsoleEnded is returned by Console.Read when the VM has ended.
var ErrConsoleEnded = errors.New("the VM has stopped")

// Console opens a VM's serial console. First come the last history bytes of
// what it printed before, 0 to MaxHistory.
func (c *Client) Console(ctx context.Context, project, vm string, history int) (*Console, error) {
	path, err := objectPath(api.KindVM, vm)
	if err != nil {
		return nil, err
	}
	q := projectQuery(api.KindVM, project)
	q.Set("history", strconv.Itoa(history))
	s, err := c.dial(ctx, path+"/console", q, consoleFrame)
	if err != nil {
		return nil, err
	}
	return &Console{s: s}, nil
}

// Server returns the server that the console goes through.
func (k *Console) Server() string { return k.s.server }

// Read returns the next output. It returns ErrConsoleEnded when the server
// closed the console because the VM stopped; any other error is a lost
// connection.
func (k *Console) Read(ctx context.Context) ([]byte, error) {
	b, err := k.s.read(ctx)
	if websocket.CloseStatus(err) == websocket.StatusNormalClosure {
		return nil, ErrConsoleEnded
	}
	return b, err
}

// Write sends input to the guest.
func (k *Console) Write(ctx context.Context, p []byte) error {
	return k.s.conn.Write(ctx, websocket.MessageBinary, p)
}

// Close leaves the console.
func (k *Console) Close() {
	// A polite close frame, so that the server need not find out by itself.
	done := make(chan struct{})
	go func() { defer close(done); _ = k.s.conn.Close(websocket.StatusNormalClosure, "detached") }()
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
	k.s.close()
	<-done
}

const closeTimeout = 500 * time.Millisecond

// ConsoleLog returns the last bytes of a VM's console without attaching.
func (c *Client) ConsoleLog(ctx context.Context, project, vm string, bytes int) ([]byte, error) {
	path, err := objectPath(api.KindVM, vm)
	if err != nil {
		return nil, err
	}
	q := projectQuery(api.KindVM, project)
	if bytes > 0 {
		q.Set("bytes", strconv.Itoa(bytes))
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path + "/console/log", Query: q, Header: http.Header{"Accept": {"text/plain"}}})
	if err != nil {
		return nil, err
	}
	return reply.Body, nil
}
