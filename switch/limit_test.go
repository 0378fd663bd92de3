// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/goodturn"
	"github.com/muster-vm/muster/switch/openflow"
)

// Payload and time of measurements of throughput.
const (
	frameBytes  = 1400
	settleTime  = time.Second     // in which what may pass at once does
	measureTime = 3 * time.Second // in which frames are counted
)

// count makes the guest count the bytes of UDP that reach it.
func (g *guest) count() { g.counting.Store(true) }

// flood sends UDP to another guest, as many bytes in a second as it is told, or can,
// for a while, and returns what reached it in a second after the beginning.
func (g *guest) flood(other *guest, rate float64) float64 {
	g.t.Helper()
	udp := make([]byte, 8+frameBytes)
	binary.BigEndian.PutUint16(udp, 9)
	binary.BigEndian.PutUint16(udp[2:], 9)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	body := ipBody(17, g.addr(), other.addr(), udp)
	other.count()
	began := time.Now()
	var before int64
	var from time.Time
	for sent := 0.0; ; {
		passed := time.Since(began)
		if passed >= settleTime && from.IsZero() {
			from, before = time.Now(), other.received.Load()
		}
		if passed >= settleTime+measureTime {
			break
		}
		if sent > rate*passed.Seconds() {
			time.Sleep(500 * time.Microsecond)
			continue
		}
		g.send(other.hw(), 0x0800, body)
		sent += float64(14 + len(body))
	}
	return float64(other.received.Load()-before) / time.Since(from).Seconds()
}

// limit changes the limit of a VM's first card.
func (w *world) limit(vm api.VM, l api.NICLimit) {
	w.t.Helper()
	w.do(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		o.Spec.NICs[0].Limit = l
		return configdb.VMs.UpdateSpec(v, tx, &o)
	})
}

// meters are those of the running switch.
func (h *host) meters() string {
	return run(h.w.t, "ip", "netns", "exec", h.ns, "ovs-ofctl", "-O", "OpenFlow13", "dump-meters", "unix:"+h.dir+"/"+Bridge+".mgmt")
}

// shaped reports whether the kernel shapes a device.
func (h *host) shaped(device string) bool {
	return strings.Contains(run(h.w.t, "tc", "-n", h.ns, "qdisc", "show", "dev", device), "htb")
}

// Real traffic through the real Open vSwitch: both limits are kept, and go with the
// wish; a restart of the switch, of its database or of the daemon loses none.
func TestLimitsOfCardsAreKept(t *testing.T) {
	const rate = 2 * api.MiB
	w := newWorld(t, 1)
	h := w.hosts[0]
	red := w.network("red", api.NetworkSpec{Type: api.NetworkIsolated})
	w.pool(red, api.IPPoolSpec{CIDR: "10.20.0.0/24"})
	w.start()
	w.ready("red")
	card := nic("red", "02", "10.20.0.12")
	card.Limit = api.NICLimit{BPSIn: rate} // at the start
	vm1, vm2 := w.vm("web1", h, nic("red", "01", "10.20.0.11")), w.vm("web2", h, card)
	g1, g2 := h.boot(vm1), h.boot(vm2)
	g1.reaches(g2)
	tap := tapName(vm2.Meta.ID, 1)
	inForce := func(in, out bool) {
		t.Helper()
		eventually(t, func() string {
			if got := h.shaped(tap); got != in {
				return "what web2 receives is limited, or not, against the wish"
			}
			if got := strings.Contains(h.meters(), "kbps"); got != out {
				return "what web2 sends is limited, or not, against the wish: " + h.meters()
			}
			return ""
		})
	}
	// Less comes through while the machine stands still, so a measurement is repeated.
	measured := func(what string, from, to *guest, ok func(float64) bool) {
		t.Helper()
		goodturn.Take(t, func(int) error {
			got := from.flood(to, 6*float64(rate))
			t.Logf("%s: %.2f MB/s, the limit is %.2f", what, got/1e6, float64(rate)/1e6)
			if !ok(got) {
				return fmt.Errorf("%s: %.0f bytes per second, the limit is %d", what, got, rate)
			}
			return nil
		})
	}
	within := func(got float64) bool { return math.Abs(got/float64(rate)-1) <= 0.15 }
	free := func(got float64) bool { return got >= 3*float64(rate) }
	inForce(true, false)
	measured("received", g1, g2, within)
	measured("sent without a limit", g2, g1, free)

	w.limit(vm2, api.NICLimit{BPSOut: rate})
	inForce(false, true)
	measured("sent", g2, g1, within)
	measured("received without a limit", g1, g2, free)

	// Both, through everything that may restart.
	w.limit(vm2, api.NICLimit{BPSIn: rate, BPSOut: rate, Burst: 2})
	inForce(true, true)
	h.kill("ovs-vswitchd")
	h.unready("ovs-vswitchd does not run")
	h.startVswitchd()
	w.ready("red")
	inForce(true, true)
	h.stop()
	h.start()
	w.ready("red")
	inForce(true, true)
	measured("sent, after restarts", g2, g1, within)

	w.limit(vm2, api.NICLimit{})
	inForce(false, false)
	for _, table := range []string{"qos", "queue"} {
		eventually(t, func() string {
			if rows := h.vsctl("--columns=_uuid", "list", table); rows != "" {
				return table + " has rows that nothing uses: " + rows
			}
			return ""
		})
	}
	if st, _ := h.report(); st.LimitsProblem != "" {
		t.Error(st.LimitsProblem)
	}
}

func TestAMeterIsInEveryFlowThatLetsPass(t *testing.T) {
	flows := cardFlows(3, "52:54:00:00:00:01", "10.20.0.7")
	metered(flows, 3)
	for _, f := range flows {
		if (f.Meter == 3) != f.Normal {
			t.Errorf("%+v", f)
		}
	}
	if m := meterOf(3, api.NICLimit{BPSOut: 2_000_000}); m != (openflow.Meter{ID: 3, Rate: 16000, Burst: 4000}) {
		t.Errorf("%+v", m)
	}
	if m := meterOf(3, api.NICLimit{BPSOut: api.MaxNICRate, Burst: 100, BurstSeconds: 3600}); m.Rate == 0 || m.Burst == 0 {
		t.Errorf("%+v", m)
	}
	if s := shapeOf(api.NICLimit{BPSIn: 1_000_000, Burst: 3, BurstSeconds: 2}); s.Rate != 8_000_000 || s.Burst != 32_000_000 {
		t.Errorf("%+v", s)
	}
}
