// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
)

// A node that was off until the authority that it knows was replaced knows
// nobody and is known by nobody. An administrator's join token brings it back:
// the hash in it proves the cluster to the node; the token, and the key of its
// last certificate, prove the node to the cluster.

// mayComeBack reports whether a join token is for this node's own cluster while
// the node is out of touch with it.
func (m *member) mayComeBack(t *pki.JoinToken) bool {
	_, _, inTouch := m.store.Leader()
	return t.ClusterID == m.info.ClusterID && !inTouch
}

// comeBack asks for a certificate of the authority that signs now.
func (m *member) comeBack(ctx context.Context, t *pki.JoinToken) (api.JoinResult, error) {
	var none api.JoinResult
	held := m.certs.current()
	key, err := pendingKey(m.cfg)
	if err != nil {
		return none, err
	}
	csr, err := pki.NewCSR(key, m.info.Node)
	if err != nil {
		return none, err
	}
	renewal, err := pki.NewRenewal(held.Key, m.info.ClusterID, m.info.NodeID, csr)
	if err != nil {
		return none, err
	}
	a, err := askAdmission(ctx, t, api.AdmitRequest{
		TokenID: t.TokenID, Secret: t.Secret, CSR: string(csr), Node: m.info.Node, Address: m.info.Address, Version: version.Version, FeatureLevels: new(feature.Supported()),
		NodeID: m.info.NodeID, ProofKey: renewal.Proof.PublicKey, ProofSignature: renewal.Proof.Signature,
	})
	if err != nil {
		return none, err
	}
	if err := m.certs.install(credentials{Key: key, Cert: []byte(a.Cert), CA: []byte(a.CACert), Authority: a.Authority}); err != nil {
		return none, err
	}
	_ = os.Remove(filepath.Join(m.cfg.DataDir, pendingKeyFile)) // a leftover does no harm
	m.log.Info("this node is back with a certificate of the present authority")
	return api.JoinResult{Cluster: m.info.Cluster, ClusterID: m.info.ClusterID, Node: m.info.Node, Address: m.info.Address, CACert: a.CACert}, nil
}

// readmission is the transaction of Admit for a node that is a member already.
// It returns the key that the node has proved to have.
func (m *member) readmission(v *configdb.View, tx *configdb.Txn, r api.AdmitRequest, keyHash string) (n api.Node, present string, err error) {
	t, err := m.tokenOf(v, r)
	if err != nil {
		return n, "", err
	}
	renewal := pki.Renewal{NodeID: r.NodeID, CSR: r.CSR, Proof: pki.Proof{PublicKey: r.ProofKey, Signature: r.ProofSignature}}
	if _, present, err = renewal.Check(m.info.ClusterID); err != nil {
		return n, "", api.Invalid("proofSignature", "%v", err)
	}
	if _, gone := v.Get(removedPrefix + r.NodeID); gone {
		return n, "", api.Errorf(api.CodeRefused, "node %s was removed from cluster %s; to join again, start with an empty data directory", r.Node, m.info.Cluster)
	}
	if n, err = configdb.Nodes.Get(v, r.NodeID); err != nil {
		return n, "", api.Errorf(api.CodeRefused, "cluster %s has no node with ID %s; to join, start with an empty data directory", m.info.Cluster, r.NodeID)
	}
	rec, was, err := certificateOf(v, r.NodeID)
	if err != nil {
		return n, "", err
	}
	if was != 0 && !slices.Contains(rec.Keys, present) {
		return n, "", superseded(n.Meta.Name)
	}
	again := t.Spec.UsedBy == r.NodeID && t.Spec.UsedKey == keyHash // whose answer was lost
	if t.Spec.UsedBy != "" && !again {
		return n, "", tokenUsed()
	}
	if err := m.levelFits(v, r); err != nil {
		return n, "", err
	}
	tx.RequireExists(configdb.Nodes.SpecKey(n.Meta.ID))
	t.Spec.UsedBy, t.Spec.UsedKey = n.Meta.ID, keyHash
	return n, present, configdb.Tokens.UpdateSpec(v, tx, &t)
}
