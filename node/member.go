// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/thejerf/suture/v4"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/history"
	"github.com/muster-vm/muster/ha"
	"github.com/muster-vm/muster/hypervisor"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/gossip"
	"github.com/muster-vm/muster/monitor"
	"github.com/muster-vm/muster/monitor/snmp"
	"github.com/muster-vm/muster/storage"
	vswitch "github.com/muster-vm/muster/switch"
	"github.com/muster-vm/muster/task"
)

// Times of a member.
const (
	// quorumAge is how fresh the replica must be to call the quorum present.
	quorumAge = 3 * time.Second
	// enlistEvery is how often a node that is not yet in the group asks.
	enlistEvery = 500 * time.Millisecond
	// reassignEvery is how often the leader looks for storage work of lost nodes.
	reassignEvery = 5 * time.Second
	// writeDeadline bounds one transaction of this package.
	writeDeadline = 5 * time.Second
)

// member is everything that runs on a host that belongs to a cluster.
type member struct {
	cfg  *Config
	info *membership
	log  *slog.Logger

	identity *clusternet.Identity
	port     *clusternet.Port
	rpc      *clusternet.RPCServer
	client   *clusternet.RPCClient
	store    *configdb.Store
	guard    *guardLink
	keeper   *ha.Keeper
	ha       *ha.Service
	outlook  *ha.Outlook
	storage  *storage.Service
	hyper    *hypervisor.Hypervisor
	vswitch  *vswitch.Switch
	meter    *monitor.Node
	monitor  *monitor.Service
	lone     *monitor.Lone
	agent    *snmp.Agent // nil without an address to listen on
	task     *task.Service
	history  *history.Service
	facts    *registrar
	gossip   *gossip.Service
	packets  net.PacketConn // of gossip
	certs    *certs
	backups  *backupKeeper
	seen     *lastSeen

	rpcListener, webListener, streamListener, volumeListener net.Listener

	fatal     func(error)     // ends the daemon
	left      context.Context // ends when this node was removed from the cluster
	setLeft   context.CancelFunc
	expelling sync.Mutex    // held while this node, as the leader, takes another out
	table     *serviceTable // how the services fare
	wake      chan struct{} // asks for a look at every VM
	peersMu   sync.Mutex
	peers     map[string]http.RoundTripper // by id@address
}

// openMember opens the replica and wires the modules. ln and packets are the one
// port.
func openMember(cfg *Config, info *membership, ln net.Listener, packets net.PacketConn, fatal func(error), services func() []api.ServiceStatus, log *slog.Logger) (*member, error) {
	id, err := info.identity(time.Now())
	if err != nil {
		return nil, err
	}
	m := &member{cfg: cfg, info: info, log: log, fatal: fatal, identity: id, seen: newLastSeen(), peers: map[string]http.RoundTripper{}, wake: make(chan struct{}, 1), port: clusternet.NewPort(ln, id, log)}
	m.packets, m.gossip = packets, m.newGossip(packets)
	m.left, m.setLeft = context.WithCancel(context.Background())
	m.rpc, m.client = clusternet.NewRPCServer(log), clusternet.NewRPCClient(id)
	m.rpc.Trust(m.trusted)
	m.rpc.Life(info.life())
	raftListener := m.port.Listener(clusternet.ProtoRaft)
	m.rpcListener = m.port.Listener(clusternet.ProtoRPC)
	m.streamListener = m.port.Listener(clusternet.ProtoStream)
	m.volumeListener = m.port.Listener(clusternet.ProtoVolume)
	m.webListener = m.port.Listener(clusternet.ProtoH2, clusternet.ProtoH1)
	m.store, err = configdb.Open(configdb.StoreConfig{
		Dir: filepath.Join(cfg.DataDir, replicaDir), NodeID: info.NodeID, NodeName: info.Node, Address: info.Address, Identity: id,
		Listener: raftListener, Server: m.rpc, Client: m.client, LogStore: cfg.LogStore, OnFatal: fatal, Log: log.With("module", "configdb"),
	})
	if err != nil {
		return nil, err
	}
	id.Trust = m.trusted
	m.certs = newCerts(m)
	if err := errors.Join(m.checkLife(), m.checkLevel()); err != nil {
		return nil, errors.Join(err, m.store.Close())
	}
	if err := m.wire(services); err != nil {
		return nil, errors.Join(err, m.store.Close())
	}
	return m, nil
}

