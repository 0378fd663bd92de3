// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// Limits and defaults of joining.
const (
	defaultJoinTTL = time.Hour
	minJoinTTL     = time.Minute
	maxJoinTTL     = 7 * 24 * time.Hour
	caKeyLabel     = "cluster/ca-key"
)

// The calls between nodes about membership.
const (
	methodEnlist = "cluster.enlist"
	methodExpel  = "cluster.expel"
	methodLeader = "cluster.leader"
	// methodHealth asks a member how its replica fares, methodTransfer the
	// leader to hand over.
	methodHealth   = "cluster.health"
	methodTransfer = "cluster.transfer"
)

// Status implements rest.Cluster.
func (m *member) Status(context.Context) (api.ClusterStatus, error) {
	v := m.store.Local()
	age, known := m.store.Staleness()
	st := api.ClusterStatus{
		Cluster: m.info.Cluster, ClusterID: m.info.ClusterID, Life: m.info.life(), Node: m.info.Node, Term: m.store.Term(),
		Revision: v.Revision(), StaleSeconds: age.Seconds(), Quorum: known && age < quorumAge,
	}
	if c, err := configdb.Clusters.Get(v, m.info.ClusterID); err == nil {
		if c.Spec.Rotation != nil {
			st.CARotation = c.Spec.Rotation.Phase
		}
		st.FeatureLevel = levelStatus(&c.Spec, v)
	}
	if b, err := configdb.CPUBaselines.Get(v, m.info.ClusterID); err == nil {
		st.CPUBaseline = &api.CPUBaselineStatus{Generation: b.Meta.Generation, Baseline: b.Spec}
	}
	st.NoQuorum = m.noQuorum()
	leaderID, _, _ := m.store.Leader()
	members, err := m.store.Members()
	if err != nil {
		return st, err
	}
	hints := m.hints()
	for _, mb := range members {
		ms := api.MemberStatus{NodeID: mb.NodeID, Address: mb.Address, Voter: mb.Voter, Leader: mb.NodeID == leaderID, Gossip: hints[mb.NodeID]}
		if n, err := configdb.Nodes.Get(v, mb.NodeID); err == nil {
			ms.Node, ms.Role, ms.Phase = n.Meta.Name, n.Spec.Role, n.Status.Phase
			ms.Version, ms.FeatureLevels = n.Status.Version, new(n.Status.Supports())
			if n.Status.Certificate != nil {
				ms.CertificateEnds = &n.Status.Certificate.NotAfter
			}
		}
		if ms.Leader {
			st.Leader = ms.Node
		}
		st.Members = append(st.Members, ms)
	}
	return st, nil
}

// CreateJoinToken implements rest.Cluster.
func (m *member) CreateJoinToken(ctx context.Context, actor string, r api.JoinTokenRequest) (api.JoinToken, error) {
	ttl := time.Duration(r.TTLSeconds) * time.Second
	if r.TTLSeconds == 0 {
		ttl = defaultJoinTTL
	}
	if ttl < minJoinTTL || ttl > maxJoinTTL {
		return api.JoinToken{}, api.Invalid("ttlSeconds", "is %d; give %d to %d", r.TTLSeconds, int(minJoinTTL.Seconds()), int(maxJoinTTL.Seconds()))
	}
	hashes, err := m.authorityHashes()
	if err != nil {
		return api.JoinToken{}, err
	}
	secret := fmt.Sprintf("%x", pki.NewSecret(32))
	expires := time.Now().Add(ttl).UTC().Truncate(time.Second)
	t := api.Token{Meta: api.NewMeta(api.KindToken, "", "")}
	t.Meta.Name = "join-" + t.Meta.ID
	t.Spec = api.TokenSpec{Use: api.TokenJoin, JoinRole: r.Role, Hash: pki.HashSecret(secret), ExpiresAt: expires}
	if err := t.Prepare(); err != nil {
		return api.JoinToken{}, err
	}
	jt := pki.JoinToken{ClusterID: m.info.ClusterID, CAHash: hashes[0], TokenID: t.Meta.ID, Secret: secret, ExpiresAt: expires}
	if len(hashes) > 1 {
		jt.OtherCAHash = hashes[1]
	}
	// This node first, so that the joining node asks where it surely works.
	jt.Addresses = []string{m.info.Address}
	members, err := m.store.Members()
	if err != nil {
		return api.JoinToken{}, err
	}
	for _, mb := range members {
		if mb.NodeID != m.info.NodeID {
			jt.Addresses = append(jt.Addresses, mb.Address)
		}
	}
	word, err := jt.Encode()
	if err != nil {
		return api.JoinToken{}, err
	}
	tx := &configdb.Txn{Actor: actor}
	if err := configdb.Tokens.Create(tx, &t); err != nil {
		return api.JoinToken{}, err
	}
	if _, err := m.store.Txn(ctx, tx); err != nil {
		return api.JoinToken{}, err
	}
	return api.JoinToken{Token: word, ExpiresAt: expires}, nil
}

