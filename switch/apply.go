// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/reconcile"
	"github.com/muster-vm/muster/switch/hostnet"
	"github.com/muster-vm/muster/switch/openflow"
	"github.com/muster-vm/muster/switch/ovs"
)

// The keys in external_ids of our ports.
const (
	keyNetwork = "muster-network" // ID
	keyVM      = "muster-vm"      // ID
	keyMAC     = "muster-mac"
	keyUplink  = "muster-uplink" // ID
)

// pass is one look at the whole: what is wished, what is there, and what was
// found out.
type pass struct {
	s     *Switch
	w     *wish
	links map[string]hostnet.Link
	state *ovs.State // nil: no database
	tags  map[string]int
	ports map[string]ovs.PortWish
	keep  map[string]bool // devices that are wanted
	made  bool            // the bridge, just now

	report api.SwitchStateStatus
	uplink api.UplinkStatus
}

// reconcile makes everything as it should be and says how it went.
func (s *Switch) reconcile(ctx context.Context, _ string) (reconcile.Result, error) {
	if err := s.work.enter(ctx); err != nil {
		return reconcile.Result{}, err
	}
	defer s.work.leave()
	if !s.tried {
		return reconcile.Result{}, nil // nothing to say yet
	}
	w, err := wishFor(s.cfg.DB.Local(), s.cfg.NodeID)
	if err != nil {
		return reconcile.Result{}, err
	}
	p := &pass{s: s, w: w, ports: map[string]ovs.PortWish{}, keep: map[string]bool{}}
	p.report = api.SwitchStateStatus{Node: s.cfg.NodeName, Problems: map[string]string{}}
	mctx, cancel := context.WithTimeoutCause(ctx, PassDeadline, errSlow)
	err = p.make(mctx)
	cancel()
	if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errSlow) {
		err = fmt.Errorf("%w (%w)", errSlow, err) // all deadlines in there are those of calls to it
	}
	if err != nil {
		p.report.Ready, p.report.Reason = false, err.Error()
	}
	if p.report.Reason != s.told {
		s.told = p.report.Reason
		s.log.Info("the virtual switch of this node", "ready", p.report.Ready, "reason", p.report.Reason)
	}
	if !p.report.Ready {
		p.report.Networks, p.report.Problems = nil, nil
	}
	return reconcile.Result{}, p.write(ctx)
}

// make does the work; its error is why the switch as a whole is not ready.
func (p *pass) make(ctx context.Context) error {
	var err error
	if p.links, err = p.s.host.Links(); err != nil {
		return err
	}
	p.s.answerDHCP(p) // works without Open vSwitch, too
	if p.s.conn == nil {
		return p.s.whyNoDatabase()
	}
	if p.state, err = p.bridge(ctx); err != nil {
		return err
	}
	p.report.Version, p.report.Datapath = p.state.Version, p.state.Bridges[Bridge].Datapath
	p.networks()
	p.bridgeIn()
	p.cards()
	p.keepUnwanted()
	if err := p.plugAll(ctx); err != nil {
		return err
	}
	p.refused()
	p.s.answerDHCP(p)
	p.reapDevices()
	if err := p.flows(ctx); err != nil {
		return err
	}
	p.report.Ready = true
	return nil
}

// whyNoDatabase says in words what keeps us from Open vSwitch.
func (s *Switch) whyNoDatabase() error {
	const doing = "install and start it (Debian: apt-get install openvswitch-switch; systemctl start openvswitch-switch)"
	path := strings.TrimPrefix(s.cfg.OVSDB, "unix:")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("Open vSwitch does not run, there is no %s: %s", path, doing) //nolint:staticcheck // a name, shown to people as it is
	}
	return fmt.Errorf("Open vSwitch's database does not answer at %s: %s", path, doing) //nolint:staticcheck // a name
}

func (p *pass) owner() string { return p.s.cfg.ClusterID }

// alias marks our network devices.
func (s *Switch) alias(what ...string) string {
	return "muster:" + s.cfg.ClusterID + ":" + strings.Join(what, ":")
}

