// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/pki"
)

// How often the leader looks whether there is a rotation, and whether one that
// is under way can go on.
const (
	rotationIdle = time.Second
	rotationBusy = 250 * time.Millisecond
)

// progress is how far the nodes are with what the phase of a rotation asks.
type progress struct {
	// waiting are ready nodes that have not done it, away the others.
	waiting, away []string
	nodes         []api.NodeCertificate
}

func (p progress) lacking() []string { return append(slices.Clone(p.waiting), p.away...) }

// progressOf compares what the nodes report with what the cluster object wants.
func progressOf(v *configdb.View, c *api.ClusterSpec) (progress, error) {
	var p progress
	want, err := pki.ParseCert([]byte(c.CACert))
	if err != nil {
		return p, fmt.Errorf("authority: %w", err)
	}
	trusting := c.Rotation != nil && c.Rotation.Phase == api.CATrust
	if trusting {
		if want, err = pki.ParseCert([]byte(c.Rotation.CACert)); err != nil {
			return p, fmt.Errorf("new authority: %w", err)
		}
	}
	hash := pki.CAHash(want)
	nodes, err := configdb.Nodes.List(v)
	if err != nil {
		return p, err
	}
	for i := range nodes {
		n := &nodes[i]
		cert := n.Status.Certificate
		done := cert != nil && (trusting && slices.Contains(cert.Trusts, hash) || !trusting && cert.Signer == hash)
		p.nodes = append(p.nodes, api.NodeCertificate{Node: n.Meta.Name, Phase: n.Status.Phase, Done: done, Certificate: cert})
		switch {
		case done:
		case n.Status.Phase == api.NodeReady:
			p.waiting = append(p.waiting, n.Meta.Name)
		default:
			p.away = append(p.away, n.Meta.Name)
		}
	}
	return p, nil
}