// Admit implements rest.Cluster: it checks the token, makes the node known and
// issues its certificate. Everything is checked before anything is written.
func (m *member) Admit(ctx context.Context, r api.AdmitRequest) (api.AdmitResult, error) {
	if err := api.ValidName("node", r.Node); err != nil {
		return api.AdmitResult{}, err
	}
	if host, _, err := net.SplitHostPort(r.Address); err != nil || host == "" {
		return api.AdmitResult{}, api.Invalid("address", "%q is not host:port", r.Address)
	}
	csr, err := pki.ParseCSR([]byte(r.CSR))
	if err != nil {
		return api.AdmitResult{}, api.Invalid("csr", "%v", err)
	}
	keyHash, err := pki.KeyHash(csr.PublicKey)
	if err != nil {
		return api.AdmitResult{}, api.Invalid("csr", "%v", err)
	}
	var n api.Node
	var cert []byte
	// Not from an old replica: a token that was used a moment ago is used.
	if _, err := m.store.View(ctx); err != nil {
		return api.AdmitResult{}, err
	}
	_, err = configdb.Transact(ctx, m.store, "node "+r.Node, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) (err error) {
		present := ""
		if r.NodeID != "" {
			n, present, err = m.readmission(v, tx, r, keyHash)
		} else {
			n, err = m.admission(v, tx, r, keyHash)
		}
		if err == nil {
			cert, err = m.issue(v, tx, &n, csr.PublicKey, present)
		}
		return err
	})
	if err != nil {
		return api.AdmitResult{}, err
	}
	return m.admitted(n, cert)
}

// admission is the transaction of Admit.
func (m *member) admission(v *configdb.View, tx *configdb.Txn, r api.AdmitRequest, keyHash string) (api.Node, error) {
	t, err := m.tokenOf(v, r)
	if err != nil {
		return api.Node{}, err
	}
	if t.Spec.UsedBy != "" {
		if err := m.levelFits(v, r); err != nil {
			return api.Node{}, err
		}
		// The same node may finish an interrupted join, but not with a key that it
		// has replaced since.
		rec, was, err := certificateOf(v, t.Spec.UsedBy)
		if err != nil {
			return api.Node{}, err
		}
		fresh := was == 0 || slices.Contains(rec.Keys, keyHash)
		if n, err := configdb.Nodes.Get(v, t.Spec.UsedBy); err == nil && t.Spec.UsedKey == keyHash && fresh {
			return n, nil
		}
		return api.Node{}, tokenUsed()
	}
	if err := m.levelFits(v, r); err != nil {
		return api.Node{}, err
	}
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return api.Node{}, err
	}
	for i := range nodes {
		if nodes[i].Meta.Name == r.Node {
			return api.Node{}, api.Errorf(api.CodeExists, "a node named %s is a member already; choose another name with --node-name, or take the old one out with: muster node remove %s", r.Node, r.Node)
		}
		if nodes[i].Spec.Address == r.Address {
			return api.Node{}, api.Errorf(api.CodeExists, "node %s has the address %s already; check --listen and --advertise", nodes[i].Meta.Name, r.Address)
		}
	}
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", r.Node)}
	n.Spec = api.NodeSpec{Address: r.Address, Role: t.Spec.JoinRole}
	n.Status = api.NodeStatus{Phase: api.NodeJoining, Version: r.Version, FeatureLevels: r.FeatureLevels}
	if err := n.Prepare(); err != nil {
		return n, err
	}
	if err := configdb.Nodes.Create(tx, &n); err != nil {
		return n, err
	}
	// Whoever raises the feature level has to see this node.
	tx.Put(admittedKey, []byte(n.Meta.ID))
	t.Spec.UsedBy, t.Spec.UsedKey = n.Meta.ID, keyHash
	return n, configdb.Tokens.UpdateSpec(v, tx, &t)
}

