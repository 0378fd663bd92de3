// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
)

const (
	manyStreams = 1000
	// streamBytes is how much memory an open watch may need, with its client,
	// which is in the same process here: goroutines, buffers, TLS left out.
	streamBytes = 128 << 10
)

// A thousand clients watch one node over WebSockets. Each sees every change of
// its kind once and in order; how long that takes, and what a client costs, is
// in the log.
func TestAThousandClientsWatchOneNode(t *testing.T) {
	const changes = 20
	f := newFixture(t)
	f.servers["m1"].pingEvery = time.Hour // the first answer none until the last is there
	vm := f.newVM("web1", api.VMStopped)
	memory := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse) //nolint:gosec // not so much
	}
	before := memory()
	conns := make([]*websocket.Conn, manyStreams)
	for i := range conns {
		c, _, err := f.dial("watch?kinds=vm", api.RoleViewer)
		if err != nil {
			t.Fatalf("watch %d: %v", i, err)
		}
		conns[i] = c
		f.until(c, synced)
	}
	each := (memory() - before) / manyStreams
	// One change after the other has come to all, so that none is told together
	// with the next.
	delays := make([]time.Duration, 0, changes*manyStreams)
	for n := range changes {
		at := make([]time.Duration, manyStreams)
		sent := time.Now()
		var wg sync.WaitGroup
		for i, c := range conns {
			wg.Go(func() {
				e, err := f.readEvent(c)
				at[i] = time.Since(sent)
				if err != nil || e.Type != "put" || e.Object.Meta.ID != vm.Meta.ID || e.Revision != f.rev() {
					t.Errorf("watch %d, change %d: %v of %d, %v", i, n, e, e.Revision, err)
				}
			})
		}
		f.report(vm.Meta.ID, []api.VMPhase{api.VMRunning, api.VMFailed}[n%2])
		wg.Wait()
		delays = append(delays, at...)
	}
	slices.Sort(delays)
	t.Logf("%d bytes of heap and stacks for a watch, both ends; %d changes to %d clients: p50 %v, p99 %v",
		each, changes, manyStreams, delays[len(delays)/2], delays[len(delays)*99/100])
	if each > streamBytes {
		t.Errorf("a watch needs %d bytes, want at most %d", each, streamBytes)
	}
}
