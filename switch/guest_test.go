// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/api"
)

// guest is the other end of a tap: as much of a network stack as a ping and a
// DHCP client need.
type guest struct {
	t    *testing.T
	f    *os.File
	pong chan netip.Addr
	dhcp chan *dhcpv4.DHCPv4

	// What the guest calls itself may change while it reads.
	mac atomic.Pointer[net.HardwareAddr]
	ip  atomic.Pointer[netip.Addr]

	// received counts bytes of UDP while counting is set.
	counting atomic.Bool
	received atomic.Int64

	mu  sync.Mutex
	arp map[netip.Addr]net.HardwareAddr
}

func (g *guest) hw() net.HardwareAddr { return *g.mac.Load() }

func (g *guest) addr() netip.Addr { return *g.ip.Load() }

// callItself sets the addresses that the guest uses from now on.
func (g *guest) callItself(mac net.HardwareAddr, ip netip.Addr) {
	g.mac.Store(&mac)
	g.ip.Store(&ip)
}

// at gives the guest an address without asking anybody.
func (g *guest) at(ip string) { g.callItself(g.hw(), netip.MustParseAddr(ip)) }

// boot plugs the first card of a VM and opens its tap, as QEMU does.
func (h *host) boot(vm api.VM) *guest {
	h.w.t.Helper()
	device, offload, err := h.sw.Plug(h.w.t.Context(), vm, 0)
	if err != nil {
		h.w.t.Fatal(err)
	}
	if offload {
		h.w.t.Fatal("the switch in user space cannot take offloaded frames")
	}
	return h.attach(vm, device)
}

func (h *host) attach(vm api.VM, device string) *guest {
	h.w.t.Helper()
	g := &guest{t: h.w.t, pong: make(chan netip.Addr, 16), dhcp: make(chan *dhcpv4.DHCPv4, 64), arp: map[netip.Addr]net.HardwareAddr{}}
	mac, _ := net.ParseMAC(vm.Spec.NICs[0].MAC)
	ip, _ := netip.ParseAddr(vm.Spec.NICs[0].Address)
	g.callItself(mac, ip)
	var err error
	if g.f, err = openTap("/var/run/netns/"+h.ns, device); err != nil {
		h.w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.read()
	}()
	h.w.t.Cleanup(func() { g.halt(); <-done })
	return g
}

func (g *guest) halt() { _ = g.f.Close() }

func openTap(namespace, device string) (f *os.File, err error) {
	done := make(chan struct{})
	go func() { // the thread ends with the goroutine
		defer close(done)
		runtime.LockOSThread()
		var ns netns.NsHandle
		if ns, err = netns.GetFromPath(namespace); err != nil {
			return
		}
		if err = netns.Set(ns); err != nil {
			return
		}
		var fd int
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		req, _ := unix.NewIfreq(device)
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return
		}
		f = os.NewFile(uintptr(fd), device)
	}()
	<-done
	return f, err
}

// read answers ARP and ICMP echo requests and passes on replies.
func (g *guest) read() {
	buf := make([]byte, 4096)
	for {
		n, err := g.f.Read(buf)
		if errors.Is(err, unix.EIO) { // the device is down for a moment
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return
		}
		if g.counting.Load() && n > 34 && buf[23] == 17 {
			g.received.Add(int64(n))
			continue
		}
		if f := buf[:n]; len(f) > 34 && (bytes.Equal(f[:6], g.hw()) || f[0]&1 == 1) {
			g.handle(f)
		}
	}
}

func (g *guest) handle(f []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch binary.BigEndian.Uint16(f[12:]) {
	case 0x0806:
		from, to := netip.AddrFrom4([4]byte(f[28:32])), netip.AddrFrom4([4]byte(f[38:42]))
		g.arp[from] = bytes.Clone(f[22:28])
		if f[21] == 1 && to == g.addr() {
			g.send(f[6:12], 0x0806, arpBody(2, g.hw(), g.addr(), f[22:28], from))
		}
	case 0x0800:
		ip := f[14:]
		from, to := netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
		switch {
		case ip[9] == 1 && ip[20] == 8 && to == g.addr(): // echo request
			body := bytes.Clone(ip[20:])
			body[0] = 0
			g.send(f[6:12], 0x0800, ipBody(1, g.addr(), from, body))
		case ip[9] == 1 && ip[20] == 0:
			select {
			case g.pong <- from:
			default:
			}
		case ip[9] == 17 && binary.BigEndian.Uint16(ip[22:]) == 68:
			if m, err := dhcpv4.FromBytes(ip[28:]); err == nil {
				select {
				case g.dhcp <- m:
				default:
				}
			}
		}
	}
}

