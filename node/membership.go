// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/placement"
)

// Waits of joining and leaving.
const (
	admitTimeout = 20 * time.Second
	leaderRetry  = 200 * time.Millisecond
	expelTimeout = 20 * time.Second
)

// errHandedOver: the leader was asked to expel itself and gave up leadership.
var errHandedOver = errors.New("leadership was handed over; ask the new leader")

// Codes of refusals after which another leader is to be asked.
const (
	codeHandedOver = "handed_over"
	codeNotLeader  = "not_leader"
)

type handedOverError struct{ error }

// RPCCode keeps the code on the way to another node.
func (handedOverError) RPCCode() string { return codeHandedOver }

type expelRequest struct {
	NodeID string `json:"nodeID"`
	Actor  string `json:"actor"`
	Source string `json:"source,omitempty"`
	// Force: the administrator says that the lost node's host is switched off.
	Force bool `json:"force,omitempty"`
	// Audit is the event that goes with the removal: a node that removes itself
	// cannot write it afterwards.
	Audit *api.Event `json:"audit,omitempty"`
}

// expelled is the answer to it; older leaders answer nothing.
type expelled struct {
	// Audited: the event was written, with the removal.
	Audited bool `json:"audited,omitempty"`
}

// serveEnlist is called on the leader by a node that was admitted and now
// answers on its port: only then may it count for the quorum.
func (m *member) serveEnlist(ctx context.Context, caller string) ([]byte, error) {
	if _, ok := m.store.Leadership(); !ok {
		return nil, notLeader()
	}
	v, err := m.store.View(ctx)
	if err != nil {
		return nil, err
	}
	n, err := configdb.Nodes.Get(v, caller)
	if err != nil {
		return nil, fmt.Errorf("this node was removed from the cluster: %w", err)
	}
	members, err := m.store.Members()
	if err != nil {
		return nil, err
	}
	for _, mb := range members {
		if mb.NodeID == caller && mb.Address == n.Spec.Address {
			return nil, nil
		}
	}
	// Without a vote: it gets one when it has caught up, if one is needed.
	if err := m.store.AddMember(caller, n.Spec.Address, false); err != nil {
		return nil, err
	}
	m.log.Info("member added", "node", n.Meta.Name)
	return nil, nil
}

// serveExpel is called on the leader to take a node out for good.
func (m *member) serveExpel(ctx context.Context, request []byte) ([]byte, error) {
	var r expelRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, fmt.Errorf("malformed request: %w", err)
	}
	ctx = configdb.WithSource(ctx, r.Source)
	l, ok := m.store.Leadership()
	if !ok {
		return nil, notLeader()
	}
	if r.NodeID == m.info.NodeID {
		if err := m.store.TransferLeadership(); err != nil {
			return nil, fmt.Errorf("hand over leadership before leaving: %w", err)
		}
		return nil, handedOverError{errHandedOver}
	}
	// One after the other: two hosts of an old cluster would hand each other their VMs.
	m.expelling.Lock()
	defer m.expelling.Unlock()
	if r.Force {
		if err := takeOver(ctx, m.store, m.log, r, l.Term, heirOf(r.NodeID)); err != nil {
			return nil, err
		}
	}
	if err := deleteNode(ctx, m.store, r, l.Term); err != nil {
		return nil, err
	}
	// If this fails, dropGhosts does it.
	if err := m.store.RemoveMember(r.NodeID); err != nil {
		return nil, err
	}
	return json.Marshal(expelled{Audited: r.Audit != nil})
}