func (m *member) wire(services func() []api.ServiceStatus) error {
	m.guard = newGuardLink(m.cfg, m.log.With("module", "guard"))
	m.storage = storage.New(storage.Config{
		DB: m.store, NodeID: m.info.NodeID, NodeName: m.info.Node, DataDir: m.cfg.DataDir, RunDir: m.cfg.RunDir,
		QemuImg: m.cfg.QEMUImg, Streams: volumeStreams{m}, OpenKey: sealer{m.info.clusterKey}.Open, NoteKey: noteKey(m.info.clusterKey), Log: m.log.With("module", "storage"),
	})
	m.ha = ha.NewService(ha.ServiceConfig{
		DB: m.store, Leader: m.store, Placer: recoveryPlacer{}, NodeID: m.info.NodeID, NodeName: m.info.Node, Fencer: fencer{m}, Storage: poolGuard{m}, Log: m.log.With("module", "ha"),
	})
	m.outlook = m.newOutlook()
	m.keeper = ha.NewKeeper(ha.KeeperConfig{
		NodeID: m.info.NodeID, Caller: m, Guard: leaseGuard{m.guard}, Log: m.log.With("module", "ha"),
		OnLease: m.wakeHypervisor, Heard: m.store.Heard,
	})
	var err error
	m.vswitch, err = vswitch.New(vswitch.Config{
		DB: m.store, NodeID: m.info.NodeID, NodeName: m.info.Node, ClusterID: m.info.ClusterID, OVSDB: m.cfg.OVSDB,
		Log: m.log.With("module", "switch"), Notify: m.wakeHypervisor, TapOwner: func(id string) int { return m.hyper.UserOf(id) },
	})
	if err != nil {
		return err
	}
	m.hyper, err = hypervisor.New(hypervisor.Config{
		DB: m.store, NodeID: m.info.NodeID, NodeName: m.info.Node, RunDir: m.cfg.RunDir,
		Guard: vmGuard{m.guard}, Lease: m.keeper, Volumes: m.storage, Ports: m.vswitch, Snapshots: m.storage, Keys: m.storage, Streams: m, Copies: m.storage, QEMU: m.cfg.QEMU, Users: m.cfg.users(), Limits: findLimits(m.log), Log: m.log.With("module", "hypervisor"),
	})
	if err != nil {
		return err
	}
	m.guard.onExit = m.hyper.GuardEvent
	m.guard.onNew = m.wakeHypervisor
	m.history = history.New(history.ServiceConfig{DB: m.store, Log: m.log.With("module", "history")})
	m.task = task.New(task.Config{DB: m.store, Log: m.log.With("module", "task")})
	if err := m.wireMonitor(services); err != nil {
		return err
	}
	m.backups = newBackupKeeper(m)
	m.facts = &registrar{m: m, bootID: api.NewID()}
	m.rpc.Handle(ha.MethodRenew, func(ctx context.Context, b []byte) ([]byte, error) {
		return m.ha.Serve(ctx, clusternet.CallerOf(ctx), b)
	})
	m.rpc.Handle(ha.MethodCarry, m.ha.ServeCarry)
	m.rpc.Handle(methodLockOut, poolGuard{m}.serve)
	m.rpc.Handle(methodEnlist, func(ctx context.Context, _ []byte) ([]byte, error) {
		return m.serveEnlist(ctx, clusternet.CallerOf(ctx))
	})
	m.rpc.Handle(methodCertify, func(ctx context.Context, b []byte) ([]byte, error) {
		return m.serveCertify(ctx, clusternet.CallerOf(ctx), b)
	})
	m.rpc.Handle(methodExpel, m.serveExpel)
	m.rpc.Handle(methodLeader, m.serveLeader)
	m.rpc.Handle(methodHealth, m.serveHealth)
	m.rpc.Handle(methodTransfer, m.serveTransfer)
	m.rpc.Handle(methodPosition, m.servePosition)
	return nil
}

