// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/proof"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// move is one VM that went to another node, by the evidence.
type move struct {
	api.Phases
	ran time.Time // when its QEMU did
}

// prove checks the evidence of every loss so far that was not looked at: each must
// hold. It is called when the cluster is calm, so a loss that is still under way
// is looked at again.
func (c *campaign) prove(ctx context.Context) error {
	var list struct{ Items []api.Failover }
	if err := c.read(ctx, "/failovers", &list); err != nil {
		return err
	}
	for i := range list.Items {
		id := list.Items[i].Meta.ID
		c.losses[id] = true
		if c.proved[id] {
			continue
		}
		var p api.FailoverProof
		if err := c.read(ctx, proofPath(&list.Items[i]), &p); err != nil {
			return err
		}
		v := proof.Check(&p)
		for _, f := range v.Findings {
			if !f.OK {
				c.violate(notProved, "loss %s of %s: %s: %s", id, v.Node, f.Rule, f.Detail)
			}
		}
		final := !slices.ContainsFunc(p.Moves, func(m api.FailoverMove) bool { return !m.Status.Phase.Final() })
		if final && p.Failover.Status.ReadmittedAt != nil {
			c.proved[id] = true
			for j := range p.Moves {
				m := move{Phases: api.PhasesOf(&p.Failover, &p.Moves[j])}
				if at := p.Moves[j].Status.At; at != nil {
					m.ran = *at
				}
				c.moves = append(c.moves, m)
			}
		}
	}
	return nil
}

func proofPath(f *api.Failover) string { return "/failovers/" + url.PathEscape(f.Meta.ID) + "/proof" }

// read asks the nodes in turn until one answers.
func (c *campaign) read(ctx context.Context, path string, out any) (err error) {
	for i := range c.nodes {
		a := c.Rest.Do(ctx, i, lab.Request{Method: "GET", Path: path, Timeout: askTimeout})
		if !a.OK() {
			err = fmt.Errorf("GET %s at %s: %s", path, c.Hosts.Name(i), a.Word())
			continue
		}
		return json.Unmarshal(a.Body, out)
	}
	return err
}

// showMoves prints how long the parts of the failovers took.
func (c *campaign) showMoves() {
	if len(c.moves) == 0 {
		return
	}
	fmt.Printf("%d moves of VMs at %d losses; milliseconds of each part, median and most:\n", len(c.moves), len(c.proved))
	for _, part := range []struct {
		name string
		of   func(m move) int64
	}{
		{"silence until declared lost", func(m move) int64 { return m.Detection }},
		{"placement", func(m move) int64 { return m.Placement }},
		{"until QEMU runs", func(m move) int64 { return m.Start }},
		{"in all", func(m move) int64 { return m.Total() }},
	} {
		if t := known(c.moves, part.of); len(t) > 0 {
			fmt.Printf("  %-32s %6d %6d  (%d)\n", part.name, t[len(t)/2], t[len(t)-1], len(t))
		}
	}
}

// known returns a part of each, where it is known, in order; -1 is unknown.
func known[T any](all []T, of func(T) int64) (t []int64) {
	for _, one := range all {
		if v := of(one); v >= 0 {
			t = append(t, v)
		}
	}
	slices.Sort(t)
	return t
}
