// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	consoleEvery = 300 * time.Millisecond
	consoleBytes = 8192
	// pauseMin is a pause in counting that is worth the name.
	pauseMin = 2 * time.Second
	// A guest counts less than four times in a second, and boots at most once in some
	// seconds. A number that is further ahead of all others was misread: when a daemon is
	// started again, a console may double the character that was on its way
	// (hypervisor/console), and 1253 becomes 12533, or boot 6 boot 66.
	leapMost, leapPerSecond, bootsMost = 30, 10, 8
)

// line is what a guest says: a number that was printed is on the disk.
type line struct {
	boot, counter int
	at            time.Duration // when it was first seen
}

// span is the least and the greatest number heard of a boot.
type span struct{ first, last int }

// guest is a VM, known by its console.
type guest struct {
	name string

	mu      sync.Mutex
	last    line
	boots   map[int]span  // by boot
	resume  time.Duration // the end of the last pause
	most    line          // the greatest number of all boots
	misread map[span]bool // boots and numbers that no guest can have said
}

var says = regexp.MustCompile(`muster-guest name=\S+ boot=(\d+) counter=(\d+)\r?\n`)

func (g *guest) newest() line {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
}

func (g *guest) resumed() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.resume
}

func (g *guest) misreadLines() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.misread)
}

// hear takes in what a console said, oldest first. It returns what is wrong: what
// an earlier boot printed must be less than what a later one begins with, since
// that one begins after the number on the disk. So neither was a written number
// lost, nor did two write at once.
func (g *guest) hear(text []byte, at time.Duration) (wrong []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.boots == nil {
		g.boots, g.misread = map[int]span{}, map[span]bool{}
	}
	for _, m := range says.FindAllSubmatch(text, -1) {
		boot, _ := strconv.Atoi(string(m[1])) // digits by the expression
		counter, _ := strconv.Atoi(string(m[2]))
		s, again := g.boots[boot]
		if again && counter <= s.last {
			continue // heard before
		}
		if g.last.boot > 0 && boot > g.last.boot+bootsMost || g.most.counter > 0 && counter > g.most.counter+leapMost+leapPerSecond*int((at-g.most.at)/time.Second) {
			g.misread[span{boot, counter}] = true
			continue
		}
		if counter > g.most.counter {
			g.most = line{boot, counter, at}
		}
		if !again {
			s.first = counter
		}
		s.last = counter
		g.boots[boot] = s
		for other, o := range g.boots {
			if other < boot && o.last >= s.first || other > boot && s.last >= o.first {
				wrong = append(wrong, fmt.Sprintf("%s: boot %d printed %d to %d, boot %d printed %d to %d", g.name, boot, s.first, s.last, other, o.first, o.last))
			}
		}
		if boot >= g.last.boot {
			if at-g.last.at > pauseMin {
				g.resume = at
			}
			g.last = line{boot, counter, at}
		}
	}
	return wrong
}

// readConsole asks the nodes in turn for the end of the console, until one has it.
func (c *campaign) readConsole(ctx context.Context, g *guest) {
	for i := range c.nodes {
		if c.readConsoleAt(ctx, i, g) {
			return
		}
	}
}

// readConsoleAt asks one node.
func (c *campaign) readConsoleAt(ctx context.Context, node int, g *guest) bool {
	a := c.Rest.Do(ctx, node, lab.Request{Method: "GET", Path: "/vms/" + g.name + "/console/log?bytes=" + strconv.Itoa(consoleBytes), Timeout: askTimeout, Header: map[string]string{"Accept": "text/plain"}})
	if !a.OK() {
		return false
	}
	for _, w := range g.hear(a.Body, c.now()) {
		c.violate(lostWrite, "%s", w)
	}
	return true
}

func (c *campaign) watchConsole(ctx context.Context, g *guest) {
	for lab.Wait(ctx, consoleEvery) {
		c.readConsole(ctx, g)
	}
}