func (g *guest) send(to net.HardwareAddr, typ uint16, body []byte) { g.sendAs(g.hw(), to, typ, body) }

func (g *guest) sendAs(from, to net.HardwareAddr, typ uint16, body []byte) {
	f := append(bytes.Clone(to), from...)
	f = append(binary.BigEndian.AppendUint16(f, typ), body...)
	_, _ = g.f.Write(f)
}

func arpBody(op byte, fromMAC net.HardwareAddr, from netip.Addr, toMAC net.HardwareAddr, to netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, op}
	b = append(append(b, fromMAC...), from.AsSlice()...)
	return append(append(b, toMAC...), to.AsSlice()...)
}

func ipBody(proto byte, from, to netip.Addr, body []byte) []byte {
	b := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(body)))
	return append(append(append(b, from.AsSlice()...), to.AsSlice()...), body...)
}

var (
	everyone = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	nobody   = net.HardwareAddr{0, 0, 0, 0, 0, 0}
)

// ping asks for ARP and then for an echo until one comes, or the time is over.
func (g *guest) ping(to netip.Addr, within time.Duration) bool {
	g.mu.Lock()
	delete(g.arp, to)
	g.mu.Unlock()
	deadline := time.Now().Add(within)
	for time.Now().Before(deadline) {
		g.mu.Lock()
		hw := g.arp[to]
		if hw == nil {
			g.send(everyone, 0x0806, arpBody(1, g.hw(), g.addr(), nobody, to))
		} else {
			g.send(hw, 0x0800, ipBody(1, g.addr(), to, []byte{8, 0, 0, 0, 0, 1, 0, 1}))
		}
		g.mu.Unlock()
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case from := <-g.pong:
			if from == to {
				return true
			}
		case <-t.C:
		}
		t.Stop()
	}
	return false
}

// echo pings another whose hardware address is known, without ARP.
func (g *guest) echo(other *guest, within time.Duration) bool {
	deadline := time.Now().Add(within)
	for time.Now().Before(deadline) {
		g.mu.Lock()
		g.send(other.hw(), 0x0800, ipBody(1, g.addr(), other.addr(), []byte{8, 0, 0, 0, 0, 1, 0, 1}))
		// The answer needs no ARP either: it goes to whoever asked.
		g.mu.Unlock()
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case from := <-g.pong:
			if from == other.addr() {
				return true
			}
		case <-t.C:
		}
		t.Stop()
	}
	return false
}

// reaches and cannotReach check both kinds of outcome.
func (g *guest) reaches(other *guest) {
	g.t.Helper()
	if !g.ping(other.addr(), patience) {
		g.t.Fatalf("%s does not reach %s", g.addr(), other.addr())
	}
}

func (g *guest) cannotReach(other *guest) {
	g.t.Helper()
	if g.ping(other.addr(), 1500*time.Millisecond) {
		g.t.Fatalf("%s reaches %s, which is on another network", g.addr(), other.addr())
	}
}

// ask sends a DHCP message until an answer comes.
func (g *guest) ask(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	g.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		udp := []byte{0, 68, 0, 67, 0, 0, 0, 0}
		body := m.ToBytes()
		binary.BigEndian.PutUint16(udp[4:], uint16(8+len(body)))
		g.send(everyone, 0x0800, ipBody(17, netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255}), append(udp, body...)))
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case r := <-g.dhcp:
			t.Stop()
			if r.TransactionID == m.TransactionID {
				return r
			}
		case <-t.C:
		}
	}
	g.t.Fatalf("no answer to %s", m.Summary())
	return nil
}

// lease gets an address as a client does and uses it.
func (g *guest) lease() *dhcpv4.DHCPv4 {
	g.t.Helper()
	d, err := dhcpv4.NewDiscovery(g.hw())
	if err != nil {
		g.t.Fatal(err)
	}
	offer := g.ask(d)
	req, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		g.t.Fatal(err)
	}
	ack := g.ask(req)
	if ack.MessageType() != dhcpv4.MessageTypeAck {
		g.t.Fatalf("answered %s", ack.Summary())
	}
	g.mu.Lock()
	g.callItself(g.hw(), netip.AddrFrom4([4]byte(ack.YourIPAddr.To4())))
	g.mu.Unlock()
	return ack
}
