// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// A new pool or network is of use only when nodes have made it, which takes
// them a moment.
const (
	// settleTime is how long they are waited for.
	settleTime = 10 * time.Second
	// settleLook is the pause between two looks.
	settleLook = 100 * time.Millisecond
)

// settled waits until every node that can has a new pool or network, or has
// said why not, so that the next command finds it. The object is made in any
// case: what is missing is only told.
func (a *app) settled(ctx context.Context, c *client.Client, kind api.Kind, name string) {
	if !a.flags.wait || kind != api.KindPool && kind != api.KindNetwork {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	nodes, err := c.List(ctx, api.KindNode, client.ListOptions{})
	if err != nil {
		return // who creates may not be able to look
	}
	var silent, without []string
	for {
		raw, _, err := c.Get(ctx, kind, a.project, name)
		if err != nil {
			break
		}
		if silent, without = verdicts(nodes.Items, raw); len(silent) == 0 {
			break
		}
		if sleep(ctx, settleLook) != nil {
			break
		}
	}
	for _, node := range silent {
		a.notice("%s %s is not ready on node %s yet", kind, name, node)
	}
	for _, why := range without {
		a.notice("%s %s is not ready on node %s", kind, name, why)
	}
}

// verdicts says which nodes that are ready have not said anything of a new
// pool or network, and which do not have it, with their reasons.
func verdicts(nodes []json.RawMessage, raw json.RawMessage) (silent, without []string) {
	var o struct {
		Status struct {
			Nodes []api.NetworkNode `json:"nodes"` // a pool's have the same fields
		} `json:"status"`
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, nil // of a newer version: nothing to wait for
	}
	said := map[string]api.NetworkNode{}
	for _, n := range o.Status.Nodes {
		said[n.Node] = n
	}
	for _, b := range nodes {
		var n api.Node
		if err := json.Unmarshal(b, &n); err != nil || n.Status.Phase != api.NodeReady || n.Spec.Role == api.RoleWitness {
			continue
		}
		s, ok := said[n.Meta.Name]
		switch {
		case !ok || !s.Ready && (s.Reason == "" || s.Reason == api.NotMadeYet):
			silent = append(silent, n.Meta.Name)
		case !s.Ready:
			without = append(without, n.Meta.Name+": "+s.Reason)
		}
	}
	return silent, without
}