// CallLeader implements ha.Caller: it calls the leader, which may be this node.
func (m *member) CallLeader(ctx context.Context, method string, request []byte) ([]byte, error) {
	id, addr, ok := m.store.Leader()
	if !ok {
		return nil, configdb.ErrNoQuorum
	}
	if id != m.info.NodeID {
		return m.client.Call(ctx, id, addr, method, request)
	}
	switch method {
	case ha.MethodRenew:
		return m.ha.Serve(ctx, m.info.NodeID, request)
	case ha.MethodCarry:
		return m.ha.ServeCarry(ctx, request)
	case methodExpel:
		return m.serveExpel(ctx, request)
	case methodTransfer:
		return m.serveTransfer(ctx, request)
	case methodCertify:
		return m.serveCertify(ctx, m.info.NodeID, request)
	}
	return nil, fmt.Errorf("call %s on this node: unknown method", method)
}

type notLeaderError struct{ error }

// RPCCode keeps the code on the way to another node.
func (notLeaderError) RPCCode() string { return codeNotLeader }

func notLeader() error { return notLeaderError{errors.New("this node is not the leader")} }

// services returns what the supervisor runs, by name.
func (m *member) services() map[string]func(context.Context) error {
	all := map[string]func(context.Context) error{
		"port":       m.port.Serve,
		"rpc":        func(ctx context.Context) error { return m.rpc.Serve(ctx, m.rpcListener) },
		"enlist":     m.enlist,
		"cert":       m.certs.run,
		"lockout":    m.lockOut,
		"guard":      m.guard.Serve,
		"lease":      m.keeper.Run,
		"heartbeat":  m.newHeartbeat().Run,
		"storage":    m.storage.Run,
		"hypervisor": m.hyper.Run,
		"takeback":   m.newTakeBack().Run,
		"hostfacts":  m.hyper.Report,
		"stream":     m.serveStreams,
		"volumes":    m.serveVolumes,
		"switch":     m.vswitch.Run,
		"monitor":    m.meter.Run,
		"lone":       m.lone.Run,
		"wake":       m.lookAround,
		"node":       m.facts.run,
		"leader":     m.leader,
		"gossip":     m.gossiping,
		"backup":     m.backups.run,
		"level":      m.watchLevel,
		"standstill": (&standstill{log: m.log, now: ha.BootTime, wait: waitFor}).run,
		"outlook":    m.outlook.Run,
		"reboot":     m.serveReboot,
	}
	if m.agent != nil {
		all["snmp"] = m.agent.Run
	}
	if m.info.Role == api.RoleWitness {
		delete(all, "heartbeat")
		delete(all, "storage")
		delete(all, "hypervisor")
		delete(all, "takeback")
		delete(all, "hostfacts")
		delete(all, "stream")
		delete(all, "volumes")
		delete(all, "switch")
		delete(all, "wake")
	}
	return all
}

// wakeHypervisor asks for a look at every VM and does not wait for it: neither
// the renewal of the lease nor the guard's events may be held up.
func (m *member) wakeHypervisor() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *member) lookAround(ctx context.Context) error {
	for {
		select {
		case <-m.wake:
			m.hyper.Wake()
		case <-ctx.Done():
			return nil
		}
	}
}