// rotate takes the steps of a rotation that need nobody's word, while this node
// leads.
func (m *member) rotate(ctx context.Context, term uint64) error {
	for {
		pause := rotationIdle
		if m.rotating() {
			pause = rotationBusy
			if err := m.rotateOnce(ctx, term); err != nil && ctx.Err() == nil && !errors.Is(err, configdb.ErrConflict) {
				m.log.Warn("replacement of the authority does not go on", "err", err)
				pause = rotationIdle
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

func (m *member) rotating() bool {
	c, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	return err == nil && c.Spec.Rotation != nil
}

func (m *member) rotateOnce(ctx context.Context, term uint64) error {
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	var said string
	_, err := configdb.Transact(ctx, m.store, "leader "+m.info.Node, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		said = ""
		c, err := configdb.Clusters.Get(v, m.info.ClusterID)
		if err != nil {
			return err
		}
		if said, err = nextStep(v, &c); err != nil || said == "" {
			return err
		}
		tx.RequireTerm(term)
		ev := api.NewEvent("authority."+phaseWord(&c.Spec), api.SeverityInfo, api.KindCluster, c.Meta, said, time.Now())
		ev.Spec.Node = m.info.Node
		return errors.Join(configdb.PutEvent(tx, &ev), configdb.Clusters.UpdateSpec(v, tx, &c))
	})
	if err == nil && said != "" {
		m.log.Info("replacement of the authority goes on", "step", said)
	}
	return err
}

func phaseWord(c *api.ClusterSpec) string {
	if c.Rotation == nil {
		return "single"
	}
	return string(c.Rotation.Phase)
}

// nextStep changes the cluster object if the nodes have done what its phase
// asks, and says what it did. What a node has reported here stays true as long as
// the cluster object does not change, whose revision the writing requires.
func nextStep(v *configdb.View, c *api.Cluster) (string, error) {
	r := c.Spec.Rotation
	if r == nil || r.Phase == api.CARenew {
		return "", nil // nothing to do, or the administrator's word is needed
	}
	p, err := progressOf(v, &c.Spec)
	if err != nil {
		return "", err
	}
	switch r.Phase {
	case api.CATrust:
		// Nodes that are away follow by the bridge when they are back.
		if len(p.waiting) > 0 || len(p.away) == len(p.nodes) {
			return "", nil
		}
		swapAuthorities(&c.Spec)
		c.Spec.Rotation.Phase = api.CARenew
		return "all ready nodes trust the new authority; it signs from now on and all nodes renew their certificates", nil
	case api.CABack:
		if len(p.lacking()) > 0 {
			return "", nil
		}
		c.Spec.Rotation = nil
		return "all nodes are back under the former authority; the new one is dropped", nil
	}
	return "", fmt.Errorf("phase %q of the rotation is unknown; upgrade this node", r.Phase)
}

// swapAuthorities lets the other authority of a rotation sign.
func swapAuthorities(c *api.ClusterSpec) {
	r := *c.Rotation
	c.CACert, r.CACert = r.CACert, c.CACert
	c.SealedCAKey, r.SealedCAKey = r.SealedCAKey, c.SealedCAKey
	c.Rotation = &r
}

// RotateAuthority implements rest.Authority.
func (m *member) RotateAuthority(ctx context.Context, actor string, r api.RotateRequest) error {
	if _, err := m.store.View(ctx); err != nil {
		return err
	}
	step := map[api.RotateAction]func(*configdb.View, *api.Cluster, string, bool) error{
		api.RotateStart: m.startRotation, api.RotateFinish: finishRotation, api.RotateAbort: abortRotation,
	}[r.Action]
	if step == nil {
		return api.Invalid("action", "is %q; give start, finish or abort", r.Action)
	}
	_, err := configdb.Transact(ctx, m.store, actor, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		c, err := configdb.Clusters.Get(v, m.info.ClusterID)
		if err != nil {
			return err
		}
		if err := step(v, &c, actor, r.Force); err != nil {
			return err
		}
		return configdb.Clusters.UpdateSpec(v, tx, &c)
	})
	return err
}

func (m *member) startRotation(_ *configdb.View, c *api.Cluster, actor string, force bool) error {
	if r := c.Spec.Rotation; r != nil {
		return api.Errorf(api.CodeRefused, "a rotation is under way already (phase %s, begun by %s on %s); see: muster cluster ca show", r.Phase, r.Actor, stamp(r.StartedAt))
	}
	cert, key, err := pki.NewCA(m.info.Cluster, m.info.ClusterID)
	if err != nil {
		return err
	}
	sealed, err := pki.Seal(m.info.clusterKey, caKeyLabel, key)
	if err != nil {
		return err
	}
	oldKey, err := pki.Open(m.info.clusterKey, caKeyLabel, c.Spec.SealedCAKey)
	if err != nil {
		return err
	}
	bridge, err := pki.Bridge([]byte(c.Spec.CACert), oldKey, cert)
	switch {
	case errors.Is(err, pki.ErrNoBridge) && force:
	case errors.Is(err, pki.ErrNoBridge):
		return api.Errorf(api.CodeRefused, "%w: once the nodes renew, clients and nodes that have only the present ca.crt know nobody; start with force only when no node is off and clients can be given the new file at once", err)
	case err != nil:
		return err
	}
	c.Spec.Rotation = &api.CARotation{
		Phase: api.CATrust, CACert: string(cert), SealedCAKey: sealed, Bridge: string(bridge), Actor: actor, StartedAt: time.Now().UTC(),
	}
	return nil
}

func noRotation() error {
	return api.Errorf(api.CodeRefused, "no rotation of the authority is under way; begin one with: muster cluster ca rotate")
}

func finishRotation(v *configdb.View, c *api.Cluster, _ string, force bool) error {
	switch r := c.Spec.Rotation; {
	case r == nil:
		return noRotation()
	case r.Phase == api.CATrust:
		return api.Errorf(api.CodeRefused, "the nodes do not all trust the new authority yet; see who is missing with: muster cluster ca show")
	}
	p, err := progressOf(v, &c.Spec)
	if err != nil {
		return err
	}
	if lacking := p.lacking(); len(lacking) > 0 && !force {
		return api.Errorf(api.CodeRefused, "%s not renewed under the authority that signs now; wait, or finish with force: they then need a join token to come back", haveNot(lacking))
	}
	c.Spec.Rotation = nil
	return nil
}

func haveNot(names []string) string {
	if len(names) == 1 {
		return "node " + names[0] + " has"
	}
	return "nodes " + joinSome(names, 10) + " have"
}

func abortRotation(_ *configdb.View, c *api.Cluster, _ string, _ bool) error {
	switch r := c.Spec.Rotation; {
	case r == nil:
		return noRotation()
	case r.Phase == api.CATrust:
		c.Spec.Rotation = nil // nobody has anything of it
	case r.Phase == api.CARenew:
		swapAuthorities(&c.Spec)
		c.Spec.Rotation.Phase = api.CABack
	default:
		return api.Errorf(api.CodeRefused, "the rotation was aborted already; it ends when all nodes have renewed under the former authority")
	}
	return nil
}

// SetAuthority implements rest.Authority.
func (m *member) SetAuthority(ctx context.Context, actor string, s api.AuthoritySettings) error {
	if err := s.Validate(); err != nil {
		return err
	}
	_, err := configdb.Transact(ctx, m.store, actor, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		c, err := configdb.Clusters.Get(v, m.info.ClusterID)
		if err != nil {
			return err
		}
		c.Spec.CertificateSeconds = s.CertificateSeconds
		return configdb.Clusters.UpdateSpec(v, tx, &c)
	})
	return err
}

// Authority implements rest.Authority.
func (m *member) Authority(context.Context) (api.AuthorityStatus, uint64, error) {
	v := m.store.Local()
	st := api.AuthorityStatus{Cluster: m.info.Cluster}
	c, err := configdb.Clusters.Get(v, m.info.ClusterID)
	if err != nil {
		return st, 0, err
	}
	st.CertificateSeconds = int(certificateLife(&c.Spec).Seconds())
	certs := []string{c.Spec.CACert}
	if r := c.Spec.Rotation; r != nil {
		st.Phase, st.StartedAt, st.Actor = r.Phase, &r.StartedAt, r.Actor
		certs = append(certs, r.CACert)
	}
	for i, text := range certs {
		cert, err := pki.ParseCert([]byte(text))
		if err != nil {
			return st, 0, err
		}
		st.Authorities = append(st.Authorities, api.Authority{
			Fingerprint: pki.CAHash(cert), NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), Signs: i == 0, Cert: text,
		})
	}
	p, err := progressOf(v, &c.Spec)
	if err != nil {
		return st, 0, err
	}
	st.WaitingFor, st.Away, st.Nodes = orNone(p.waiting), orNone(p.away), p.nodes
	st.Next = whatNext(&c.Spec, p)
	return st, v.Revision(), nil
}

