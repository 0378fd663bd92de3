// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/torture"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// Waits of the campaign.
const (
	// recoverWithin is when the cluster must serve again, at every node.
	recoverWithin = 60 * time.Second
	// cutSettle is how long a cut may take to be noticed by all.
	cutSettle = time.Second
)

// torment runs clients, watches and the schedule for a time.
func (c *campaign) torment(ctx context.Context, length time.Duration) {
	clientCtx, stopClients := context.WithCancel(ctx)
	watchCtx, stopWatching := context.WithCancel(ctx)
	var clients, watchers sync.WaitGroup
	for _, w := range c.watchers {
		watchers.Go(func() { w.run(watchCtx) })
	}
	if err := c.firstWord(ctx); err != nil {
		c.violate(torture.WatchGap, "watches", "%v", err)
	}
	for _, u := range c.clients {
		clients.Go(func() { u.run(clientCtx) })
	}
	schedule := torture.NewSchedule(c.seed, c.nodes)
	for end := c.rec.Now() + length; c.rec.Now() < end && ctx.Err() == nil; {
		if !c.episode(ctx, schedule.Next()) {
			break
		}
	}
	stopClients()
	clients.Wait()
	if ctx.Err() == nil {
		if err := c.lastWord(ctx); err != nil {
			c.violate(torture.WatchGap, "watches", "%v", err)
		}
	}
	stopWatching()
	watchers.Wait()
}

// active is a fault in force.
type active struct {
	fault torture.Fault
	node  int
	other int // of a cut link
	stop  func()
}

// episode lets the faults of an episode happen and pass. It returns false when
// the cluster does not recover.
func (c *campaign) episode(ctx context.Context, e torture.Episode) bool {
	if !lab.Wait(ctx, e.Calm) {
		return true
	}
	began, span := time.Now(), faultSpan{Span: torture.Span{From: c.rec.Now()}}
	var on []*active
	for _, f := range e.Faults {
		lab.Wait(ctx, f.Delay)
		a, err := c.inject(ctx, f, on)
		if err != nil {
			c.violate(torture.NotRecovered, "campaign", "a fault could not be made: %v", err)
			return false
		}
		on = append(on, a)
		c.mu.Lock()
		c.faults[f.String()]++
		c.mu.Unlock()
		if span.what != "" {
			span.what += "+"
		}
		span.what += f.String() + ":" + c.hosts.Name(a.node)
	}
	span.majority = c.majority(on)
	c.say("episode %d: %s for %.1f s", e.N, span.what, e.Hold.Seconds())
	for _, a := range on {
		if a.fault.Kind == torture.CutOff {
			c.probe(a.node)
		}
	}
	lab.Wait(ctx, e.Hold-time.Since(began))
	healed := c.rec.Now()
	var errs []error
	for _, a := range on {
		errs = append(errs, c.heal(a))
	}
	if err := errors.Join(errs...); err != nil {
		c.violate(torture.NotRecovered, "campaign", "a fault could not be ended: %v", err)
		return false
	}
	if err := c.serves(ctx, e.Settle); err != nil {
		if ctx.Err() == nil {
			c.violate(torture.NotRecovered, span.what, "%v", err)
		}
		return false
	}
	span.To = c.rec.Now()
	took := span.To - healed
	gap, _ := torture.Outage(c.ackList(), span.Span)
	c.say("  over; %s after %.2f s; longest time without an acknowledged write %.2f s", map[bool]string{true: "every node serves", false: "the cluster serves"}[e.Settle], took.Seconds(), gap.Seconds())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recovered = max(c.recovered, took)
	c.spans = append(c.spans, span)
	return true
}

func (c *campaign) ackList() []torture.Ack {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]torture.Ack(nil), c.acks...)
}

// majority reports whether the faults leave nodes enough that work and hear
// each other both ways.
func (c *campaign) majority(on []*active) bool {
	hurt := map[int]bool{}
	for _, a := range on {
		switch a.fault.Kind {
		case torture.KillAll:
			return false
		default:
			hurt[a.node] = true
		}
	}
	return 2*(c.nodes-len(hurt)) > c.nodes
}

// inject makes a fault. The second of an episode meets another node.
func (c *campaign) inject(ctx context.Context, f torture.Fault, on []*active) (*active, error) {
	a := &active{fault: f, node: f.Node}
	if f.Leader {
		if l := c.Leader(ctx); l >= 0 {
			a.node = l
		}
	}
	for _, o := range on {
		if o.node == a.node {
			a.node = (a.node + 1) % c.nodes
		}
	}
	a.other = (a.node + 1) % c.nodes
	d := c.daemons[a.node]
	switch f.Kind {
	case torture.Kill:
		return a, d.Kill()
	case torture.KillAll:
		var errs []error
		for _, d := range c.daemons {
			errs = append(errs, d.Kill())
		}
		return a, errors.Join(errs...)
	case torture.Stop:
		return a, d.Signal(syscall.SIGSTOP)
	case torture.DiskFull:
		d.SetFull(true)
		var err error
		a.stop, err = c.hosts.KeepFull(a.node, c.say)
		return a, err
	}
	c.setDrops(a, true)
	return a, c.hosts.ApplyDrops()
}