// deleteNode takes the node's object away: from then on it gets neither lease
// nor VM. First it is marked: every placement requires the revision of the
// node's spec, so that a VM is either seen below or not placed there.
func deleteNode(ctx context.Context, db configdb.DB, r expelRequest, term uint64) error {
	bound := false
	step := func(decide func(v *configdb.View, tx *configdb.Txn, n *api.Node) error) error {
		_, err := configdb.Transact(ctx, db, r.Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, r.NodeID)
			if api.CodeOf(err) == api.CodeNotFound {
				return nil // a repeated request
			}
			if err != nil {
				return err
			}
			tx.RequireTerm(term)
			return decide(v, tx, &n)
		})
		return err
	}
	if err := step(func(v *configdb.View, tx *configdb.Txn, n *api.Node) error {
		if len(boundTo(v, r.NodeID)) > 0 {
			return api.Errorf(api.CodeRefused, "node %s still has VMs", n.Meta.Name)
		}
		now := time.Now().UTC()
		n.Meta.DeletingAt = &now
		return configdb.Nodes.UpdateSpec(v, tx, n)
	}); err != nil {
		return err
	}
	err := step(func(v *configdb.View, tx *configdb.Txn, n *api.Node) error {
		if bound = len(boundTo(v, r.NodeID)) > 0; bound {
			n.Meta.DeletingAt = nil // it stays
			return configdb.Nodes.UpdateSpec(v, tx, n)
		}
		placement.Reserve(v, tx, r.NodeID)
		configdb.ReleaseNode(v, tx, r.NodeID)
		configdb.Nodes.Delete(tx, n)
		tx.Put(removedPrefix+r.NodeID, []byte(n.Meta.Name))
		tx.Delete(certificateKey(r.NodeID))
		if r.Audit != nil {
			if err := configdb.PutEvent(tx, r.Audit); err != nil {
				return err
			}
		}
		for e := range v.Scan(configdb.PoolStates.SpecPrefix(), "") {
			id, _ := configdb.PoolStates.IDOf(e.Key)
			if ps, err := configdb.PoolStates.Get(v, id); err == nil && ps.Spec.NodeID == r.NodeID {
				configdb.PoolStates.DeleteUnnamed(tx, &ps)
			}
		}
		return nil
	})
	if err == nil && bound {
		return api.Errorf(api.CodeRefused, "a VM was placed on the node meanwhile; move or delete it first")
	}
	return err
}

// dropGhosts takes out of the group, while this node leads, what is no node any
// more: a removal may have been interrupted after the object was gone. A node
// becomes a member only after its object was written, and a leader has applied
// everything, so what has no object here was removed.
func (m *member) dropGhosts() error {
	members, err := m.store.Members()
	if err != nil {
		return err
	}
	v := m.store.Local()
	for _, mb := range members {
		if _, err := configdb.Nodes.Get(v, mb.NodeID); mb.NodeID == m.info.NodeID || err == nil || api.CodeOf(err) != api.CodeNotFound {
			continue
		}
		if err := m.store.RemoveMember(mb.NodeID); err != nil {
			return err
		}
		m.log.Info("member removed that is no node any more", "node", mb.NodeID)
	}
	return nil
}

// removedPrefix is where the IDs of removed nodes are remembered: their
// certificates are good for years, and prove nothing any more.
const removedPrefix = configdb.Root + "removed/"

// trusted reports whether a node that proved its identity may call this one.
// What this replica does not know yet may be a node that just joined.
func (m *member) trusted(nodeID string) error {
	err := trustedIn(m.store.Local(), nodeID, m.info.Cluster)
	if err == nil {
		m.seen.note(nodeID)
	}
	return err
}

func trustedIn(v *configdb.View, nodeID, cluster string) error {
	if e, gone := v.Get(removedPrefix + nodeID); gone {
		return removedError{fmt.Errorf("node %s was removed from cluster %s", e.Value, cluster)}
	}
	return nil
}

// codeRemoved tells a node that it is no member any more.
const codeRemoved = "removed"

type removedError struct{ error }

// RPCCode keeps the code on the way to the node.
func (removedError) RPCCode() string { return codeRemoved }

// askWhetherRemoved asks the other nodes, while no leader is known, whether this
// one was removed while it was away: nobody else would tell it.
func (m *member) askWhetherRemoved(ctx context.Context) bool {
	if _, _, ok := m.store.Leader(); ok {
		return false
	}
	return m.askOthers(ctx, func(id string, err error) bool {
		var re *clusternet.RemoteError
		// A leader that was found meanwhile knows better: a majority that was cut
		// off goes on, whatever one node, which somebody recovered, says of it.
		_, _, led := m.store.Leader()
		if !led && errors.As(err, &re) && (re.Code == codeRemoved || re.Code == clusternet.CodeOldLife) {
			m.log.Warn("this node is no member any more", "said", id, "why", re.Detail)
			return true
		}
		m.certs.met(err)
		return false
	})
}

// expelled reports whether this node was removed, as far as its replica or any
// other node knows.
func (m *member) expelled(ctx context.Context) bool {
	return trustedIn(m.store.Local(), m.info.NodeID, m.info.Cluster) != nil ||
		m.askOthers(ctx, func(_ string, err error) bool { return refusal(err) == codeRemoved })
}

