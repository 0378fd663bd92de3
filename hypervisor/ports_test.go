// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// testPorts is a virtual switch inside the test.
type testPorts struct {
	mu      sync.Mutex
	broken  error
	calls   []string
	plugged map[string]bool // by VM and index
	prefix  string          // of the devices' names; "tap" when empty
}

func (p *testPorts) Plug(_ context.Context, vm api.VM, nic int) (string, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != nil {
		return "", false, p.broken
	}
	p.calls = append(p.calls, fmt.Sprintf("plug %d", nic))
	if p.plugged == nil {
		p.plugged = map[string]bool{}
	}
	p.plugged[fmt.Sprint(vm.Meta.ID, nic)] = true
	return fmt.Sprintf("%s%d", cmp.Or(p.prefix, "tap"), nic), nic == 1, nil
}

func (p *testPorts) Unplug(_ context.Context, vmID string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, "unplug")
	for k := range p.plugged {
		if strings.HasPrefix(k, vmID) {
			delete(p.plugged, k)
		}
	}
	return nil
}

func (p *testPorts) UnplugCard(_ context.Context, vmID string, slot int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, fmt.Sprintf("unplug slot %d", slot))
	return nil
}

func (p *testPorts) set(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broken = err
}

func (p *testPorts) left() (plugged int, calls []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.plugged), slices.Clone(p.calls)
}

func TestNetworkCardsArePluggedAndUnplugged(t *testing.T) {
	e := newEnv(t, false)
	e.ports.set(errors.New("Open vSwitch does not run"))
	lab := api.Network{Meta: api.NewMeta(api.KindNetwork, "", "lab"), Spec: api.NetworkSpec{Type: api.NetworkVXLAN, VNI: 7}}
	tx := &configdb.Txn{}
	must(t, configdb.Networks.Create(tx, &lab))
	e.commit(tx)
	e.vols.put("web1-disk0", e.disk())
	id := e.create("node-1", api.VMSpec{Power: api.PowerRunning, NICs: []api.VMNIC{
		{Network: "lab", MAC: "52:54:00:00:00:01", Address: "10.20.0.7"}, {Network: "lab", MAC: "52:54:00:00:00:02"},
	}})
	tx = &configdb.Txn{} // what rest reserves
	address := configdb.AddressKey(lab.Meta.ID, netip.MustParseAddr("10.20.0.7"))
	for _, key := range []string{configdb.MACKey("52:54:00:00:00:01"), configdb.MACKey("52:54:00:00:00:02"), address} {
		tx.Put(key, []byte(id))
	}
	configdb.Networks.Refer(tx, lab.Meta.ID, api.KindVM, id)
	e.commit(tx)

	e.wait(id, "the reason", func(vm api.VM) bool { return strings.Contains(vm.Status.Message, "Open vSwitch does not run") })
	if e.guard.startCount() != 0 {
		t.Fatal("QEMU was started without its network")
	}
	e.ports.set(nil)
	e.wait(id, "running", func(vm api.VM) bool { return vm.Status.Phase == api.VMRunning })
	e.guard.mu.Lock()
	argv := strings.Join(e.guard.starts[0].Argv, " ")
	e.guard.mu.Unlock()
	for _, w := range []string{
		"-netdev tap,id=net1,ifname=tap0,script=no,downscript=no,vhost=off,vnet_hdr=off -device virtio-net-pci,id=nic1,netdev=net1,mac=52:54:00:00:00:01,bus=pn1,host_mtu=1450,romfile=",
		"ifname=tap1,script=no,downscript=no,vhost=off -device virtio-net-pci,id=nic2,netdev=net2,mac=52:54:00:00:00:02,bus=pn2,",
	} {
		if !strings.Contains(argv, w) {
			t.Errorf("%q is not in %s", w, argv)
		}
	}
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	e.until("unplugged", func() bool { n, _ := e.ports.left(); return n == 0 }, nothing)

	e.change(id, func(vm *api.VM) { vm.Meta.DeletingAt = &vm.Meta.CreatedAt })
	e.until("volume marked", func() bool {
		vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
		return err == nil && vol.Meta.Deleting()
	}, nothing)
	vol, err := configdb.Volumes.Find(e.db.Local(), "", "web1-disk0")
	must(t, err)
	tx = &configdb.Txn{} // what the storage module does
	configdb.Volumes.Delete(tx, &vol)
	e.commit(tx)
	e.until("gone with its claims", func() bool {
		v := e.db.Local()
		_, err := configdb.VMs.Get(v, id)
		return err != nil && v.Empty(configdb.Root+"claim/") && len(configdb.Networks.Referrers(v, lab.Meta.ID)) == 0
	}, nothing)
}

func TestAVMWithoutNetworkCardsNeedsNoSwitch(t *testing.T) {
	e := newEnv(t, false)
	e.ports.set(errors.New("Open vSwitch does not run"))
	id, _ := e.running(api.VMSpec{})
	e.change(id, func(vm *api.VM) { vm.Spec.Power, vm.Spec.ForceStop = api.PowerStopped, true })
	e.wait(id, "stopped", func(vm api.VM) bool { return vm.Status.Phase == api.VMStopped })
	if _, calls := e.ports.left(); len(calls) != 0 {
		t.Errorf("the switch was asked: %v", calls)
	}
}
