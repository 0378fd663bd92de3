// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
)

// pendingKeyFile keeps the key of a join under way, so that a repeated join
// with the same token is recognised as the same node.
const pendingKeyFile = "join.key"

// adminToken is the name of the first token.
const adminToken = "admin"

// defaultCluster is the name of a cluster whose founder gives none.
const defaultCluster = "muster"

// Init implements rest.Bootstrap: it founds a cluster on this host.
func (d *Daemon) Init(ctx context.Context, r api.InitRequest) (api.InitResult, error) {
	if r.Name == "" {
		r.Name = defaultCluster
	}
	if err := api.ValidName("name", r.Name); err != nil {
		return api.InitResult{}, err
	}
	d.become.Lock()
	defer d.become.Unlock()
	if err := d.notYetMember(); err != nil {
		return api.InitResult{}, err
	}
	info, caKey, err := d.foundership(r.Name)
	if err != nil {
		return api.InitResult{}, err
	}
	mark := filepath.Join(d.cfg.DataDir, foundingFile)
	if err := errors.Join(writeFile(mark, nil, 0o600), info.save(d.cfg.DataDir)); err != nil {
		return api.InitResult{}, errors.Join(err, forget(d.cfg.DataDir))
	}
	if err := d.start(info); err != nil {
		return api.InitResult{}, errors.Join(err, forget(d.cfg.DataDir))
	}
	// A caller who goes away must not leave half a cluster behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), initTimeout)
	defer cancel()
	token, err := d.current().found(ctx, caKey)
	if err == nil { // for good, or a power cut would bring the mark back
		err = errors.Join(os.Remove(mark), syncDir(d.cfg.DataDir))
	}
	if err != nil {
		// The services run already, so the daemon has to begin anew.
		err = fmt.Errorf("found cluster %s: %w; nothing of it is kept, start musterd again", r.Name, err)
		d.fail(err)
		return api.InitResult{}, errors.Join(err, forget(d.cfg.DataDir))
	}
	return api.InitResult{
		Cluster: info.Cluster, ClusterID: info.ClusterID, Node: info.Node, Address: info.Address, Token: token, CACert: string(info.ca),
	}, nil
}

func (d *Daemon) notYetMember() error {
	if m := d.current(); m != nil {
		return api.Errorf(api.CodeRefused, "this host is node %s of cluster %s (%s) already; a data directory belongs to one cluster: use another --data-dir, or remove the node first", m.info.Node, m.info.Cluster, m.info.ClusterID)
	}
	if _, err := os.Stat(filepath.Join(d.cfg.DataDir, replicaDir)); err == nil {
		return api.Errorf(api.CodeRefused, "%s holds the replica of an earlier cluster but not its identity; restore node.json and the keys from a backup, or move the directory away", d.cfg.DataDir)
	}
	return nil
}

func (d *Daemon) foundership(cluster string) (*membership, []byte, error) {
	info := &membership{ClusterID: api.NewID(), Cluster: cluster, NodeID: api.NewID(), Node: d.cfg.NodeName, Address: d.cfg.Advertise, Founder: true}
	info.clusterKey = pki.NewSecret(pki.ClusterKeyBytes)
	var caKey []byte
	var err error
	if info.ca, caKey, err = pki.NewCA(cluster, info.ClusterID); err != nil {
		return nil, nil, err
	}
	if info.key, err = pki.NewKey(); err != nil {
		return nil, nil, err
	}
	csrPEM, err := pki.NewCSR(info.key, info.Node)
	if err != nil {
		return nil, nil, err
	}
	csr, err := pki.ParseCSR(csrPEM)
	if err != nil {
		return nil, nil, err
	}
	host, _, err := net.SplitHostPort(info.Address)
	if err != nil {
		return nil, nil, err
	}
	info.cert, err = pki.SignNode(info.ca, caKey, csr, info.NodeID, info.Node, host)
	return info, caKey, err
}

// found begins the group with this node alone and writes the first objects.
func (m *member) found(ctx context.Context, caKey []byte) (string, error) {
	if err := m.store.Bootstrap(); err != nil {
		return "", err
	}
	return m.populate(ctx, caKey)
}

// dropFounding removes what an init left that was interrupted by a crash.
func (d *Daemon) dropFounding() error {
	if _, err := os.Stat(filepath.Join(d.cfg.DataDir, foundingFile)); err != nil {
		return nil //nolint:nilerr // it is not there, or loading says what is wrong
	}
	d.log.Warn("the founding of a cluster was interrupted; what it left is removed, run muster cluster init or restore again")
	return forget(d.cfg.DataDir)
}

