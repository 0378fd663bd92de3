// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

const patience = 2 * time.Minute

// eventually waits until f returns "" and fails with what it says otherwise.
func eventually(t testing.TB, f func() string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		problem := f()
		if problem == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(problem)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// run is a command that must work.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// world is a database with its hosts: network namespaces on one bridge, each
// with an Open vSwitch of its own and one node's switch.
type world struct {
	t     *testing.T
	db    *storetest.Mem
	id    string // begins the names of the namespaces
	hosts []*host
}

type host struct {
	w       *world
	ns, dir string
	node    api.Node
	sw      *Switch
	stop    func()
	pids    map[string]int
}

func newWorld(t *testing.T, hosts int) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make network namespaces: run them as root")
	}
	for _, program := range []string{"ip", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ping"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: install openvswitch-switch, iproute2 and iputils-ping", err)
		}
	}
	w := &world{t: t, db: storetest.New(t), id: fmt.Sprintf("mt%d", os.Getpid()%100000)}
	under := w.id + "u"
	w.namespace(under)
	run(t, "ip", "-n", under, "link", "add", "br0", "type", "bridge")
	run(t, "ip", "-n", under, "link", "set", "br0", "up")
	for i := 1; i <= hosts; i++ {
		w.addHost(i, under)
	}
	return w
}

func (w *world) namespace(name string) {
	w.t.Helper()
	run(w.t, "ip", "netns", "add", name)
	w.t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	run(w.t, "ip", "-n", name, "link", "set", "lo", "up")
}

func (w *world) addHost(i int, under string) {
	w.t.Helper()
	h := &host{w: w, ns: fmt.Sprintf("%sh%d", w.id, i), pids: map[string]int{}}
	var err error
	if h.dir, err = os.MkdirTemp("", "muster-ovs-"); err != nil { // short: it holds sockets
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = os.RemoveAll(h.dir) })
	w.namespace(h.ns)
	end := fmt.Sprintf("h%d", i)
	run(w.t, "ip", "-n", under, "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", h.ns)
	run(w.t, "ip", "-n", under, "link", "set", end, "master", "br0", "up")
	address := fmt.Sprintf("10.99.0.%d", i)
	run(w.t, "ip", "-n", h.ns, "addr", "add", address+"/24", "dev", "eth0")
	run(w.t, "ip", "-n", h.ns, "link", "set", "eth0", "up")
	h.node = api.Node{Meta: api.NewMeta(api.KindNode, "", fmt.Sprintf("m%d", i)), Spec: api.NodeSpec{Address: address + ":7600"}}
	h.node.Status.Phase = api.NodeReady
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &h.node) })
	run(w.t, "ovsdb-tool", "create", filepath.Join(h.dir, "conf.db"), "/usr/share/openvswitch/vswitch.ovsschema")
	w.t.Cleanup(h.stopOVS)
	h.startDatabase()
	run(w.t, "ovs-vsctl", "--db="+h.endpoint(), "--no-wait", "init")
	h.startVswitchd()
	w.hosts = append(w.hosts, h)
}

func (h *host) endpoint() string { return "unix:" + filepath.Join(h.dir, "db.sock") }

// daemon starts a program of Open vSwitch in the host, as its own process so
// that its end is ours to wait for.
func (h *host) daemon(name string, args ...string) {
	h.w.t.Helper()
	args = append([]string{"netns", "exec", h.ns, name}, args...)
	args = append(args, "--unixctl="+filepath.Join(h.dir, name+".ctl"), "--log-file="+filepath.Join(h.dir, name+".log"), "--no-chdir", "-vconsole:off")
	cmd := exec.Command("ip", args...)
	cmd.Env = append(os.Environ(), "OVS_RUNDIR="+h.dir, "OVS_LOGDIR="+h.dir, "OVS_DBDIR="+h.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also when the test dies
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		h.w.t.Fatal(err)
	}
	h.pids[name] = cmd.Process.Pid
}

func (h *host) startDatabase() {
	h.w.t.Helper()
	h.daemon("ovsdb-server", filepath.Join(h.dir, "conf.db"), "--remote=punix:"+filepath.Join(h.dir, "db.sock"))
	eventually(h.w.t, func() string {
		out, err := exec.Command("ovs-vsctl", "--db="+h.endpoint(), "--timeout=2", "--no-wait", "show").CombinedOutput()
		if err != nil {
			return "ovsdb-server does not answer: " + string(out)
		}
		return ""
	})
}

func (h *host) startVswitchd() { h.daemon("ovs-vswitchd", h.endpoint()) }

// kill ends one program at once.
func (h *host) kill(name string) {
	if pid := h.pids[name]; pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		delete(h.pids, name)
	}
}

func (h *host) stopOVS() {
	if h.w.t.Failed() {
		for _, args := range [][]string{{"show"}, {"list", "interface"}} {
			out, _ := exec.Command("ovs-vsctl", append([]string{"--db=" + h.endpoint(), "--timeout=2"}, args...)...).CombinedOutput()
			h.w.t.Logf("%s: ovs-vsctl %s\n%s", h.node.Meta.Name, args, out)
		}
		log, _ := os.ReadFile(filepath.Join(h.dir, "ovs-vswitchd.log"))
		h.w.t.Logf("%s: ovs-vswitchd\n%s", h.node.Meta.Name, log)
	}
	h.kill("ovs-vswitchd")
	h.kill("ovsdb-server")
}

