// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/contain"
)

// methodPosition asks a node how far its log goes and whom it follows.
const methodPosition = "cluster.position"

// surveyTimeout is how long another member may take to answer before it counts
// as silent.
const surveyTimeout = 3 * time.Second

// position is the answer.
type position struct {
	LastIndex uint64 `json:"lastIndex"`
	LastTerm  uint64 `json:"lastTerm"`
	// Leader is the ID of the node that leads, empty if none is known.
	Leader string `json:"leader,omitempty"`
}

func (m *member) servePosition(context.Context, []byte) ([]byte, error) {
	var p position
	p.LastIndex, p.LastTerm = m.store.LastLog()
	p.Leader, _, _ = m.store.Leader()
	return json.Marshal(p)
}

// answer is what one other member said.
type answer struct {
	position
	err error
}

// survey is what is left of a cluster, as one node sees it.
type survey struct {
	plan api.RecoveryPlan
	// view is what a recovery from this node would begin with: after a start
	// without a quorum this node's own state is behind its log.
	view *configdb.View
	said []answer // of plan.Others
}

// nameOf returns the name of a node, or its ID when the name is not known.
func (s *survey) nameOf(nodeID string) string {
	if n, err := configdb.Nodes.Get(s.view, nodeID); err == nil {
		return n.Meta.Name
	}
	return nodeID
}

// survey looks at what is left of the cluster, for somebody who thinks of
// recovering it from this node.
func (m *member) survey(ctx context.Context) (*survey, error) {
	newest, err := m.store.Newest(ctx)
	if err != nil {
		return nil, err
	}
	s := &survey{view: newest.View()}
	p, v := &s.plan, s.view
	*p = api.RecoveryPlan{
		Cluster: m.info.Cluster, ClusterID: m.info.ClusterID, Node: m.info.Node, Life: m.info.life(), Revision: v.Revision(),
		StartedAt: m.seen.since.UTC(),
	}
	p.LastIndex, p.LastTerm = m.store.LastLog()
	if v.Time() > 0 {
		p.WrittenAt = time.Unix(0, v.Time()).UTC()
	}
	if age, known := m.store.Staleness(); known {
		at := time.Now().Add(-age).UTC()
		p.LeaderHeardAt = &at
	}
	if p.Others, err = m.others(v); err != nil {
		return nil, err
	}
	if s.said, err = m.askAll(ctx, p.Others); err != nil {
		return nil, err
	}
	for i := range p.Others {
		o, a := &p.Others[i], s.said[i]
		if o.LastSeen = m.seen.when(o.NodeID); a.err != nil {
			o.Error = a.err.Error()
			continue
		}
		o.Answers, o.LastIndex, o.LastTerm = true, a.LastIndex, a.LastTerm
		o.Newer = a.LastTerm > p.LastTerm || a.LastTerm == p.LastTerm && a.LastIndex > p.LastIndex
	}
	p.Refused = m.whyNot(s)
	return s, nil
}

// others are all members and nodes but this one, in order of name.
func (m *member) others(v *configdb.View) ([]api.RecoveryMember, error) {
	byID := map[string]*api.RecoveryMember{}
	members, err := m.store.Members()
	if err != nil {
		return nil, err
	}
	for _, mb := range members {
		byID[mb.NodeID] = &api.RecoveryMember{NodeID: mb.NodeID, Node: mb.NodeID, Address: mb.Address, Voter: mb.Voter}
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		n := &nodes[i]
		o := byID[n.Meta.ID]
		if o == nil && isGhost(v, n) {
			continue // nothing is said of the old cluster's hosts, and nothing of them is taken over
		}
		if o == nil {
			o = &api.RecoveryMember{NodeID: n.Meta.ID}
			byID[n.Meta.ID] = o
		}
		o.Node, o.Address, o.Role, o.Phase = n.Meta.Name, n.Spec.Address, n.Spec.Role, n.Status.Phase
	}
	delete(byID, m.info.NodeID)
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		m.log.Warn("bindings that cannot be read are not counted", "err", err)
	}
	for i := range bindings {
		if o := byID[bindings[i].Spec.NodeID]; o != nil {
			o.VMs++
		}
	}
	out := make([]api.RecoveryMember, 0, len(byID))
	for _, o := range byID {
		out = append(out, *o)
	}
	slices.SortFunc(out, func(a, b api.RecoveryMember) int { return strings.Compare(a.Node, b.Node) })
	return out, nil
}