// tokenOf returns the join token that a request shows, used or not.
func (m *member) tokenOf(v *configdb.View, r api.AdmitRequest) (api.Token, error) {
	t, err := configdb.Tokens.Get(v, r.TokenID)
	if err != nil || t.Spec.Use != api.TokenJoin || subtle.ConstantTimeCompare([]byte(t.Spec.Hash), []byte(pki.HashSecret(r.Secret))) != 1 {
		return t, api.Errorf(api.CodeUnauthorized, "this join token is not known to cluster %s (revoked, or of another cluster); make a new one with: muster cluster token create", m.info.Cluster)
	}
	if now := time.Now(); now.After(t.Spec.ExpiresAt) {
		return t, api.Errorf(api.CodeUnauthorized, "this join token expired at %s, and the clock of node %s says %s; make a new one with: muster cluster token create", t.Spec.ExpiresAt.Format(time.RFC3339), m.info.Node, stamp(now))
	}
	return t, nil
}

func tokenUsed() error {
	return api.Errorf(api.CodeUnauthorized, "this join token was used already; make a new one with: muster cluster token create")
}

// admitted is the answer to a node that was admitted by a committed transaction.
func (m *member) admitted(n api.Node, cert []byte) (api.AdmitResult, error) {
	c, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil {
		return api.AdmitResult{}, err
	}
	out := api.AdmitResult{
		ClusterID: m.info.ClusterID, Cluster: m.info.Cluster, NodeID: n.Meta.ID, CACert: string(bundleOf(&c.Spec)),
		Cert: string(cert), ClusterKey: m.info.clusterKey, Role: n.Spec.Role, Life: m.info.life(),
	}
	if out.Authority, err = copyAuthority(&c); err != nil {
		return api.AdmitResult{}, err
	}
	members, err := m.store.Members()
	if err != nil {
		return api.AdmitResult{}, err
	}
	for _, mb := range members {
		out.Peers = append(out.Peers, mb.NodeID+"@"+mb.Address)
	}
	m.log.Info("node admitted", "node", n.Meta.Name, "address", n.Spec.Address, "role", n.Spec.Role)
	return out, nil
}

// RemoveNode implements rest.Cluster.
func (m *member) RemoveNode(ctx context.Context, audit api.Event, name string, force bool) error {
	v, err := m.store.View(ctx)
	if err != nil {
		return err
	}
	n, err := configdb.Nodes.Find(v, "", name)
	if err != nil {
		return err
	}
	if n.Status.Phase == api.NodeReady && force {
		return api.Errorf(api.CodeRefused, "node %s is alive; remove it without force", n.Meta.Name)
	}
	if (n.Status.Phase == api.NodeLost || n.Status.Phase == api.NodeJoining) && !force {
		return api.Errorf(api.CodeRefused, "node %s is %s and cannot take leave itself; make sure that it is switched off, then use force", n.Meta.Name, n.Status.Phase)
	}
	if out := n.Status.StorageFences; len(out) > 0 && !force {
		return api.Errorf(api.CodeRefused, "node %s is locked out of pool %s, and would leave its addresses on the pool's list; it takes them off itself (muster node show %s says what it waits for), try again then", n.Meta.Name, out[0].Pool, n.Meta.Name)
	}
	if bound := boundTo(v, n.Meta.ID); len(bound) > 0 && !force {
		return api.Errorf(api.CodeRefused, "node %s still has %d VMs (%s); move or delete them first", n.Meta.Name, len(bound), joinSome(bound, 5))
	}
	req, err := json.Marshal(expelRequest{NodeID: n.Meta.ID, Actor: audit.Spec.Actor, Source: configdb.SourceOf(ctx), Force: force, Audit: &audit})
	if err != nil {
		return err
	}
	var answer []byte
	err = m.expel(ctx, n.Meta, func(ctx context.Context) (err error) {
		if force {
			id, _, _ := m.store.Leader()
			if err := oldHostsKnown(v, id, &n); err != nil {
				return err
			}
		}
		answer, err = m.CallLeader(ctx, methodExpel, req)
		return err
	})
	if err != nil || n.Meta.ID == m.info.NodeID { // which can write nothing any more
		return err
	}
	return auditRemoval(ctx, m.store, answer, &audit)
}

