// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"sync"

	"github.com/hashicorp/raft"
)

// transport is Raft's own, with an intake, a floor and pipelines that end.
//
// Raft reads the answers of a pipeline until one is a refusal, an error or of a
// later term, and then no more. A request that is being handed over at that
// moment waits for room that nobody makes: the leader never sends that follower
// another entry, while its heartbeats go on, and Raft does not shut down
// (hashicorp/raft issue 612).
type transport struct {
	*raft.NetworkTransport
	calls   chan raft.RPC
	floor   *floor
	closing chan struct{}
}

// Consumer implements raft.Transport.
func (t transport) Consumer() <-chan raft.RPC { return t.calls }

// AppendEntriesPipeline implements raft.Transport.
func (t transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return newPipeline(p), nil
}

// pipeline takes every answer of the pipeline below, so that nothing ever waits
// there, and refuses requests after the answer with which Raft stops reading.
type pipeline struct {
	raft.AppendPipeline
	answers chan raft.AppendFuture
	over    chan struct{} // closed by the last answer that Raft reads
	closed  chan struct{}
	once    sync.Once
	err     error
}

func newPipeline(below raft.AppendPipeline) *pipeline {
	p := &pipeline{AppendPipeline: below, answers: make(chan raft.AppendFuture), over: make(chan struct{}), closed: make(chan struct{})}
	go p.pass()
	return p
}

// pass hands answers on until the pipeline is closed.
func (p *pipeline) pass() {
	below := p.AppendPipeline.Consumer()
	over := false
	for {
		select {
		case f := <-below:
			if over {
				continue // nobody reads it
			}
			if last(f) {
				over = true
				close(p.over)
			}
			select {
			case p.answers <- f:
			case <-p.closed:
				return
			}
		case <-p.closed:
			return
		}
	}
}

// last reports whether Raft stops reading after an answer.
func last(f raft.AppendFuture) bool {
	r := f.Response() // complete, since it was consumed
	return !r.Success || r.Term > f.Request().Term
}

// AppendEntries implements raft.AppendPipeline.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	select {
	case <-p.over:
		return nil, raft.ErrPipelineShutdown
	default:
	}
	f, err := p.AppendPipeline.AppendEntries(args, resp)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.over:
		return nil, raft.ErrPipelineShutdown
	default:
		return f, nil
	}
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.answers }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() {
		close(p.closed)
		p.err = p.AppendPipeline.Close()
	})
	return p.err
}