// populate writes the first objects in one transaction: the cluster, this
// node, the pool "local" and the administrator's token, which it returns.
func (m *member) populate(ctx context.Context, caKey []byte) (string, error) {
	tx := &configdb.Txn{Actor: "local:root"}
	sealed, err := pki.Seal(m.info.clusterKey, caKeyLabel, caKey)
	if err != nil {
		return "", err
	}
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", m.info.Cluster)}
	c.Meta.ID = m.info.ClusterID
	c.Spec = api.ClusterSpec{CACert: string(m.info.ca), SealedCAKey: sealed, Life: 1, FeatureLevel: feature.Supported().Max}
	if c.Spec.Gossip, err = firstGossipKeys(m.info.clusterKey, 0); err != nil {
		return "", err
	}
	n := api.Node{Meta: api.NewMeta(api.KindNode, "", m.info.Node)}
	n.Meta.ID = m.info.NodeID
	n.Spec.Address = m.info.Address
	n.Status = api.NodeStatus{Phase: api.NodeJoining, Version: version.Version, FeatureLevels: new(feature.Supported())}
	if err := m.info.recordFounder(tx); err != nil {
		return "", err
	}
	p := api.Pool{Meta: api.NewMeta(api.KindPool, "", api.LocalPool)}
	t, text := newAdminToken(adminToken)
	err = errors.Join(c.Prepare(), n.Prepare(), p.Prepare(), t.Prepare(),
		configdb.Clusters.Create(tx, &c), configdb.Nodes.Create(tx, &n), configdb.Pools.Create(tx, &p), configdb.Tokens.Create(tx, &t))
	if err != nil {
		return "", err
	}
	if _, err := m.store.Txn(ctx, tx); err != nil {
		return "", err
	}
	return text, nil
}

// Join implements rest.Bootstrap: it makes this host a member of the cluster
// that made the token.
func (d *Daemon) Join(ctx context.Context, r api.JoinRequest) (api.JoinResult, error) {
	t, err := pki.ParseJoinToken(r.Token)
	if err != nil {
		return api.JoinResult{}, api.Invalid("token", "%v", err)
	}
	d.become.Lock()
	defer d.become.Unlock()
	if err := d.notYetMember(); err != nil {
		if m := d.current(); m != nil && m.mayComeBack(t) {
			return m.comeBack(ctx, t)
		}
		return api.JoinResult{}, err
	}
	if now := time.Now(); now.After(t.ExpiresAt) {
		return api.JoinResult{}, api.Errorf(api.CodeRefused, "this join token expired at %s, and the clock of this host says %s; make a new one with: muster cluster token create", t.ExpiresAt.Format(time.RFC3339), stamp(now))
	}
	if err := probePort(d.cfg.Listen); err != nil {
		return api.JoinResult{}, api.Errorf(api.CodeRefused, "%w", err)
	}
	key, err := pendingKey(d.cfg)
	if err != nil {
		return api.JoinResult{}, err
	}
	csr, err := pki.NewCSR(key, d.cfg.NodeName)
	if err != nil {
		return api.JoinResult{}, err
	}
	a, err := askAdmission(ctx, t, api.AdmitRequest{
		TokenID: t.TokenID, Secret: t.Secret, CSR: string(csr), Node: d.cfg.NodeName, Address: d.cfg.Advertise, Version: version.Version, FeatureLevels: new(feature.Supported()),
	})
	if err != nil {
		return api.JoinResult{}, err
	}
	info := &membership{
		ClusterID: a.ClusterID, Cluster: a.Cluster, NodeID: a.NodeID, Node: d.cfg.NodeName, Address: d.cfg.Advertise, Role: a.Role, Life: a.Life, Peers: a.Peers,
		key: key, cert: []byte(a.Cert), ca: []byte(a.CACert), clusterKey: a.ClusterKey, authority: a.Authority,
	}
	if err := info.save(d.cfg.DataDir); err != nil {
		return api.JoinResult{}, errors.Join(err, forget(d.cfg.DataDir))
	}
	_ = os.Remove(filepath.Join(d.cfg.DataDir, pendingKeyFile)) // a leftover does no harm
	if err := d.start(info); err != nil {
		return api.JoinResult{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if err := d.current().waitMember(ctx); err != nil {
		return api.JoinResult{}, fmt.Errorf("admitted to cluster %s, but not yet in step with it (the daemon goes on trying): %w", a.Cluster, err)
	}
	return api.JoinResult{Cluster: info.Cluster, ClusterID: info.ClusterID, Node: info.Node, Address: info.Address, CACert: a.CACert}, nil
}

// pendingKey returns the key of an interrupted join, or a new one.
func pendingKey(cfg *Config) ([]byte, error) {
	path := filepath.Join(cfg.DataDir, pendingKeyFile)
	if key, err := os.ReadFile(path); err == nil {
		if _, err := pki.NewCSR(key, cfg.NodeName); err == nil {
			return key, nil
		}
	}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	return key, writeFile(path, key, 0o600)
}
