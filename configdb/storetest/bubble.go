// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// Bubble is a group of replicas in a bubble of testing/synctest: the real Raft,
// TLS and calls over a network in memory, on disks in memory that lose at a
// crash what was not synced. Nodes may crash at any moment, or at a step of
// their disk; they start again by themselves.
type Bubble struct {
	tb    testing.TB
	net   *memNet
	nodes []*BubbleNode
	log   *slog.Logger

	caCert, caKey []byte
	// down is how long a crashed node stays down.
	down    func() time.Duration
	storage raftnode.Storage // the template: how often snapshots are made
	wg      sync.WaitGroup
	closing chan struct{}
}

// BubbleNode is one replica.
type BubbleNode struct {
	b         *Bubble
	index     int
	id        string
	cert, key []byte
	disk      *memDisk
	crashed   chan int

	mu    sync.Mutex
	store *configdb.Store // nil while it is down
	life  int
	stop  func()
	held  bool // it shall stay down
}

// BubbleConfig describes a Bubble.
type BubbleConfig struct {
	Nodes int
	Seed  uint64
	// SnapshotEvery entries a snapshot is made, and TrailingLogs are kept.
	SnapshotEvery, TrailingLogs uint64
}

// Times of a Bubble.
const (
	downLeast, downMost = 100 * time.Millisecond, 3 * time.Second
	bubbleSnapshotLook  = 200 * time.Millisecond
	bubblePatience      = 60 * time.Second // of the bubble's clock
)

// NewBubble returns a running group of voters. It is called in a bubble, and
// closed there.
func NewBubble(tb testing.TB, cfg BubbleConfig) *Bubble {
	tb.Helper()
	rng := rand.New(rand.NewPCG(cfg.Seed, 0xb0bb1e))
	b := &Bubble{tb: tb, net: newMemNet(rand.New(rand.NewPCG(cfg.Seed, 1))), closing: make(chan struct{}), log: slog.New(slog.DiscardHandler)}
	if dir := os.Getenv("MUSTER_TEST_LOG"); dir != "" {
		f, err := os.Create(filepath.Join(dir, strings.ReplaceAll(tb.Name(), "/", "_")+".log"))
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = f.Close() })
		b.log = slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	b.storage = raftnode.Storage{SnapshotEvery: cfg.SnapshotEvery, TrailingLogs: cfg.TrailingLogs, SnapshotInterval: bubbleSnapshotLook}
	var mu sync.Mutex
	b.down = func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return downLeast + time.Duration(rng.Int64N(int64(downMost-downLeast)))
	}
	var err error
	if b.caCert, b.caKey, err = pki.NewCA("test", api.NewID()); err != nil {
		tb.Fatal(err)
	}
	for i := range cfg.Nodes {
		b.nodes = append(b.nodes, b.newNode(i, rand.New(rand.NewPCG(cfg.Seed, uint64(100+i)))))
	}
	for i, n := range b.nodes {
		n.start()
		b.wg.Go(n.attend)
		if i == 0 {
			if err := n.current().Bootstrap(); err != nil {
				tb.Fatal(err)
			}
			continue
		}
		b.Eventually("add a member", func(ctx context.Context) error {
			return b.Leader().AddMember(n.id, memAddress(n.index).String(), true)
		})
	}
	return b
}

func (b *Bubble) newNode(i int, rng *rand.Rand) *BubbleNode {
	b.tb.Helper()
	n := &BubbleNode{b: b, index: i, id: api.NewID(), crashed: make(chan int, 1)}
	n.disk = newMemDisk(rng, n.crashed)
	var err error
	if n.key, err = pki.NewKey(); err != nil {
		b.tb.Fatal(err)
	}
	csrPEM, err := pki.NewCSR(n.key, "n")
	if err != nil {
		b.tb.Fatal(err)
	}
	csr, err := pki.ParseCSR(csrPEM)
	if err != nil {
		b.tb.Fatal(err)
	}
	if n.cert, err = pki.SignNode(b.caCert, b.caKey, csr, n.id, n.name(), memAddress(i).IP.String()); err != nil {
		b.tb.Fatal(err)
	}
	return n
}

