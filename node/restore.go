// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
)

// restoreActor is recorded with what a restore writes.
const restoreActor = "local:root"

// idempotencyPrefix has the records of requests of the old cluster's clients.
const idempotencyPrefix = configdb.Root + "idempotency/"

// dropBatch is how many keys are deleted in one transaction.
const dropBatch = 500

// Restore implements rest.Disaster: it founds a cluster on this host from a
// backup. Everything is read and decided before anything is written; then the
// mark of init holds until the new cluster works.
func (d *Daemon) Restore(ctx context.Context, r api.RestoreRequest) (api.RestoreResult, error) {
	if r.Name != "" {
		if err := api.ValidName("name", r.Name); err != nil {
			return api.RestoreResult{}, err
		}
	}
	d.become.Lock()
	defer d.become.Unlock()
	if err := d.notYetMember(); err != nil {
		return api.RestoreResult{}, err
	}
	if err := probePort(d.cfg.Listen); err != nil {
		return api.RestoreResult{}, api.Errorf(api.CodeRefused, "%w", err)
	}
	state, h, clusterKey, err := openForRestore(&r)
	if err != nil {
		return api.RestoreResult{}, err
	}
	if r.Name == "" {
		r.Name = h.Cluster
	}
	info, caKey, err := d.foundership(r.Name)
	if err != nil {
		return api.RestoreResult{}, err
	}
	info.clusterKey, info.Life = clusterKey, h.Life+1
	db := configdb.NewOffline(state, h.Term+1)
	defer db.Close()
	out, err := (&resurrection{r: &r, h: h, info: info, caKey: caKey, db: db, log: d.log}).run(ctx)
	if err != nil {
		return api.RestoreResult{}, err
	}
	// A caller who goes away must not leave half a cluster behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), initTimeout)
	defer cancel()
	return out, d.foundFrom(ctx, info, db)
}

// openForRestore reads the backup and finds the key that opens it.
func openForRestore(r *api.RestoreRequest) (*fsm.State, *backup.Header, []byte, error) {
	if !filepath.IsAbs(r.File) {
		return nil, nil, nil, api.Invalid("file", "%q is not an absolute path on this host", r.File)
	}
	var clusterKey []byte
	state, h, err := openBackup(r.File, func(h *backup.Header) (key []byte, err error) {
		switch {
		case len(r.ClusterKey) > 0 && r.Passphrase != "":
			return nil, api.Invalid("passphrase", "is given together with a cluster key; give one")
		case len(r.ClusterKey) > 0:
			clusterKey = r.ClusterKey
		case r.Passphrase != "":
			clusterKey, err = h.Slot.Open(r.Passphrase)
		case h.Slot != nil:
			err = api.Errorf(api.CodeInvalid, "%w without a key: it was made with a pass phrase, give it with --passphrase-file; or give the cluster's key with --cluster-key-file", backupfile.ErrKey)
		default:
			err = api.Errorf(api.CodeInvalid, "%w without a key: give the cluster's key with --cluster-key-file, the file cluster.key in the data directory of any node of cluster %s", backupfile.ErrKey, h.Cluster)
		}
		return clusterKey, err
	})
	return state, h, clusterKey, err
}

// foundFrom makes this host the first node of the cluster that db describes.
func (d *Daemon) foundFrom(ctx context.Context, info *membership, db *configdb.Offline) error {
	mark := filepath.Join(d.cfg.DataDir, foundingFile)
	files := configdb.Files{Dir: filepath.Join(d.cfg.DataDir, replicaDir), NodeID: info.NodeID, Address: info.Address, LogStore: d.cfg.LogStore, Log: d.log.With("module", "configdb")}
	err := writeFile(mark, nil, 0o600)
	if err == nil {
		err = configdb.Install(files, db)
	}
	if err == nil {
		err = info.save(d.cfg.DataDir)
	}
	if err == nil {
		err = d.start(info)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("restore: %w", err), forget(d.cfg.DataDir))
	}
	_, err = d.current().store.View(ctx) // it leads, and serves
	if err == nil {                      // for good, or a power cut would bring the mark back
		err = errors.Join(os.Remove(mark), syncDir(d.cfg.DataDir))
	}
	if err != nil {
		err = fmt.Errorf("restore cluster %s: %w; nothing of it is kept, start musterd again", info.Cluster, err)
		d.fail(err)
		return errors.Join(err, forget(d.cfg.DataDir))
	}
	d.log.Warn("cluster restored from a backup", "cluster", info.Cluster, "id", info.ClusterID)
	return nil
}

