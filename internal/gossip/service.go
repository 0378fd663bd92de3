// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Timing of memberlist; see the package comment for what comes of it.
const (
	probeInterval = 500 * time.Millisecond
	probeTimeout  = 200 * time.Millisecond
	// suspicionMult times the logarithm of the number of members (at least 1)
	// seconds lie between suspect and dead; suspicionMaxMult times as much when
	// nobody else confirms.
	suspicionMult    = 6
	suspicionMaxMult = 2
	indirectChecks   = 3
	// awarenessMax bounds how much slower a node probes that is itself slow.
	awarenessMax   = 4
	gossipInterval = 200 * time.Millisecond
	gossipNodes    = 3
	retransmitMult = 3
	// deadTime is how long a dead node is still told things, so that it may object.
	deadTime = 30 * time.Second
	// exchangeInterval lies between two exchanges of the whole state with a random
	// node; memberlist stretches it in clusters of more than 32.
	exchangeInterval = 30 * time.Second
	streamTimeout    = 3 * time.Second
	// handoffQueue is how many messages about states may wait.
	handoffQueue = 1024
)

// Timing of this package.
const (
	// summaryInterval lies between two summaries of a node, unless the members
	// together would send more than summariesPerSecond.
	summaryInterval    = 5 * time.Second
	summariesPerSecond = 20
	// summaryMult times the logarithm of the number of members is how often a node
	// passes a summary on.
	summaryMult = 2
	// lookInterval is how often the members are looked at.
	lookInterval = time.Second
	// joinsPerLook is how many that are not alive are asked at a look, and joinsAtOnce
	// how many at a time; each is asked after joinPause, which doubles up to maxJoinPause.
	joinsPerLook = 2
	joinsAtOnce  = 4
	joinPause    = time.Second
	maxJoinPause = 30 * time.Second
	// resolvesPerLook is how many names are resolved at a look, each in resolveTimeout.
	resolvesPerLook = 4
	resolveTimeout  = 2 * time.Second
	// suspicionMargin is added to the longest suspicion before it is taken as over.
	suspicionMargin = time.Second
	// leaveTimeout bounds the wait until the others know that this node leaves.
	leaveTimeout = time.Second
	// jitter is the random part of a pause, so that nodes do not act in step.
	jitter = 0.2
)

// Config describes a Service.
type Config struct {
	NodeID string
	// Packets is the node's UDP socket. It stays open when Run ends.
	Packets net.PacketConn
	// Listen returns a listener for the protocol muster-gossip, whose connections
	// are *tls.Conn. Each Run asks for one and closes it.
	Listen func() net.Listener
	// Dial connects to other nodes.
	Dial Dialler
	// Local says how this node fares. It must answer at once.
	Local func() Summary
	Log   *slog.Logger
}

// Service is gossip on one node.
type Service struct {
	cfg   Config
	table *table
	out   *outbox

	mu    sync.Mutex
	keys  Keys
	ring  *ring         // nil until there are keys
	keyed chan struct{} // closed when there are
	last  uint64        // number of this node's newest summary
	fail  func(error)   // ends the Run under way
}

// New returns a service that knows nobody until SetMembers, and begins when it
// runs and SetKeys was called.
func New(cfg Config) *Service {
	s := &Service{cfg: cfg, keyed: make(chan struct{}), last: uint64(time.Now().UnixMilli())}
	s.table = newTable(cfg.NodeID, s.told)
	s.out = &outbox{members: s.table.count}
	return s
}

// SetMembers says who the members are, this node among them. Who is not named is
// no peer from now on.
func (s *Service) SetMembers(list []Member) { s.table.setMembers(list) }

