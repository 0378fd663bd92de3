// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/reconcile"
	"github.com/muster-vm/muster/switch/hostnet"
	"github.com/muster-vm/muster/switch/openflow"
	"github.com/muster-vm/muster/switch/ovs"
)

// Times and limits.
const (
	// DefaultOVSDB is where Open vSwitch's database listens on most systems.
	DefaultOVSDB = "unix:/var/run/openvswitch/db.sock"
	// ResyncInterval is the slow look at everything, for what nobody told.
	ResyncInterval = 15 * time.Second
	// RetryInterval is the pause between two attempts to reach Open vSwitch.
	RetryInterval = time.Second
	// EchoInterval is the pause between two looks whether the database answers.
	EchoInterval = 10 * time.Second
	// PlugDeadline bounds Plug: the port must be in the running switch by then.
	PlugDeadline = 5 * time.Second
	// PassDeadline bounds one look at the whole: with a database that hangs,
	// each of its calls would take its own deadline.
	PassDeadline = 10 * time.Second
	// WriteDeadline bounds a transaction.
	WriteDeadline = 5 * time.Second
	// bridgeTime is how long ovs-vswitchd may take to make a new bridge before
	// somebody is told, bridgeLook the pause between looks.
	bridgeTime = 2 * time.Second
	bridgeLook = 50 * time.Millisecond

	actor = "switch"
	// all is the one object of the loop: the bridge as a whole.
	all = "host"
)

// Config of New.
type Config struct {
	DB               configdb.DB
	NodeID, NodeName string
	// ClusterID marks what is ours in Open vSwitch.
	ClusterID string
	// OVSDB is the endpoint of the database, "unix:PATH"; DefaultOVSDB when
	// empty. The bridge's management socket is beside it.
	OVSDB string
	// Namespace is the path of the network namespace to work in; the process's
	// own when empty. Open vSwitch must run in the same.
	Namespace string
	Log       *slog.Logger
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// Notify, if set, is called when something changed for waiting VMs. It must
	// not block.
	Notify func()
	// TapOwner returns the user that a VM of this node runs as, 0 for root, who
	// needs no leave; all run as root when nil.
	TapOwner func(vmID string) int
}

// Switch is the module. Make it with New, then Run it, not twice at a time.
type Switch struct {
	cfg  Config
	log  *slog.Logger
	loop *reconcile.Loop
	mgmt string // path of the bridge's management socket

	// work is held while the host's network is looked at and changed.
	work gate
	host *hostnet.Host
	conn *ovs.Conn
	flow *openflow.Session
	// set is what the flows were made from, for the session flow.
	set        string
	unlimited  string                // why what guests send is not limited; empty if it is
	responders map[string]*responder // by tap
	told       string                // last problem in the log
	tried      bool                  // to reach Open vSwitch, once
}

// CheckOVSDB refuses what cannot be the endpoint of Open vSwitch's database.
func CheckOVSDB(endpoint string) error {
	_, err := socketOf(endpoint)
	return err
}

func socketOf(endpoint string) (path string, err error) {
	path, ok := strings.CutPrefix(endpoint, "unix:")
	if !ok || !filepath.IsAbs(path) {
		return "", fmt.Errorf("ovsdb: %q is not unix: and an absolute path, such as %s", endpoint, DefaultOVSDB)
	}
	return path, nil
}

// New checks the configuration and returns a switch that does nothing until Run.
func New(cfg Config) (*Switch, error) {
	if cfg.DB == nil || cfg.NodeID == "" || cfg.NodeName == "" || cfg.ClusterID == "" {
		return nil, errors.New("configure the switch: DB, NodeID, NodeName and ClusterID are needed")
	}
	if cfg.OVSDB == "" {
		cfg.OVSDB = DefaultOVSDB
	}
	path, err := socketOf(cfg.OVSDB)
	if err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Switch{cfg: cfg, log: cfg.Log, mgmt: filepath.Join(filepath.Dir(path), Bridge+".mgmt"), responders: map[string]*responder{}, work: make(gate, 1)}
	host := func(*configdb.View, configdb.Change) []string { return []string{all} }
	var sources []reconcile.Source
	for _, prefix := range []string{
		configdb.Networks.SpecPrefix(), configdb.Uplinks.SpecPrefix(), configdb.Nodes.SpecPrefix(),
		configdb.SwitchStates.StatusKey(cfg.NodeID),
	} {
		sources = append(sources, reconcile.Source{Prefix: prefix, IDs: host})
	}
	for _, prefix := range []string{configdb.VMs.SpecPrefix(), configdb.Bindings.SpecPrefix(), configdb.Operations.SpecPrefix()} {
		sources = append(sources, reconcile.Source{Prefix: prefix, IDs: s.concerns})
	}
	s.loop = reconcile.New(reconcile.Config{
		Name: "switch", DB: cfg.DB, Sources: sources, Reconcile: s.reconcile, Workers: 1, MaxBackoff: 5 * time.Second, Log: cfg.Log,
	})
	return s, nil
}

