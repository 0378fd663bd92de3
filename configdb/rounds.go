// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"context"
	"sync"
	"time"
)

// roundTimeout bounds one round.
const roundTimeout = 5 * time.Second

// rounds shares one question among all who asked before it was put. The answer
// is thereby never older than anybody's wish to know it.
type rounds[T any] struct {
	mu      sync.Mutex
	next    *round[T] // not begun; whoever asks now may share it
	running bool
	ask     func(ctx context.Context) (T, error)
}

type round[T any] struct {
	done   chan struct{}
	answer T
	err    error
}

// do returns the answer of a round that began after the call.
func (s *rounds[T]) do(ctx context.Context) (T, error) {
	s.mu.Lock()
	if s.next == nil {
		s.next = &round[T]{done: make(chan struct{})}
	}
	r := s.next
	if !s.running {
		s.running = true
		go s.run()
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.answer, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

func (s *rounds[T]) run() {
	for {
		s.mu.Lock()
		r := s.next
		s.next = nil
		if r == nil {
			s.running = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), roundTimeout)
		r.answer, r.err = s.ask(ctx)
		cancel()
		close(r.done)
	}
}
