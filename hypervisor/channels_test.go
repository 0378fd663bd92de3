// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/greeting"
)

const channelHead = "\x11\x22\x33\x44"

// gateway is a target with a gate whose QEMU is a list of pipes, in the order in
// which they were opened.
type gateway struct {
	t     *testing.T
	h     *Hypervisor
	hello streamHello
	mu    sync.Mutex
	qemu  []net.Conn
}

func newGateway(t *testing.T, channels int) *gateway {
	w := &gateway{t: t, h: &Hypervisor{gates: map[string]*gate{}}, hello: streamHello{VM: api.NewID(), Task: "t", Channels: channels}}
	w.h.gates[w.hello.VM] = newGate(w.hello, w.dial)
	return w
}

func (w *gateway) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.qemu = append(w.qemu, far)
	return near, nil
}

// arrives opens a connection that begins with a text; the error comes when it has
// ended.
func (w *gateway) arrives(head string) (net.Conn, chan error) {
	near, far := net.Pipe()
	ended := make(chan error, 1)
	g, err := w.h.enterGate(w.hello)
	if err != nil {
		ended <- err
		return near, ended
	}
	go func() {
		defer w.h.leaveGate(w.hello.VM, g)
		ended <- g.carry(w.t.Context(), greeting.NewConn(far, greeting.MaxLine))
	}()
	go func() { _, _ = io.WriteString(near, head) }()
	return near, ended
}

func (w *gateway) heads() (out []string) {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.qemu {
		b := make([]byte, magicBytes)
		if _, err := io.ReadFull(c, b); err != nil {
			b = []byte(err.Error())
		}
		out = append(out, string(b))
	}
	return out
}

func TestGateLetsTheMainConnectionFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newGateway(t, 2)
		a, aEnd := w.arrives(channelHead + "pages")
		b, bEnd := w.arrives(channelHead + "pages")
		if got := w.heads(); len(got) != 0 {
			t.Fatalf("QEMU has %q before the main connection", got)
		}
		time.Sleep(ChannelsTime / 2)
		m, mEnd := w.arrives("QEVM" + "state")
		if got := w.heads(); len(got) != 3 || got[0] != "QEVM" || got[1] != channelHead || got[2] != channelHead {
			t.Fatalf("QEMU has %q", got)
		}
		time.Sleep(10 * ChannelsTime) // nothing is late any more
		for _, c := range w.qemu {
			_, _ = io.ReadFull(c, make([]byte, len("state")))
			_ = c.Close()
		}
		for _, c := range []net.Conn{a, b, m} {
			_ = c.Close()
		}
		for _, e := range []chan error{aEnd, bEnd, mEnd} {
			if err := <-e; err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, context.Canceled) {
				t.Errorf("it ended with %v", err)
			}
		}
		synctest.Wait()
		if len(w.h.gates) != 0 {
			t.Error("the gate is left")
		}
	})
}

func TestGateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		heads []string // in their order
		ends  int      // which of them ends, with what
		want  string
	}{
		"another beginning":            {heads: []string{"GET /"}, want: "begins with 0x47455420"},
		"a second main connection":     {heads: []string{"QEVM", "QEVM"}, ends: 1, want: "comes twice"},
		"more than said":               {heads: []string{channelHead, channelHead, channelHead}, ends: 2, want: "comes twice"},
		"more than all":                {heads: []string{"QEVM", channelHead, channelHead, channelHead}, ends: 3, want: "its 3 connections already"},
		"no main connection":           {heads: []string{channelHead, channelHead}, want: "did not come within"},
		"a channel that never comes":   {heads: []string{"QEVM", channelHead}, want: "1 of 2 connections with memory came"},
		"a beginning that is too slow": {heads: []string{"QE"}, want: "read how a connection"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newGateway(t, 2)
				var near []net.Conn
				var ends []chan error
				for _, head := range c.heads {
					n, e := w.arrives(head)
					near, ends = append(near, n), append(ends, e)
					synctest.Wait()
				}
				if err := <-ends[c.ends]; err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v; want %q", err, c.want)
				}
				for _, q := range append(near, w.qemu...) {
					_ = q.Close()
				}
				for i, e := range ends { // all of them end
					if i != c.ends {
						<-e
					}
				}
			})
		})
	}
	if _, err := newGateway(t, 17).h.enterGate(streamHello{Channels: 17}); err == nil {
		t.Error("17 channels were admitted")
	}
}

func TestGateBreaksAllConnectionsWithOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newGateway(t, 1)
		_, mEnd := w.arrives("QEVM")
		ch, cEnd := w.arrives(channelHead)
		w.heads()
		w.mu.Lock()
		_ = w.qemu[1].Close() // QEMU's end: what is written to it has no reader
		w.mu.Unlock()
		_, _ = io.WriteString(ch, "pages")
		if err := <-cEnd; err == nil {
			t.Error("the broken one ended well")
		}
		if err := <-mEnd; err == nil {
			t.Error("the main one ended well")
		}
	})
}

// Several connections are used only where both sides have said so.
func TestConnectionsAreAgreedOn(t *testing.T) {
	for name, c := range map[string]struct{ wished, source, target, want int }{
		"both know":                 {4, 4, 4, 4},
		"an older target":           {4, 4, 0, 0},
		"an older source":           {4, 0, 0, 0},
		"one is wished":             {1, 0, 0, 0},
		"they say different things": {4, 4, 2, 0},
	} {
		op := &api.Operation{Spec: api.OperationSpec{Migration: &api.MigrationSpec{Channels: c.wished}}, Status: api.OperationStatus{Channels: c.source}}
		arr := &api.Arrival{Status: api.ArrivalStatus{Channels: c.target}}
		if got := channelsOf(op, arr); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
		if got := canSend(op); c.source > 0 && got != c.wished || c.wished == 1 && got != 0 {
			t.Errorf("%s: the source says %d", name, got)
		}
	}
}

func over4(m *api.MigrationSpec) { m.Channels = 4 }

// severOne breaks one of the streams between the nodes.
func (l *links) severOne() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns[len(l.conns)-2:] { // of the latest
		_ = c.Close()
	}
}

// allFlow waits until all streams of a migration over four channels are open.
func (p *pair) allFlow() {
	p.t.Helper()
	p.until("five streams are open", func() bool {
		p.links.mu.Lock()
		defer p.links.mu.Unlock()
		return len(p.links.conns) >= 2*5
	}, nothing)
}

func TestMigrationOverSeveralConnections(t *testing.T) {
	for _, c := range []struct {
		name, ends, at string
		held           func(p *pair, id string)
	}{
		{name: "nothing happens", ends: "succeeded", at: "node-2"},
		{name: "cancelled", ends: "cancelled", at: "node-1", held: func(p *pair, id string) { p.cancel(id) }},
		{name: "one connection breaks", ends: "failed", at: "node-1", held: func(p *pair, _ string) {
			p.allFlow()
			p.links.severOne()
			p.atStep("failed") // else it might come to its end before anybody has noticed
		}},
		{name: "the source's daemon dies", ends: "failed", at: "node-1", held: func(p *pair, _ string) { p.stop(); p.begin() }},
		{name: "the target's daemon dies", ends: "failed", at: "node-1", held: func(p *pair, _ string) {
			p.allFlow()
			p.other.stop()
			p.links.sever(false)
			p.other.begin()
		}},
		{name: "the target's QEMU dies", ends: "failed", at: "node-1", held: func(p *pair, _ string) { p.other.fakes.qemu().Exit(-1, 9) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false)
			id := p.begun(api.VMSpec{})
			p.fakes.qemu().Hold()
			p.migrate(id, over4)
			p.atStep("active")
			if a, b := p.fakes.qemu().Channels(), p.other.fakes.qemu().Channels(); a != 4 || b != 4 {
				t.Errorf("QEMU sends over %d connections and expects %d", a, b)
			}
			if c.held != nil {
				c.held(p, id)
			}
			p.fakes.qemu().Release()
			p.over(id, c.ends)
			p.settled(id, c.at)
			p.until("no gate is left", func() bool {
				p.other.h.mu.Lock()
				defer p.other.h.mu.Unlock()
				return len(p.other.h.gates) == 0
			}, func() string { return fmt.Sprint(p.other.h.gates) })
			// The next one, over one connection, finds nothing of it.
			p.migrate(id, nil)
			p.over(id, "succeeded")
		})
	}
}
