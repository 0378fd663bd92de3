// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/quorum"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/contain"
)

// Times and limits of the leader's look at the members.
const (
	votersEvery   = time.Second
	votersSpread  = 20 * time.Millisecond // more per member, so that many cost no more a second
	healthTimeout = time.Second
	// caughtUp is by how many entries a healthy replica may lag.
	caughtUp = 1024
	// behindAfter is how long a node may lag or be full before its status says so.
	behindAfter     = 5 * time.Second
	transferTimeout = 20 * time.Second
)

// replicaHealth is what a member says of its replica.
type replicaHealth struct {
	Applied uint64 `json:"applied"`
	// Full is why the node's disk takes no entries; empty when it does.
	Full string `json:"full,omitempty"`
}

func (m *member) serveHealth(context.Context, []byte) ([]byte, error) {
	h := replicaHealth{}
	_, _, h.Applied = m.store.Indexes()
	if err := m.store.DiskFull(); err != nil {
		h.Full = err.Error()
	}
	return json.Marshal(h)
}

// pulse is what the leader knows of a member's health.
type pulse struct {
	healthy bool
	since   time.Time
	reason  string // of a condition that is not well; empty while unknown
	message string
	later   string // what it said of its later life
}

// voterKeeper keeps the right members voting, while this node leads.
type voterKeeper struct {
	m      *member
	term   uint64
	pulses map[string]pulse
	told   string // the last failure that was logged
}

// keepVoters is the leader's service "voters".
func (m *member) keepVoters(ctx context.Context, term uint64) error {
	k := &voterKeeper{m: m, term: term, pulses: map[string]pulse{}}
	for {
		members, err := m.store.Members()
		if err == nil {
			err = k.look(ctx, members)
		}
		if text := fmt.Sprint(err); err != nil && ctx.Err() == nil && text != k.told {
			k.told = text
			m.log.Warn("membership not settled", "err", err)
		}
		select {
		case <-time.After(votersEvery + time.Duration(len(members))*votersSpread):
		case <-ctx.Done():
			return nil
		}
	}
}

// look asks all members how they are and makes at most one change.
func (k *voterKeeper) look(ctx context.Context, members []configdb.Member) error {
	k.ask(ctx, members)
	if err := errors.Join(k.noteLater(ctx), k.mark(ctx)); err != nil {
		return err
	}
	step, ok := quorum.Next(k.group(members))
	if !ok {
		return nil
	}
	k.m.log.Info("membership changes", "node", step.ID, "action", step.Do, "reason", step.Why)
	switch step.Do {
	case quorum.Promote:
		return k.m.store.AddMember(step.ID, addressOf(members, step.ID), true)
	case quorum.Demote:
		return k.m.store.DemoteMember(step.ID)
	case quorum.Transfer:
		return k.m.store.TransferLeadershipTo(step.ID, addressOf(members, step.ID))
	}
	return nil
}

func addressOf(members []configdb.Member, id string) string {
	for _, mb := range members {
		if mb.NodeID == id {
			return mb.Address
		}
	}
	return ""
}

// ask brings the pulses up to date.
func (k *voterKeeper) ask(ctx context.Context, members []configdb.Member) {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	_, _, goal := k.m.store.Indexes()
	answers := make([]pulse, len(members))
	var wg sync.WaitGroup
	for i, mb := range members {
		wg.Go(func() {
			if err := contain.Do(func() { answers[i] = k.askOne(ctx, mb, goal) }); err != nil {
				k.m.log.Error("a member was not asked for its health", "node", mb.NodeID, "err", err)
			}
		})
	}
	wg.Wait()
	now, old := time.Now(), k.pulses
	k.pulses = make(map[string]pulse, len(members))
	for i, mb := range members {
		p := answers[i]
		p.since = now
		if was, ok := old[mb.NodeID]; ok && was.healthy == p.healthy {
			p.since = was.since
		}
		k.pulses[mb.NodeID] = p
	}
}

func (k *voterKeeper) askOne(ctx context.Context, mb configdb.Member, goal uint64) pulse {
	var b []byte
	var err error
	if mb.NodeID == k.m.info.NodeID {
		b, err = k.m.serveHealth(ctx, nil)
	} else {
		b, err = k.m.client.Call(ctx, mb.NodeID, mb.Address, methodHealth, nil)
	}
	var h replicaHealth
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	switch {
	case refusal(err) == clusternet.CodeOldLife:
		return pulse{later: err.Error()}
	case err != nil:
		return pulse{} // whether it lives is for ha to say
	case h.Full != "":
		return pulse{reason: "DiskFull", message: h.Full}
	case h.Applied+caughtUp < goal:
		return pulse{reason: "Behind", message: fmt.Sprintf("the replica of the configuration database lacks %d of %d entries", goal-h.Applied, goal)}
	}
	return pulse{healthy: true}
}

