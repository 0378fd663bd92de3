// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
	"github.com/muster-vm/muster/scripts/bench.d/configdb/system"
)

// Options of a cluster.
type Options struct {
	// Name of the folder.
	Name string
	// Plain leaves out TLS, between clients and servers and between servers.
	Plain bool
	// Heartbeat and Election are etcd's own defaults when zero, 100 ms and 1 s.
	Heartbeat, Election time.Duration
}

// Cluster is three servers.
type Cluster struct {
	*system.Servers
	opt Options
	// The ports. etcd recommends one for HTTP alone: gRPC is slower on a port
	// that serves both.
	client, peer, http []int
	tls                *tls.Config

	mu     sync.Mutex
	shared [load.Nodes][]*clientv3.Client // the connections of the loads
	turn   [load.Nodes]int
}

// dialTimeout bounds the making of a connection.
const dialTimeout = 5 * time.Second

// statusTimeout bounds a question for the state of a server.
const statusTimeout = 2 * time.Second

// Start makes a new cluster.
func Start(ctx context.Context, h *system.Host, opt Options) (_ *Cluster, err error) {
	dir, err := h.Fresh(opt.Name)
	if err != nil {
		return nil, err
	}
	certs, err := system.NewCerts(dir)
	if err != nil {
		return nil, err
	}
	ports, err := system.FreePorts(3 * load.Nodes)
	if err != nil {
		return nil, err
	}
	c := &Cluster{opt: opt, client: ports[:load.Nodes], peer: ports[load.Nodes : 2*load.Nodes], http: ports[2*load.Nodes:]}
	if !opt.Plain {
		if c.tls, err = system.ClientTLS(certs.CA); err != nil {
			return nil, err
		}
	}
	c.Servers, err = system.NewServers(h, dir, func(node int) (string, []string) { return "etcd", c.args(dir, node, certs) })
	if err != nil {
		return nil, err
	}
	if err := c.Await(ctx, "all etcd servers answer", c.whole); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Cluster) url(port int) string {
	if c.opt.Plain {
		return fmt.Sprintf("http://127.0.0.1:%d", port)
	}
	return fmt.Sprintf("https://127.0.0.1:%d", port)
}

func (c *Cluster) args(dir string, node int, certs *system.Certs) []string {
	var members []string
	for i, p := range c.peer {
		members = append(members, fmt.Sprintf("node%d=%s", i, c.url(p)))
	}
	a := []string{
		"--name", fmt.Sprintf("node%d", node), "--data-dir", filepath.Join(dir, fmt.Sprintf("node%d", node)), "--log-level", "warn",
		"--listen-client-urls", c.url(c.client[node]), "--listen-client-http-urls", c.url(c.http[node]), "--advertise-client-urls", c.url(c.client[node]),
		"--listen-peer-urls", c.url(c.peer[node]), "--initial-advertise-peer-urls", c.url(c.peer[node]),
		"--initial-cluster", strings.Join(members, ","), "--initial-cluster-state", "new", "--initial-cluster-token", c.opt.Name,
	}
	if !c.opt.Plain {
		a = append(a, "--cert-file", certs.Cert, "--key-file", certs.Key,
			"--peer-cert-file", certs.Cert, "--peer-key-file", certs.Key, "--peer-trusted-ca-file", certs.CA, "--peer-client-cert-auth")
	}
	if c.opt.Heartbeat > 0 {
		a = append(a, "--heartbeat-interval", fmt.Sprint(c.opt.Heartbeat.Milliseconds()), "--election-timeout", fmt.Sprint(c.opt.Election.Milliseconds()))
	}
	return a
}

func (c *Cluster) dial(node int) (*clientv3.Client, error) {
	cl, err := clientv3.New(clientv3.Config{
		Endpoints: []string{c.url(c.client[node])}, DialTimeout: dialTimeout, TLS: c.tls, Logger: zap.NewNop(),
	})
	if err != nil {
		return nil, fmt.Errorf("connect to etcd %d: %w", node, err)
	}
	return cl, nil
}

// status asks every server, at a limit of its own for each.
func (c *Cluster) status(ctx context.Context, node int) (*clientv3.StatusResponse, error) {
	cl, err := c.dial(node)
	if err != nil {
		return nil, err
	}
	defer func() { _ = cl.Close() }()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return cl.Status(ctx, c.url(c.client[node]))
}

// whole is content when all servers know the same leader and have applied
// nearly all that the leader has.
func (c *Cluster) whole(ctx context.Context) error {
	const close = 1000 // entries; a start adds a few of its own all the time
	var leader, index uint64
	for i := range load.Nodes {
		s, err := c.status(ctx, i)
		if err != nil {
			return err
		}
		if s.Leader == 0 || leader != 0 && s.Leader != leader {
			return fmt.Errorf("etcd %d knows the leader %x, another %x", i, s.Leader, leader)
		}
		leader, index = s.Leader, max(index, s.RaftIndex)
		if s.RaftAppliedIndex+close < index {
			return fmt.Errorf("etcd %d has applied %d of %d", i, s.RaftAppliedIndex, index)
		}
	}
	return nil
}

