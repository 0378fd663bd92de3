// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/goodturn"
)

func nic(network, mac, address string) api.VMNIC {
	return api.VMNIC{Network: network, MAC: "52:54:00:00:00:" + mac, Address: address}
}

func TestNetworksSpanNodesAndStayApart(t *testing.T) {
	w := newWorld(t, 3)
	red := w.network("red", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 100})
	w.network("blue", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 200})
	w.network("lone", api.NetworkSpec{Type: api.NetworkIsolated})
	w.pool(red, api.IPPoolSpec{CIDR: "10.20.0.0/24", Gateway: "10.20.0.1", DNS: []string{"10.20.0.53"}, Domain: "lab.example"})
	w.start()
	w.ready("red", "blue", "lone")

	vm1 := w.vm("web1", w.hosts[0], nic("red", "01", "10.20.0.11"))
	vm2 := w.vm("web2", w.hosts[1], nic("red", "02", "10.20.0.12"))
	vm3 := w.vm("web3", w.hosts[2], nic("blue", "03", ""))
	g1, g2, g3 := w.hosts[0].boot(vm1), w.hosts[1].boot(vm2), w.hosts[2].boot(vm3)
	g3.at("10.20.0.13") // blue has no pool: the guest chose it itself

	ack := g1.lease()
	if got := ack.YourIPAddr.String(); got != "10.20.0.11" {
		t.Fatalf("was given %s", got)
	}
	if ack.HostName() != "web1" || ack.DomainName() != "lab.example" || ack.Router()[0].String() != "10.20.0.1" || ack.DNS()[0].String() != "10.20.0.53" {
		t.Fatalf("told %s", ack.Summary())
	}
	g2.lease()
	g1.reaches(g2)
	g2.reaches(g1)
	g1.cannotReach(g3)
	g3.cannotReach(g1)

	// The same node: an isolated network and a vxlan one do not meet, two cards
	// of one network do.
	lone1, lone2 := w.hosts[0].boot(w.vm("lone1", w.hosts[0], nic("lone", "04", ""))), w.hosts[0].boot(w.vm("lone2", w.hosts[0], nic("lone", "05", "")))
	far := w.hosts[1].boot(w.vm("lone3", w.hosts[1], nic("lone", "06", "")))
	lone1.at("10.20.0.21")
	lone2.at("10.20.0.22")
	far.at("10.20.0.23")
	lone1.reaches(lone2)
	lone1.cannotReach(g1)
	lone1.cannotReach(far)

	// A failover: the VM starts elsewhere and has the same address. Who knows it
	// already reaches it at once, without asking where it is.
	g2.halt()
	w.move(vm2, w.hosts[2])
	g2 = w.hosts[2].boot(vm2)
	g2.mu.Lock()
	g2.at("10.20.0.12")
	g2.mu.Unlock()
	if !g1.echo(g2, 20*time.Second) {
		t.Error("frames still go to the node where the VM was")
	}
	if got := g2.lease().YourIPAddr.String(); got != "10.20.0.12" {
		t.Fatalf("was given %s after the move", got)
	}
	g1.reaches(g2)
	w.hosts[1].sw.loop.Enqueue(all)
	w.hosts[1].gone(tapName(vm2.Meta.ID, 1))
}

// gone waits until a device and its port are not there any more.
func (h *host) gone(device string) {
	h.w.t.Helper()
	eventually(h.w.t, func() string {
		if strings.Contains(h.vsctl("list-ports", Bridge), device) {
			return "the port " + device + " is left over"
		}
		if exec.Command("ip", "-n", h.ns, "link", "show", device).Run() == nil {
			return "the device " + device + " is left over"
		}
		return ""
	})
}

func TestVLANNetworksLeaveThroughTheUplink(t *testing.T) {
	w := newWorld(t, 2)
	for i, h := range w.hosts { // a second NIC of each host, on a switch of its own
		end := []string{"a", "b"}[i]
		if i == 0 {
			run(t, "ip", "-n", w.id+"u", "link", "add", "br1", "type", "bridge")
			run(t, "ip", "-n", w.id+"u", "link", "set", "br1", "up")
		}
		run(t, "ip", "-n", w.id+"u", "link", "add", "t"+end, "type", "veth", "peer", "name", "eth1", "netns", h.ns)
		run(t, "ip", "-n", w.id+"u", "link", "set", "t"+end, "master", "br1", "up")
	}
	w.network("office", api.NetworkSpec{Type: api.NetworkVLAN, VLAN: 7})
	w.network("guests", api.NetworkSpec{Type: api.NetworkVLAN, VLAN: 8})
	w.start()
	eventually(t, func() string {
		if st, _ := w.hosts[0].report(); !strings.Contains(st.Problems["office"], "no uplink") {
			return "a vlan network without an uplink is not refused: " + st.Problems["office"] + st.Reason
		}
		return ""
	})
	w.uplink(w.hosts[0], "eth0")
	w.uplink(w.hosts[1], "eth1")
	eventually(t, func() string {
		if st, _ := w.hosts[0].report(); !strings.Contains(st.Problems["office"], "10.99.0.1") {
			return "a NIC with the host's address is not refused: " + st.Problems["office"]
		}
		return ""
	})
	w.do(func(v *configdb.View, tx *configdb.Txn) error {
		u, err := configdb.Uplinks.Find(v, "", "up-m1")
		if err == nil {
			u.Spec.NIC = "eth1"
			err = configdb.Uplinks.UpdateSpec(v, tx, &u)
		}
		return err
	})
	w.ready("office", "guests")
	a := w.hosts[0].boot(w.vm("a", w.hosts[0], nic("office", "01", "")))
	b := w.hosts[1].boot(w.vm("b", w.hosts[1], nic("office", "02", "")))
	c := w.hosts[1].boot(w.vm("c", w.hosts[1], nic("guests", "03", "")))
	a.at("10.7.0.1")
	b.at("10.7.0.2")
	c.at("10.7.0.3")
	a.reaches(b)
	a.cannotReach(c)
	eventually(t, func() string {
		u, err := configdb.Uplinks.Find(w.db.Local(), "", "up-m1")
		if err != nil || !u.Status.Ready {
			return "the uplink is not ready: " + u.Status.Message
		}
		return ""
	})
}