// resurrection turns the state of a backup into that of a new cluster.
type resurrection struct {
	r     *api.RestoreRequest
	h     *backup.Header
	info  *membership
	caKey []byte
	db    *configdb.Offline
	log   *slog.Logger
}

func (s *resurrection) run(ctx context.Context) (api.RestoreResult, error) {
	out := api.RestoreResult{
		InitResult: api.InitResult{Cluster: s.info.Cluster, ClusterID: s.info.ClusterID, Node: s.info.Node, Address: s.info.Address, CACert: string(s.info.ca)},
		From:       api.Origin{ClusterID: s.h.ClusterID, Cluster: s.h.Cluster, Life: s.h.Life, Revision: s.h.Revision, Time: s.h.Time},
		Waiting:    map[string]int{},
	}
	old, err := configdb.Nodes.List(s.db.Local())
	if err != nil {
		return out, err
	}
	if err := s.checkNames(old); err != nil {
		return out, err
	}
	self := api.Node{Meta: api.NewMeta(api.KindNode, "", s.info.Node)}
	self.Meta.ID = s.info.NodeID
	a := &afterlife{db: s.db, self: self, term: s.db.Term(), actor: restoreActor, log: s.log}
	to := s.heir(old, a.itself())
	for _, n := range old {
		if !slices.Contains(s.r.SwitchedOff, n.Meta.Name) {
			continue
		}
		vms, err := a.bury(ctx, n, to)
		if err != nil {
			return out, err
		}
		if !to.ghost {
			out.TakenOver += len(vms)
		}
	}
	for _, n := range old {
		if slices.Contains(s.r.SwitchedOff, n.Meta.Name) {
			continue
		}
		why := fmt.Sprintf("from a backup of %s: what ran on node %s then may still run there; if its host is switched off for good: muster node remove %s --force",
			s.h.Time.Format("2006-01-02 15:04 MST"), n.Meta.Name, n.Meta.Name)
		if out.Waiting[n.Meta.Name], err = a.haunt(ctx, n, why); err != nil {
			return out, err
		}
	}
	if err := a.dropTokens(ctx, func(t *api.Token) bool { return !s.r.KeepTokens || isJoinToken(t) }); err != nil {
		return out, err
	}
	// Records of the old cluster's requests, and of certificates of its authority.
	for _, prefix := range []string{idempotencyPrefix, certificatePrefix} {
		if err := s.dropKeys(ctx, prefix); err != nil {
			return out, err
		}
	}
	out.Token, err = s.found(ctx, a, out.From)
	return out, err
}

// heir is who gets the VMs of the hosts that are switched off: this node, but while
// another host of the old cluster may run them, that one. See heirOf.
func (s *resurrection) heir(old []api.Node, self heir) heir {
	for i := range old {
		if n := &old[i]; n.Spec.Role != api.RoleWitness && !slices.Contains(s.r.SwitchedOff, n.Meta.Name) {
			return heir{nodeID: n.Meta.ID, node: n.Meta.Name, ghost: true}
		}
	}
	return self
}

// checkNames refuses nodes that do not exist, and a first node that would be
// taken for an old one.
func (s *resurrection) checkNames(old []api.Node) error {
	var names []string
	for i := range old {
		names = append(names, old[i].Meta.Name)
	}
	for _, off := range s.r.SwitchedOff {
		if !slices.Contains(names, off) {
			return api.Invalid("switchedOff", "%q is no node of the cluster in the backup; it has %s", off, strings.Join(names, ", "))
		}
	}
	if slices.Contains(names, s.info.Node) && !slices.Contains(s.r.SwitchedOff, s.info.Node) {
		return api.Errorf(api.CodeRefused, "the cluster in the backup has a node %s, as this host is called; start musterd with another --node-name, or if the old host is switched off for good, say so: --yes-i-have-switched-off %s", s.info.Node, s.info.Node)
	}
	return nil
}

