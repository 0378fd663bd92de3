// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Waits of the beginning.
const (
	socketWait = 30 * time.Second
	joinWait   = 90 * time.Second
	look       = 50 * time.Millisecond
	askTimeout = 2 * time.Second
)

// Cluster is the cluster of all hosts.
type Cluster struct {
	Hosts *Hosts
	Bin   string // folder of the programs
	// Found sets the rest.
	Rest      *Caller
	Token, CA string
}

// Found makes a cluster of the hosts, whose daemons run, and waits until all of
// them vote.
func (c *Cluster) Found(ctx context.Context, name string) (err error) {
	if err := c.found(ctx, name); err != nil {
		return err
	}
	if c.Rest, err = c.NewCaller(); err != nil {
		return err
	}
	if err := Eventually(ctx, joinWait, c.AllVote); err != nil {
		return fmt.Errorf("wait until all nodes are voters: %w", err)
	}
	return nil
}

// NewCaller returns a caller with connections of its own.
func (c *Cluster) NewCaller() (*Caller, error) {
	urls := make([]string, c.Hosts.n)
	for i := range urls {
		urls[i] = c.Hosts.URL(i)
	}
	return NewCaller(urls, c.Token, c.CA)
}

// Wait returns false when the context ended first.
func Wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Eventually tries until it works, the time is over or the campaign is ended.
func Eventually(ctx context.Context, within time.Duration, try func(context.Context) error) error {
	deadline := time.Now().Add(within)
	for {
		err := try(ctx)
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", within, err)
		}
		time.Sleep(look)
	}
}

// Muster runs the command line on a host.
func (c *Cluster) Muster(host int, args ...string) (string, error) {
	return Command("", "ip", InHost(c.Hosts.Namespace(host), append([]string{filepath.Join(c.Bin, "muster")}, args...)...)...)
}

// found makes the cluster, as an administrator would.
func (c *Cluster) found(ctx context.Context, name string) error {
	for i := range c.Hosts.n {
		if err := c.AwaitSocket(ctx, i); err != nil {
			return err
		}
	}
	out, err := c.Muster(0, "cluster", "init", "--name", name, "--data-dir", c.Hosts.Data(0), "-o", "json")
	if err != nil {
		return err
	}
	var first struct{ Token, CACert string }
	if err := json.Unmarshal([]byte(out), &first); err != nil || first.Token == "" {
		return fmt.Errorf("cluster init answered %q: %w", out, err)
	}
	c.Token, c.CA = first.Token, first.CACert
	for i := 1; i < c.Hosts.n; i++ {
		if err := c.Join(0, i); err != nil {
			return err
		}
	}
	return nil
}

// AwaitSocket waits until the daemon of a host takes commands.
func (c *Cluster) AwaitSocket(ctx context.Context, host int) error {
	socket := filepath.Join(c.Hosts.Data(host), "muster.sock")
	err := Eventually(ctx, socketWait, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket) // a killed daemon leaves the file
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("musterd on %s opens no socket; see its log: %w", c.Hosts.Name(host), err)
	}
	return nil
}

// Join has a host join by a token that is made at a member.
func (c *Cluster) Join(member, host int) error {
	word, err := c.Muster(member, "--data-dir", c.Hosts.Data(member), "cluster", "token", "create", "-o", "name")
	if err != nil {
		return err
	}
	_, err = c.Muster(host, "cluster", "join", strings.TrimSpace(word), "--data-dir", c.Hosts.Data(host))
	return err
}

// Status is the part of a node's answer that campaigns use.
type Status struct {
	Node, Leader string
	Term         uint64
	Members      []struct{ Voter bool }
}

func (c *Cluster) Status(ctx context.Context, node int) (Status, error) {
	var st Status
	a := c.Rest.Do(ctx, node, Request{Method: "GET", Path: "/cluster", Timeout: askTimeout})
	if !a.OK() {
		return st, fmt.Errorf("status of %s: %s", c.Hosts.Name(node), a.Word())
	}
	return st, json.Unmarshal(a.Body, &st)
}

// AllVote succeeds when every node says that all vote and somebody leads.
func (c *Cluster) AllVote(ctx context.Context) error {
	for i := range c.Hosts.n {
		st, err := c.Status(ctx, i)
		if err != nil {
			return err
		}
		voters := 0
		for _, m := range st.Members {
			if m.Voter {
				voters++
			}
		}
		if voters != c.Hosts.n || st.Leader == "" {
			return fmt.Errorf("%s knows %d voters and the leader %q", st.Node, voters, st.Leader)
		}
	}
	return nil
}

// Leader is who says of itself that it leads, in the highest term; -1 if
// nobody does.
func (c *Cluster) Leader(ctx context.Context) int {
	var mu sync.Mutex
	var wg sync.WaitGroup
	best, term := -1, uint64(0)
	for i := range c.Hosts.n {
		wg.Go(func() {
			st, err := c.Status(ctx, i)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && st.Leader == st.Node && st.Term > term {
				best, term = i, st.Term
			}
		})
	}
	wg.Wait()
	return best
}
