// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-vm/muster/internal/torture/lab"
)

// disks is where the guests' disks are.
type disks struct {
	pool []string // arguments that make it
	conf string   // of the administrator of the Ceph; "": there is none
}

// makeDisks brings a Ceph up, if there is to be one.
func (c *campaign) makeDisks() (d disks, err error) {
	if c.ceph == "" {
		shared := filepath.Join(c.work, "shared")
		d.pool = []string{"--type", "shared", "--path", shared}
		return d, os.MkdirAll(shared, 0o755)
	}
	out, err := lab.Command("", c.ceph, "up", filepath.Join(c.work, "ceph"), "--address", lab.Storage)
	if err != nil {
		return d, err
	}
	has := map[string]string{}
	for l := range strings.Lines(out) {
		if k, v, ok := strings.Cut(strings.TrimSpace(l), "="); ok {
			has[k] = v
		}
	}
	d.conf = has["CEPH_CONF"]
	d.pool = []string{"--type", "rbd", "--ceph-pool", has["CEPH_POOL"], "--ceph-user", has["CEPH_USER"], "--monitor", has["CEPH_MONITOR"], "--key-file", has["CEPH_KEYRING"]}
	return d, nil
}

// lockedAway reports that of two QEMUs of one VM one is on a host that the Ceph has
// locked out, so that it cannot write: it is halted there by its first I/O error, and
// ended when its node hears of it.
func (c *campaign) lockedAway(two []process) bool {
	if c.disks.conf == "" {
		return false
	}
	list, err := lab.Command("", "ceph", "-c", c.disks.conf, "osd", "blocklist", "ls")
	if err != nil {
		c.violate(harness, "the Ceph does not say whom it has locked out: %v", err)
		return true
	}
	for i := range c.nodes {
		barred := strings.Contains(list, c.Hosts.Address(i)+":0/0 ")
		if barred && slices.ContainsFunc(two, func(p process) bool { return p.dir == c.host(i) }) {
			c.mu.Lock()
			c.outlived[fmt.Sprint(two[0].vm, two[0].pid, two[1].pid)] = true
			c.mu.Unlock()
			return true
		}
	}
	return false
}
