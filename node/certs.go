// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/pki"
)

// Times of the certificate service.
const (
	// certCheck is the longest wait between two looks; clocks are set meanwhile.
	certCheck = 15 * time.Second
	// certRetryFirst and certRetryLast bound the wait after a failure.
	certRetryFirst = time.Second
	certRetryLast  = 5 * time.Minute
	// certRetryPart: never wait more than this part of a certificate's life.
	certRetryPart = 20
	// certifyTimeout bounds one call to a signer.
	certifyTimeout = 10 * time.Second
	// authorityNotice is how long before its end an authority is to be replaced.
	authorityNotice = 365 * 24 * time.Hour
	// maxSigners is how many nodes are asked in one try.
	maxSigners = 4
)

// certs keeps this node's certificate and what it trusts as the cluster wants
// them. It is level-triggered: each look compares the files, the identity and the
// replica, and takes the steps that are missing. See internal/pki/DESIGN.md.
type certs struct {
	m    *member
	log  *slog.Logger
	now  func() time.Time
	wake chan struct{}

	mu       sync.Mutex
	held     credentials // on the disk
	stranger bool        // no other node is known any more

	// Of the service's goroutine only.
	failures int
	retryAt  time.Time
	message  string
}

func newCerts(m *member) *certs {
	return &certs{m: m, log: m.log.With("module", "certificate"), now: time.Now, wake: make(chan struct{}, 1), held: m.info.held()}
}

// current returns the credentials on the disk.
func (s *certs) current() credentials {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

// install writes credentials and puts them to use.
func (s *certs) install(c credentials) error {
	if _, err := c.shown().Check(); err != nil {
		return err
	}
	if err := s.store(c); err != nil {
		return err
	}
	s.poke()
	return s.m.identity.Replace(c.shown())
}

func (s *certs) store(c credentials) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := c.save(s.m.cfg.DataDir); err != nil {
		return err
	}
	s.held = c
	return nil
}