// bridge makes the integration bridge and returns the state with it.
func (p *pass) bridge(ctx context.Context) (*ovs.State, error) {
	st, err := p.s.conn.State(ctx)
	if err != nil {
		return nil, err
	}
	b, ok := st.Bridges[Bridge]
	if !ok {
		if err := p.s.conn.AddBridge(ctx, st, p.owner(), Bridge, p.datapath("")); err != nil {
			return nil, err
		}
		p.s.log.Info("integration bridge made", "bridge", Bridge)
		p.made = true
		return p.bridgeAgain(ctx)
	}
	if b.Owner != p.owner() {
		return nil, fmt.Errorf("bridge %s exists and is not this cluster's (external_ids:%s=%s): if nothing needs it, remove it: ovs-vsctl del-br %s", Bridge, ovs.OwnerKey, p.owner(), Bridge)
	}
	var left []string
	p.tags, left = assignTags(rememberedTags(b.ExternalIDs), p.w.networks)
	for _, name := range left {
		p.report.Problems[name] = fmt.Sprintf("the node has no tag left: at most %d networks", MaxNetworks)
	}
	ids := map[string]string{ovs.OwnerKey: p.owner()}
	for k, v := range b.ExternalIDs { // what others keep there stays
		if !strings.HasPrefix(k, tagKey) {
			ids[k] = v
		}
	}
	for id, tag := range p.tags {
		ids[tagKey+id] = strconv.Itoa(tag)
	}
	return st, p.s.conn.SetBridge(ctx, b, p.datapath(b.Datapath), ids)
}

// bridgeAgain reads the state until it has the bridge just made.
func (p *pass) bridgeAgain(ctx context.Context) (*ovs.State, error) {
	ctx, cancel := context.WithTimeout(ctx, ovs.CallDeadline)
	defer cancel()
	for {
		changed := p.s.conn.Changed()
		st, err := p.s.conn.State(ctx)
		if err != nil {
			return nil, err
		}
		if _, ok := st.Bridges[Bridge]; ok {
			return p.bridge(ctx)
		}
		if err := p.s.await(ctx, changed); err != nil {
			return nil, fmt.Errorf("make bridge %s: %w", Bridge, err)
		}
	}
}

