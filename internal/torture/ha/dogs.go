// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	dogEvery = 50 * time.Millisecond
	// bootTime is how long a host that was reset is away.
	bootTime = 3 * time.Second
)

// dog is the watchdog of a host: a file that its guard writes to.
type dog struct {
	path string

	mu   sync.Mutex
	size int64
	at   time.Time // when it grew; zero: nobody has opened it
}

func newDog(path string) (*dog, error) {
	return &dog{path: path}, os.WriteFile(path, nil, 0o600)
}

// off is what a power cut does to the device.
func (d *dog) off() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if fi, err := os.Stat(d.path); err == nil {
		d.size = fi.Size()
	}
	d.at = time.Time{}
}

// bites reports that the host must be reset now.
func (d *dog) bites() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	fi, err := os.Stat(d.path)
	if err != nil {
		return false
	}
	if fi.Size() != d.size {
		d.size, d.at = fi.Size(), time.Now()
	}
	return !d.at.IsZero() && time.Since(d.at) >= lab.DogTimeout
}

// watchDogs resets hosts whose guards do not pet. A host comes back by itself,
// unless a fault keeps its daemon down.
func (c *campaign) watchDogs(ctx context.Context) {
	var boots sync.WaitGroup
	defer boots.Wait()
	for lab.Wait(ctx, dogEvery) {
		for i, d := range c.dogs {
			if !d.bites() {
				continue
			}
			down := c.daemons[i].Down()
			c.say("the watchdog resets %s", c.Hosts.Name(i))
			if err := c.cutPower(i); err != nil {
				c.violate(harness, "reset of %s: %v", c.Hosts.Name(i), err)
			}
			c.mu.Lock()
			c.resets++
			c.mu.Unlock()
			if down {
				continue
			}
			boots.Go(func() {
				lab.Wait(ctx, bootTime)
				if err := c.daemons[i].Start(); err != nil {
					c.violate(harness, "start of %s: %v", c.Hosts.Name(i), err)
				}
			})
		}
	}
}