// Leader implements load.Cluster.
func (c *Cluster) Leader(ctx context.Context) (int, error) {
	for i := range load.Nodes {
		s, err := c.status(ctx, i)
		if err == nil && s.Leader == s.Header.MemberId && s.Leader != 0 {
			return i, nil
		}
	}
	return 0, errors.New("no etcd server says that it leads")
}

// Restart implements load.Killable.
func (c *Cluster) Restart(ctx context.Context, node int) error {
	c.hangUp(node) // else the client waits longer and longer before it tries again
	if err := c.StartAgain(node); err != nil {
		return err
	}
	return c.Await(ctx, fmt.Sprintf("etcd %d is back", node), c.whole)
}

// connsPerNode is how many connections all sessions with a node share. gRPC is
// made for sharing: with a connection for each session, etcd does less.
const connsPerNode = 2

// session is one client, which shares its connection.
type session struct{ c *clientv3.Client }

// Dial implements load.Cluster.
func (c *Cluster) Dial(_ context.Context, node int) (load.Session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.shared[node]
	if len(all) < connsPerNode {
		cl, err := c.dial(node)
		if err != nil {
			return nil, err
		}
		c.shared[node] = append(all, cl)
		return session{cl}, nil
	}
	c.turn[node]++
	return session{all[c.turn[node]%len(all)]}, nil
}

// DialShared implements load.Killable: sessions share connections anyway.
func (c *Cluster) DialShared(ctx context.Context, node int) (load.Session, error) {
	return c.Dial(ctx, node)
}

// hangUp ends the shared connections with a node.
func (c *Cluster) hangUp(node int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, cl := range c.shared[node] {
		_ = cl.Close()
	}
	c.shared[node] = nil
}

// Stop ends the connections and the servers.
func (c *Cluster) Stop() error {
	for i := range load.Nodes {
		c.hangUp(i)
	}
	return c.Servers.Stop()
}

// Put implements load.Session.
func (s session) Put(ctx context.Context, key string, value []byte) error {
	_, err := s.c.Put(ctx, key, string(value))
	return err
}

// Get implements load.Session.
func (s session) Get(ctx context.Context, key string) ([]byte, error) {
	r, err := s.c.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	if len(r.Kvs) != 1 {
		return nil, fmt.Errorf("get %s: %d keys", key, len(r.Kvs))
	}
	return r.Kvs[0].Value, nil
}

// Close implements load.Session. The connection stays for the next session.
func (session) Close() {}

// watchedKey is what the watches look at.
const watchedKey = "bench/watched"

// Toucher implements load.Watched.
func (c *Cluster) Toucher(_ context.Context, node int) (func(context.Context, string) error, func(), error) {
	cl, err := c.dial(node)
	if err != nil {
		return nil, nil, err
	}
	touch := func(ctx context.Context, text string) error {
		_, err := cl.Put(ctx, watchedKey, text)
		return err
	}
	return touch, func() { _ = cl.Close() }, nil
}

// Watch implements load.Watched, each watch with a client of its own.
func (c *Cluster) Watch(ctx context.Context, node, n int, seen func(int, string)) (func() error, error) {
	clients := make([]*clientv3.Client, 0, n)
	end := func() {
		for _, cl := range clients {
			_ = cl.Close()
		}
	}
	ended := make(chan error, n)
	for i := range n {
		cl, err := c.dial(node)
		if err != nil {
			end()
			return nil, err
		}
		clients = append(clients, cl)
		events := cl.Watch(ctx, watchedKey, clientv3.WithCreatedNotify())
		select {
		case r := <-events:
			if !r.Created {
				end()
				return nil, fmt.Errorf("open watch %d: %w", i, r.Err())
			}
		case <-time.After(dialTimeout):
			end()
			return nil, fmt.Errorf("open watch %d: no answer in %s", i, dialTimeout)
		}
		go func() { ended <- follow(ctx, events, func(text string) { seen(i, text) }) }()
	}
	return func() error {
		defer end()
		var err error
		for range n {
			err = errors.Join(err, <-ended)
		}
		return err
	}, nil
}

func follow(ctx context.Context, events clientv3.WatchChan, seen func(text string)) error {
	for r := range events {
		if err := r.Err(); err != nil && ctx.Err() == nil {
			return fmt.Errorf("watch ended: %w", err)
		}
		for _, e := range r.Events {
			seen(string(e.Kv.Value))
		}
	}
	if ctx.Err() == nil {
		return errors.New("watch ended by itself")
	}
	return nil
}