// askOthers calls one node after the other that this one knows, until one's
// answer is what is looked for.
func (m *member) askOthers(ctx context.Context, found func(nodeID string, err error) bool) bool {
	for id, address := range m.knownNodes() {
		cctx, cancel := context.WithTimeout(ctx, leaderRetry*5)
		_, err := m.client.Call(cctx, id, address, methodLeader, nil)
		cancel()
		if found(id, err) {
			return true
		}
	}
	return false
}

// knownNodes are the others that this node ever heard of, with their addresses.
// After a start without a leader its state may be an older one, so the
// members in its log count, too.
func (m *member) knownNodes() map[string]string {
	out := map[string]string{}
	for _, p := range m.info.Peers {
		if id, address, ok := strings.Cut(p, "@"); ok {
			out[id] = address
		}
	}
	members, err := m.store.Members()
	if err != nil {
		m.log.Debug("members not known", "err", err)
	}
	for _, mb := range members {
		out[mb.NodeID] = mb.Address
	}
	nodes, _ := configdb.Nodes.List(m.store.Local())
	for i := range nodes {
		out[nodes[i].Meta.ID] = nodes[i].Spec.Address
	}
	delete(out, m.info.NodeID)
	return out
}

// askAdmission talks to the members named in a join token. A member is
// recognised by the hash of the authority that it shows.
func askAdmission(ctx context.Context, t *pki.JoinToken, r api.AdmitRequest) (api.AdmitResult, error) {
	ctx, cancel := context.WithTimeout(ctx, admitTimeout)
	defer cancel()
	var errs []error
	for _, addr := range t.Addresses {
		out, err := askOne(ctx, t, addr, r)
		var refused *api.Error
		if errors.As(err, &refused) && refused.Field == "featureLevels" && r.FeatureLevels != nil {
			// A member whose software is older than the levels; so is the cluster,
			// and this node reports its own when it has joined.
			r.FeatureLevels = nil
			out, err = askOne(ctx, t, addr, r)
		}
		if err == nil || errors.As(err, &refused) && refused.Code != api.CodeNoQuorum {
			return out, err
		}
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
	}
	return api.AdmitResult{}, api.Errorf(api.CodeNoQuorum, "no member of the cluster could be reached: %v", errors.Join(errs...))
}

func askOne(ctx context.Context, t *pki.JoinToken, addr string, r api.AdmitRequest) (api.AdmitResult, error) {
	var out api.AdmitResult
	body, err := json.Marshal(r)
	if err != nil {
		return out, err
	}
	tr := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d := tls.Dialer{Config: &tls.Config{
				MinVersion: tls.VersionTLS13,
				// The authority is not known yet; its hash is, from the token.
				InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it
				VerifyConnection:   func(cs tls.ConnectionState) error { return verifyByHash(cs, t.CAHash, t.OtherCAHash) },
			}}
			return d.DialContext(ctx, "tcp", addr)
		},
	}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+addr+"/api/v1/cluster/admit", bytes.NewReader(body))
	if err != nil {
		return out, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return out, err
	}
	if resp.StatusCode/100 != 2 {
		var p struct {
			Code   api.Code `json:"code"`
			Field  string   `json:"field"`
			Detail string   `json:"detail"`
		}
		if err := json.Unmarshal(b, &p); err != nil || p.Code == "" {
			return out, fmt.Errorf("status %s", resp.Status)
		}
		if p.Code == api.CodeUnauthorized {
			p.Code = api.CodeRefused // it is the join token, not the caller's login
		}
		return out, &api.Error{Code: p.Code, Field: p.Field, Detail: p.Detail}
	}
	if err := json.Unmarshal(b, &out); err != nil {
		return out, fmt.Errorf("malformed answer: %w", err)
	}
	if out.ClusterID != t.ClusterID {
		return out, fmt.Errorf("it is of cluster %s, the token of cluster %s", out.ClusterID, t.ClusterID)
	}
	return out, nil
}

// verifyByHash accepts a chain that ends at an authority with one of the hashes.
// The node may show a bridge to the authority that the hash names.
func verifyByHash(cs tls.ConnectionState, hashes ...string) error {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	known := false
	for _, ca := range cs.PeerCertificates[1:] {
		switch {
		case !ca.IsCA:
		case slices.Contains(hashes, pki.CAHash(ca)):
			roots.AddCert(ca)
			known = true
		default:
			between.AddCert(ca)
		}
	}
	if !known {
		return errors.New("the server is not of the cluster that made this join token, or the cluster has replaced its authority since; make a new one with: muster cluster token create")
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between})
	return err
}
