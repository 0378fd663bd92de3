// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/freeport"
	"github.com/muster-vm/muster/internal/pki"
)

// Cluster is a group of replicas in one process: real Raft, real TLS on
// loopback, real files. Links between nodes can be cut.
type Cluster struct {
	tb    testing.TB
	Nodes []*Node

	caCert, caKey []byte
	mu            sync.Mutex
	cut           map[[2]int]error // directed links that are cut, with what dialling says
	conns         map[[2]int][]net.Conn
}

// Node is one replica of a Cluster.
type Node struct {
	*configdb.Store
	ID, Address string
	Index       int
	// Life of the cluster in which it starts; 0 is 1.
	Life uint64

	cluster   *Cluster
	dir       string
	cert, key []byte
	stop      func()
	up        bool
}

// NewCluster returns a running group of n voters.
func NewCluster(tb testing.TB, n int) *Cluster {
	tb.Helper()
	base := tb.TempDir()
	dirs := make([]string, n)
	for i := range dirs {
		dirs[i] = filepath.Join(base, fmt.Sprint(i))
	}
	return NewClusterIn(tb, dirs...)
}

// NewClusterIn returns a running group of voters, one for each directory.
func NewClusterIn(tb testing.TB, dirs ...string) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb, cut: map[[2]int]error{}, conns: map[[2]int][]net.Conn{}}
	var err error
	if c.caCert, c.caKey, err = pki.NewCA("test", api.NewID()); err != nil {
		tb.Fatal(err)
	}
	for i, dir := range dirs {
		c.Nodes = append(c.Nodes, c.newNode(i, dir))
	}
	tb.Cleanup(func() {
		for _, n := range c.Nodes {
			n.Stop()
		}
	})
	for i, n := range c.Nodes {
		n.Start()
		if i == 0 {
			if err := n.Bootstrap(); err != nil {
				tb.Fatal(err)
			}
			continue
		}
		c.Leader()
		c.Eventually("add a member", func() error { return c.Leader().AddMember(n.ID, n.Address, true) })
	}
	return c
}

func (c *Cluster) newNode(i int, dir string) *Node {
	c.tb.Helper()
	n := &Node{cluster: c, Index: i, ID: api.NewID(), dir: dir, Address: freeport.Loopback(c.tb)}
	var err error
	if n.key, err = pki.NewKey(); err != nil {
		c.tb.Fatal(err)
	}
	csrPEM, err := pki.NewCSR(n.key, "n")
	if err != nil {
		c.tb.Fatal(err)
	}
	csr, err := pki.ParseCSR(csrPEM)
	if err != nil {
		c.tb.Fatal(err)
	}
	if n.cert, err = pki.SignNode(c.caCert, c.caKey, csr, n.ID, fmt.Sprintf("n%d", i+1), "127.0.0.1"); err != nil {
		c.tb.Fatal(err)
	}
	return n
}

// Start opens the replica on its directory, again after Stop.
func (n *Node) Start() {
	tb := n.cluster.tb
	tb.Helper()
	id, err := clusternet.NewIdentity(n.cert, n.key, n.cluster.caCert)
	if err != nil {
		tb.Fatal(err)
	}
	id.DialTCP, id.Life = n.dial, n.Life
	ln, err := net.Listen("tcp", n.Address)
	if err != nil {
		tb.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	port, rpc, client := clusternet.NewPort(ln, id, log), clusternet.NewRPCServer(log), clusternet.NewRPCClient(id)
	rpc.Life(n.Life)
	raftLn, rpcLn := port.Listener(clusternet.ProtoRaft), port.Listener(clusternet.ProtoRPC)
	n.Store, err = configdb.Open(configdb.StoreConfig{
		Dir: n.dir, NodeID: n.ID, NodeName: n.Name(), Address: n.Address, Identity: id, Listener: raftLn, Server: rpc, Client: client, Log: log,
		OnFatal: func(err error) { tb.Errorf("node %d: %v", n.Index, err) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = port.Serve(ctx) })
	wg.Go(func() { _ = rpc.Serve(ctx, rpcLn) })
	n.up = true
	n.stop = func() {
		cancel()
		client.Close()
		if err := n.Close(); err != nil {
			tb.Errorf("close node %d: %v", n.Index, err)
		}
		wg.Wait()
	}
}

// Name of the node, as in its certificate.
func (n *Node) Name() string { return fmt.Sprintf("n%d", n.Index+1) }

// Files names the files of the replica, for what is done while it is stopped.
func (n *Node) Files() configdb.Files {
	return configdb.Files{Dir: n.dir, NodeID: n.ID, Address: n.Address, Log: slog.New(slog.DiscardHandler)}
}

// Stop ends the replica.
func (n *Node) Stop() {
	if n.up {
		n.up = false
		n.stop()
	}
}

// dial finds the peer by its address and obeys the cuts.
func (n *Node) dial(ctx context.Context, address string) (net.Conn, error) {
	c := n.cluster
	to := -1
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.Nodes {
		if p.Address == address {
			to = p.Index
		}
	}
	if err := c.cut[[2]int{n.Index, to}]; err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err == nil {
		c.conns[[2]int{n.Index, to}] = append(c.conns[[2]int{n.Index, to}], conn)
	}
	return conn, err
}

// Isolate cuts all links of a node, or of several together, from the rest.
func (c *Cluster) Isolate(nodes ...*Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	in := map[int]bool{}
	for _, n := range nodes {
		in[n.Index] = true
	}
	for _, a := range c.Nodes {
		for _, b := range c.Nodes {
			if in[a.Index] == in[b.Index] {
				continue
			}
			c.sever(a, b, errors.New("link is cut"))
		}
	}
}

// Refuse breaks what two nodes have open to each other, and a's host says that
// nobody listens at b, as a firewall may.
func (c *Cluster) Refuse(a, b *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sever(a, b, syscall.ECONNREFUSED)
	c.sever(b, a, syscall.ECONNREFUSED)
}

func (c *Cluster) sever(a, b *Node, why error) {
	link := [2]int{a.Index, b.Index}
	c.cut[link] = why
	for _, conn := range c.conns[link] {
		_ = conn.Close()
	}
	delete(c.conns, link)
}

// Heal restores all links.
func (c *Cluster) Heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.cut)
}

// Leader waits for a leader that can serve and returns it.
func (c *Cluster) Leader() *Node {
	c.tb.Helper()
	var leader *Node
	c.Eventually("a leader", func() error {
		for _, n := range c.Nodes {
			if !n.up {
				continue
			}
			if l, ok := n.Leadership(); ok && n.Confirm(context.Background(), l.Term) == nil {
				leader = n
				return nil
			}
		}
		return errors.New("no leader")
	})
	return leader
}

// Followers returns the running nodes that are not n.
func (c *Cluster) Followers(of *Node) []*Node {
	var out []*Node
	for _, n := range c.Nodes {
		if n != of && n.up {
			out = append(out, n)
		}
	}
	return out
}

// Eventually tries until it works or a minute has passed.
func (c *Cluster) Eventually(what string, try func() error) {
	c.tb.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.tb.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
