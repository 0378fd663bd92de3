// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package contain

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

func noMap() map[string]int { return nil }

func TestAPanicEndsItsGroupOnly(t *testing.T) {
	g, ctx := NewGroup(t.Context())
	ended := make(chan struct{})
	g.Go(func() { <-ctx.Done(); close(ended) })
	g.Go(func() { panic("a bug") })
	err := g.Wait()
	var p *Panic
	if !errors.As(err, &p) || p.Error() != "panic: a bug" || !strings.Contains(p.Stack, "TestAPanicEndsItsGroupOnly") {
		t.Fatalf("error %v", err)
	}
	select {
	case <-ended:
	default:
		t.Error("Wait returned before the other goroutine")
	}
}

func TestAGroupWithoutPanics(t *testing.T) {
	parent, cancel := context.WithCancel(t.Context())
	g, ctx := NewGroup(parent)
	g.Go(func() { <-ctx.Done() })
	cancel()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	g, ctx = NewGroup(t.Context())
	g.Go(func() { <-ctx.Done() })
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestTheFirstPanicIsKept(t *testing.T) {
	g, ctx := NewGroup(t.Context())
	g.Go(func() { <-ctx.Done(); panic("of the end") })
	g.Go(func() { panic(io.ErrShortWrite) })
	if err := g.Wait(); !errors.Is(err, io.ErrShortWrite) {
		t.Fatalf("error %v", err)
	}
}

func TestCall(t *testing.T) {
	if err := Call(func() error { return io.EOF }); !errors.Is(err, io.EOF) {
		t.Errorf("error %v", err)
	}
	if err := Do(func() {}); err != nil {
		t.Errorf("error %v", err)
	}
	if err := Do(func() { noMap()["x"] = 1 }); err == nil || !strings.Contains(err.Error(), "nil map") {
		t.Errorf("error %v", err)
	}
}