func (s *resurrection) dropKeys(ctx context.Context, prefix string) error {
	for {
		tx := &configdb.Txn{Actor: restoreActor}
		n := 0
		for e := range s.db.Local().Scan(prefix, "") {
			if n++; n > dropBatch {
				break
			}
			tx.Delete(e.Key)
		}
		if tx.Empty() {
			return nil
		}
		if _, err := s.db.Txn(ctx, tx); err != nil {
			return err
		}
	}
}

// found writes what a new cluster has: its own object in place of the old one,
// its first node, and the administrator's token, which it returns.
func (s *resurrection) found(ctx context.Context, a *afterlife, from api.Origin) (string, error) {
	sealed, err := pki.Seal(s.info.clusterKey, caKeyLabel, s.caKey)
	if err != nil {
		return "", err
	}
	v := s.db.Local()
	was, err := backup.Cluster(v)
	if err != nil {
		return "", err
	}
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", s.info.Cluster)}
	c.Meta.ID, c.Meta.Labels = s.info.ClusterID, was.Meta.Labels
	// No rotation goes on under the new authority, and the leader makes new keys of
	// gossip.
	c.Spec = api.ClusterSpec{
		CACert: string(s.info.ca), SealedCAKey: sealed, Life: s.info.Life, RestoredFrom: &from,
		Backup: was.Spec.Backup, History: was.Spec.History, CertificateSeconds: was.Spec.CertificateSeconds,
		FeatureLevel: was.Spec.FeatureLevel, FeatureLevelHold: was.Spec.FeatureLevelHold, HA: was.Spec.HA,
	}
	a.self.Spec.Address = s.info.Address
	// Ready at once: the daemon that does this is the node.
	a.self.Status = api.NodeStatus{Phase: api.NodeReady, Version: version.Version, FeatureLevels: new(feature.Supported())}
	name := adminToken
	if _, taken := v.Get(configdb.Tokens.NameKey(api.DefaultProject, name)); taken {
		name += "-" + s.info.ClusterID
	}
	token, secret := newAdminToken(name)

	// The old object first: one transaction may change a name only once.
	tx := &configdb.Txn{Actor: restoreActor}
	configdb.Clusters.Delete(tx, &was)
	if _, err := s.db.Txn(ctx, tx); err != nil {
		return "", err
	}
	tx = &configdb.Txn{Actor: restoreActor}
	err = errors.Join(c.Prepare(), a.self.Prepare(), token.Prepare(), s.info.recordFounder(tx),
		configdb.Clusters.Create(tx, &c), configdb.Nodes.Create(tx, &a.self), configdb.Tokens.Create(tx, &token),
		a.tell(tx, "cluster.restored", c.Meta, fmt.Sprintf("cluster %s was restored from a backup of cluster %s (%s) of %s, revision %d",
			c.Meta.Name, from.Cluster, from.ClusterID, from.Time.Format("2006-01-02 15:04 MST"), from.Revision)))
	if err != nil {
		return "", err
	}
	if _, err := s.db.Txn(ctx, tx); err != nil {
		return "", err
	}
	return secret, s.checkSecrets()
}

// checkSecrets makes sure that the key opens what the database has sealed: a
// cluster that cannot open its secrets is better not founded.
func (s *resurrection) checkSecrets() error {
	e, ok := s.db.Local().Get(hostKeyKey)
	if !ok {
		return nil // no shell was ever opened
	}
	if plain, err := pki.Open(s.info.clusterKey, hostKeyLabel, e.Value); err != nil || len(bytes.TrimSpace(plain)) == 0 {
		return api.Errorf(api.CodeInvalid, "the secrets in the backup do not open with the cluster key: %w", err)
	}
	return nil
}

// newAdminToken returns the administrator's first token and its text.
func newAdminToken(name string) (t api.Token, text string) {
	t = api.Token{Meta: api.NewMeta(api.KindToken, "", name)}
	secret := base64.RawURLEncoding.EncodeToString(pki.NewSecret(32))
	t.Spec = api.TokenSpec{Use: api.TokenAPI, Role: api.RoleAdministrator, Hash: pki.HashSecret(secret)}
	return t, "muster_" + t.Meta.ID + "_" + secret
}
