// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/internal/pki"
)

// Credentials are what a node shows and trusts, PEM.
type Credentials struct {
	// Cert and Key are the node's own.
	Cert, Key []byte
	// CA are the authorities that are trusted: one, or two during a rotation.
	CA []byte
	// Bridge is the certificate by which those who trust the former authority
	// only can verify Cert; empty when there is none.
	Bridge []byte
}

// material is Credentials in the form that TLS needs.
type material struct {
	nodeID  string
	cert    tls.Certificate
	leaf    *x509.Certificate
	roots   *x509.CertPool
	web     *tls.Config
	cluster *tls.Config
}

// Check reports whether certificate, key and authorities belong together,
// whatever the time, and returns the certificate.
func (c Credentials) Check() (*x509.Certificate, error) {
	m, err := newMaterial(c)
	if err != nil {
		return nil, err
	}
	return m.leaf, nil
}

func newMaterial(c Credentials) (*material, error) {
	cert, err := tls.X509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	leaf, err := pki.ParseCert(c.Cert)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	authorities, err := pki.ParseBundle(c.CA)
	if err != nil {
		return nil, err
	}
	m := &material{cert: cert, leaf: leaf, roots: pki.PoolOf(authorities...)}
	if err := m.verify([]*x509.Certificate{leaf}); err != nil {
		return nil, fmt.Errorf("node certificate is not of this cluster: %w", err)
	}
	id, ok := pki.NodeIDOf(leaf)
	if !ok {
		return nil, errors.New("node certificate names no node")
	}
	m.nodeID = id
	m.cert.Leaf = leaf
	// The bridge comes first of all that are no leaf: some verifiers take the
	// first that fits. The authorities are sent along, so that a joining node can
	// compare their hashes with that in its token.
	m.cert.Certificate = m.cert.Certificate[:1]
	if len(c.Bridge) > 0 {
		bridge, err := pki.ParseCert(c.Bridge)
		if err != nil {
			return nil, fmt.Errorf("bridge to the new authority: %w", err)
		}
		if bytes.Equal(bridge.SubjectKeyId, leaf.AuthorityKeyId) {
			m.cert.Certificate = append(m.cert.Certificate, bridge.Raw)
		}
	}
	for _, ca := range authorities {
		m.cert.Certificate = append(m.cert.Certificate, ca.Raw)
	}
	return m, nil
}

// verify checks a node's certificate, with what it showed along, against the
// authorities, whether or not it has ended meanwhile.
func (m *material) verify(chain []*x509.Certificate) error {
	leaf, at := chain[0], time.Now()
	if at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
		at = leaf.NotAfter.Add(-time.Second)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: m.roots, Intermediates: pki.PoolOf(chain[1:]...), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err
}

// serve prepares the accepting side. There are no tickets: a resumed session
// would not be verified anew.
func (m *material) serve(id *Identity) {
	base := tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{m.cert}, ClientCAs: m.roots, SessionTicketsDisabled: true,
	}
	m.web = base.Clone()
	m.web.NextProtos = []string{ProtoH2, ProtoH1}
	m.web.ClientAuth = tls.VerifyClientCertIfGiven
	m.cluster = base.Clone()
	m.cluster.ClientAuth = tls.RequireAndVerifyClientCert
	m.cluster.VerifyConnection = id.requireNode
}

// configFor chooses by what the client offers: a cluster protocol needs a
// node's certificate, the web may do without.
func (m *material) configFor(h *tls.ClientHelloInfo, id *Identity) *tls.Config {
	names := wireNames(clusterProtocols, id.life())
	for _, p := range h.SupportedProtos {
		if slices.Contains(names, p) {
			return m.speaking(names)
		}
	}
	if name, ok := id.otherLife(h.SupportedProtos); ok {
		return m.speaking([]string{name})
	}
	return m.web
}

// speaking is the configuration for cluster protocols of some names.
func (m *material) speaking(names []string) *tls.Config {
	c := m.cluster.Clone()
	c.NextProtos = names
	return c
}

// Leaf is the certificate that later handshakes show.
func (id *Identity) Leaf() *x509.Certificate { return id.shown.Load().leaf }

// Replace makes later handshakes show and trust something else, for the same
// node. Connections stay, but for those of peers whose certificate was signed by
// an authority that is trusted no longer: they are closed.
func (id *Identity) Replace(c Credentials) error {
	m, err := newMaterial(c)
	if err != nil {
		return err
	}
	if m.nodeID != id.NodeID {
		return fmt.Errorf("node certificate is that of node %s, this is %s", m.nodeID, id.NodeID)
	}
	m.serve(id)
	id.shown.Store(m)
	id.conns.closeIf(func(_ string, c *trackedConn) bool { return id.verify(c.chain) != nil })
	return nil
}

// verify checks what a peer showed against what is trusted now.
func (id *Identity) verify(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the other side showed no certificate")
	}
	return id.shown.Load().verify(chain)
}