// askAll asks every node. An error means that this node cannot tell who lives.
func (m *member) askAll(ctx context.Context, others []api.RecoveryMember) ([]answer, error) {
	ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
	defer cancel()
	out, broken := make([]answer, len(others)), make([]error, len(others))
	var wg sync.WaitGroup
	for i := range others {
		wg.Go(func() {
			broken[i] = contain.Do(func() { out[i] = m.ask(ctx, others[i].NodeID, others[i].Address) })
			if out[i].err == nil {
				m.seen.note(others[i].NodeID)
			}
		})
	}
	wg.Wait()
	return out, errors.Join(broken...)
}

// ask asks one node for its position. One that does not know the question is
// of an older version, and alive.
func (m *member) ask(ctx context.Context, nodeID, address string) (a answer) {
	b, err := m.client.Call(ctx, nodeID, address, methodPosition, nil)
	var refused *clusternet.RemoteError
	switch {
	case err == nil:
		a.err = json.Unmarshal(b, &a.position)
	case errors.As(err, &refused):
		a.err = err
	default:
		if b, a.err = m.client.Call(ctx, nodeID, address, methodLeader, nil); a.err == nil {
			a.Leader, _, _ = strings.Cut(string(b), "@")
		}
	}
	return a
}

// whyNot is empty when the cluster may be recovered from this node.
func (m *member) whyNot(s *survey) string {
	p := &s.plan
	if id, _, ok := m.store.Leader(); ok {
		return fmt.Sprintf("node %s leads the cluster: it has its quorum, there is nothing to recover", s.nameOf(id))
	}
	if len(p.Others) == 0 {
		return "this node is the only member of its cluster, there is nothing to recover"
	}
	if m.info.Role == api.RoleWitness {
		return fmt.Sprintf("node %s is a witness, which can run no VM; take a backup here (muster cluster backup --stale FILE) and restore it on another host", p.Node)
	}
	var newer, alive []string
	for i, o := range p.Others {
		a := s.said[i]
		var refused *clusternet.RemoteError
		switch {
		case errors.As(a.err, &refused) && (refused.Code == codeRemoved || refused.Code == clusternet.CodeOldLife):
			return fmt.Sprintf("node %s says that this node is no member any more: %s", o.Node, refused.Detail)
		case errors.As(a.err, &refused):
			alive = append(alive, o.Node) // it runs, whatever it says
		case a.err != nil:
		case a.Leader != "":
			return fmt.Sprintf("node %s answers and says that node %s leads: the cluster has its quorum; find out why this node does not reach it", o.Node, s.nameOf(a.Leader))
		case o.Newer:
			newer = append(newer, fmt.Sprintf("%s (log up to %d in term %d, here %d in term %d)", o.Node, o.LastIndex, o.LastTerm, p.LastIndex, p.LastTerm))
		default:
			alive = append(alive, o.Node)
		}
	}
	switch {
	case len(newer) > 0:
		return fmt.Sprintf("there is a node with a newer log, which may have what was acknowledged last: %s; recover the cluster from that node", strings.Join(newer, ", "))
	case len(alive) > 0:
		return fmt.Sprintf("these nodes still answer, none with a newer log: %s; a recovered cluster begins with one node alone, so switch them off first, with their VMs", strings.Join(alive, ", "))
	}
	return ""
}
