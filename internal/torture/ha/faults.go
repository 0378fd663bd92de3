// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	flapEvery = time.Second
	// emptyWithin bounds the end of a host's processes.
	emptyWithin = 10 * time.Second
)

// active is a fault in force.
type active struct {
	fault
	node, other int   // other: of two power cuts, and of clocks that part
	pids        []int // that were stopped
	stop        func()
}

// choose says whom a fault meets. The second of an episode meets another node.
func (c *campaign) choose(ctx context.Context, f fault, on []*active) *active {
	a := &active{fault: f, node: f.node}
	switch f.at {
	case leader:
		if n := c.Leader(ctx); n >= 0 {
			a.node = n
		}
	case owner:
		if n := c.owner(ctx); n >= 0 {
			a.node = n
		}
	}
	for _, o := range on {
		if o.node == a.node && c.nodes > len(on)+1 && (o.kind == powerCut || f.kind == powerCut) {
			a.node = (a.node + 1) % c.nodes
		}
	}
	a.other = (a.node + 1) % c.nodes
	return a
}

func (c *campaign) inject(a *active) (err error) {
	d := c.daemons[a.node]
	switch a.kind {
	case killDaemon:
		return d.Kill()
	case killGuard:
		pids, err := c.inside(a.node, guardName)
		return errors.Join(err, killed(pids))
	case killQEMU:
		return killed(c.qemus(a.node))
	case powerCut:
		return c.cutPower(a.node)
	case twoHosts:
		return errors.Join(c.cutPower(a.node), c.cutPower(a.other))
	case stopDaemon:
		return d.Signal(syscall.SIGSTOP)
	case stopGuard:
		a.pids, err = c.inside(a.node, guardName)
		return errors.Join(err, send(syscall.SIGSTOP, a.pids))
	case stopQEMU:
		a.pids = c.qemus(a.node)
		return send(syscall.SIGSTOP, a.pids)
	case stopAll:
		a.pids, err = c.inside(a.node, "")
		return errors.Join(err, send(syscall.SIGSTOP, a.pids))
	case fullDisk:
		d.SetFull(true)
		a.stop, err = c.Hosts.KeepFull(a.node, c.say)
		return err
	case flap:
		a.stop = lab.Repeat(flapEvery, func(n int) error { return c.cut(a.node, true, true, n%2 == 0) }, c.say)
		return nil
	case isolate, deaf, mute:
		return c.cut(a.node, a.kind != mute, a.kind != deaf, true)
	case deadSwitch:
		return c.cutAll(true)
	case noStorage:
		c.Hosts.NoStorage[a.node] = true
		return c.Hosts.ApplyDrops()
	case clockBack, clockAhead, clockLeap:
		return c.clocks[a.node].Set(a.step)
	case clocksPart:
		return errors.Join(c.clocks[a.node].Set(a.step), c.clocks[a.other].Set(-a.step))
	case clockBoot:
		return errors.Join(c.cutPower(a.node), c.clocks[a.node].Set(a.step), d.Start())
	case oldBackup:
		return c.loseAll(a)
	case oldBeside:
		return c.restoreBeside(a)
	}
	return fmt.Errorf("no such fault: %s", a.kind)
}

func (c *campaign) heal(a *active) error {
	d := c.daemons[a.node]
	switch a.kind {
	case killDaemon, powerCut:
		return d.Start()
	case twoHosts:
		return errors.Join(d.Start(), c.daemons[a.other].Start())
	case stopDaemon:
		return d.Signal(syscall.SIGCONT)
	case stopGuard, stopQEMU, stopAll:
		return send(syscall.SIGCONT, a.pids)
	case fullDisk:
		a.stop()
		d.SetFull(false)
		return c.Hosts.MakeRoom(a.node)
	case flap:
		a.stop()
		return c.cut(a.node, true, true, false)
	case isolate, deaf, mute:
		return c.cut(a.node, a.kind != mute, a.kind != deaf, false)
	case deadSwitch:
		return c.cutAll(false)
	case noStorage:
		c.Hosts.NoStorage[a.node] = false
		return c.Hosts.ApplyDrops()
	case clockBack, clockAhead, clockLeap, clockBoot:
		return c.clocks[a.node].Set(0)
	case clocksPart:
		return errors.Join(c.clocks[a.node].Set(0), c.clocks[a.other].Set(0))
	case oldBackup:
		return c.restoreAfterAll(a)
	case oldBeside:
		return c.endOld(a)
	}
	return nil
}

// cut loses, or no longer loses, what a node receives and what it sends.
func (c *campaign) cut(node int, in, out, lost bool) error {
	for o := range c.nodes {
		if o != node && in {
			c.Hosts.Drop[o][node] = lost
		}
		if o != node && out {
			c.Hosts.Drop[node][o] = lost
		}
	}
	return c.Hosts.ApplyDrops()
}

// cutAll loses, or no longer loses, all that the hosts send each other.
func (c *campaign) cutAll(lost bool) error {
	for i := range c.nodes {
		for o := range c.nodes {
			c.Hosts.Drop[i][o] = lost && i != o
		}
	}
	return c.Hosts.ApplyDrops()
}

// cutPower ends everything on a host at once. What was in its /run is gone.
func (c *campaign) cutPower(node int) error {
	d := c.daemons[node]
	for end := time.Now().Add(emptyWithin); ; {
		if err := d.Kill(); err != nil {
			return err
		}
		pids, err := c.inside(node, "")
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			break
		}
		if err := killed(pids); err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("processes %v of %s do not end", pids, d.Name)
		}
	}
	c.dogs[node].off()
	return os.RemoveAll(c.host(node))
}