func orNone(names []string) []string {
	if names == nil {
		return []string{}
	}
	return names
}

// whatNext tells the administrator in words.
func whatNext(c *api.ClusterSpec, p progress) string {
	r := c.Rotation
	var out []string
	switch {
	case r == nil:
		return ""
	case r.Phase == api.CATrust && len(p.waiting) > 0:
		out = append(out, "waits until "+joinSome(p.waiting, 10)+" trust the new authority")
	case r.Phase == api.CATrust:
		out = append(out, "the leader lets the new authority sign now")
	case r.Phase == api.CABack:
		out = append(out, "aborted; ends when all nodes have renewed under the former authority")
	case len(p.lacking()) > 0:
		out = append(out, "waits until "+joinSome(p.lacking(), 10)+" renewed")
	default:
		out = append(out, "all nodes have renewed; give all clients the new file (muster cluster ca show --pem > ca.crt), then: muster cluster ca rotate --finish")
	}
	if len(p.away) > 0 && r.Phase != api.CABack {
		out = append(out, "not ready: "+joinSome(p.away, 10)+", which can come back by themselves until the rotation is finished")
	}
	if r.Bridge == "" {
		out = append(out, "without a bridge: clients need the new file before the nodes renew")
	}
	return strings.Join(out, "; ")
}

// authorityHashes are those of the authorities by which the cluster may be
// known, the one that signs first.
func (m *member) authorityHashes() ([]string, error) {
	c, err := configdb.Clusters.Get(m.store.Local(), m.info.ClusterID)
	if err != nil {
		return nil, err
	}
	return trusts(bundleOf(&c.Spec)), nil
}

// recordFounder remembers the certificate that the founder issued itself.
func (m *membership) recordFounder(tx *configdb.Txn) error {
	leaf, err := pki.ParseCert(m.cert)
	if err != nil {
		return err
	}
	hash, err := pki.KeyHash(leaf.PublicKey)
	if err != nil {
		return err
	}
	return certificateRecord{Keys: []string{hash}, Serial: pki.Serial(leaf)}.put(tx, m.NodeID, 0)
}

// authorityOf is the cluster's authority as rest sees it.
type authorityOf struct{ d *Daemon }

// Authority implements rest.Authority.
func (a authorityOf) Authority(ctx context.Context) (api.AuthorityStatus, uint64, error) {
	m := a.d.current()
	if m == nil {
		return api.AuthorityStatus{}, 0, notMember()
	}
	return m.Authority(ctx)
}

// RotateAuthority implements rest.Authority.
func (a authorityOf) RotateAuthority(ctx context.Context, actor string, r api.RotateRequest) error {
	m := a.d.current()
	if m == nil {
		return notMember()
	}
	return m.RotateAuthority(ctx, actor, r)
}

// SetAuthority implements rest.Authority.
func (a authorityOf) SetAuthority(ctx context.Context, actor string, s api.AuthoritySettings) error {
	m := a.d.current()
	if m == nil {
		return notMember()
	}
	return m.SetAuthority(ctx, actor, s)
}

// RenewCertificate implements rest.Authority.
func (a authorityOf) RenewCertificate(ctx context.Context, actor, node string) (api.Node, error) {
	m := a.d.current()
	if m == nil {
		return api.Node{}, notMember()
	}
	return m.RenewCertificate(ctx, actor, node)
}
