// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/hypervisor/agent"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// Each event asked for a look at once, and each look asks QEMU a dozen things: a guest
// that opens and closes its tray kept a worker busy, and the database with it.
func TestEventsAskForLooksAtTheirRate(t *testing.T) {
	var w waker
	var looks atomic.Int64
	began := time.Now()
	for n := 0; n < 2*wakeBurst || time.Since(began) < time.Second; n++ {
		w.wake(func() { looks.Add(1) })
	}
	most := wakeBurst + int64(time.Since(began)/wakePause) + 2
	if n := looks.Load(); n < wakeBurst || n > most {
		t.Errorf("%d looks; at least %d, at most %d", n, wakeBurst, most)
	}
	had := looks.Load()
	w.wake(func() { looks.Add(1) })
	for end := time.Now().Add(30 * time.Second); looks.Load() == had; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the last word led to no look")
		}
	}
}

// Agents that take their time held all places, for half a minute each; whoever opens
// and closes his channel is asked again at once.
func TestSlowAgentsHoldUpNobodyElse(t *testing.T) {
	e := newEnv(t, false)
	e.stop()
	lanes := newAgentLanes()
	asked := make(chan string, 64)
	with := func(name string, answers bool) *instance {
		in := &instance{id: name, conn: qmp.New(nil), portKnown: true}
		path := filepath.Join(e.runDir, name)
		ln, err := net.Listen("unix", path)
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				asked <- name
				if answers {
					_ = c.Close() // as good as an answer: the look is over
				}
				t.Cleanup(func() { c.Close() })
			}
		}()
		in.agent = agent.New(agent.Config{VM: name, Now: time.Now, Dial: func(context.Context) (net.Conn, error) { return net.Dial("unix", path) }})
		t.Cleanup(in.agent.Close)
		in.agent.SetOpen(true)
		e.h.mu.Lock()
		e.h.instances[name] = in
		e.h.mu.Unlock()
		return in
	}
	must(t, os.MkdirAll(e.runDir, 0o700))
	var slow []*instance
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		slow = append(slow, with(name, false))
	}
	held := false
	for turn := 0; turn < 20 && !held; turn++ { // they give up in a while, on a busy machine before they are looked at here
		lanes.work.Wait()
		for _, in := range slow {
			in.slowAgent.Store(true)
			in.agent.SetOpen(false)
			in.agent.SetOpen(true) // due at once
		}
		e.h.checkAgents(t.Context(), lanes)
		for range agentChecks { // now they hold all places that they get
			<-asked
		}
		other := with(fmt.Sprintf("other%d", turn), true)
		e.h.checkAgents(t.Context(), lanes)
		<-asked
		held = len(lanes.slow) == agentChecks
		other.agent.SetOpen(false)
	}
	if !held {
		t.Error("the other was asked only when one of them had given up")
	}
	e.h.mu.Lock()
	for _, in := range e.h.instances {
		in.agent.SetOpen(false)
		go in.agent.Close()
	}
	e.h.mu.Unlock()
	lanes.work.Wait()
}
