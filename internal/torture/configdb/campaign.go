// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
)

// Waits of the beginning.
const (
	socketWait = 30 * time.Second
	joinWait   = 90 * time.Second
	look       = 50 * time.Millisecond
	askTimeout = 2 * time.Second
)

// campaign is one run.
type campaign struct {
	config
	hosts    *hosts
	daemons  []*daemon
	rec      *linear.Recorder
	rest     *caller // of the campaign itself
	clients  []*client
	watchers []*watcher
	known    *knowledge

	mu         sync.Mutex
	acks       []torture.Ack
	stale      []torture.StaleRead
	probes     []torture.Probe
	exits      []exit
	answers    map[string]int
	violations []linear.Violation
	faults     map[string]int
	spans      []faultSpan
	recovered  time.Duration // the longest time until all served again
	gaveUp     time.Duration // when the outcome of a write last stayed unknown

	token, ca string
}

// faultSpan is an episode from its first fault until the cluster served again.
type faultSpan struct {
	torture.Span
	what string
	// majority: at every moment a majority of the nodes could work together.
	majority bool
}

func newCampaign(cfg config) *campaign {
	return &campaign{
		config: cfg, rec: linear.NewRecorder(), known: &knowledge{rev: map[string]uint64{}},
		answers: map[string]int{}, faults: map[string]int{},
	}
}

// say prints a line with the time.
func (c *campaign) say(format string, args ...any) {
	fmt.Printf("[%7.2f s] %s\n", c.rec.Now().Seconds(), fmt.Sprintf(format, args...))
}

// begin makes hosts, a cluster, and everybody who talks to it.
func (c *campaign) begin(ctx context.Context) error {
	var err error
	if c.hosts, err = makeHosts(c.nodes, c.work, c.diskMiB); err != nil {
		return err
	}
	for i := range c.nodes {
		d := c.newDaemon(i)
		c.daemons = append(c.daemons, d)
		if err := d.start(); err != nil {
			return err
		}
	}
	if err := c.found(ctx); err != nil {
		return err
	}
	urls := make([]string, c.nodes)
	for i := range urls {
		urls[i] = c.hosts.url(i)
	}
	if c.rest, err = newCaller(urls, c.token, c.ca); err != nil {
		return err
	}
	if err := c.eventually(ctx, joinWait, c.allVote); err != nil {
		return fmt.Errorf("wait until all nodes are voters: %w", err)
	}
	for i := range c.nodes * c.perNode {
		u := &client{c: c, id: i, home: i % c.nodes, timeout: torture.Timeouts[(i/c.nodes)%len(torture.Timeouts)], stream: torture.NewStream(c.seed, i, c.nodes)}
		if u.rest, err = newCaller(urls, c.token, c.ca); err != nil {
			return err
		}
		c.clients = append(c.clients, u)
	}
	for i, d := range c.daemons {
		w := &watcher{node: i, name: d.name}
		if w.rest, err = newCaller(urls, c.token, c.ca); err != nil {
			return err
		}
		c.watchers = append(c.watchers, w)
	}
	return nil
}

// eventually tries until it works, the time is over or the campaign is ended.
func (c *campaign) eventually(ctx context.Context, within time.Duration, try func(context.Context) error) error {
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

// muster runs the command line on a host.
func (c *campaign) muster(host int, args ...string) (string, error) {
	return command("", "ip", inHost(c.hosts.namespace(host), append([]string{filepath.Join(c.bin, "muster")}, args...)...)...)
}

// found makes the cluster, as an administrator would.
func (c *campaign) found(ctx context.Context) error {
	for i := range c.nodes {
		socket := filepath.Join(c.hosts.data(i), "muster.sock")
		if err := c.eventually(ctx, socketWait, func(context.Context) error { _, err := os.Stat(socket); return err }); err != nil {
			return fmt.Errorf("musterd on %s opens no socket; see its log: %w", c.hosts.name(i), err)
		}
	}
	out, err := c.muster(0, "cluster", "init", "--name", "torture", "--data-dir", c.hosts.data(0), "-o", "json")
	if err != nil {
		return err
	}
	var first struct{ Token, CACert string }
	if err := json.Unmarshal([]byte(out), &first); err != nil || first.Token == "" {
		return fmt.Errorf("cluster init answered %q: %w", out, err)
	}
	c.token, c.ca = first.Token, first.CACert
	for i := 1; i < c.nodes; i++ {
		word, err := c.muster(0, "--data-dir", c.hosts.data(0), "cluster", "token", "create", "-o", "name")
		if err != nil {
			return err
		}
		if _, err := c.muster(i, "cluster", "join", strings.TrimSpace(word), "--data-dir", c.hosts.data(i)); err != nil {
			return err
		}
	}
	return nil
}

// clusterStatus is the part of the answer that the campaign uses.
type clusterStatus struct {
	Node, Leader string
	Term         uint64
	Members      []struct{ Voter bool }
}

func (c *campaign) status(ctx context.Context, node int) (clusterStatus, error) {
	var st clusterStatus
	a := c.rest.do(ctx, node, request{method: "GET", path: "/cluster", timeout: askTimeout})
	if !a.ok() {
		return st, fmt.Errorf("status of %s: %s", c.hosts.name(node), a.word())
	}
	return st, json.Unmarshal(a.body, &st)
}

func (c *campaign) allVote(ctx context.Context) error {
	for i := range c.nodes {
		st, err := c.status(ctx, i)
		if err != nil {
			return err
		}
		voters := 0
		for _, m := range st.Members {
			if m.Voter {
				voters++
			}
		}
		if voters != c.nodes || st.Leader == "" {
			return fmt.Errorf("%s knows %d voters and the leader %q", st.Node, voters, st.Leader)
		}
	}
	return nil
}

// leader is who says of itself that it leads, in the highest term; -1 if
// nobody does.
func (c *campaign) leader(ctx context.Context) int {
	var mu sync.Mutex
	var wg sync.WaitGroup
	best, term := -1, uint64(0)
	for i := range c.nodes {
		wg.Go(func() {
			st, err := c.status(ctx, i)
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

func (c *campaign) noteAck(a torture.Ack) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acks = append(c.acks, a)
}

func (c *campaign) noteStale(r torture.StaleRead) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stale = append(c.stale, r)
}

func (c *campaign) noteExit(e exit) {
	c.say("%s ended by itself: %s (disk full: %t)", e.Node, e.Why, e.Full)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exits = append(c.exits, e)
	if !e.Full {
		c.violations = append(c.violations, linear.Violation{Kind: torture.Died, Group: e.Node, Text: fmt.Sprintf("at %.3f s: %s", e.At.Seconds(), e.Why)})
	}
}

func (c *campaign) violate(kind linear.ViolationKind, group, format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := linear.Violation{Kind: kind, Group: group, Text: fmt.Sprintf(format, args...)}
	c.violations = append(c.violations, v)
	fmt.Println("VIOLATION", v)
}

// tally counts the sorts of answers.
func (c *campaign) tally(o *linear.Op, a *answer) {
	word := "no answer"
	if a.err == nil {
		word = strconv.Itoa(a.status)
		if a.code != "" {
			word += " " + a.code
		}
	} else if !a.sent {
		word = "no connection"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers[o.Kind+": "+word]++
	if o.Status == linear.Unknown {
		c.gaveUp = c.rec.Now()
	}
}

// end takes all down. The namespaces and what else runs in them are the
// script's.
func (c *campaign) end() {
	for _, d := range c.daemons {
		d.end()
	}
}