// await waits for news from the database.
func (s *Switch) await(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-changed:
		return nil
	case <-s.conn.Done():
		return errors.New("the connection to Open vSwitch's database ended")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// datapath chooses the kernel's where it is, else the one in user space. A
// bridge that carries guests keeps what it has, unless that cannot work.
func (p *pass) datapath(have string) string {
	const kernel, user = "system", "netdev"
	if !p.s.host.HasKernelDatapath() {
		return user
	}
	for name := range p.links {
		if have == user && strings.HasPrefix(name, tapPrefix) && strings.HasPrefix(p.links[name].Alias, p.s.alias()) {
			return user
		}
	}
	return kernel
}

// networks makes the devices of vxlan networks and says which networks work.
func (p *pass) networks() {
	for i := range p.w.networks {
		n := &p.w.networks[i]
		if p.tags[n.Meta.ID] == 0 {
			continue
		}
		if err := p.network(n); err != nil {
			p.report.Problems[n.Meta.Name] = err.Error()
			continue
		}
		p.report.Networks = append(p.report.Networks, n.Meta.Name)
	}
	slices.Sort(p.report.Networks)
}

func (p *pass) network(n *api.Network) error {
	switch n.Spec.Type {
	case api.NetworkVLAN:
		if p.w.uplink == nil {
			return fmt.Errorf("node %s has no uplink; name one: muster uplink create NAME --node %s --nic NIC", p.s.cfg.NodeName, p.s.cfg.NodeName)
		}
		return p.uplinkProblem()
	case api.NetworkVXLAN:
		return p.vxlan(n)
	case api.NetworkIsolated:
	}
	return nil
}

func (p *pass) vxlan(n *api.Network) error {
	if !p.w.local.IsValid() {
		return fmt.Errorf("the address of node %s is not an IP address, which tunnels need", p.s.cfg.NodeName)
	}
	name := vxlanName(n.Spec.VNI)
	p.keep[name] = true
	x := hostnet.VXLAN{Name: name, Alias: p.s.alias("net", n.Meta.ID), VNI: n.Spec.VNI, MTU: mtu(n), Local: p.w.local}
	for _, a := range p.w.remotes {
		if a.Is4() == x.Local.Is4() {
			x.Remotes = append(x.Remotes, a)
		}
	}
	if err := p.s.host.EnsureVXLAN(x); err != nil {
		return err
	}
	if p.report.Datapath == "netdev" {
		if err := p.s.host.NoGRO(name); err != nil {
			return err
		}
	}
	p.ports[name] = p.port(name, p.tags[n.Meta.ID], nil, map[string]string{keyNetwork: n.Meta.ID})
	if len(p.w.strange) > 0 {
		return fmt.Errorf("the address of node %s is not an IP address, which tunnels need", strings.Join(p.w.strange, ", "))
	}
	return nil
}

func (p *pass) port(name string, tag int, trunks []int, ids map[string]string) ovs.PortWish {
	out := map[string]string{ovs.OwnerKey: p.owner()}
	maps.Copy(out, ids)
	return ovs.PortWish{Name: name, Tag: tag, Trunks: trunks, ExternalIDs: out}
}

// uplinkProblem says why the NIC of the uplink must not be bridged in.
func (p *pass) uplinkProblem() error {
	nic := p.w.uplink.Spec.NIC
	l, ok := p.links[nic]
	if !ok {
		return fmt.Errorf("the uplink's NIC %s does not exist on node %s", nic, p.s.cfg.NodeName)
	}
	if l.Loopback || l.Kind == "openvswitch" || strings.HasPrefix(l.Alias, "muster:") {
		return fmt.Errorf("%s cannot be an uplink", nic)
	}
	addrs, err := p.s.host.Addresses(l)
	if err != nil {
		return err
	}
	if len(addrs) > 0 {
		return fmt.Errorf("NIC %s carries the host's address %s: bridged in, it would cut the host off; give a NIC without addresses", nic, addrs[0])
	}
	if at, used := p.state.Ports[nic]; used && (at.Bridge != Bridge || at.Owner != p.owner()) {
		return fmt.Errorf("NIC %s is a port of bridge %s, which is not ours", nic, at.Bridge)
	}
	for name, m := range p.links { // with the kernel's datapath the master is OVS itself
		if l.Master != 0 && m.Index == l.Master && m.Kind != "openvswitch" {
			return fmt.Errorf("NIC %s is a part of %s", nic, name)
		}
	}
	return nil
}

// bridgeIn wishes for the uplink's port.
func (p *pass) bridgeIn() {
	if p.w.uplink == nil {
		return
	}
	nic := p.w.uplink.Spec.NIC
	p.uplink.ObservedGeneration = p.w.uplink.Meta.Generation
	err := p.uplinkProblem()
	if err == nil && !p.links[nic].Up {
		err = p.s.host.Up(nic)
	}
	if err == nil && p.report.Datapath == "netdev" {
		err = p.s.host.NoGRO(nic)
	}
	if err != nil {
		p.uplink.Message = err.Error()
		return
	}
	p.ports[nic] = p.port(nic, 0, p.w.vlans(), map[string]string{keyUplink: p.w.uplink.Meta.ID})
	p.report.Uplink, p.report.UplinkUp = nic, p.links[nic].Carrier
	p.uplink.Ready = true
	if !p.links[nic].Carrier {
		p.uplink.Message = "no carrier: the cable or the other end is missing"
	}
}

// cards wishes for the ports of the taps that are there.
func (p *pass) cards() {
	for _, t := range p.w.taps() {
		l, ok := p.links[t.name]
		if !ok || l.Alias != p.s.tapAlias(t) || (t.vm.Spec.Power == api.PowerStopped || t.vm.Spec.Power == api.PowerSuspended) && !l.Carrier {
			continue // not plugged, or the left-over of a VM that stopped
		}
		p.keep[t.name] = true
		if t.network != nil && p.tags[t.network.Meta.ID] != 0 {
			p.ports[t.name] = p.card(t)
		}
	}
}

// keepUnwanted keeps the devices of cards that guests have not let go of.
func (p *pass) keepUnwanted() {
	for _, t := range p.w.unwanted() {
		if l, ok := p.links[t.name]; ok && l.Alias == p.s.tapAlias(t) {
			p.keep[t.name] = true
		}
	}
}

func (s *Switch) tapAlias(t tap) string {
	return s.alias("vm", t.vm.Meta.ID, strconv.Itoa(t.nic.Slot-1))
}

func (p *pass) card(t tap) ovs.PortWish {
	w := p.port(t.name, p.tags[t.network.Meta.ID], nil, map[string]string{keyNetwork: t.network.Meta.ID, keyVM: t.vm.Meta.ID, keyMAC: t.nic.MAC})
	w.Shape = shapeOf(t.nic.Limit)
	return w
}

// plugAll makes the ports as wished and removes ours that are not.
func (p *pass) plugAll(ctx context.Context) error {
	var errs []error
	changed := false
	for _, name := range slices.Sorted(maps.Keys(p.ports)) {
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		did, err := p.s.conn.SetPort(ctx, p.state, Bridge, p.ports[name])
		changed = changed || did
		if err != nil {
			errs = append(errs, err)
		}
	}
	for name, have := range p.state.Ports {
		_, wanted := p.ports[name]
		if wanted || have.Bridge != Bridge || have.Owner != p.owner() || name == Bridge {
			continue
		}
		if p.links[name].Carrier && strings.HasPrefix(name, tapPrefix) {
			continue // a guest has it open: whoever ends the guest unplugs it
		}
		p.s.log.Info("port removed", "port", name, "vm", have.ExternalIDs[keyVM])
		changed = true
		if err := p.s.conn.RemovePort(ctx, p.state, p.owner(), name); err != nil {
			errs = append(errs, err)
		}
	}
	if changed { // the database's answer came before its news, or will wake us
		if st, err := p.s.conn.State(ctx); err == nil {
			p.state = st
		}
	}
	if err := p.s.conn.DropShapes(ctx, p.state, p.owner()); err != nil {
		p.s.log.Debug("limits that nothing uses are left for the next look", "err", err)
	}
	return errors.Join(errs...)
}

// refused takes note of networks whose port ovs-vswitchd could not make.
func (p *pass) refused() {
	for _, n := range p.w.networks {
		why := ""
		switch {
		case n.Spec.Type == api.NetworkVXLAN:
			why = p.state.Ports[vxlanName(n.Spec.VNI)].Error
		case n.Spec.Type == api.NetworkVLAN && p.w.uplink != nil:
			why = p.state.Ports[p.w.uplink.Spec.NIC].Error
		}
		if i := slices.Index(p.report.Networks, n.Meta.Name); why != "" && i >= 0 {
			p.report.Networks = slices.Delete(p.report.Networks, i, i+1)
			p.report.Problems[n.Meta.Name] = "Open vSwitch says: " + why
		}
	}
}

// reapDevices removes our devices that nothing needs: of networks that are
// gone, and taps without a process whose VM is not here any more.
func (p *pass) reapDevices() {
	for name, l := range p.links {
		if p.keep[name] || !strings.HasPrefix(l.Alias, p.s.alias()) || strings.HasPrefix(name, tapPrefix) && l.Carrier {
			continue
		}
		if err := p.s.host.Remove(name, p.s.alias()); err != nil {
			p.s.log.Warn("a network device is left over", "device", name, "err", err)
			continue
		}
		p.s.log.Info("network device removed", "device", name)
	}
}

// flows speaks with the running switch. Its silence means that ovs-vswitchd
// does not run.
func (p *pass) flows(ctx context.Context) error {
	s := p.s
	if s.flow == nil {
		flow, err := openflow.Dial(ctx, s.mgmt)
		for wait := time.Duration(0); err != nil && p.made && wait < bridgeTime; wait += bridgeLook {
			pause(ctx, bridgeLook) // ovs-vswitchd needs a moment to make the bridge, too
			flow, err = openflow.Dial(ctx, s.mgmt)
		}
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return errors.New("ovs-vswitchd does not run, only its database does: start it (Debian: systemctl restart openvswitch-switch)")
		}
		if err != nil {
			return err
		}
		s.flow, s.set = flow, ""
	}
	list, meters := p.antiSpoofing(), p.meters()
	if want := fmt.Sprint(list, meters); want != s.set {
		if err := p.replaceFlows(ctx, list, meters); err != nil {
			s.closeFlow()
			return err
		}
		s.set = want
	}
	p.report.LimitsProblem = s.unlimited
	return nil
}
