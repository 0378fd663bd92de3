// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
)

const (
	// readyLimit bounds the start of three servers.
	readyLimit = 60 * time.Second
)

// Servers are the processes of a cluster, whatever the system.
type Servers struct {
	host *Host
	// Dir has the data and the logs.
	Dir     string
	command func(node int) (program string, args []string)
	procs   [load.Nodes]*Process
}

// NewServers starts three servers on empty folders below name.
func NewServers(h *Host, dir string, command func(node int) (program string, args []string)) (*Servers, error) {
	s := &Servers{host: h, Dir: dir, command: command}
	for i := range s.procs {
		if err := s.start(i); err != nil {
			return nil, errors.Join(err, s.Stop())
		}
	}
	return s, nil
}

func (s *Servers) start(node int) error {
	program, args := s.command(node)
	name := fmt.Sprintf("%s %d", program, node)
	p, err := s.host.Start(name, fmt.Sprintf("%s/%s%d.log", s.Dir, program, node), program, args...)
	if err != nil {
		return err
	}
	if old := s.procs[node]; old != nil {
		p.kids = append(p.kids, old.kids...)
	}
	s.procs[node] = p
	return nil
}

// Await asks until ready is content.
func (s *Servers) Await(ctx context.Context, what string, ready func(context.Context) error) error {
	return until(ctx, readyLimit, what, s.procs[:], ready)
}

// Kill implements load.Killable.
func (s *Servers) Kill(node int) error { return s.procs[node].Kill() }

// StartAgain starts a server that was killed.
func (s *Servers) StartAgain(node int) error { return s.start(node) }

// Stop ends all servers.
func (s *Servers) Stop() error {
	failed := make(chan error)
	n := 0
	for _, p := range s.procs {
		if p != nil {
			n++
			go func() { failed <- p.Stop() }()
		}
	}
	var err error
	for range n {
		err = errors.Join(err, <-failed)
	}
	return err
}

// Logged counts the lines with text in the logs of the servers and prints the
// first few of them.
func (s *Servers) Logged(text string, say func(format string, a ...any)) (n int, err error) {
	const shown = 5
	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	if err != nil {
		return 0, err
	}
	for _, path := range logs {
		data, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(data)) {
			if !strings.Contains(line, text) {
				continue
			}
			if n++; n <= shown {
				say("  %s: %s", filepath.Base(path), strings.TrimSpace(line))
			}
		}
	}
	return n, nil
}

// Usage returns what each server uses.
func (s *Servers) Usage() ([load.Nodes]Usage, error) {
	var out [load.Nodes]Usage
	for i, p := range s.procs {
		u, err := p.Usage()
		if err != nil {
			return out, err
		}
		out[i] = u
	}
	return out, nil
}

// PIDs of the servers.
func (s *Servers) PIDs() []int {
	var out []int
	for _, p := range s.procs {
		out = append(out, p.PID())
	}
	return out
}