// concerns passes on changes of VMs with network cards that are bound here. What
// such a VM leaves behind is unplugged by the hypervisor, or found by the slow
// look.
func (s *Switch) concerns(v *configdb.View, c configdb.Change) []string {
	id, ok := configdb.VMs.IDOf(c.Key)
	if !ok {
		id, ok = configdb.Bindings.IDOf(c.Key)
	}
	if !ok {
		id, ok = configdb.Operations.IDOf(c.Key)
	}
	if !ok {
		return nil
	}
	if b, err := configdb.Bindings.Get(v, id); err != nil || b.Spec.NodeID != s.cfg.NodeID && !passes(v, id, s.cfg.NodeID) {
		return nil
	}
	if vm, err := configdb.VMs.Get(v, id); err != nil || len(vm.Spec.NICs) == 0 {
		return nil
	}
	return []string{all}
}

// Run works until the context ends, which is not an error. Bridges, ports and
// taps stay, so that guests go on.
func (s *Switch) Run(ctx context.Context) error {
	host, err := hostnet.Open(s.cfg.Namespace)
	if err != nil {
		return err
	}
	_ = s.work.enter(context.Background())
	s.host = host
	s.work.leave()
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() { s.followOVS(ctx) })
	group.Go(func() { s.followDevices(ctx, host) })
	group.Go(func() { s.resync(ctx) })
	err = s.loop.Run(ctx)
	err = errors.Join(err, group.Stop())
	_ = s.work.enter(context.Background())
	defer s.work.leave()
	s.stopResponders(nil)
	s.disconnect()
	s.host.Close()
	s.host = nil
	return err
}

func (s *Switch) resync(ctx context.Context) {
	t := time.NewTicker(ResyncInterval)
	defer t.Stop()
	for {
		s.loop.Enqueue(all)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Switch) followDevices(ctx context.Context, host *hostnet.Host) {
	for ctx.Err() == nil {
		if err := host.Follow(ctx, func() { s.loop.Enqueue(all) }); err != nil {
			s.log.Warn("changes of network devices are not followed", "err", err)
			pause(ctx, RetryInterval)
		}
	}
}

// followOVS keeps the connections to Open vSwitch and asks for a look at every
// change there, and when one of them begins or ends.
func (s *Switch) followOVS(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := ovs.Dial(ctx, s.cfg.OVSDB, s.log)
		_ = s.work.enter(context.Background())
		first := !s.tried
		s.tried, s.conn = true, conn
		s.work.leave()
		if first || err == nil {
			s.loop.Enqueue(all)
		}
		if err != nil {
			pause(ctx, RetryInterval)
			continue
		}
		s.followConn(ctx, conn)
		conn.Close() // first, so that who holds the work and waits for it goes on
		_ = s.work.enter(context.Background())
		s.disconnect()
		s.work.leave()
		s.loop.Enqueue(all)
	}
}

// followConn works with one connection to the database until it ends.
func (s *Switch) followConn(ctx context.Context, conn *ovs.Conn) {
	t := time.NewTicker(RetryInterval)
	defer t.Stop()
	asked := s.cfg.Now()
	changed := conn.Changed()
	for {
		_ = s.work.enter(context.Background())
		flow := s.flow
		s.work.leave()
		var ended <-chan struct{}
		if flow != nil {
			ended = flow.Done()
		}
		select {
		case <-changed:
			changed = conn.Changed()
			s.loop.Enqueue(all)
		case <-ended:
			_ = s.work.enter(context.Background())
			s.closeFlow()
			s.work.leave()
			s.loop.Enqueue(all)
		case <-t.C: // the session may have begun since
			if flow == nil {
				s.loop.Enqueue(all)
			}
			if now := s.cfg.Now(); now.Sub(asked) >= EchoInterval {
				if asked = now; !conn.Alive(ctx) {
					return
				}
			}
		case <-conn.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

// gate is a mutex whose wait ends with a context: a switch that hangs must not
// hold up those who start VMs.
type gate chan struct{}

var (
	errBusy = errors.New("the virtual switch of this node is busy; it waits for Open vSwitch")
	errSlow = errors.New("Open vSwitch's database answers too slowly, or not at all: systemctl restart openvswitch-switch") //nolint:staticcheck // a name
)

func (g gate) enter(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errBusy
	}
}

func (g gate) leave() { <-g }

func (s *Switch) closeFlow() {
	if s.flow != nil {
		s.flow.Close()
		s.flow, s.set = nil, ""
	}
}

func (s *Switch) disconnect() {
	s.closeFlow()
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

// pause waits, or less if the context ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
