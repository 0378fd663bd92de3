// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/power/powersim"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// This file measures failovers instead of looking for faults: the power of the VM's
// own host is cut, and the time is taken until the guest has written on another one.

const (
	bmcUser     = "fence"
	bmcPassword = "torture-Pa55"
	// settle is the quiet before each cut.
	settle = 3 * time.Second
	// crowdMemory is that of each VM of a crowd: nothing boots in it.
	crowdMemory = "16M"
	crowdBound  = 15 * time.Minute
)

// failover is one that was measured.
type failover struct {
	led   bool // the host that was lost led the cluster
	total time.Duration
	move  move
	guest time.Duration // from the running QEMU to the counted write
}

// giveBMCs gives each host a controller that can cut its power.
func (c *campaign) giveBMCs() error {
	for i := range c.nodes {
		host := powersim.NewHost(func() {
			if err := c.cutPower(i); err != nil {
				c.violate(harness, "the controller of %s: %v", c.Hosts.Name(i), err)
			}
		})
		bmc, err := powersim.NewIPMI(powersim.IPMIConfig{Address: lab.Storage, Host: host, User: bmcUser, Password: bmcPassword})
		if err != nil {
			return err
		}
		c.bmcs = append(c.bmcs, host)
		args := lab.InHost(c.Hosts.Namespace(0), filepath.Join(c.bin, "muster"), "--data-dir", c.Hosts.Data(0), "node", "power", "add", c.Hosts.Name(i), "bmc-"+c.Hosts.Name(i),
			"--driver", "ipmi", "--address", lab.Storage, "--port", strconv.Itoa(bmc.Port), "--user", bmcUser, "--password-file", "-")
		if _, err := lab.Command(bmcPassword+"\n", "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// cutAllOf is a power cut as others see it: first nothing comes from the host any
// more, then all of it ends.
func (c *campaign) cutAllOf(node int) error {
	return errors.Join(c.cut(node, true, true, true), c.cutPower(node))
}

// powerUp ends that.
func (c *campaign) powerUp(node int) error {
	if c.bmcs != nil {
		c.bmcs[node].Switch(true)
	}
	return errors.Join(c.cut(node, true, true, false), c.daemons[node].Start())
}

// lead makes a node lead.
func (c *campaign) lead(ctx context.Context, node int) error {
	return lab.Eventually(ctx, bound, func(ctx context.Context) error {
		if c.Leader(ctx) == node {
			return nil
		}
		_, err := c.Muster(node, "--data-dir", c.Hosts.Data(node), "cluster", "transfer", c.Hosts.Name(node))
		return cmp.Or(err, errors.New("it does not lead yet"))
	})
}

// beside runs what only looks, while something is measured.
func (c *campaign) beside(ctx context.Context, do func() error) error {
	watch, stop := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { c.watchProcesses(watch) })
	watchers.Go(func() { c.watchDogs(watch) })
	err := do()
	stop()
	watchers.Wait()
	return err
}

// measure cuts the power of the VM's host again and again; in every second round it
// leads, too.
func (c *campaign) measure(ctx context.Context, rounds int) error {
	for round := range rounds {
		f, err := c.failOver(ctx, round%2 == 1)
		if err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
		c.failovers = append(c.failovers, f)
		c.say("failover %d: %.1f s; silence %d ms, fence %d, placement %d, QEMU %d, guest %d; the host led: %t", round+1, f.total.Seconds(),
			f.move.Detection, f.move.Fence, f.move.Placement, f.move.Start, f.guest.Milliseconds(), f.led)
	}
	return nil
}

func (c *campaign) failOver(ctx context.Context, led bool) (f failover, err error) {
	g := c.guests[0]
	at := c.owner(ctx)
	if at < 0 {
		return f, errors.New("nobody runs the VM")
	}
	other := (at + 1) % c.nodes
	leads := other
	if f.led = led; led {
		leads = at
	}
	if err := c.lead(ctx, leads); err != nil {
		return f, err
	}
	lab.Wait(ctx, settle)
	c.readConsole(ctx, g)
	was, proved := g.newest(), len(c.proved)
	began := c.now()
	if err := c.cutAllOf(at); err != nil {
		return f, err
	}
	err = lab.Eventually(ctx, bound, func(ctx context.Context) error {
		if c.readConsoleAt(ctx, other, g); g.newest().boot == was.boot {
			return errors.New("the guest has written nothing on another host")
		}
		return nil
	})
	if err != nil {
		return f, err
	}
	heard := g.newest().at
	f.total = heard - began
	if err := c.powerUp(at); err != nil {
		return f, err
	}
	err = lab.Eventually(ctx, bound, func(ctx context.Context) error {
		if err := c.prove(ctx); err != nil || len(c.proved) > proved {
			return err
		}
		return errors.New("the evidence is not complete")
	})
	if err != nil {
		return f, err
	}
	f.move = c.moves[len(c.moves)-1]
	f.guest = c.began.Add(heard).Sub(f.move.ran)
	return f, lab.Eventually(ctx, bound, c.Cluster.AllVote)
}

// showFailovers prints the table.
func (c *campaign) showFailovers() {
	if len(c.failovers) == 0 {
		return
	}
	fmt.Printf("%d failovers, milliseconds: median, the 99th percentile, most\n", len(c.failovers))
	for _, part := range []struct {
		name string
		of   func(f failover) int64
	}{
		{"silence until declared lost or fenced", func(f failover) int64 { return f.move.Detection }},
		{"fence", func(f failover) int64 { return f.move.Fence }},
		{"placement", func(f failover) int64 { return f.move.Placement }},
		{"until QEMU runs", func(f failover) int64 { return f.move.Start }},
		{"until the guest has booted and written", func(f failover) int64 { return f.guest.Milliseconds() }},
		{"power cut to counted write", func(f failover) int64 { return f.total.Milliseconds() }},
		{"  the host did not lead", func(f failover) int64 { return only(!f.led, f.total) }},
		{"  the host led the cluster", func(f failover) int64 { return only(f.led, f.total) }},
	} {
		if t := known(c.failovers, part.of); len(t) > 0 {
			fmt.Printf("  %-40s %7d %7d %7d  (%d)\n", part.name, t[len(t)/2], t[len(t)*99/100], t[len(t)-1], len(t))
		}
	}
}

func only(counts bool, d time.Duration) int64 {
	if !counts {
		return -1
	}
	return d.Milliseconds()
}

// crowded loses a host with many protected VMs, and tells when all had a place and
// when all ran.
func (c *campaign) crowded(ctx context.Context) error {
	if err := c.lead(ctx, 1); err != nil {
		return err
	}
	at := []string{"--data-dir", c.Hosts.Data(0)}
	for i := 1; i < c.nodes; i++ {
		if _, err := c.Muster(0, append(at, "node", "maintenance", "on", c.Hosts.Name(i))...); err != nil {
			return err
		}
	}
	if _, err := c.Muster(0, append(at, "vm", "create", "crowd", "--count", strconv.Itoa(c.crowd), "--cpu", "1", "--memory", crowdMemory, "--ha", "restart", "--start", "--timeout", crowdBound.String())...); err != nil {
		return err
	}
	for i := 1; i < c.nodes; i++ {
		if _, err := c.Muster(0, append(at, "node", "maintenance", "off", c.Hosts.Name(i))...); err != nil {
			return err
		}
	}
	if err := c.lead(ctx, 1); err != nil { // maintenance handed it over
		return err
	}
	c.say("%d VMs run on %s", c.crowd, c.Hosts.Name(0))
	lab.Wait(ctx, 10*settle)
	if err := c.cutAllOf(0); err != nil {
		return err
	}
	var p api.FailoverProof
	err := lab.Eventually(ctx, crowdBound, func(ctx context.Context) error { return c.allMoved(ctx, &p) })
	if err != nil {
		return err
	}
	placed, run := p.Failover.Spec.At, p.Failover.Spec.At
	to := map[string]int{}
	for i := range p.Moves {
		m := &p.Moves[i]
		to[m.Spec.Node]++
		if m.Spec.At.After(placed) {
			placed = m.Spec.At
		}
		if m.Status.At.After(run) {
			run = *m.Status.At
		}
	}
	fmt.Printf("%d VMs of a lost host, from when it was declared lost: all placed after %d ms, all QEMUs run after %.1f s; places: %v\n",
		len(p.Moves), placed.Sub(p.Failover.Spec.At).Milliseconds(), run.Sub(p.Failover.Spec.At).Seconds(), to)
	return c.powerUp(0)
}

// allMoved reads the evidence of the one loss until all VMs of the crowd run.
func (c *campaign) allMoved(ctx context.Context, p *api.FailoverProof) error {
	var list struct{ Items []api.Failover }
	if err := c.read(ctx, "/failovers", &list); err != nil {
		return err
	}
	if len(list.Items) == 0 {
		return errors.New("no loss yet")
	}
	*p = api.FailoverProof{}
	if err := c.read(ctx, proofPath(&list.Items[0]), p); err != nil {
		return err
	}
	run := 0
	for i := range p.Moves {
		if p.Moves[i].Status.Phase == api.MoveRunning && p.Moves[i].Status.At != nil {
			run++
		}
	}
	if run < c.crowd {
		return fmt.Errorf("%d of %d run elsewhere", run, c.crowd)
	}
	return nil
}
