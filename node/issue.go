// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/pki"
)

// certificatePrefix is where the database remembers, by node ID, which keys may
// renew and which certificate is the newest.
const certificatePrefix = configdb.Root + "certificate/"

// certificateRecord is what it remembers.
type certificateRecord struct {
	// Keys are the SHA-256 of the public keys that may ask for another
	// certificate: the one that asked last, and the one it was given, until the
	// node has put that to use.
	Keys []string `json:"keys"`
	// Serial of the newest certificate. A node that has another renews at once;
	// empty: an administrator wants it to.
	Serial string `json:"serial"`
}

func certificateKey(nodeID string) string { return certificatePrefix + nodeID }

// certificateOf returns the record and its revision, 0 if there is none.
func certificateOf(v *configdb.View, nodeID string) (r certificateRecord, revision uint64, err error) {
	e, ok := v.Get(certificateKey(nodeID))
	if !ok {
		return r, 0, nil
	}
	if err := json.Unmarshal(e.Value, &r); err != nil {
		return r, e.Revision, fmt.Errorf("read %s: %w", certificateKey(nodeID), err)
	}
	return r, e.Revision, nil
}

func (r certificateRecord) put(tx *configdb.Txn, nodeID string, was uint64) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tx.RequireRevision(certificateKey(nodeID), was)
	tx.Put(certificateKey(nodeID), b)
	return nil
}

// issue signs a node's certificate and adds to the transaction what makes it
// good: it must not be handed out before that is committed. What it says comes
// from the node's object. present is the key that asked; empty for a new node.
func (m *member) issue(v *configdb.View, tx *configdb.Txn, n *api.Node, pub any, present string) ([]byte, error) {
	c, err := configdb.Clusters.Get(v, m.info.ClusterID)
	if err != nil {
		return nil, err
	}
	caKey, err := pki.Open(m.info.clusterKey, caKeyLabel, c.Spec.SealedCAKey)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(n.Spec.Address)
	if err != nil {
		return nil, fmt.Errorf("address of node %s: %w", n.Meta.Name, err)
	}
	cert, err := pki.Issue([]byte(c.Spec.CACert), caKey, pub, pki.TermsFrom(time.Now(), certificateLife(&c.Spec), n.Meta.ID, n.Meta.Name, host))
	if err != nil {
		return nil, err
	}
	leaf, err := pki.ParseCert(cert)
	if err != nil {
		return nil, err
	}
	fresh, err := pki.KeyHash(leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	_, was, err := certificateOf(v, n.Meta.ID)
	if err != nil {
		return nil, err
	}
	r := certificateRecord{Keys: []string{fresh}, Serial: pki.Serial(leaf)}
	if present != "" {
		r.Keys = []string{present, fresh}
	}
	// Not under an authority that was replaced meanwhile.
	tx.RequireRevision(configdb.Clusters.SpecKey(c.Meta.ID), c.Meta.Revision)
	return cert, r.put(tx, n.Meta.ID, was)
}

func certificateLife(c *api.ClusterSpec) time.Duration {
	if c.CertificateSeconds == 0 {
		return pki.NodeCertLife
	}
	return time.Duration(c.CertificateSeconds) * time.Second
}

// methodCertify is called on any node by one that renews.
const methodCertify = "cluster.certify"

type certifyResult struct {
	Cert string `json:"cert"`
	// Now is the signer's clock.
	Now time.Time `json:"now"`
}

// supersededError: the key is not, or no longer, the node's newest.
type supersededError struct{ error }

// codeSuperseded keeps that on the way to another node.
const codeSuperseded = "superseded"

// RPCCode keeps the code on the way to another node.
func (supersededError) RPCCode() string { return codeSuperseded }

// Unwrap gives the code for users.
func (e supersededError) Unwrap() error { return e.error }

func superseded(name string) error {
	return supersededError{api.Errorf(api.CodeRefused,
		"the key of node %s was superseded by a later renewal: its data directory was restored from an old copy, or somebody else has used its key; remove the node and let it join again with an empty data directory", name)}
}

// serveCertify answers a node that renews. It is known by its certificate.
func (m *member) serveCertify(ctx context.Context, caller string, request []byte) ([]byte, error) {
	r, err := pki.ParseRenewal(request)
	if err != nil {
		return nil, err
	}
	if r.NodeID != caller {
		return nil, api.Errorf(api.CodeForbidden, "node %s asked for a certificate of node %s", caller, r.NodeID)
	}
	csr, present, err := r.Check(m.info.ClusterID)
	if err != nil {
		return nil, err
	}
	var cert []byte
	var name string
	_, err = configdb.Transact(ctx, m.store, "node "+caller, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := m.mayRenew(v, caller, present)
		if err != nil {
			return err
		}
		name = n.Meta.Name
		tx.RequireExists(configdb.Nodes.SpecKey(n.Meta.ID)) // not removed meanwhile
		cert, err = m.issue(v, tx, &n, csr.PublicKey, present)
		return err
	})
	if err != nil {
		return nil, err
	}
	m.log.Info("certificate renewed for a node", "node", name)
	return json.Marshal(certifyResult{Cert: string(cert), Now: time.Now()})
}

// certifyAttempts is how often a certificate is computed again when something
// it depends on has changed.
const certifyAttempts = 8

// mayRenew returns the node if it is a member and the key is one of its newest.
// A node of an early version has no record yet; its first renewal makes it.
func (m *member) mayRenew(v *configdb.View, nodeID, present string) (api.Node, error) {
	if err := trustedIn(v, nodeID, m.info.Cluster); err != nil {
		return api.Node{}, err
	}
	n, err := configdb.Nodes.Get(v, nodeID)
	if err != nil {
		return n, err
	}
	r, was, err := certificateOf(v, nodeID)
	if err != nil {
		return n, err
	}
	if was != 0 && !slices.Contains(r.Keys, present) {
		return n, superseded(n.Meta.Name)
	}
	return n, nil
}

// RenewCertificate implements rest.Authority: the node sees that its certificate
// is not the newest any more and renews.
func (m *member) RenewCertificate(ctx context.Context, actor, name string) (api.Node, error) {
	var n api.Node
	_, err := configdb.Transact(ctx, m.store, actor, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) (err error) {
		if n, err = configdb.Nodes.Find(v, "", name); err != nil {
			return err
		}
		r, was, err := certificateOf(v, n.Meta.ID)
		if err != nil {
			return err
		}
		if was == 0 {
			return api.Errorf(api.CodeRefused, "node %s runs a version that does not renew certificates; upgrade it first", n.Meta.Name)
		}
		r.Serial = ""
		tx.RequireExists(configdb.Nodes.SpecKey(n.Meta.ID))
		return r.put(tx, n.Meta.ID, was)
	})
	return n, err
}
