// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// guestProgram is a guest agent on the channel of a scripted QEMU.
type guestProgram struct {
	mu    sync.Mutex
	heard []string
}

func (g *guestProgram) said() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.heard)
}

func (g *guestProgram) count(command string) int {
	n := 0
	for _, h := range g.said() {
		if h == command {
			n++
		}
	}
	return n
}

func (g *guestProgram) serve(c net.Conn) {
	defer c.Close()
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		for len(line) > 0 && line[0] == 0xff { // throws away what was before
			line = line[1:]
		}
		var r struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if json.Unmarshal(line, &r) != nil {
			continue
		}
		answer := "{\"return\": {}}\n"
		switch r.Execute {
		case "guest-sync-delimited":
			answer = fmt.Sprintf("\xff{\"return\": %d}\n", r.Arguments.ID)
		case "guest-info":
			answer = `{"return":{"version":"7.2.0","supported_commands":[{"name":"guest-fsfreeze-freeze","enabled":true},{"name":"guest-fsfreeze-thaw","enabled":true}]}}` + "\n"
		case "guest-fsfreeze-freeze", "guest-fsfreeze-thaw":
			answer = "{\"return\": 2}\n"
		}
		g.mu.Lock()
		g.heard = append(g.heard, r.Execute)
		g.mu.Unlock()
		if _, err := c.Write([]byte(answer)); err != nil {
			return
		}
	}
}

// serveAgent answers at the socket of a VM's guest agent, each connection by itself.
func (e *env) serveAgent(id string, serve func(net.Conn)) {
	e.t.Helper()
	l, err := net.Listen("unix", e.h.pathsOf(id).agent)
	must(e.t, err)
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			served.Go(func() { serve(c) })
		}
	})
	e.t.Cleanup(func() { l.Close(); e.stop(); served.Wait() })
}

// The module's own talk with the guest's agent freezes for a snapshot, and leaves
// alone what somebody else has frozen.
func TestTheGuestAgentFreezesForASnapshot(t *testing.T) {
	e := newEnv(t, false)
	id := e.twoDisks(api.VMSpec{Power: api.PowerRunning})
	e.wait(id, "running", running)
	e.done(id, api.ActionVMSnapshot, "none", false)
	if c := e.snap(id, "none").Status.Consistency; c != api.ConsistencyCrash {
		t.Error("without an agent:", c)
	}

	g := &guestProgram{}
	e.serveAgent(id, g.serve)
	e.fakes.qemu().Emit("VSERPORT_CHANGE", `{"id": "agent0", "open": true}`)
	e.until("the agent is known", func() bool { return slices.Contains(g.said(), "guest-info") }, nothing)
	e.done(id, api.ActionVMSnapshot, "quiet", false)
	if c := e.snap(id, "quiet").Status.Consistency; c != api.ConsistencyQuiesced {
		t.Error("with an agent:", c)
	}
	if n, m := g.count("guest-fsfreeze-freeze"), g.count("guest-fsfreeze-thaw"); n != 1 || m != 1 {
		t.Errorf("%d times frozen, %d times thawed: %v", n, m, g.said())
	}
	e.done(id, api.ActionVMSnapshot, "memory", true)

	_, err := e.h.Freeze(t.Context(), id, time.Minute)
	must(t, err)
	e.done(id, api.ActionVMSnapshot, "frozen", false)
	if c := e.snap(id, "frozen").Status.Consistency; c != api.ConsistencyCrash {
		t.Error("frozen by somebody else:", c)
	}
	if n, m := g.count("guest-fsfreeze-freeze"), g.count("guest-fsfreeze-thaw"); n != 2 || m != 1 {
		t.Errorf("%d times frozen, %d times thawed: %v", n, m, g.said())
	}
	must(t, e.h.Thaw(t.Context(), id))
}