func TestEverythingComesBack(t *testing.T) {
	w := newWorld(t, 2)
	w.network("red", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 1<<24 - 1})
	h := w.hosts[0]
	h.vsctl("add-br", "mine", "--", "set", "bridge", "mine", "datapath_type=netdev")
	run(t, "ip", "-n", h.ns, "tuntap", "add", "mtforeign", "mode", "tap")
	h.vsctl("add-port", "mine", "mtforeign", "tag=33")
	w.start()
	w.ready("red")
	h.vsctl("add-port", Bridge, "byhand", "--", "set", "interface", "byhand", "type=internal")
	vm1, vm2 := w.vm("web1", h, nic("red", "01", "")), w.vm("web2", w.hosts[1], nic("red", "02", ""))
	g1, g2 := h.boot(vm1), w.hosts[1].boot(vm2)
	g1.at("10.7.0.1")
	g2.at("10.7.0.2")
	g1.reaches(g2)
	tag := h.vsctl("get", "port", tapName(vm1.Meta.ID, 1), "tag")

	t.Log("ovs-vswitchd dies and comes back")
	h.kill("ovs-vswitchd")
	h.unready("ovs-vswitchd does not run")
	h.startVswitchd()
	w.ready("red")
	g1.reaches(g2)

	t.Log("the database dies and comes back empty")
	h.stopOVS()
	h.unready("database does not answer")
	run(t, "rm", h.dir+"/conf.db")
	run(t, "ovsdb-tool", "create", h.dir+"/conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
	h.startDatabase()
	h.vsctl("--no-wait", "init")
	h.startVswitchd()
	w.ready("red")
	g1.reaches(g2)

	t.Log("the daemon restarts; somebody removes a port meanwhile")
	h.stop()
	h.vsctl("add-br", "mine", "--", "set", "bridge", "mine", "datapath_type=netdev", "--", "add-port", "mine", "mtforeign", "tag=33")
	h.vsctl("add-port", Bridge, "byhand", "--", "set", "interface", "byhand", "type=internal")
	h.vsctl("del-port", Bridge, tapName(vm1.Meta.ID, 1))
	h.start()
	g1.reaches(g2)
	if now := h.vsctl("get", "port", tapName(vm1.Meta.ID, 1), "tag"); now != tag {
		t.Errorf("the tag was %s and is %s", tag, now)
	}

	t.Log("the VM goes; what is not ours stays")
	if err := h.sw.Unplug(t.Context(), vm1.Meta.ID); err == nil {
		h.gone(tapName(vm1.Meta.ID, 1))
	} else {
		t.Error(err)
	}
	if ports := h.vsctl("list-ports", "mine"); ports != "mtforeign" {
		t.Errorf("the foreign bridge has the ports %q", ports)
	}
	if ports := h.vsctl("list-ports", Bridge); !strings.Contains(ports, "byhand") {
		t.Errorf("a port made by hand is gone: %q", ports)
	}
	run(t, "ip", "-n", h.ns, "link", "show", "mtforeign")
}

func TestLeftOversAreReapedButNeverUnderAGuest(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	w.network("lone", api.NetworkSpec{Type: api.NetworkIsolated})
	vx := w.network("vx", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 5})
	w.start()
	w.ready("lone", "vx")
	vm := w.vm("web1", h, nic("lone", "01", ""))
	g := h.boot(vm)
	other := w.hosts[0].node
	other.Meta.ID = api.NewID()
	w.move(vm, &host{node: other})
	h.sw.loop.Enqueue(all)
	run(t, "ip", "-n", h.ns, "link", "show", tapName(vm.Meta.ID, 1))
	time.Sleep(300 * time.Millisecond) // nothing tells that nothing happens
	if ports := h.vsctl("list-ports", Bridge); !strings.Contains(ports, tapName(vm.Meta.ID, 1)) {
		t.Fatalf("the port under a guest is gone: %q", ports)
	}
	g.halt()
	h.gone(tapName(vm.Meta.ID, 1))
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { configdb.Networks.Delete(tx, &vx); return nil })
	h.gone(vxlanName(5))
}

