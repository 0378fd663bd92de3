// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/hostboot"
	"github.com/muster-vm/muster/monitor/alert"
	"github.com/muster-vm/muster/monitor/notify"
	"github.com/muster-vm/muster/reconcile"
)

// Actor is recorded with everything that the service writes.
const Actor = "monitor"

// Limits of the service.
const (
	// EvaluateEvery is how often rules are looked at, if there is a reason.
	EvaluateEvery = time.Second
	// idleEvaluate is how often they are looked at without one.
	idleEvaluate = 10 * time.Second
	// maxChanges is the most alerts changed in one transaction.
	maxChanges    = 100
	eventWorkers  = 4
	writeAttempts = 8
	writeTimeout  = 10 * time.Second
)

// Members tells who belongs to the configuration database.
type Members interface {
	Members(ctx context.Context) ([]api.MemberStatus, error)
}

// Peers calls a method on a node, which may be this one.
type Peers interface {
	Call(ctx context.Context, node api.Node, method string, request []byte) ([]byte, error)
}

// Sealer keeps the secrets of receivers. The label must be the same for both.
type Sealer interface {
	Seal(label string, plain []byte) ([]byte, error)
	Open(label string, sealed []byte) ([]byte, error)
}

// Config describes a Service. All fields but Log and Now must be set.
type Config struct {
	DB       configdb.DB
	NodeID   string
	NodeName string
	// Cluster and ClusterID name the cluster in messages.
	Cluster, ClusterID string
	Members            Members
	Peers              Peers
	Sealer             Sealer
	Log                *slog.Logger
	Now                func() time.Time
}

// Service is the leader's part. Run may be called again in a later term, but
// not twice at a time.
type Service struct {
	cfg Config
	log *slog.Logger
	now func() time.Time
	// clock is CLOCK_BOOTTIME.
	clock func() time.Duration
	db    configdb.DB

	send *notify.Sender
	// timing and keep are shortened by tests.
	timing timing
	keep   retention

	mu     sync.Mutex
	term   uint64
	nodes  map[string]alert.Node
	vms    map[string]alert.VM
	probes map[string]probeResult
	dirty  bool
	kick   chan struct{} // evaluate
	tell   chan struct{} // deliver
}

type timing struct {
	evaluate, probe, sweep, deliver time.Duration
	backoff, maxBackoff             time.Duration
}

// New returns a service that does nothing until Run.
func New(cfg Config) *Service {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Service{
		cfg: cfg, log: cfg.Log, now: cfg.Now, clock: hostboot.Clock, db: cfg.DB,
		send: notify.New(cfg.Cluster, cfg.ClusterID, cfg.NodeName),
		timing: timing{
			evaluate: EvaluateEvery, probe: probeEvery, sweep: sweepEvery, deliver: time.Second,
			backoff: minBackoff, maxBackoff: MaxBackoff,
		},
		keep: retention{events: MaxEvents, logins: MaxLogins, resolved: MaxResolved},
		kick: make(chan struct{}, 1), tell: make(chan struct{}, 1),
	}
	s.forget(0)
	return s
}

func (s *Service) forget(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.term, s.dirty = term, true
	s.nodes, s.vms, s.probes = map[string]alert.Node{}, map[string]alert.VM{}, map[string]probeResult{}
}

// Run does the leader's work in one Raft term until the context ends, which is
// not an error.
func (s *Service) Run(ctx context.Context, term uint64) error {
	s.forget(term)
	// Rules must not be evaluated on half of the facts: what is missing would
	// look like recovery.
	if err := s.load(); err != nil {
		s.log.Error("objects that cannot be read are not watched", "err", err)
	}
	if err := s.createBuiltins(ctx, term); err != nil && ctx.Err() == nil {
		return err
	}
	s.send.Begin(term)
	if err := s.noteEngine(ctx, term); err != nil && ctx.Err() == nil {
		s.log.Warn("begin of the term not noted: managers of SNMP v3 may refuse what a node without quorum sends", "err", err)
	}
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() { s.evaluateLoop(ctx, term) })
	group.Go(func() { s.probeLoop(ctx) })
	group.Go(func() { s.sweepLoop(ctx, term) })
	group.Go(func() { s.deliverLoop(ctx, term) })
	err := s.eventLoop(term).Run(ctx)
	return errors.Join(err, group.Stop())
}

