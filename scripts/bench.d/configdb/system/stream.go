// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/internal/kvwire"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
)

// MusterStream is the same cluster, whose clients speak the key stream: binary
// frames over a WebSocket. As with etcd's client they share two connections per
// node.
type MusterStream struct {
	*Muster
	mu      sync.Mutex
	streams [load.Nodes][streamsPerNode]*keyStream
	dialled int
}

const streamsPerNode = 2

// StartMusterStream founds such a cluster.
func StartMusterStream(ctx context.Context, h *Host) (*MusterStream, error) {
	m, err := StartMuster(ctx, h)
	if err != nil {
		return nil, err
	}
	return &MusterStream{Muster: m}, nil
}

// Dial implements load.Cluster.
func (m *MusterStream) Dial(ctx context.Context, node int) (load.Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dialled++
	at := &m.streams[node][m.dialled/load.Nodes%streamsPerNode]
	if *at == nil || (*at).ended() {
		s, err := m.open(ctx, node)
		if err != nil {
			return nil, err
		}
		*at = s
	}
	return streamSession{*at}, nil
}

func (m *MusterStream) open(ctx context.Context, node int) (*keyStream, error) {
	ctx, cancel := context.WithTimeout(ctx, setupCall)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "wss://"+m.address(node)+"/api/v1/kv", &websocket.DialOptions{ //nolint:bodyclose // of a WebSocket there is none
		HTTPClient:   &http.Client{Transport: &http.Transport{TLSClientConfig: m.tls.Clone()}},
		HTTPHeader:   http.Header{"Authorization": {"Bearer " + m.token}},
		Subprotocols: []string{kvwire.Protocol},
	})
	if err != nil {
		return nil, fmt.Errorf("open a key stream: %w", err)
	}
	ws.SetReadLimit(kvwire.MaxMessageBytes)
	sctx, end := context.WithCancelCause(context.Background())
	s := &keyStream{ws: ws, kick: make(chan struct{}, 1), ctx: sctx, end: end, waits: map[uint64]chan kvwire.Answer{}}
	go s.write()
	go s.read()
	return s, nil
}

// Stop implements cluster.
func (m *MusterStream) Stop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.streams {
		for _, s := range m.streams[i] {
			if s != nil {
				s.end(errors.New("the stream was closed"))
				_ = s.ws.CloseNow()
			}
		}
	}
	return m.Muster.Stop()
}

// keyStream is one WebSocket, which many sessions share.
type keyStream struct {
	ws   *websocket.Conn
	kick chan struct{}
	ctx  context.Context //nolint:containedctx // the stream's life
	end  context.CancelCauseFunc

	mu    sync.Mutex
	last  uint64
	out   []byte // frames that wait for the writer
	spare []byte
	waits map[uint64]chan kvwire.Answer
}

func (s *keyStream) ended() bool { return s.ctx.Err() != nil }

// write sends what has gathered while it sent before.
func (s *keyStream) write() {
	for {
		select {
		case <-s.kick:
		case <-s.ctx.Done():
			return
		}
		s.mu.Lock()
		b := s.out
		s.out, s.spare = s.spare[:0], b
		s.mu.Unlock()
		if len(b) == 0 {
			continue
		}
		if err := s.ws.Write(s.ctx, websocket.MessageBinary, b); err != nil {
			s.end(err)
			return
		}
	}
}

func (s *keyStream) read() {
	for {
		_, b, err := s.ws.Read(s.ctx)
		for err == nil && len(b) > 0 {
			var a kvwire.Answer
			if a, b, err = kvwire.NextAnswer(b); err == nil {
				s.mu.Lock()
				c := s.waits[a.Number]
				delete(s.waits, a.Number)
				s.mu.Unlock()
				if c != nil {
					c <- a
				}
			}
		}
		if err != nil {
			s.end(err)
			return
		}
	}
}

func (s *keyStream) call(ctx context.Context, r kvwire.Request) (kvwire.Answer, error) {
	answer := make(chan kvwire.Answer, 1)
	s.mu.Lock()
	s.last++
	r.Number = s.last
	s.waits[r.Number] = answer
	s.out = kvwire.AppendRequest(s.out, &r)
	s.mu.Unlock()
	select {
	case s.kick <- struct{}{}:
	default:
	}
	select {
	case a := <-answer:
		if a.Status == kvwire.Error {
			return a, fmt.Errorf("%s: %s", a.Code, a.Detail)
		}
		return a, nil
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.waits, r.Number)
		s.mu.Unlock()
		return kvwire.Answer{}, ctx.Err()
	case <-s.ctx.Done():
		return kvwire.Answer{}, context.Cause(s.ctx)
	}
}

type streamSession struct{ *keyStream }

// Put implements load.Session.
func (s streamSession) Put(ctx context.Context, key string, value []byte) error {
	a, err := s.call(ctx, kvwire.Request{Op: kvwire.Put, Key: []byte(key), Value: value})
	if err == nil && a.Status != kvwire.Done {
		err = fmt.Errorf("put %s: answer %d", key, a.Status)
	}
	return err
}

// Get implements load.Session.
func (s streamSession) Get(ctx context.Context, key string) ([]byte, error) {
	a, err := s.call(ctx, kvwire.Request{Op: kvwire.Get, Key: []byte(key)})
	if err == nil && a.Status != kvwire.Value {
		err = fmt.Errorf("get %s: answer %d", key, a.Status)
	}
	return a.Value, err
}

// Close implements load.Session; the stream stays for the others.
func (streamSession) Close() {}
