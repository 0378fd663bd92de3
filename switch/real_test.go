// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// machine is a QEMU with the tiny test guest.
type machine struct {
	t      *testing.T
	serial string // file
	agent  string // socket
}

// qemu starts a real guest on the first card of a VM.
func (h *host) qemu(vm api.VM) *machine {
	t := h.w.t
	t.Helper()
	image, err := filepath.Abs("../build/guest/tiny.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("../scripts/guest-image").CombinedOutput(); err != nil {
		t.Fatalf("build the test guest: %v: %s", err, out)
	}
	device, _, err := h.sw.Plug(t.Context(), vm, 0)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, serial: filepath.Join(h.dir, vm.Meta.Name+".serial"), agent: filepath.Join(h.dir, vm.Meta.Name+".ga")}
	cmd := exec.Command("ip", "netns", "exec", h.ns, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "128M", "-snapshot",
		"-drive", "file="+image+",if=virtio,format=qcow2",
		"-fw_cfg", "name=opt/muster/name,string="+vm.Meta.Name,
		"-serial", "file:"+m.serial,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ga0,path="+m.agent+",server=on,wait=off",
		"-device", "virtserialport,chardev=ga0,name=org.qemu.guest_agent.0",
		"-netdev", "tap,id=net0,ifname="+device+",script=no,downscript=no,vhost=off,vnet_hdr=off",
		"-device", "virtio-net-pci,netdev=net0,mac="+vm.Spec.NICs[0].MAC+",host_mtu=1450,romfile=")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return m
}

// prints waits for a line on the serial console.
func (m *machine) prints(line string) {
	m.t.Helper()
	deadline := time.Now().Add(3 * time.Minute) // without KVM, on a busy machine
	for {
		b, _ := os.ReadFile(m.serial)
		if strings.Contains(string(b), line) {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the guest did not print %q but\n%s", line, b)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// run executes a command in the guest through its agent.
func (m *machine) run(path string, args ...string) (code int, output string) {
	m.t.Helper()
	conn, err := net.Dial("unix", m.agent)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Minute))
	lines := bufio.NewReader(conn)
	ask := func(cmd string, arguments map[string]any, reply any) {
		q, _ := json.Marshal(map[string]any{"execute": cmd, "arguments": arguments})
		if _, err := conn.Write(append(q, '\n')); err != nil {
			m.t.Fatal(err)
		}
		line, err := lines.ReadBytes('\n')
		if err != nil {
			m.t.Fatal(err)
		}
		var r struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(line, &r); err != nil || r.Error != nil {
			m.t.Fatalf("%s: %v %s", cmd, err, line)
		}
		if err := json.Unmarshal(r.Return, reply); err != nil {
			m.t.Fatal(err)
		}
	}
	var started struct {
		PID int `json:"pid"`
	}
	ask("guest-exec", map[string]any{"path": path, "arg": args, "capture-output": true}, &started)
	for {
		var st struct {
			Exited bool   `json:"exited"`
			Code   int    `json:"exitcode"`
			Out    string `json:"out-data"`
		}
		ask("guest-exec-status", map[string]any{"pid": started.PID}, &st)
		if st.Exited {
			out, _ := base64.StdEncoding.DecodeString(st.Out)
			return st.Code, string(out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// TestRealGuests: two guests on two nodes get their addresses and reach each
// other; a third, on another network, reaches neither.
func TestRealGuests(t *testing.T) {
	w := newWorld(t, 2)
	red := w.network("red", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 100})
	w.network("blue", api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 200})
	w.pool(red, api.IPPoolSpec{CIDR: "10.20.0.0/24"})
	w.start()
	w.ready("red", "blue")
	vm1, vm2 := w.vm("web1", w.hosts[0], nic("red", "01", "10.20.0.11")), w.vm("web2", w.hosts[1], nic("red", "02", "10.20.0.12"))
	m1, m2 := w.hosts[0].qemu(vm1), w.hosts[1].qemu(vm2)
	stranger := w.hosts[1].boot(w.vm("web3", w.hosts[1], nic("blue", "03", "")))
	m1.prints("muster-guest name=web1 address=10.20.0.11")
	m2.prints("muster-guest name=web2 address=10.20.0.12")
	if code, out := m1.run("/bin/ping", "-c", "3", "-W", "5", "10.20.0.12"); code != 0 {
		t.Errorf("web1 does not reach web2: %s", out)
	}
	if code, out := m2.run("/bin/ping", "-c", "3", "-W", "5", "-s", "1400", "10.20.0.11"); code != 0 {
		t.Errorf("web2 does not reach web1 with large packets: %s", out)
	}
	if code, out := m1.run("/bin/cat", "/sys/class/net/eth0/mtu"); code != 0 || strings.TrimSpace(out) != "1450" {
		t.Errorf("the MTU of web1 is %q", out)
	}
	// TCP, which a switch in user space breaks if checksums are left to the card.
	_, _ = m2.run("/bin/sh", "-c", "sleep 120 </dev/null 2>/dev/null | nc -l -p 5000 >/tmp/got 2>/dev/null &")
	eventually(t, func() string {
		if _, out := m2.run("/bin/sh", "-c", "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null"); !strings.Contains(out, ":1388 ") {
			return "nobody listens on port 5000 of web2: " + out
		}
		return ""
	})
	if code, out := m1.run("/bin/sh", "-c", "dd if=/dev/zero bs=64k count=32 2>/dev/null | timeout 60 nc -w 5 10.20.0.12 5000"); code != 0 {
		t.Errorf("TCP from web1 to web2: %s", out)
	}
	eventually(t, func() string {
		if _, out := m2.run("/bin/sh", "-c", "wc -c </tmp/got"); strings.TrimSpace(out) != fmt.Sprint(32*64*1024) {
			return "web2 received " + out
		}
		return ""
	})
	stranger.callItself(stranger.hw(), w.address("10.20.0.99"))
	for _, a := range []string{"10.20.0.11", "10.20.0.12"} {
		if stranger.ping(w.address(a), time.Second) {
			t.Errorf("a guest on another network reaches %s", a)
		}
	}
}