func TestGuestsCannotPretend(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	red := w.network("red", api.NetworkSpec{Type: api.NetworkIsolated})
	w.pool(red, api.IPPoolSpec{CIDR: "10.20.0.0/24"})
	w.start()
	w.ready("red")
	good := h.boot(w.vm("good", h, nic("red", "01", "10.20.0.11")))
	bad := h.boot(w.vm("bad", h, nic("red", "02", "10.20.0.12")))
	bad.reaches(good)
	bad.at("10.20.0.99")
	bad.cannotReach(good)
	bad.at("10.20.0.12")
	mac := bad.hw()
	bad.callItself(good.hw(), bad.addr())
	bad.cannotReach(good)
	bad.callItself(mac, bad.addr())
	bad.reaches(good)
	// The other's DHCP messages are not seen, and a stranger is not answered.
	good.lease()
	select {
	case m := <-bad.dhcp:
		t.Fatalf("the other guest saw %s", m.Summary())
	default:
	}
}

func TestWithoutOpenVSwitchTheReasonSaysWhatToDo(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	h.stopOVS()
	run(t, "rm", "-f", h.dir+"/db.sock")
	w.network("lone", api.NetworkSpec{Type: api.NetworkIsolated})
	w.start()
	h.unready("install and start it")
	vm := w.vm("web1", h, nic("lone", "01", ""))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, _, err := h.sw.Plug(ctx, vm, 0); err == nil || !strings.Contains(err.Error(), "openvswitch-switch") {
		t.Fatalf("Plug says %v", err)
	}
	if err := h.sw.Unplug(ctx, vm.Meta.ID); err != nil {
		t.Fatalf("Unplug says %v", err)
	}
	h.startDatabase()
	h.unready("ovs-vswitchd does not run")
	h.startVswitchd()
	w.ready("lone")
	h.boot(vm)
}

func TestABridgeOfAnotherClusterIsLeftAlone(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	h.vsctl("add-br", Bridge, "--", "set", "bridge", Bridge, "datapath_type=netdev", "external_ids:muster=another")
	w.network("lone", api.NetworkSpec{Type: api.NetworkIsolated})
	w.start()
	h.unready("ovs-vsctl del-br " + Bridge)
	if got := h.vsctl("get", "bridge", Bridge, "external_ids"); got != "{muster=another}" {
		t.Errorf("the bridge was changed: %s", got)
	}
}

// TestAHungDatabaseHoldsUpNobody: ovsdb-server that is alive and silent must not
// hold up those who start VMs, nor outlast its own silence.
func TestAHungDatabaseHoldsUpNobody(t *testing.T) {
	w := newWorld(t, 1)
	h := w.hosts[0]
	w.start()
	w.network("lab", api.NetworkSpec{Type: api.NetworkIsolated})
	w.ready("lab")
	stop := func(s syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(h.pids["ovsdb-server"], s); err != nil {
			t.Fatal(err)
		}
	}
	stop(syscall.SIGSTOP)
	// Many cards, each of which would wait for its own call to end.
	var last api.VM
	var plugs sync.WaitGroup
	for i := range 8 {
		vm := w.vm(fmt.Sprintf("vm%d", i), h, nic("lab", fmt.Sprintf("%02x", i), ""))
		plugs.Go(func() { _, _, _ = h.sw.Plug(t.Context(), vm, 0) })
		last = vm
	}
	for range 5 { // while the connection stands, and when it was given up
		goodturn.Take(t, func(int) error {
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, _, err := h.sw.Plug(ctx, last, 0)
			if err == nil {
				t.Error("a plug with a silent database")
			}
			if took := time.Since(began); took > 4*time.Second {
				return fmt.Errorf("a plug with a silent database: %w after %s", err, took)
			}
			return nil
		})
	}
	plugs.Wait() // each has its deadline; the look at the whole comes in its turn
	h.unready("systemctl")
	stop(syscall.SIGCONT)
	eventually(t, func() string {
		if _, _, err := h.sw.Plug(t.Context(), last, 0); err != nil {
			return "a plug after the silence: " + err.Error()
		}
		return ""
	})
}

func TestAWaitForABusySwitchEndsWithItsContext(t *testing.T) {
	s, err := New(Config{DB: storetest.New(t), NodeID: "1", NodeName: "m1", ClusterID: "c", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.work.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := s.Plug(ctx, api.VM{}, 0); !errors.Is(err, errBusy) {
		t.Errorf("plug: %v", err)
	}
	if err := s.Unplug(ctx, "x"); !errors.Is(err, errBusy) {
		t.Errorf("unplug: %v", err)
	}
}
