// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/raftnode"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

const (
	// voters is how many nodes of a cluster vote at most.
	voters = 5
	// patience bounds a wait for a leader, a member or the replicas.
	patience = 5 * time.Minute
	pause    = 5 * time.Millisecond
	// never is more entries than a run has: no snapshots.
	never = 1 << 40
)

// node is one replica.
type node struct {
	*configdb.Store
	index int
	id    string
	sent  traffic
	stop  func() error
}

func (n *node) name() string { return fmt.Sprintf("n%03d", n.index+1) }

// cluster is all of them.
type cluster struct {
	nodes   []*node
	wire    *wire
	library *library
	timing  configdb.Timing
	log     *slog.Logger
	say     func(format string, a ...any)

	caCert, caKey []byte
	mu            sync.Mutex
	fatal         []error
}

// form makes a group of voters and replicas.
func form(ctx context.Context, nodes int, timing configdb.Timing, log *slog.Logger) (*cluster, error) {
	c := &cluster{wire: newWire(), library: newLibrary(), timing: timing, log: log}
	var err error
	if c.caCert, c.caKey, err = pki.NewCA("simulation", api.NewID()); err != nil {
		return nil, err
	}
	for i := range nodes {
		n, err := c.open(i)
		if err != nil {
			return c, fmt.Errorf("node %d: %w", i+1, err)
		}
		c.nodes = append(c.nodes, n)
		if i == 0 {
			if err := n.Bootstrap(); err != nil {
				return c, err
			}
			continue
		}
		if err := c.add(ctx, n); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c *cluster) add(ctx context.Context, n *node) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		leader, err := c.leader(ctx)
		if err != nil {
			return err
		}
		if err = leader.AddMember(n.id, address(n.index), n.index < voters); err == nil {
			return nil
		}
		if !wait(ctx, pause) {
			return fmt.Errorf("add %s: %w", n.name(), err)
		}
	}
}

func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// leader waits for one that a majority confirms.
func (c *cluster) leader(ctx context.Context) (*node, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("there is no leader"))
	defer cancel()
	for {
		for _, n := range c.nodes[:min(voters, len(c.nodes))] {
			if l, ok := n.Leadership(); ok && n.Confirm(ctx, l.Term) == nil {
				return n, nil
			}
		}
		if !wait(ctx, pause) {
			return nil, context.Cause(ctx)
		}
	}
}

func (c *cluster) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fatal = append(c.fatal, err)
}

// broken returns why some replica could not go on.
func (c *cluster) broken() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(c.fatal...)
}

func (c *cluster) identity(n *node) (*clusternet.Identity, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	csrPEM, err := pki.NewCSR(key, n.name())
	if err != nil {
		return nil, err
	}
	csr, err := pki.ParseCSR(csrPEM)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(address(n.index))
	if err != nil {
		return nil, err
	}
	cert, err := pki.SignNode(c.caCert, c.caKey, csr, n.id, n.name(), host)
	if err != nil {
		return nil, err
	}
	id, err := clusternet.NewIdentity(cert, key, c.caCert)
	if err != nil {
		return nil, err
	}
	id.DialTCP = func(ctx context.Context, to string) (net.Conn, error) { return c.wire.dial(ctx, n.index, &n.sent, to) }
	return id, nil
}

// open starts a replica.
func (c *cluster) open(i int) (*node, error) {
	n := &node{index: i, id: api.NewID()}
	id, err := c.identity(n)
	if err != nil {
		return nil, err
	}
	log := c.log.With("node", n.name())
	port, rpc, client := clusternet.NewPort(c.wire.listen(i, &n.sent), id, log), clusternet.NewRPCServer(log), clusternet.NewRPCClient(id)
	raftLn, rpcLn := port.Listener(clusternet.ProtoRaft), port.Listener(clusternet.ProtoRPC)
	fatal := func(err error) { c.failed(fmt.Errorf("%s: %w", n.name(), err)) }
	n.Store, err = configdb.Open(configdb.StoreConfig{
		NodeID: n.id, NodeName: n.name(), Address: address(i), Identity: id, Listener: raftLn, Server: rpc, Client: client, Log: log,
		Timing: c.timing, OnFatal: fatal,
		Storage: &raftnode.Storage{
			Log: &shelf{library: c.library, broken: fatal}, Stable: raft.NewInmemStore(), Snapshots: raft.NewInmemSnapshotStore(),
			SnapshotEvery: never, TrailingLogs: never,
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = port.Serve(ctx) })
	wg.Go(func() { _ = rpc.Serve(ctx, rpcLn) })
	n.stop = func() error {
		cancel()
		client.Close()
		err := n.Close()
		client.Close() // what was still in use
		wg.Wait()
		return err
	}
	return n, nil
}

// close ends all nodes.
func (c *cluster) close() error {
	errs := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for i, n := range c.nodes {
		wg.Go(func() { errs[i] = n.stop() })
	}
	wg.Wait()
	return errors.Join(errs...)
}
