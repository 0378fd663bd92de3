// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	// firstReadBytes is the reader's first buffer; it grows to MaxRequestBytes.
	firstReadBytes = 16 << 10
	// maxErrorBytes cuts error texts, which may quote the request.
	maxErrorBytes = 512
)

// conn is one client connection: one reader, one writer, a bounded queue.
type conn struct {
	s       *Server
	c       *net.UnixConn
	out     *outQueue
	slots   chan struct{} // waiting requests
	waiting sync.WaitGroup
	// Under Server.mu:
	watching   bool
	superseded bool // it had control
}

// serveConn takes over an accepted connection and returns at once.
func (s *Server) serveConn(c *net.UnixConn) {
	cn := &conn{s: s, c: c, out: newOutQueue(), slots: make(chan struct{}, MaxInFlight)}
	s.mu.Lock()
	full, stopped := len(s.conns) >= MaxConnections, s.conns == nil
	if !full && !stopped {
		s.conns[cn] = struct{}{}
		s.requests.Add(1)
	}
	s.mu.Unlock()
	if full || stopped {
		_ = c.SetWriteDeadline(time.Now().Add(flushWait))
		_, _ = c.Write(refusalLine(0, refuse(CodeBusy, "too many connections")))
		_ = c.Close()
		return
	}
	go cn.run()
}

func (cn *conn) run() {
	defer cn.s.requests.Done()
	written := make(chan struct{})
	go func() {
		defer close(written)
		cn.write()
	}()
	cn.read()
	cn.waiting.Wait() // answers of waiting requests are still written
	cn.s.mu.Lock()
	delete(cn.s.conns, cn)
	if cn.s.control == cn {
		cn.s.control = nil
	}
	cn.s.mu.Unlock()
	_ = cn.c.SetWriteDeadline(time.Now().Add(flushWait))
	cn.out.finish()
	<-written
	_ = cn.c.Close()
}

func (cn *conn) read() {
	sc := bufio.NewScanner(cn.c)
	sc.Buffer(make([]byte, firstReadBytes), MaxRequestBytes)
	sc.Split(splitLine)
	for sc.Scan() {
		cn.handle(sc.Bytes())
	}
	if errors.Is(sc.Err(), bufio.ErrTooLong) {
		cn.send(refusalLine(0, badRequest("line is over %d bytes", MaxRequestBytes)))
	}
}

func (cn *conn) write() {
	for {
		msg, ok := cn.out.next()
		if !ok {
			return
		}
		if _, err := cn.c.Write(msg); err != nil {
			cn.drop()
			return
		}
	}
}

// send queues a line; a client that does not read is disconnected.
func (cn *conn) send(line []byte) {
	if !cn.out.put(line) {
		cn.drop()
	}
}

// drop disconnects at once. It never blocks.
func (cn *conn) drop() {
	cn.out.abandon()
	_ = cn.c.Close()
}

// handle answers one request, start and kill in the background: they wait, and
// an extend behind them must not.
func (cn *conn) handle(line []byte) {
	req, e := decodeRequest(line)
	if e != nil {
		cn.send(refusalLine(req.id, e))
		return
	}
	if req.op != opStart && req.op != opKill {
		cn.send(cn.s.answer(cn, req))
		if req.op == opStop {
			cn.s.endIfStopped()
		}
		return
	}
	select {
	case cn.slots <- struct{}{}:
	default:
		cn.send(refusalLine(req.id, refuse(CodeBusy, "%d requests are waiting", MaxInFlight)))
		return
	}
	carryOut := func() []byte { return cn.s.answer(cn, req) }
	if b, ok := req.body.(StartRequest); ok {
		in, e := cn.s.reserve(cn, b)
		if e != nil {
			<-cn.slots
			cn.send(cn.s.reply(req, nil, e))
			return
		}
		carryOut = func() []byte {
			body, e := cn.s.fork(b, in)
			return cn.s.reply(req, body, e)
		}
	}
	cn.waiting.Go(func() {
		defer func() { <-cn.slots }()
		cn.send(carryOut())
	})
}

// broadcast queues an event on every watching connection. The caller holds mu.
func (s *Server) broadcast(event any) {
	line, err := json.Marshal(event)
	if err != nil {
		s.log.Error("encode event", "err", err)
		return
	}
	line = append(line, '\n')
	for cn := range s.conns {
		if cn.watching {
			cn.send(line)
		}
	}
}

// closeConns lets every connection write what is queued and waits for them.
func (s *Server) closeConns() {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	for cn := range conns {
		_ = cn.c.SetWriteDeadline(time.Now().Add(flushWait))
		_ = cn.c.CloseRead() // ends the reader, and with it the connection
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.requests.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(2 * flushWait): // a request inside a hanging fork
	}
}

// replyLine encodes a positive answer; body is nil or encodes as an object.
func replyLine(id uint64, body any) []byte {
	head := fmt.Sprintf(`{"id":%d,"ok":true`, id)
	if body == nil {
		return []byte(head + "}\n")
	}
	enc, err := json.Marshal(body)
	if err != nil || len(enc) < 2 || enc[0] != '{' {
		return refusalLine(id, refuse(CodeInternal, "encode answer: %v", err))
	}
	if len(enc) > 2 {
		head += ","
	}
	line := append([]byte(head), enc[1:]...)
	return append(line, '\n')
}

func refusalLine(id uint64, e *Error) []byte {
	msg := e.Msg
	if len(msg) > maxErrorBytes {
		msg = msg[:maxErrorBytes]
	}
	line, err := json.Marshal(struct {
		ID    uint64 `json:"id"`
		OK    bool   `json:"ok"`
		Code  Code   `json:"code"`
		Error string `json:"error"`
	}{id, false, e.Code, msg})
	if err != nil { // no such value encodes badly
		return fmt.Appendf(nil, `{"id":%d,"ok":false,"code":%q,"error":""}`+"\n", id, CodeInternal)
	}
	return append(line, '\n')
}

// outQueue is a queue bounded in messages and bytes.
type outQueue struct {
	mu    sync.Mutex
	ready chan struct{}
	msgs  [][]byte
	bytes int
	last  bool // finish was called
	dead  bool // abandon was called
}

func newOutQueue() *outQueue { return &outQueue{ready: make(chan struct{}, 1)} }

// put returns false when the queue is full: the reader is too slow. Bytes count
// only for what waits, so that one large answer always fits.
func (q *outQueue) put(msg []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.dead || q.last {
		return true // nobody reads any more; the connection is ending
	}
	if len(q.msgs) >= MaxQueued || len(q.msgs) > 0 && q.bytes+len(msg) > MaxReplyBytes {
		return false
	}
	q.msgs = append(q.msgs, msg)
	q.bytes += len(msg)
	q.signal()
	return true
}

// next waits for a message; false means that there will be none.
func (q *outQueue) next() ([]byte, bool) {
	for {
		q.mu.Lock()
		switch {
		case q.dead || len(q.msgs) == 0 && q.last:
			q.mu.Unlock()
			return nil, false
		case len(q.msgs) > 0:
			msg := q.msgs[0]
			q.msgs = q.msgs[1:]
			q.bytes -= len(msg)
			q.mu.Unlock()
			return msg, true
		}
		q.mu.Unlock()
		<-q.ready
	}
}

// finish ends the queue after what is in it.
func (q *outQueue) finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.last = true
	q.signal()
}

// abandon ends the queue now.
func (q *outQueue) abandon() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dead, q.msgs, q.bytes = true, nil, 0
	q.signal()
}

func (q *outQueue) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}
