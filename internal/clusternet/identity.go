// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/internal/pki"
)

// The protocols on the one port, as ALPN names.
const (
	ProtoRaft = "muster-raft"
	ProtoRPC  = "muster-rpc"
	ProtoH2   = "h2"
	ProtoH1   = "http/1.1"
	// ProtoSSH stands for connections that begin with "SSH-" instead of TLS.
	ProtoSSH = "ssh"
)

// clusterProtocols need a node's certificate on both sides.
var clusterProtocols = []string{ProtoRaft, ProtoRPC}

// DialTimeout bounds one connection attempt, with its handshake.
const DialTimeout = 5 * time.Second

// Identity is what a node is known by: its certificate and the authority.
type Identity struct {
	NodeID string
	// Life of the cluster that this node belongs to; 0 is 1. See life.go.
	Life  uint64
	cert  tls.Certificate
	roots *x509.CertPool
	// Trust, if set, refuses a peer although its certificate is good, when it
	// connects for Raft. Calls have RPCServer.Trust. Set it before the port serves.
	Trust func(nodeID string) error
	// DialTCP replaces the network in tests; nil means TCP.
	DialTCP func(ctx context.Context, address string) (net.Conn, error)
}

// NewIdentity checks that certificate, key and authority belong together.
func NewIdentity(certPEM, keyPEM, caPEM []byte) (*Identity, error) {
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	leaf, err := pki.ParseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	ca, err := pki.ParseCert(caPEM)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, fmt.Errorf("node certificate is not of this cluster: %w", err)
	}
	id, ok := pki.NodeIDOf(leaf)
	if !ok {
		return nil, fmt.Errorf("node certificate names no node")
	}
	// The authority is sent along, so that a joining node can compare its hash
	// with the one in its token.
	cert.Certificate = append(cert.Certificate, ca.Raw)
	return &Identity{NodeID: id, cert: cert, roots: roots}, nil
}

// serverConfig chooses by what the client offers: a cluster protocol needs a
// node's certificate, the web may do without.
func (id *Identity) serverConfig() *tls.Config {
	base := tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		ClientCAs:    id.roots,
	}
	web := base.Clone()
	web.NextProtos = []string{ProtoH2, ProtoH1}
	web.ClientAuth = tls.VerifyClientCertIfGiven
	cluster := base.Clone()
	cluster.NextProtos = wireNames(clusterProtocols, id.life())
	cluster.ClientAuth = tls.RequireAndVerifyClientCert
	cluster.VerifyConnection = id.requireNode
	out := base.Clone()
	out.NextProtos = web.NextProtos
	out.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, p := range h.SupportedProtos {
			if slices.Contains(cluster.NextProtos, p) {
				return cluster, nil
			}
		}
		if name, ok := id.otherLife(h.SupportedProtos); ok {
			stranger := cluster.Clone()
			stranger.NextProtos = []string{name}
			return stranger, nil
		}
		return web, nil
	}
	return out
}

func (id *Identity) requireNode(cs tls.ConnectionState) error {
	peer, ok := PeerNode(&cs)
	if !ok {
		return fmt.Errorf("the peer's certificate names no node")
	}
	// A call is refused with a reason, which a removed node must get to know;
	// Raft has no words for it.
	if proto, _ := splitWire(cs.NegotiatedProtocol); id.Trust != nil && proto == ProtoRaft {
		return id.Trust(peer)
	}
	return nil
}

// PeerNode returns the ID of the node at the other end, if it proved to be one.
func PeerNode(cs *tls.ConnectionState) (string, bool) {
	if cs == nil || len(cs.VerifiedChains) == 0 {
		return "", false
	}
	return pki.NodeIDOf(cs.VerifiedChains[0][0])
}

// Dial connects to a node by a protocol and makes sure that it is that node.
func (id *Identity) Dial(ctx context.Context, nodeID, address string, protocols ...string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	raw, err := id.dialTCP(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("connect to node %s at %s: %w", nodeID, address, err)
	}
	names := wireNames(protocols, id.life())
	c := tls.Client(raw, &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		RootCAs:      id.roots,
		ServerName:   pki.NodeDNSName(nodeID),
		NextProtos:   names,
	})
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("connect to node %s at %s: %w", nodeID, address, err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; !slices.Contains(names, got) {
		_ = c.Close()
		return nil, fmt.Errorf("connect to node %s at %s: it does not speak %s", nodeID, address, strings.Join(protocols, " or "))
	}
	return c, nil
}

func (id *Identity) dialTCP(ctx context.Context, address string) (net.Conn, error) {
	if id.DialTCP != nil {
		return id.DialTCP(ctx, address)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}
