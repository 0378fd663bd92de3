// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"flag"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
)

var sizes = flag.String("members", "3,10", "sizes of the clusters that TestTraffic measures")

func inBubble(t *testing.T, n int, f func(t *testing.T, f *flock)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(t, newFlockOn(t, n, &memNet{ports: map[string]*memPort{}}))
	})
}

// memberlist forgets who was dead for a while; a partition that lasts longer
// heals all the same.
func TestALongPartitionHeals(t *testing.T) {
	t.Parallel()
	inBubble(t, 6, func(t *testing.T, f *flock) {
		f.up()
		a, b := f.nodes[:3], f.nodes[3:]
		f.split(a, b)
		time.Sleep(5 * time.Minute)
		for _, x := range a {
			for _, y := range b {
				if s := x.peer(y).State; s != api.GossipDead {
					t.Errorf("%s has %s as %s", x.id, y.id, s)
				}
			}
		}
		f.mend()
		began := time.Now()
		for _, x := range a {
			for _, y := range b {
				x.waits(2*maxJoinPause, y, api.GossipAlive)
				y.waits(2*maxJoinPause, x, api.GossipAlive)
			}
		}
		t.Logf("healed after %v", time.Since(began))
	})
}

func TestKeysChangeInABubble(t *testing.T) {
	t.Parallel()
	inBubble(t, 5, func(_ *testing.T, f *flock) { changeKeys(f, api.GossipAlive) })
}

// Nobody is suspect while nothing happens.
func TestTenMinutesOfPeace(t *testing.T) {
	t.Parallel()
	inBubble(t, 3, func(t *testing.T, f *flock) {
		f.up()
		changed := make([]<-chan struct{}, len(f.nodes))
		for i, m := range f.nodes {
			changed[i] = m.Changed()
		}
		time.Sleep(10 * time.Minute)
		for i, m := range f.nodes {
			select {
			case <-changed[i]:
				t.Errorf("%s saw a change: %+v", m.id, m.Peers())
			default:
			}
			for _, o := range f.nodes {
				if p := m.peer(o); p.SummaryAge > 2*summaryInterval {
					t.Errorf("%s has a summary of %s from %v ago", m.id, o.id, p.SummaryAge)
				}
			}
		}
	})
}

// TestTraffic measures what gossip costs: bytes that a node sends, memory, and
// how long it takes until all know that one has failed.
//
//	go test -run TestTraffic -v ./internal/gossip -members 3,200
func TestTraffic(t *testing.T) {
	for _, s := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 3 {
			t.Fatalf("-members: %q is not a number from 3", s)
		}
		t.Run(s, func(t *testing.T) { inBubble(t, n, measureTraffic) })
	}
}

func measureTraffic(t *testing.T, f *flock) {
	n := len(f.nodes)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	f.up()
	t.Logf("%d nodes that start at once all know each other after %v", n, time.Since(began))
	time.Sleep(2 * summaryPause(n))
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("memory per node, with its half of the network: %d KiB", (int64(after.HeapAlloc)-int64(before.HeapAlloc))/int64(n)/1024)

	const window = 2 * time.Minute
	udp, packets, tls := f.sent()
	time.Sleep(window)
	udp2, packets2, tls2 := f.sent()
	per := func(a, b uint64) float64 { return float64(b-a) / window.Seconds() / float64(n) }
	t.Logf("sent per node and second: %.0f bytes in %.1f packets by UDP, %.0f bytes over TLS", per(udp, udp2), per(packets, packets2), per(tls, tls2))
	if total := per(udp, udp2) + per(tls, tls2); total > 16<<10 {
		t.Errorf("%.0f bytes per node and second", total)
	}
	oldest := time.Duration(0)
	for _, m := range f.nodes {
		for _, o := range f.nodes {
			p := m.peer(o)
			if p.State != api.GossipAlive || !p.Known {
				t.Errorf("%s has %s as %s, known: %v", m.id, o.id, p.State, p.Known)
			}
			oldest = max(oldest, p.SummaryAge)
		}
	}
	t.Logf("the oldest summary is %v old; each sends one every %v", oldest, summaryPause(n))
	if most := 4*summaryPause(n) + time.Second; oldest > most {
		t.Errorf("the oldest summary is over %v old", most)
	}

	gone, rest := f.nodes[n-1], f.nodes[:n-1]
	f.split(f.nodes[n-1:], rest)
	began = time.Now()
	rest[0].waits(longestSuspicion(n), gone, api.GossipSuspect, api.GossipDead)
	t.Logf("node-1 has the failed node as suspect after %v", time.Since(began))
	for _, m := range rest {
		m.waits(longestSuspicion(n)+5*time.Second, gone, api.GossipDead)
	}
	t.Logf("all have it as dead after %v", time.Since(began))
	for _, m := range rest {
		for _, o := range rest {
			if s := m.peer(o).State; s != api.GossipAlive {
				t.Errorf("%s has %s as %s", m.id, o.id, s)
			}
		}
	}
}

func (f *flock) sent() (udp, packets, tls uint64) {
	for _, m := range f.nodes {
		udp += m.udpBytes.Load()
		packets += m.udpPackets.Load()
		tls += m.tlsBytes.Load()
	}
	return udp, packets, tls
}