// noteLater remembers the members that were recovered into a later life of the
// cluster, so that ha leaves their VMs alone: they have no lease here, but live.
// This happens to an old majority that comes back and elects before it reaches
// the node that was recovered.
func (k *voterKeeper) noteLater(ctx context.Context) error {
	var errs []error
	for id, p := range k.pulses {
		if p.later == "" {
			continue
		}
		if _, noted := k.m.store.Local().Get(configdb.LaterLifeKey(id)); noted {
			continue
		}
		_, err := configdb.Transact(ctx, k.m.store, "voters", 4, func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, id)
			if err != nil {
				return api.IgnoreNotFound(err)
			}
			said := fmt.Sprintf("node %s was recovered into a later life of this cluster and runs its VMs under that; they are not restarted here. One of the two has to go: "+
				"clear these nodes with musterd forget and join them there, or switch %s off and remove it: muster node remove %s --force", n.Meta.Name, n.Meta.Name, n.Meta.Name)
			ev := api.NewEvent("node.laterlife", api.SeverityCritical, api.KindNode, n.Meta, said, time.Now())
			ev.Spec.Node = k.m.info.Node
			tx.RequireTerm(k.term)
			tx.RequireRevision(configdb.LaterLifeKey(id), 0)
			tx.Put(configdb.LaterLifeKey(id), []byte(p.later))
			k.m.log.Error("a member is of a later life", "node", n.Meta.Name, "said", p.later)
			return configdb.PutEvent(tx, &ev)
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// group translates the members for the planner. What has no object is being
// added or was removed, and neither votes nor is changed here.
func (k *voterKeeper) group(members []configdb.Member) []quorum.Member {
	v, now := k.m.store.Local(), time.Now()
	var out []quorum.Member
	for _, mb := range members {
		p := k.pulses[mb.NodeID]
		q := quorum.Member{ID: mb.NodeID, Voter: mb.Voter, Leader: mb.NodeID == k.m.info.NodeID, Healthy: p.healthy, For: now.Sub(p.since)}
		n, err := configdb.Nodes.Get(v, mb.NodeID)
		switch {
		case err != nil || n.Meta.Deleting():
			q.Role, q.Resting = quorum.Replica, true
			if mb.Voter {
				q.Role = quorum.Auto // its removal takes the vote away, in one change
			}
		case n.Spec.Role == api.RoleWitness:
			q.Role = quorum.Witness
		case n.Spec.Role == api.RoleReplica:
			q.Role = quorum.Replica
		}
		q.Resting = q.Resting || n.Spec.Maintenance
		out = append(out, q)
	}
	return out
}

// mark writes into the status of the nodes which replicas cannot be relied on.
func (k *voterKeeper) mark(ctx context.Context) error {
	v := k.m.store.Local()
	var errs []error
	for id, p := range k.pulses {
		n, err := configdb.Nodes.Get(v, id)
		if err != nil {
			continue
		}
		c := api.Condition{Type: api.ConditionConfigDB, OK: p.healthy, Reason: p.reason, Message: p.message}
		if p.healthy {
			c.Reason = "UpToDate"
		}
		was, known := api.FindCondition(n.Status.Conditions, c.Type)
		switch {
		case !p.healthy && (p.reason == "" || time.Since(p.since) < behindAfter):
			continue // not known, or not for long
		case known && was.OK == c.OK && was.Reason == c.Reason, !known && p.healthy:
			continue
		}
		_, err = configdb.Transact(ctx, k.m.store, "voters", 4, func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, id)
			if err != nil {
				return api.IgnoreNotFound(err)
			}
			tx.RequireTerm(k.term)
			n.Status.Conditions = api.SetCondition(n.Status.Conditions, c, time.Now())
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// serveTransfer is called on the leader to hand over to the node that the
// request names by its ID, or to any voter.
func (m *member) serveTransfer(_ context.Context, request []byte) ([]byte, error) {
	if _, ok := m.store.Leadership(); !ok {
		return nil, notLeader()
	}
	id := string(request)
	if id == "" {
		return nil, m.store.TransferLeadership()
	}
	if id == m.info.NodeID {
		return nil, nil
	}
	members, err := m.store.Members()
	if err != nil {
		return nil, err
	}
	return nil, m.store.TransferLeadershipTo(id, addressOf(members, id))
}

// Transfer implements rest.Cluster.
func (m *member) Transfer(ctx context.Context, name string) (api.TransferResult, error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	id, err := m.heir(ctx, name)
	if err != nil {
		return api.TransferResult{}, err
	}
	before := m.store.Term()
	if _, err := m.CallLeader(ctx, methodTransfer, []byte(id)); err != nil {
		return api.TransferResult{}, fmt.Errorf("hand over leadership: %w", err)
	}
	for {
		leader, _, ok := m.store.Leader()
		if term := m.store.Term(); ok && (leader == id || id == "" && term > before) {
			n, err := configdb.Nodes.Get(m.store.Local(), leader)
			return api.TransferResult{Leader: n.Meta.Name, Term: term}, err
		}
		select {
		case <-time.After(leaderRetry / 4):
		case <-ctx.Done():
			return api.TransferResult{}, fmt.Errorf("hand over leadership: no other node leads: %w", configdb.ErrNoQuorum)
		}
	}
}

// heir checks that a node can lead and returns its ID.
func (m *member) heir(ctx context.Context, name string) (string, error) {
	if name == "" {
		return "", nil
	}
	v, err := m.store.View(ctx)
	if err != nil {
		return "", err
	}
	n, err := configdb.Nodes.Find(v, "", name)
	if err != nil {
		return "", err
	}
	members, err := m.store.Members()
	if err != nil {
		return "", err
	}
	for _, mb := range members {
		switch {
		case mb.NodeID != n.Meta.ID:
		case !mb.Voter:
			return "", api.Errorf(api.CodeRefused, "node %s has no vote, so it cannot lead; see muster cluster status", n.Meta.Name)
		case n.Status.Phase != api.NodeReady:
			return "", api.Errorf(api.CodeRefused, "node %s is %s", n.Meta.Name, n.Status.Phase)
		case n.Spec.Maintenance:
			return "", api.Errorf(api.CodeRefused, "node %s is in maintenance and would hand over at once; muster node maintenance off %s", n.Meta.Name, n.Meta.Name)
		default:
			return n.Meta.ID, nil
		}
	}
	return "", api.Errorf(api.CodeRefused, "node %s is not a member of the configuration database yet", n.Meta.Name)
}
