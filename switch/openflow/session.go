// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package openflow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Limits.
const (
	// CallDeadline bounds the greeting, and one set of flows or one meter.
	CallDeadline = 5 * time.Second
	// MaxMessage is the longest message that is read.
	MaxMessage = 65535
)

const (
	version        = 4 // OpenFlow 1.3
	typeHello      = 0
	typeError      = 1
	typeEchoAsk    = 2
	typeEchoAnswer = 3
	typePacketOut  = 13
	typeFlowMod    = 14
	typeBarrier    = 20
	typeBarrierEnd = 21
	headerLength   = 8
)

// Session is a conversation with one bridge.
type Session struct {
	conn net.Conn
	done chan struct{}

	// meters that this session made; nil before the first look at them.
	meters map[uint32]Meter

	write sync.Mutex
	xid   uint32

	mu      sync.Mutex
	waiting map[uint32]chan error // by the barrier's xid
	refused error                 // since the last barrier
}

// Dial connects to the management socket of a bridge.
func Dial(ctx context.Context, path string) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, CallDeadline)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("speak OpenFlow with %s: %w", path, err)
	}
	s := &Session{conn: conn, done: make(chan struct{}), waiting: map[uint32]chan error{}}
	if err := s.greet(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("speak OpenFlow with %s: %w", path, err), conn.Close())
	}
	go s.read()
	return s, nil
}

func (s *Session) greet(ctx context.Context) error {
	if t, ok := ctx.Deadline(); ok {
		_ = s.conn.SetDeadline(t)
		defer func() { _ = s.conn.SetDeadline(time.Time{}) }()
	}
	if _, err := s.conn.Write(message(typeHello, 0, nil)); err != nil {
		return err
	}
	typ, _, _, err := receive(s.conn)
	if err == nil && typ != typeHello {
		err = fmt.Errorf("the first message has type %d, not a greeting", typ)
	}
	return err
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Close ends the session.
func (s *Session) Close() { _ = s.conn.Close() }

func message(typ byte, xid uint32, body []byte) []byte {
	b := []byte{version, typ}
	b = binary.BigEndian.AppendUint16(b, uint16(headerLength+len(body)))
	b = binary.BigEndian.AppendUint32(b, xid)
	return append(b, body...)
}

func receive(r io.Reader) (typ byte, xid uint32, body []byte, err error) {
	var h [headerLength]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, 0, nil, err
	}
	n := int(binary.BigEndian.Uint16(h[2:]))
	if n < headerLength {
		return 0, 0, nil, fmt.Errorf("a message of %d bytes", n)
	}
	body = make([]byte, n-headerLength)
	_, err = io.ReadFull(r, body)
	return h[1], binary.BigEndian.Uint32(h[4:]), body, err
}

// read answers the switch's echo requests and ends waits.
func (s *Session) read() {
	defer close(s.done)
	for {
		typ, xid, body, err := receive(s.conn)
		if err != nil {
			_ = s.conn.Close()
			s.mu.Lock()
			for _, w := range s.waiting {
				w <- fmt.Errorf("the switch ended the session: %w", err)
			}
			clear(s.waiting)
			s.mu.Unlock()
			return
		}
		switch typ {
		case typeEchoAsk:
			_ = s.send(message(typeEchoAnswer, xid, body)) // the next read fails, too
		case typeError:
			s.mu.Lock()
			s.refused = errorOf(body)
			s.mu.Unlock()
		case typeBarrierEnd:
			s.mu.Lock()
			if w, ok := s.waiting[xid]; ok {
				w <- s.refused
				delete(s.waiting, xid)
			}
			s.mu.Unlock()
		}
	}
}

func errorOf(body []byte) error {
	if len(body) < 4 {
		return &Refusal{}
	}
	return &Refusal{Type: binary.BigEndian.Uint16(body), Code: binary.BigEndian.Uint16(body[2:])}
}

func (s *Session) send(b []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	_ = s.conn.SetWriteDeadline(time.Now().Add(CallDeadline))
	_, err := s.conn.Write(b)
	return err
}

// Inject lets the switch handle a frame as if it had come in through a port and
// no flow said otherwise.
func (s *Session) Inject(port uint32, frame []byte) error {
	if err := s.send(message(typePacketOut, 0, packetOut(port, frame))); err != nil {
		return fmt.Errorf("send a frame through the switch: %w", err)
	}
	return nil
}

// Replace makes flows the only ones with this cookie.
func (s *Session) Replace(ctx context.Context, cookie uint64, flows []Flow) error {
	return s.call(ctx, "set flows", func(xid uint32) []byte {
		b := message(typeFlowMod, xid, flowMod(commandDelete, cookie, ^uint64(0), &Flow{}))
		for i := range flows {
			b = append(b, message(typeFlowMod, xid, flowMod(commandAdd, cookie, 0, &flows[i]))...)
		}
		return b
	})
}

// call sends messages and waits until the switch has carried all of them out.
func (s *Session) call(ctx context.Context, what string, messages func(xid uint32) []byte) error {
	ctx, cancel := context.WithTimeout(ctx, CallDeadline)
	defer cancel()
	end := make(chan error, 1)
	s.mu.Lock()
	s.xid++
	xid := s.xid
	s.refused, s.waiting[xid] = nil, end
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiting, xid)
		s.mu.Unlock()
	}()
	if err := s.send(append(messages(xid), message(typeBarrier, xid, nil)...)); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	select {
	case err := <-end:
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	case <-s.done:
		return fmt.Errorf("%s: the switch ended the session", what)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}
