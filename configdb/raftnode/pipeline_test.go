// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// narrow is a pipeline as Raft's network transport has it: without room, so
// that a request waits until the answers before it were read.
type narrow struct {
	under   chan *future
	done    chan raft.AppendFuture
	closed  chan struct{}
	success bool
}

type future struct {
	args *raft.AppendEntriesRequest
	resp *raft.AppendEntriesResponse
}

func (f *future) Error() error                          { return nil }
func (f *future) Start() time.Time                      { return time.Time{} }
func (f *future) Request() *raft.AppendEntriesRequest   { return f.args }
func (f *future) Response() *raft.AppendEntriesResponse { return f.resp }

func newNarrow(success bool) *narrow {
	n := &narrow{under: make(chan *future), done: make(chan raft.AppendFuture), closed: make(chan struct{}), success: success}
	go func() {
		for {
			select {
			case f := <-n.under:
				f.resp.Success = n.success
				select {
				case n.done <- f:
				case <-n.closed:
					return
				}
			case <-n.closed:
				return
			}
		}
	}()
	return n
}

func (n *narrow) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	f := &future{args, resp}
	select {
	case n.under <- f:
		return f, nil
	case <-n.closed:
		return nil, raft.ErrPipelineShutdown
	}
}

func (n *narrow) Consumer() <-chan raft.AppendFuture { return n.done }

func (n *narrow) Close() error {
	close(n.closed)
	return nil
}

// send puts requests in until one fails, as Raft does.
func send(p raft.AppendPipeline, most int) (sent int, err error) {
	for range most {
		if _, err = p.AppendEntries(&raft.AppendEntriesRequest{}, &raft.AppendEntriesResponse{}); err != nil {
			return sent, err
		}
		sent++
	}
	return sent, nil
}

func TestAPipelineEndsAfterARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipeline(newNarrow(false))
		ended := make(chan error, 1)
		go func() {
			_, err := send(p, 100)
			ended <- err
		}()
		if f := <-p.Consumer(); f.Response().Success {
			t.Error("the refusal was not handed on")
		}
		// Raft reads no more; the sender must notice.
		select {
		case err := <-ended:
			if !errors.Is(err, raft.ErrPipelineShutdown) {
				t.Errorf("the sender ended with %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("the sender waits for a reader that has gone")
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestAPipelineHandsOnEveryAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipeline(newNarrow(true))
		go func() { _, _ = send(p, 50) }()
		for range 50 {
			if f := <-p.Consumer(); !f.Response().Success {
				t.Fatal("an answer was changed")
			}
		}
		_ = p.Close()
		_ = p.Close() // Raft's may be closed again
	})
}
