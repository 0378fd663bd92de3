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
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	clusterName = "torture"
	// Waits of an administrator who restores: until a command that needs the pool or a
	// leader is taken, and until all vote.
	commandWait = 60 * time.Second
	membersWait = 90 * time.Second
)

// oldState is a backup that was made earlier.
type oldState struct {
	file, phrase string
	notes        bool // the storage heartbeat was on then
}

// backUp makes the backup that an episode may restore later, unless there is one.
func (c *campaign) backUp() error {
	if c.old.file != "" {
		return nil
	}
	s := oldState{file: filepath.Join(c.work, fmt.Sprintf("old-%d.backup", c.restored)), phrase: filepath.Join(c.work, "phrase"), notes: c.notes}
	if err := os.WriteFile(s.phrase, []byte("a phrase for the campaign\n"), 0o600); err != nil {
		return err
	}
	if err := c.command(commandWait, 0, "cluster", "backup", s.file, "--force", "--passphrase-file", s.phrase); err != nil {
		return err
	}
	c.old = s
	return nil
}

// command has an administrator at a host give a command until it is taken.
func (c *campaign) command(within time.Duration, host int, args ...string) error {
	return lab.Eventually(context.Background(), within, func(context.Context) error {
		_, err := c.Muster(host, append([]string{"--data-dir", c.Hosts.Data(host)}, args...)...)
		return err
	})
}

// restoreOn makes the host, whose power is cut, the first of a cluster from the old
// backup, by docs/backup.md, with the administrator's word about those that are off.
func (c *campaign) restoreOn(host int, off ...int) error {
	if err := c.forget(host); err != nil {
		return err
	}
	var names []string
	for _, i := range off {
		names = append(names, c.Hosts.Name(i))
	}
	out, err := c.Muster(host, "cluster", "restore", c.old.file, "--passphrase-file", c.old.phrase,
		"--yes-i-have-switched-off", strings.Join(names, ","), "--data-dir", c.Hosts.Data(host), "-o", "json")
	if err != nil {
		return err
	}
	c.restored++
	return json.Unmarshal([]byte(out), &c.founded)
}

// forget clears a host whose daemon does not run, and starts the daemon.
func (c *campaign) forget(host int) error {
	args := lab.InHost(c.Hosts.Namespace(host), filepath.Join(c.bin, "musterd"), "forget", "--cluster", clusterName,
		"--data-dir", c.Hosts.Data(host), "--run-dir", c.host(host))
	if _, err := lab.Command("", "ip", args...); err != nil {
		return err
	}
	if err := c.daemons[host].Start(); err != nil {
		return err
	}
	return c.AwaitSocket(context.Background(), host)
}

// settle brings the other hosts, whose power is cut, into the restored cluster, and
// starts the VMs.
func (c *campaign) settle(first int) error {
	if err := c.Rest.Turn(c.founded.Token, c.founded.CACert); err != nil {
		return err
	}
	for i := range c.nodes {
		if i == first {
			continue
		}
		if err := c.forget(i); err != nil {
			return err
		}
		if err := c.Join(first, i); err != nil {
			return err
		}
	}
	if err := lab.Eventually(context.Background(), membersWait, c.AllVote); err != nil {
		return err
	}
	for _, g := range c.guests {
		if err := c.command(commandWait, first, "vm", "start", g.name); err != nil {
			return err
		}
	}
	c.notes, c.old = c.old.notes, oldState{}
	return nil
}

// others are all hosts but one.
func (c *campaign) others(but int) (list []int) {
	for i := range c.nodes {
		if i != but {
			list = append(list, i)
		}
	}
	return list
}

func (c *campaign) cutPowerOf(hosts ...int) (err error) {
	for _, i := range hosts {
		err = errors.Join(err, c.cutPower(i))
	}
	return err
}

// loseAll is the end of all hosts at once; afterwards the old backup is restored on one.
func (c *campaign) loseAll(a *active) error { return c.cutPowerOf(append(c.others(a.node), a.node)...) }

func (c *campaign) restoreAfterAll(a *active) error {
	if err := c.restoreOn(a.node, append(c.others(a.node), a.node)...); err != nil {
		return err
	}
	return c.settle(a.node)
}

// restoreBeside loses one host and restores the old backup there, while the cluster
// lives on the others and moves the host's VMs there.
func (c *campaign) restoreBeside(a *active) error {
	return errors.Join(c.cutPower(a.node), c.restoreOn(a.node, a.node))
}

// endOld ends the old cluster, says so to the restored one, and goes on with that.
func (c *campaign) endOld(a *active) error {
	others := c.others(a.node)
	if err := c.cutPowerOf(others...); err != nil {
		return err
	}
	for _, i := range others {
		if err := c.command(commandWait, a.node, "node", "remove", c.Hosts.Name(i), "--force"); err != nil {
			return err
		}
	}
	return c.settle(a.node)
}

// whole reports that an episode is about all hosts, and begins when all is well.
func (e *episode) whole() bool {
	return slices.ContainsFunc(e.faults, func(f fault) bool { return f.kind == oldBackup || f.kind == oldBeside })
}