func (c *campaign) heal(a *active) error {
	d := c.daemons[a.node]
	switch a.fault.Kind {
	case torture.Kill:
		return d.Start()
	case torture.KillAll:
		var errs []error
		for _, d := range c.daemons {
			errs = append(errs, d.Start())
		}
		return errors.Join(errs...)
	case torture.Stop:
		return d.Signal(syscall.SIGCONT)
	case torture.DiskFull:
		a.stop()
		d.SetFull(false)
		return c.hosts.MakeRoom(a.node)
	}
	c.setDrops(a, false)
	return c.hosts.ApplyDrops()
}

// setDrops says what is lost. Two faults of one episode may lose the same; the
// first to end then ends both, at about the same time.
func (c *campaign) setDrops(a *active, lost bool) {
	drop := c.hosts.Drop
	for o := range c.nodes {
		if o == a.node {
			continue
		}
		if k := a.fault.Kind; k == torture.Isolate || k == torture.CutOff || k == torture.Mute || k == torture.CutLink && o == a.other {
			drop[a.node][o] = lost
		}
		if k := a.fault.Kind; k == torture.Isolate || k == torture.CutOff || k == torture.Deaf || k == torture.CutLink && o == a.other {
			drop[o][a.node] = lost
		}
	}
}

// serves waits until every node, or for all is false some node, answers a
// linearizable read and a write.
func (c *campaign) serves(ctx context.Context, all bool) error {
	try := func(ctx context.Context, node int) error {
		path := "/raw/serves/" + c.hosts.Name(node)
		for _, r := range []lab.Request{
			{Method: http.MethodPut, Path: path, Body: []byte(fmt.Sprint(c.rec.Now().Nanoseconds())), Timeout: askTimeout},
			{Method: http.MethodGet, Path: path, Timeout: askTimeout},
		} {
			if a := c.rest.Do(ctx, node, r); !a.OK() {
				return fmt.Errorf("%s does not serve: %s: %s", c.hosts.Name(node), r.Method, a.Word())
			}
		}
		return nil
	}
	if all {
		for i := range c.nodes {
			if err := lab.Eventually(ctx, recoverWithin, func(ctx context.Context) error { return try(ctx, i) }); err != nil {
				return err
			}
		}
		return nil
	}
	return lab.Eventually(ctx, recoverWithin, func(ctx context.Context) error {
		var errs []error
		for i := range c.nodes {
			err := try(ctx, i)
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}

// probe asks a node that was just cut off for what it can and cannot answer.
// Everything ends before the cut does.
func (c *campaign) probe(node int) {
	cut := c.rec.Now()
	time.Sleep(cutSettle)
	const patience = 14 * time.Second // less than the hold, more than any deadline
	name := c.hosts.Name(node)
	var wg sync.WaitGroup
	for i, write := range []bool{true, false, true, false} {
		wg.Go(func() {
			r := lab.Request{Method: http.MethodGet, Path: "/raw/probe", Timeout: patience}
			if write {
				r.Method, r.Path, r.Body = http.MethodPut, fmt.Sprintf("/raw/probe/%d", i), []byte("x")
			}
			p := torture.Probe{Node: name, Write: write, Call: c.rec.Now()}
			a := c.rest.Do(context.Background(), node, r)
			p.Return, p.Status, p.Code = c.rec.Now(), a.Status, a.Code
			c.mu.Lock()
			defer c.mu.Unlock()
			c.probes = append(c.probes, p)
		})
	}
	wg.Go(func() {
		p := torture.StaleRead{Node: name, Life: notOwn, Call: c.rec.Now()}
		a := c.rest.Do(context.Background(), node, lab.Request{Method: http.MethodGet, Path: "/raw/?prefix=torture/&limit=1&consistency=stale", Timeout: patience})
		if !a.OK() {
			c.violate(torture.WrongAnswer, name, "cut off, it does not answer a stale read: %s", a.Word())
			return
		}
		stateAge(&p, &a)
		p.Return = c.rec.Now()
		c.noteStale(p)
		if least := p.Call - cut - staleSlack; p.Known && p.Age < least {
			c.violate(torture.MisstatedAge, name, "cut off for %.2f s, it says that its state is %.2f s old", (p.Call - cut).Seconds(), p.Age.Seconds())
		}
	})
	wg.Wait()
}
