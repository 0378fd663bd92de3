// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// askTimeout bounds a question of the campaign's own.
const askTimeout = 2 * time.Second

// campaign is one run.
type campaign struct {
	config
	*lab.Cluster
	hosts    *lab.Hosts
	daemons  []*lab.Daemon
	rec      *linear.Recorder
	rest     *lab.Caller // of the campaign itself
	clients  []*client
	watchers []*watcher
	known    *knowledge

	mu         sync.Mutex
	acks       []torture.Ack
	stale      []torture.StaleRead
	probes     []torture.Probe
	exits      []lab.Exit
	answers    map[string]int
	violations []linear.Violation
	faults     map[string]int
	spans      []faultSpan
	recovered  time.Duration // the longest time until all served again
	gaveUp     time.Duration // when the outcome of a write last stayed unknown
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
	if c.hosts, err = lab.MakeHosts(c.nodes, c.work, c.diskMiB); err != nil {
		return err
	}
	c.Cluster = &lab.Cluster{Hosts: c.hosts, Bin: c.bin}
	for i := range c.nodes {
		d := c.hosts.NewDaemon(i, c.bin, filepath.Join(c.runDir, c.hosts.Name(i)), filepath.Join(c.work, "log", c.hosts.Name(i)+".log"), c.rec.Now, c.noteExit)
		c.daemons = append(c.daemons, d)
		if err := d.Start(); err != nil {
			return err
		}
	}
	if err := c.Found(ctx, "torture"); err != nil {
		return err
	}
	c.rest = c.Rest
	for i := range c.nodes * c.perNode {
		u := &client{c: c, id: i, home: i % c.nodes, timeout: torture.Timeouts[(i/c.nodes)%len(torture.Timeouts)], stream: torture.NewStream(c.seed, i, c.nodes)}
		if u.rest, err = c.NewCaller(); err != nil {
			return err
		}
		c.clients = append(c.clients, u)
	}
	for i, d := range c.daemons {
		w := &watcher{node: i, name: d.Name}
		if w.rest, err = c.NewCaller(); err != nil {
			return err
		}
		c.watchers = append(c.watchers, w)
	}
	return nil
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

func (c *campaign) noteExit(e lab.Exit) {
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
func (c *campaign) tally(o *linear.Op, a *lab.Answer) {
	word := "no answer"
	if a.Err == nil {
		word = strconv.Itoa(a.Status)
		if a.Code != "" {
			word += " " + a.Code
		}
	} else if !a.Sent {
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
		d.End()
	}
}