// SetKeys says which keys are in force.
func (s *Service) SetKeys(k Keys) error {
	if err := k.validate(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring == nil {
		r, err := newRing(k)
		if err != nil {
			return fmt.Errorf("gossip keys: %w", err)
		}
		s.ring, s.keys = r, k
		close(s.keyed)
		return nil
	}
	if s.keys.same(k) {
		return nil
	}
	if err := s.ring.install(k); err != nil {
		return err
	}
	s.keys = k
	s.cfg.Log.Info("gossip keys changed", "keys", len(k.all()))
	return nil
}

// Peers returns all members, this node among them, in order of name.
func (s *Service) Peers() []Peer { return s.table.list() }

// Changed returns a channel that is closed when a peer's state changes next.
func (s *Service) Changed() <-chan struct{} {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	return s.table.changed
}

func (s *Service) told(p Member, state api.GossipState) {
	s.cfg.Log.Info("node as gossip has it", "node", p.Name, "state", state)
}

// Run takes part until the context ends, and takes leave of the others then.
func (s *Service) Run(ctx context.Context) error {
	select {
	case <-s.keyed:
	case <-ctx.Done():
		return nil
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	s.mu.Lock()
	s.fail = fail
	s.mu.Unlock()
	t := &transport{table: s.table, contained: s.contained, conn: s.cfg.Packets, ln: s.cfg.Listen(), dial: s.cfg.Dial, sent: s.sent, heard: s.heard, log: s.cfg.Log}
	if b, ok := s.cfg.Packets.(interface{ SetReadBuffer(bytes int) error }); ok {
		_ = b.SetReadBuffer(socketBuffer) // the kernel's own size will do
	}
	t.start()
	defer s.table.forget()
	ml, err := memberlist.Create(s.config(t))
	if err != nil {
		return errors.Join(fmt.Errorf("begin to gossip: %w", err), t.Shutdown())
	}
	var joins sync.WaitGroup
	s.work(ctx, ml, &joins)
	// Without peers, or when they do not answer, nobody misses the word.
	if err := ml.Leave(leaveTimeout); err != nil {
		s.cfg.Log.Debug("leave not told", "err", err)
	}
	err = ml.Shutdown() // which ends the joins under way
	joins.Wait()
	var p *contain.Panic
	if errors.As(context.Cause(ctx), &p) {
		err = errors.Join(p, err)
	}
	return err
}

// contained calls f; a panic in it ends the Run under way, not the daemon. What
// memberlist calls runs in goroutines of its own.
func (s *Service) contained(f func()) {
	if err := contain.Do(f); err != nil {
		s.mu.Lock()
		fail := s.fail
		s.mu.Unlock()
		fail(err)
	}
}

// config is memberlist's.
func (s *Service) config(t *transport) *memberlist.Config {
	d := &delegate{s}
	c := memberlist.DefaultLANConfig()
	c.Name, c.RequireNodeNames = s.cfg.NodeID, true
	c.Transport = t
	c.BindAddr, c.BindPort, c.AdvertisePort = dummyAddress.String(), dummyPort, dummyPort
	c.ProbeInterval, c.ProbeTimeout, c.IndirectChecks, c.AwarenessMaxMultiplier = probeInterval, probeTimeout, indirectChecks, awarenessMax
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = suspicionMult, suspicionMaxMult
	c.GossipInterval, c.GossipNodes, c.RetransmitMult = gossipInterval, gossipNodes, retransmitMult
	c.GossipToTheDeadTime, c.PushPullInterval, c.TCPTimeout = deadTime, exchangeInterval, streamTimeout
	c.UDPBufferSize, c.HandoffQueueDepth = packetBytes, handoffQueue
	c.EnableCompression = false // what is sent is small, and is read by sent
	c.GossipVerifyIncoming, c.GossipVerifyOutgoing = true, true
	s.mu.Lock()
	c.Keyring = s.ring.Keyring
	s.mu.Unlock()
	c.Delegate, c.Events, c.Alive = d, d, d
	c.LogOutput = nil
	c.Logger = newLogger(s.cfg.Log, s.table)
	return c
}

// sent reads a packet that goes out for changes of states.
func (s *Service) sent(packet []byte) {
	s.contained(func() {
		for _, r := range s.read(packet) {
			s.table.note(r)
		}
	})
}

// heard reads a packet that came, while somebody is suspect, for what clears him.
func (s *Service) heard(packet []byte) {
	if !s.table.anySuspect() {
		return
	}
	for _, r := range s.read(packet) {
		if r.kind == msgAlive {
			s.table.note(r)
		}
	}
}

func (s *Service) read(packet []byte) []rumour {
	s.mu.Lock()
	keys := s.ring.aeads
	s.mu.Unlock()
	plain, err := open(keys, packet)
	if err != nil {
		return nil // memberlist will find that too
	}
	list, err := rumours(plain)
	if err != nil {
		s.cfg.Log.Debug("packet not understood", "err", err)
	}
	return list
}

// work does what is due, until the context ends.
func (s *Service) work(ctx context.Context, ml *memberlist.Memberlist, joins *sync.WaitGroup) {
	places := make(chan struct{}, joinsAtOnce)
	look, speak := time.NewTimer(0), time.NewTimer(0)
	defer look.Stop()
	defer speak.Stop()
	for {
		select {
		case <-speak.C:
			s.speak()
			speak.Reset(withJitter(summaryPause(s.table.count())))
		case <-look.C:
			s.table.clear(longestSuspicion(s.table.count()))
			s.resolve(ctx)
			for _, m := range s.table.due(time.Now(), joinsPerLook, nextPause) {
				select {
				case places <- struct{}{}:
				default:
					continue
				}
				joins.Go(func() {
					defer func() { <-places }()
					s.contained(func() { s.join(ml, m) })
				})
			}
			look.Reset(withJitter(lookInterval))
		case <-ctx.Done():
			return
		}
	}
}

// join exchanges the state with a node that is not alive.
func (s *Service) join(ml *memberlist.Memberlist, m Member) {
	// The address is the transport's business.
	if _, err := ml.Join([]string{m.ID + "/" + dummyAddress.String()}); err != nil {
		s.cfg.Log.Debug("node does not gossip", "node", m.Name, "err", err)
	}
}

// longestSuspicion is more than memberlist takes to call a suspect dead.
func longestSuspicion(members int) time.Duration {
	scale := max(1, math.Log10(float64(max(1, members))))
	return time.Duration(scale*float64(suspicionMult*suspicionMaxMult*probeInterval)) + suspicionMargin
}

// summaryPause is how long a node waits between two summaries.
func summaryPause(members int) time.Duration {
	return max(summaryInterval, time.Duration(members)*time.Second/summariesPerSecond)
}

func nextPause(last time.Duration) time.Duration {
	return withJitter(min(max(2*last, joinPause), maxJoinPause))
}

func withJitter(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*jitter*float64(d))
}

// resolve looks up the names among the members' addresses.
func (s *Service) resolve(ctx context.Context) {
	for _, m := range s.table.unresolved(resolvesPerLook) {
		rctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		udp, err := resolveUDP(rctx, m.Address)
		cancel()
		if err != nil {
			s.cfg.Log.Debug("address not resolved", "node", m.Name, "address", m.Address, "err", err)
			continue
		}
		s.table.resolved(m, udp)
	}
}

// speak sends a new summary of this node.
func (s *Service) speak() {
	now := s.cfg.Local()
	r := record{id: s.cfg.NodeID, number: s.nextNumber(0), summary: now.encode()}
	s.table.learn(r, now, 0)
	s.pass(r)
}

// nextNumber returns a number above all that this node gave, and above another.
func (s *Service) nextNumber(above uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, above) + 1
	return s.last
}

// pass queues a record for the others.
func (s *Service) pass(r record) {
	s.out.put(r.id, r.encode())
}

// hear takes a record from another node and says whether it is news.
func (s *Service) hear(r record, age time.Duration) (bool, error) {
	if r.id == s.cfg.NodeID {
		s.nextNumber(r.number) // it is from before a restart: begin above it
		return false, nil
	}
	sum, err := decodeSummary(r.summary)
	if err != nil {
		return false, err
	}
	return s.table.learn(r, sum, age), nil
}