// eventLoop looks at every node and VM that changes.
func (s *Service) eventLoop(term uint64) *reconcile.Loop {
	source := func(prefix string, kind api.Kind) reconcile.Source {
		return reconcile.Source{Prefix: prefix, IDs: func(_ *configdb.View, c configdb.Change) []string {
			return []string{string(kind) + "/" + c.Key[len(prefix):]}
		}}
	}
	return reconcile.New(reconcile.Config{
		Name: "events", DB: s.db, Log: s.log, Workers: eventWorkers,
		Sources: []reconcile.Source{
			source(configdb.Nodes.SpecPrefix(), api.KindNode),
			source(configdb.Nodes.StatusPrefix(), api.KindNode),
			source(configdb.VMs.SpecPrefix(), api.KindVM),
			source(configdb.VMs.StatusPrefix(), api.KindVM),
			source(configdb.Bindings.SpecPrefix(), api.KindVM),
			// What was deleted while nobody led has left nothing but its mark.
			{Prefix: markRoot, IDs: func(_ *configdb.View, c configdb.Change) []string {
				return []string{c.Key[len(markRoot):]}
			}},
		},
		Reconcile: func(ctx context.Context, id string) (reconcile.Result, error) {
			return reconcile.Result{}, s.look(ctx, term, id)
		},
	})
}

// kicked asks for an evaluation.
func (s *Service) kicked() {
	s.mu.Lock()
	s.dirty = true
	s.mu.Unlock()
	wake(s.kick)
}

func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// load reads all nodes and VMs.
func (s *Service) load() error {
	v := s.db.Local()
	var errs []error
	for e := range v.Scan(configdb.Nodes.SpecPrefix(), "") {
		id, _ := configdb.Nodes.IDOf(e.Key)
		l, err := readNode(v, id)
		errs = append(errs, err)
		if err == nil {
			s.knowNode(l)
		}
	}
	for e := range v.Scan(configdb.VMs.SpecPrefix(), "") {
		id, _ := configdb.VMs.IDOf(e.Key)
		l, err := readVM(v, id)
		errs = append(errs, err)
		if err == nil {
			s.knowVM(l)
		}
	}
	return errors.Join(errs...)
}

func (s *Service) knowNode(l *nodeLook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.gone {
		delete(s.nodes, l.id)
		return
	}
	n := alert.Node{ID: l.id, Name: l.node.Meta.Name, Message: l.node.Status.Message, Phase: l.node.Status.Phase}
	if l.node.Status.LostAt != nil {
		n.LostAt = *l.node.Status.LostAt
	}
	if c, ok := api.FindCondition(l.node.Status.Conditions, api.ConditionBackup); ok {
		n.Backup = &c
	}
	s.nodes[l.id] = n
}

func (s *Service) knowVM(l *vmLook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.gone {
		delete(s.vms, l.id)
		return
	}
	m := &l.vm.Meta
	st := &l.vm.Status
	s.vms[l.id] = alert.VM{
		ID: l.id, Name: m.Name, Project: m.Project, Node: st.Node, Message: st.Message, Phase: st.Phase, Crashes: st.Crashes,
		CrashedAt: l.mark.CrashedAt, MovedFrom: l.mark.MovedFrom, MovedFromID: l.mark.MovedFromID,
		MovedLoss: l.mark.MovedLoss, Recovering: l.mark.Recovering,
		GaveUp: st.Restarts != nil && st.Restarts.Left == api.LeftGaveUp,
	}
}