func (h *host) vsctl(args ...string) string {
	h.w.t.Helper()
	return run(h.w.t, "ovs-vsctl", append([]string{"--db=" + h.endpoint(), "--timeout=10"}, args...)...)
}

// start runs the node's switch until the test ends or stop is called.
func (h *host) start() {
	h.w.t.Helper()
	s, err := New(Config{
		DB: h.w.db, NodeID: h.node.Meta.ID, NodeName: h.node.Meta.Name, ClusterID: "0198a000-cluster",
		OVSDB: h.endpoint(), Namespace: "/var/run/netns/" + h.ns,
		Log: slog.New(slog.NewTextHandler(h.w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("host", h.node.Meta.Name),
	})
	if err != nil {
		h.w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	h.sw, h.stop = s, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			h.w.t.Errorf("the switch of %s ended: %v", h.node.Meta.Name, err)
		}
	}
	h.w.t.Cleanup(h.stop)
}

func (w *world) start() {
	w.t.Helper()
	for _, h := range w.hosts {
		h.start()
	}
}

func (w *world) do(f func(v *configdb.View, tx *configdb.Txn) error) {
	w.t.Helper()
	if _, err := configdb.Transact(context.Background(), w.db, "test", 50, f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) network(name string, spec api.NetworkSpec) api.Network {
	w.t.Helper()
	n := api.Network{Meta: api.NewMeta(api.KindNetwork, "", name), Spec: spec}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Networks.Create(tx, &n) })
	return n
}

func (w *world) pool(network api.Network, spec api.IPPoolSpec) {
	w.t.Helper()
	spec.Network = network.Meta.Name
	p := api.IPPool{Meta: api.NewMeta(api.KindIPPool, "", network.Meta.Name), Spec: spec}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error {
		tx.Put(configdb.NetworkPoolKey(network.Meta.ID), []byte(p.Meta.ID))
		return configdb.IPPools.Create(tx, &p)
	})
}

func (w *world) uplink(h *host, nic string) {
	w.t.Helper()
	u := api.Uplink{Meta: api.NewMeta(api.KindUplink, "", "up-"+h.node.Meta.Name), Spec: api.UplinkSpec{Node: h.node.Meta.Name, NIC: nic}}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error {
		tx.Put(configdb.UplinkKey(h.node.Meta.ID), []byte(u.Meta.ID))
		return configdb.Uplinks.Create(tx, &u)
	})
}

// vm makes a VM that is bound to a host and meant to run.
func (w *world) vm(name string, at *host, nics ...api.VMNIC) api.VM {
	w.t.Helper()
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", name), Spec: api.VMSpec{CPUs: 1, Memory: api.GiB, Power: api.PowerRunning, NICs: nics}}
	b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: name}, Spec: api.BindingSpec{NodeID: at.node.Meta.ID, Node: at.node.Meta.Name, Epoch: 1}}
	w.do(func(_ *configdb.View, tx *configdb.Txn) error {
		if err := configdb.VMs.Create(tx, &vm); err != nil {
			return err
		}
		return configdb.Bindings.CreateUnnamed(tx, &b)
	})
	return vm
}

// move binds a VM to another host.
func (w *world) move(vm api.VM, to *host) {
	w.t.Helper()
	w.do(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, vm.Meta.ID)
		if err != nil {
			return err
		}
		b.Spec.NodeID, b.Spec.Node = to.node.Meta.ID, to.node.Meta.Name
		b.Spec.Epoch++
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
}

func (h *host) report() (api.SwitchStateStatus, bool) {
	st, err := configdb.SwitchStates.Get(h.w.db.Local(), h.node.Meta.ID)
	return st.Status, err == nil
}

// ready waits until every host has these networks.
func (w *world) ready(networks ...string) {
	w.t.Helper()
	for _, h := range w.hosts {
		eventually(w.t, func() string {
			st, ok := h.report()
			for _, n := range networks {
				if fine, why := st.Realised(n); !fine || !ok {
					return fmt.Sprintf("%s: network %s: %s (%+v)", h.node.Meta.Name, n, why, st)
				}
			}
			if !st.Ready {
				return h.node.Meta.Name + ": " + st.Reason
			}
			return ""
		})
	}
}

// unready waits until a host says why its switch does not work.
func (h *host) unready(words string) {
	h.w.t.Helper()
	eventually(h.w.t, func() string {
		st, ok := h.report()
		if !ok || st.Ready || !strings.Contains(st.Reason, words) {
			return fmt.Sprintf("%s is %+v, want a reason with %q", h.node.Meta.Name, st, words)
		}
		return ""
	})
}

func (w *world) address(s string) netip.Addr {
	w.t.Helper()
	a, err := netip.ParseAddr(s)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}
