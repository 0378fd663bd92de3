// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package contain

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
)

// Panic is a panic as an error.
type Panic struct {
	Value any
	// Stack is where it happened, for the log.
	Stack string
}

// Error implements error.
func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

// Unwrap returns the value of the panic if that is an error.
func (p *Panic) Unwrap() error {
	err, _ := p.Value.(error)
	return err
}

// Call calls f. If f panics, that is the error.
func Call(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Panic{Value: v, Stack: string(debug.Stack())}
		}
	}()
	return f()
}

// Do is Call for a function without a result.
func Do(f func()) error {
	return Call(func() error { f(); return nil })
}

// Group runs the goroutines of one service.
type Group struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	err error
}

// NewGroup returns a group and the context of its goroutines, which ends with
// ctx, with Cancel, or when one of them panics.
func NewGroup(ctx context.Context) (*Group, context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	return &Group{cancel: cancel}, ctx
}

// Go runs f in a goroutine of the group.
func (g *Group) Go(f func()) {
	g.wg.Go(func() {
		if err := Do(f); err != nil {
			g.mu.Lock()
			if g.err == nil {
				g.err = err
			}
			g.mu.Unlock()
			g.cancel()
		}
	})
}

// Cancel ends the context of the group.
func (g *Group) Cancel() { g.cancel() }

// Stop is Cancel and Wait.
func (g *Group) Stop() error {
	g.cancel()
	return g.Wait()
}

// Wait returns when all goroutines have ended: the first panic, or nil.
func (g *Group) Wait() error {
	g.wg.Wait()
	g.cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}