// leader runs what needs one brain, while this node leads.
func (m *member) leader(ctx context.Context) error {
	return m.store.WhileLeader(ctx, func(ctx context.Context, l configdb.Leadership) {
		m.ha.Begin(l.Term) // before anybody asks how long a node has been silent
		sup := newSupervisor("leader", m.log)
		for name, run := range map[string]func(context.Context, uint64) error{
			"leader/ha": m.ha.Run, "leader/task": m.task.Run, "leader/storage": m.reassign, "leader/monitor": m.monitor.Run,
			"leader/voters": m.keepVoters, "leader/gossip": m.keepGossipKeys,
			"leader/authority": m.rotate, "leader/history": m.history.Run, "leader/level": m.keepLevel,
			"leader/cpu": m.keepCPUBaseline, "leader/outlook": m.outlook.Tell, "leader/evacuate": m.evacuate,
			"leader/failback": m.failback, "leader/reboot": m.reboot, "leader/rolling": m.rollingReboot,
			"leader/drill": m.drill,
		} {
			m.table.supervise(sup, name, func(ctx context.Context) error { return run(ctx, l.Term) })
		}
		_ = sup.Serve(ctx) // ends with the leadership
	})
}

func (m *member) reassign(ctx context.Context, term uint64) error {
	tick := time.NewTicker(reassignEvery)
	defer tick.Stop()
	for {
		if err := m.storage.Reassign(ctx, term); err != nil && ctx.Err() == nil {
			m.log.Warn("storage work of lost nodes not handed on", "err", err)
		}
		if err := m.dropGhosts(); err != nil && ctx.Err() == nil {
			m.log.Warn("a removed node is still a member of the configuration database", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// enlist asks the leader to count this node in, until it is. A node that was
// admitted but interrupted finishes here after its restart.
func (m *member) enlist(ctx context.Context) error {
	if m.info.Founder {
		return suture.ErrDoNotRestart
	}
	tick := time.NewTicker(enlistEvery)
	defer tick.Stop()
	var told string
	for {
		if m.enlisted() {
			return suture.ErrDoNotRestart
		}
		if err := m.askEnlist(ctx); err != nil && err.Error() != told {
			told = err.Error()
			m.log.Info("not yet a member of the configuration database", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// enlisted reports whether the group has this node, by this node's own log.
func (m *member) enlisted() bool {
	members, err := m.store.Members()
	if err != nil {
		return false
	}
	for _, mb := range members {
		if mb.NodeID == m.info.NodeID {
			return true
		}
	}
	return false
}

func (m *member) askEnlist(ctx context.Context) error {
	var errs []error
	for _, p := range m.info.Peers {
		id, addr, _ := strings.Cut(p, "@")
		err := m.enlistAt(ctx, id, addr)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// enlistAt asks one member, or the leader that it names: that may be one that
// joined later than this node was told of the others.
func (m *member) enlistAt(ctx context.Context, id, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, clusternet.DialTimeout)
	defer cancel()
	_, err := m.client.Call(ctx, id, addr, methodEnlist, nil)
	var refused *clusternet.RemoteError
	if !errors.As(err, &refused) || refused.Code != codeNotLeader {
		return err
	}
	b, lerr := m.client.Call(ctx, id, addr, methodLeader, nil)
	lid, laddr, ok := strings.Cut(string(b), "@")
	if lerr != nil || !ok || lid == id {
		return err
	}
	_, err = m.client.Call(ctx, lid, laddr, methodEnlist, nil)
	return err
}

// serveLeader names the leader as "id@host:port", or nothing.
func (m *member) serveLeader(context.Context, []byte) ([]byte, error) {
	id, addr, ok := m.store.Leader()
	if !ok {
		return nil, nil
	}
	return []byte(id + "@" + addr), nil
}

// waitMember waits until this node's replica knows the node itself.
func (m *member) waitMember(ctx context.Context) error {
	for {
		v := m.store.Local()
		if _, err := configdb.Nodes.Get(v, m.info.NodeID); err == nil {
			return nil
		}
		if _, err := m.store.WaitRevision(ctx, v.Revision()+1); err != nil {
			return err
		}
	}
}

func (m *member) close() error {
	if _, ok := m.store.Leadership(); ok {
		// The others need not wait until they miss this node.
		if err := m.store.TransferLeadership(); err != nil {
			m.log.Info("leadership not handed over", "err", err)
		}
	}
	m.client.Close()
	return errors.Join(m.store.Close(), m.packets.Close())
}