// auditRemoval writes the event of a removal if the leader, which is older, has not.
func auditRemoval(ctx context.Context, db configdb.DB, answer []byte, audit *api.Event) error {
	var did expelled
	if len(answer) > 0 {
		if err := json.Unmarshal(answer, &did); err != nil {
			return fmt.Errorf("understand the answer to the removal of node %s: %w", audit.Spec.Target, err)
		}
	}
	if did.Audited {
		return nil
	}
	tx := &configdb.Txn{Actor: audit.Spec.Actor}
	if err := configdb.PutEvent(tx, audit); err != nil {
		return err
	}
	if _, err := db.Txn(ctx, tx); err != nil {
		return fmt.Errorf("node %s was removed, but the event that says so was not written: %w", audit.Spec.Target, err)
	}
	return nil
}

// oldHostsKnown says why the leader cannot be told that the host of a node is off: its
// software would free VMs that another host of the old cluster may run.
func oldHostsKnown(v *configdb.View, leaderID string, n *api.Node) error {
	leader, err := configdb.Nodes.Get(v, leaderID)
	if err != nil || feature.OldHosts.At(leader.Status.Supports().Max) || !isGhost(v, n) {
		return nil
	}
	var any lastPick
	other, ok, err := any.pick(v, otherGhost(v, n.Meta.ID))
	if err != nil || !ok {
		return err
	}
	return api.Errorf(api.CodeRefused, "node %s leads with older software (version %s), which would free VMs of node %s that node %s of the old cluster may run; upgrade it first, or hand over: muster cluster transfer NODE", leader.Meta.Name, leader.Status.Version, n.Meta.Name, other.Meta.Name)
}

// expel asks the leader until it has taken a node out, or refuses. That this node was
// taken out itself, by whomever, it may know before the answer comes, which may take
// longer than its daemon lives from then on: nobody has to wait for it.
func (m *member) expel(ctx context.Context, node api.Meta, ask func(context.Context) error) error {
	self := node.ID == m.info.NodeID
	// The leader cannot take itself out: it hands over first, so ask again.
	ctx, cancel := context.WithTimeout(ctx, expelTimeout)
	defer cancel()
	if self {
		defer context.AfterFunc(m.left, cancel)()
	}
	for {
		err := ask(ctx)
		// What a node that removes itself has open is closed, maybe before the
		// answer came.
		code := refusal(err)
		cut := self && code == ""
		switch {
		case err == nil, self && (code == codeRemoved || m.left.Err() != nil), cut && m.expelled(ctx):
			return nil
		case !cut && !askAgain(err):
			return err
		}
		select {
		case <-time.After(leaderRetry):
		case <-ctx.Done():
			if self && m.left.Err() != nil {
				return nil
			}
			return fmt.Errorf("remove node %s: %w", node.Name, err)
		}
	}
}

// askAgain reports whether the leader is changing, so that the request was
// carried out by nobody.
func askAgain(err error) bool {
	code := refusal(err)
	return errors.Is(err, configdb.ErrNoQuorum) || code == codeHandedOver || code == codeNotLeader
}

// refusal is the code with which a call was refused, here or on another node;
// empty if it has none.
func refusal(err error) string {
	var here interface{ RPCCode() string }
	var there *clusternet.RemoteError
	switch {
	case errors.As(err, &there):
		return there.Code
	case errors.As(err, &here):
		return here.RPCCode()
	}
	return ""
}

// boundTo returns the names of the VMs that are bound to a node.
func boundTo(v *configdb.View, nodeID string) []string {
	var out []string
	for _, b := range bindingsOf(v, nodeID) {
		name := b.Meta.ID
		if vm, err := configdb.VMs.Get(v, b.Meta.ID); err == nil {
			name = vm.Meta.Name
		}
		out = append(out, name)
	}
	return out
}

func joinSome(list []string, most int) string {
	out := ""
	for i, s := range list {
		if i == most {
			return out + ", …"
		}
		if i > 0 {
			out += ", "
		}
		out += s
	}
	return out
}