func (n *BubbleNode) name() string { return fmt.Sprintf("n%d", n.index+1) }

// start opens the replica on its disk.
func (n *BubbleNode) start() {
	b := n.b
	id, err := clusternet.NewIdentity(n.cert, n.key, b.caCert)
	if err != nil {
		b.tb.Fatal(err)
	}
	id.DialTCP = func(ctx context.Context, address string) (net.Conn, error) { return b.net.dial(ctx, n.index, address) }
	log := b.log.With("node", n.name())
	port, rpc, client := clusternet.NewPort(b.net.listen(n.index), id, log), clusternet.NewRPCServer(log), clusternet.NewRPCClient(id)
	raftLn, rpcLn := port.Listener(clusternet.ProtoRaft), port.Listener(clusternet.ProtoRPC)
	disk, storage := n.disk.begin(), b.storage
	storage.Log, storage.Stable, storage.Snapshots = disk, disk, disk
	store, err := configdb.Open(configdb.StoreConfig{
		NodeID: n.id, Address: memAddress(n.index).String(), Identity: id, Listener: raftLn, Server: rpc, Client: client, Log: log,
		OnFatal: func(err error) { b.tb.Errorf("%s: %v", n.name(), err) }, Storage: &storage,
	})
	if err != nil {
		b.tb.Fatalf("%s does not start on its disk: %v", n.name(), err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = port.Serve(ctx) })
	wg.Go(func() { _ = rpc.Serve(ctx, rpcLn) })
	n.mu.Lock()
	n.store = store
	n.life++
	n.stop = func() {
		close(disk.closing)
		cancel()
		client.Close()
		if err := store.Close(); err != nil {
			b.tb.Errorf("close %s: %v", n.name(), err)
		}
		client.Close() // what was still in use
		wg.Wait()
	}
	n.mu.Unlock()
	disk.running()
}

// current is the replica, or nil while the node is down.
func (n *BubbleNode) current() *configdb.Store {
	s, _ := n.now()
	return s
}

// now is the replica and which of its lives this is.
func (n *BubbleNode) now() (*configdb.Store, int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.store, n.life
}

// crash ends the node as a power cut does.
func (n *BubbleNode) crash() { n.disk.crash() }

// hold keeps a node down that has crashed or will; release lets it start.
func (n *BubbleNode) hold(held bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held = held
}

// attend buries each life and begins the next.
func (n *BubbleNode) attend() {
	for {
		select {
		case <-n.crashed:
		case <-n.b.closing:
			n.bury()
			return
		}
		n.bury()
		for wait := n.b.down(); ; wait = downLeast {
			select {
			case <-time.After(wait):
			case <-n.b.closing:
				return
			}
			n.mu.Lock()
			held := n.held
			n.mu.Unlock()
			if !held {
				break
			}
		}
		n.start()
	}
}

func (n *BubbleNode) bury() {
	n.mu.Lock()
	stop := n.stop
	n.store, n.stop = nil, nil
	n.mu.Unlock()
	n.b.net.crash(n.index)
	if stop != nil {
		stop()
	}
}

// Close ends all nodes.
func (b *Bubble) Close() {
	close(b.closing)
	b.wg.Wait()
}

// Eventually tries until it works or the bubble's clock has gone on for a
// minute.
func (b *Bubble) Eventually(what string, try func(ctx context.Context) error) {
	b.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bubblePatience)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			b.tb.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

var errNoLeader = errors.New("no leader")

// Leader waits for a leader that a majority confirms.
func (b *Bubble) Leader() *configdb.Store {
	b.tb.Helper()
	var leader *configdb.Store
	b.Eventually("a leader", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		for _, n := range b.nodes {
			s := n.current()
			if s == nil {
				continue
			}
			if l, ok := s.Leadership(); ok && s.Confirm(ctx, l.Term) == nil {
				leader = s
				return nil
			}
		}
		return errNoLeader
	})
	return leader
}