func (s *certs) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run works until the context ends.
func (s *certs) run(ctx context.Context) error {
	group, ctx := contain.NewGroup(ctx)
	for _, prefix := range []string{configdb.Clusters.SpecPrefix(), certificateKey(s.m.info.NodeID)} {
		group.Go(func() {
			_ = configdb.Follow(ctx, s.m.store, prefix, func(configdb.Batch) error { s.poke(); return nil })
		})
	}
	for ctx.Err() == nil {
		timer := time.NewTimer(s.look(ctx))
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return group.Stop()
}

// errReplaced tells a node that was away for too long what to do.
var errReplaced = errors.New("the other nodes show certificates of an authority that this node does not know: the cluster has replaced its authority while this node was off; " +
	"make a token on a member with: muster cluster token create, and run on this host: muster cluster join TOKEN --data-dir DIR; nothing of this node is lost")

// met notes how a call to another node ended, while no leader is known.
func (s *certs) met(err error) {
	var unknown x509.UnknownAuthorityError
	var answered *clusternet.RemoteError
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.stranger
	switch {
	case err == nil || errors.As(err, &answered):
		s.stranger = false
	case errors.As(err, &unknown):
		s.stranger = true
	}
	if s.stranger != was {
		s.poke()
	}
}

// look takes the steps that are missing and says when to look again.
func (s *certs) look(ctx context.Context) time.Duration {
	cluster, known := s.cluster()
	problem := error(nil)
	if known {
		problem = s.adopt(&cluster)
	}
	if err := s.stand(); err != nil && problem == nil {
		problem = err
	}
	due := ""
	if known && problem == nil {
		due, problem = s.due(s.m.store.Local(), &cluster.Spec)
	}
	if problem == nil {
		problem = s.strangers()
	}
	if problem == nil && known && due == "" {
		problem = s.ending(&cluster.Spec)
	}
	tried := false
	if due != "" && problem == nil && !s.now().Before(s.retryAt) {
		tried = true
		problem = s.renewIfDue(ctx)
		s.count(problem)
		if problem == nil {
			due = ""
		}
	}
	if due == "" || problem != nil || tried {
		s.say(problem)
	}
	if known {
		if err := s.report(ctx, due == ""); err != nil && ctx.Err() == nil {
			s.log.Debug("state of the certificate not reported", "err", err)
		}
	}
	return s.wait(due != "")
}

// ending says that the authority itself comes to its end.
func (s *certs) ending(c *api.ClusterSpec) error {
	ca, err := pki.ParseCert([]byte(c.CACert))
	if err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if s.now().Add(authorityNotice).After(ca.NotAfter) {
		return fmt.Errorf("the cluster's authority ends on %s; replace it with: muster cluster ca rotate", ca.NotAfter.UTC().Format(time.DateOnly))
	}
	return nil
}

// strangers says that no other node is known any more, as long as none leads.
func (s *certs) strangers() error {
	if _, _, ok := s.m.store.Leader(); ok {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stranger {
		return errReplaced
	}
	return nil
}

// cluster returns the cluster object, unless the replica has not caught up with
// what this node knew before its restart.
func (s *certs) cluster() (api.Cluster, bool) {
	c, err := configdb.Clusters.Get(s.m.store.Local(), s.m.info.ClusterID)
	if err != nil {
		return c, false
	}
	held := s.current()
	a, err := held.authority()
	return c, err != nil || !a.older(&c)
}

// renewIfDue decides on a view that is not old: after a restart the replica
// lacks the last renewal, which must not be taken for a missing one.
func (s *certs) renewIfDue(ctx context.Context) error {
	v, err := s.m.store.View(ctx)
	if err != nil {
		return err
	}
	c, err := configdb.Clusters.Get(v, s.m.info.ClusterID)
	if err != nil {
		return err
	}
	due, err := s.due(v, &c.Spec)
	if err != nil || due == "" {
		return err
	}
	return s.renew(ctx, &c.Spec, due)
}

// say keeps what is wrong, and logs it once.
func (s *certs) say(problem error) {
	text := ""
	if problem != nil {
		text = problem.Error()
	}
	if text != s.message && text != "" {
		s.log.Warn("certificate needs attention", "err", problem)
	}
	s.message = text
}

// count sets the time of the next try.
func (s *certs) count(problem error) {
	if problem == nil {
		s.failures, s.retryAt = 0, time.Time{}
		return
	}
	pause := min(certRetryFirst<<min(s.failures, 16), certRetryLast)
	held := s.current()
	if leaf, err := pki.ParseCert(held.Cert); err == nil {
		pause = max(min(pause, pki.Life(leaf)/certRetryPart), certRetryFirst)
	}
	s.failures++
	s.retryAt = s.now().Add(pause)
}

func (s *certs) wait(due bool) time.Duration {
	next := certCheck
	if due {
		return max(min(next, s.retryAt.Sub(s.now())), certRetryFirst/10)
	}
	held := s.current()
	if leaf, err := pki.ParseCert(held.Cert); err == nil {
		next = min(next, pki.RenewAt(leaf).Sub(s.now()))
	}
	return max(next, certRetryFirst/10)
}

// adopt brings ca.crt and the copy of the sealed key up to what the cluster
// object says. What is shown changes with it.
func (s *certs) adopt(c *api.Cluster) error {
	stored, err := copyAuthority(c)
	if err != nil {
		return err
	}
	held, bundle := s.current(), bundleOf(&c.Spec)
	if bytes.Equal(held.CA, bundle) && bytes.Equal(held.Authority, stored) {
		return nil
	}
	held.CA, held.Authority = bundle, stored
	show := held.shown()
	if _, err := show.Check(); err != nil {
		// The authority that signed for this node is trusted no longer.
		if show, err = s.m.info.interim(&held, s.now()); err != nil {
			return fmt.Errorf("the cluster has replaced its authority and this node cannot follow: %w", err)
		}
	}
	if err := s.store(held); err != nil {
		return err
	}
	s.log.Info("trusted authorities changed", "authorities", len(trusts(bundle)))
	return s.m.identity.Replace(show)
}

// stand sees to it that what is shown is valid now: the certificate on the disk
// if it is, else an interim one.
func (s *certs) stand() error {
	now, held, shown := s.now(), s.current(), s.m.identity.Leaf()
	leaf, err := held.shown().Check()
	if err == nil && !now.After(leaf.NotAfter) {
		if pki.Serial(shown) != pki.Serial(leaf) {
			if err := s.m.identity.Replace(held.shown()); err != nil {
				return err
			}
		}
		if now.Before(leaf.NotBefore) {
			return fmt.Errorf("the clock of this host says %s, which is before its certificate was issued (%s); set the clock", stamp(now), stamp(leaf.NotBefore))
		}
		return nil
	}
	standing := err != nil || pki.Serial(shown) != pki.Serial(leaf) // an interim one is shown
	if standing && !now.Before(shown.NotBefore) && now.Before(shown.NotAfter.Add(-interimLife/8)) {
		return nil
	}
	stopgap, err := s.m.info.interim(&held, now)
	if err != nil {
		return fmt.Errorf("the certificate of this node ended and it cannot issue itself an interim one: %w", err)
	}
	s.log.Warn("the certificate of this node is not valid any more; an interim one is used until it is renewed")
	return s.m.identity.Replace(stopgap)
}

// due says why the certificate is to be renewed now; nothing if it is not.
func (s *certs) due(v *configdb.View, c *api.ClusterSpec) (string, error) {
	held, now := s.current(), s.now()
	leaf, err := pki.ParseCert(held.Cert)
	if err != nil {
		return "", err
	}
	r, was, err := certificateOf(v, s.m.info.NodeID)
	if err != nil {
		return "", err
	}
	signs, err := pki.ParseCert([]byte(c.CACert))
	if err != nil {
		return "", err
	}
	_, current := pki.SignerOf(leaf, []*x509.Certificate{signs})
	wished := certificateLife(c)
	switch {
	case !current:
		return "another authority signs now", nil
	case was == 0 || r.Serial != pki.Serial(leaf):
		return "another certificate is wanted", nil
	case pki.Life(leaf) > wished+wished/10:
		return "certificates live shorter now", nil
	case now.After(leaf.NotAfter):
		return "it has ended", nil
	case !now.Before(pki.RenewAt(leaf)):
		return "its time has come", nil
	}
	return "", nil
}

// renew gets another certificate for a new key and puts it to use.
func (s *certs) renew(ctx context.Context, c *api.ClusterSpec, why string) error {
	held := s.current()
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(key, s.m.info.Node)
	if err != nil {
		return err
	}
	request, err := pki.NewRenewal(held.Key, s.m.info.ClusterID, s.m.info.NodeID, csr)
	if err != nil {
		return err
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	cert, err := s.askSigners(ctx, body, func(r certifyResult) error { return s.acceptable(key, c, r) })
	if err != nil {
		return fmt.Errorf("renew the certificate of node %s: %w", s.m.info.Node, err)
	}
	held.Key, held.Cert = key, cert
	if err := s.install(held); err != nil {
		return fmt.Errorf("renew the certificate of node %s: %w", s.m.info.Node, err)
	}
	leaf := s.m.identity.Leaf()
	s.log.Info("certificate renewed", "why", why, "serial", pki.Serial(leaf), "ends", stamp(leaf.NotAfter))
	return nil
}

// askSigners asks the leader, whose clock is the cluster's, then others, until
// one gives a certificate that can be used.
func (s *certs) askSigners(ctx context.Context, request []byte, accept func(certifyResult) error) ([]byte, error) {
	ask := func(call func(context.Context) ([]byte, error)) ([]byte, error) {
		cctx, cancel := context.WithTimeout(ctx, certifyTimeout)
		defer cancel()
		b, err := call(cctx)
		if err != nil {
			return nil, err
		}
		var r certifyResult
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("malformed answer: %w", err)
		}
		return []byte(r.Cert), accept(r)
	}
	cert, err := ask(func(ctx context.Context) ([]byte, error) { return s.m.CallLeader(ctx, methodCertify, request) })
	if err == nil || final(err) || errors.Is(err, configdb.ErrNoQuorum) {
		return cert, err // without a leader nobody can record anything
	}
	errs := []error{err}
	nodes, _ := configdb.Nodes.List(s.m.store.Local())
	leader, _, _ := s.m.store.Leader()
	for i := range nodes {
		n := &nodes[i]
		if n.Meta.ID == s.m.info.NodeID || n.Meta.ID == leader || n.Status.Phase != api.NodeReady || len(errs) == maxSigners {
			continue
		}
		cert, err := ask(func(ctx context.Context) ([]byte, error) {
			return s.m.client.Call(ctx, n.Meta.ID, n.Spec.Address, methodCertify, request)
		})
		if err == nil {
			return cert, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// final reports a refusal that no other node would take back.
func final(err error) bool {
	code := refusal(err)
	return code == codeSuperseded || code == codeRemoved
}

// acceptable checks a certificate before it replaces one that works.
func (s *certs) acceptable(key []byte, c *api.ClusterSpec, r certifyResult) error {
	leaf, err := (clusternet.Credentials{Cert: []byte(r.Cert), Key: key, CA: bundleOf(c)}).Check()
	if err != nil {
		return err
	}
	if id, _ := pki.NodeIDOf(leaf); id != s.m.info.NodeID {
		return fmt.Errorf("the certificate is that of node %s", id)
	}
	now := s.now()
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return fmt.Errorf("the new certificate is valid from %s to %s, but the clock of this host says %s, that of the signer %s; set the clock that is wrong",
			stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(now), stamp(r.Now))
	}
	return nil
}

// report writes the certificate on the disk into this node's status, and tells
// the database that its key is in use, so that the one before it may no longer
// ask for anything.
func (s *certs) report(ctx context.Context, inUse bool) error {
	held := s.current()
	leaf, err := pki.ParseCert(held.Cert)
	if err != nil {
		return err
	}
	hash, err := pki.KeyHash(leaf.PublicKey)
	if err != nil {
		return err
	}
	st := certificateStatus(leaf, held.CA)
	st.Message = s.message
	ctx, cancel := context.WithTimeout(ctx, writeDeadline)
	defer cancel()
	_, err = configdb.Transact(ctx, s.m.store, "node "+s.m.info.Node, certifyAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Get(v, s.m.info.NodeID)
		if err != nil {
			return err
		}
		r, was, err := certificateOf(v, s.m.info.NodeID)
		if err != nil {
			return err
		}
		if inUse && r.Serial == st.Serial && !slices.Equal(r.Keys, []string{hash}) {
			r.Keys = []string{hash}
			if err := r.put(tx, s.m.info.NodeID, was); err != nil {
				return err
			}
		}
		n.Status.Certificate = &st
		return configdb.Nodes.UpdateStatus(v, tx, &n)
	})
	return err
}

func certificateStatus(leaf *x509.Certificate, bundle []byte) api.CertificateStatus {
	st := api.CertificateStatus{
		Serial: pki.Serial(leaf), NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC(), RenewsAt: pki.RenewAt(leaf).UTC(), Trusts: trusts(bundle),
	}
	if list, err := pki.ParseBundle(bundle); err == nil {
		if ca, ok := pki.SignerOf(leaf, list); ok {
			st.Signer = pki.CAHash(ca)
		}
	}
	return st
}

// trusts are the fingerprints of a bundle's authorities.
func trusts(bundle []byte) []string {
	list, err := pki.ParseBundle(bundle)
	if err != nil {
		return []string{}
	}
	out := make([]string, len(list))
	for i, ca := range list {
		out[i] = pki.CAHash(ca)
	}
	return out
}
