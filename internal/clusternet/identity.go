// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/internal/pki"
)

// The protocols on the one port, as ALPN names.
const (
	ProtoRaft   = "muster-raft"
	ProtoRPC    = "muster-rpc"
	ProtoGossip = "muster-gossip"
	// ProtoStream carries the memory and disks of VMs between nodes.
	ProtoStream = "muster-stream"
	// ProtoVolume carries files of volumes that no guest uses.
	ProtoVolume = "muster-volume"
	ProtoH2     = "h2"
	ProtoH1     = "http/1.1"
	// ProtoSSH stands for connections that begin with "SSH-" instead of TLS.
	ProtoSSH = "ssh"
)

// clusterProtocols need a node's certificate on both sides.
var clusterProtocols = []string{ProtoRaft, ProtoRPC, ProtoGossip, ProtoStream, ProtoVolume}

// DialTimeout bounds one connection attempt, with its handshake.
const DialTimeout = 5 * time.Second

// Identity is what a node is known by: its certificate and what it trusts. Both
// can be replaced while connections stand; see Replace.
type Identity struct {
	NodeID string
	// Life of the cluster that this node belongs to; 0 is 1. See life.go.
	Life  uint64
	shown atomic.Pointer[material]
	conns registry
	// Trust, if set, refuses a peer although its certificate is good, when it
	// connects for Raft or gossip. Calls have RPCServer.Trust. Set it before the port serves.
	Trust func(nodeID string) error
	// DialTCP replaces the network in tests; nil means TCP.
	DialTCP func(ctx context.Context, address string) (net.Conn, error)
}

// NewIdentity checks that certificate, key and authorities belong together. It
// does not ask whether the certificate has ended.
func NewIdentity(certPEM, keyPEM, caPEM []byte) (*Identity, error) {
	m, err := newMaterial(Credentials{Cert: certPEM, Key: keyPEM, CA: caPEM})
	if err != nil {
		return nil, err
	}
	id := &Identity{NodeID: m.nodeID}
	m.serve(id)
	id.shown.Store(m)
	return id, nil
}

// serverConfig is that of the port: each handshake uses what the identity shows
// at that moment.
func (id *Identity) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			return id.shown.Load().configFor(h, id), nil
		},
	}
}

func (id *Identity) requireNode(cs tls.ConnectionState) error {
	peer, ok := PeerNode(&cs)
	if !ok {
		return fmt.Errorf("the peer's certificate names no node")
	}
	// A call is refused with a reason, which a removed node must get to know;
	// the other protocols have no words for it.
	if proto, _ := splitWire(cs.NegotiatedProtocol); id.Trust != nil && proto != ProtoRPC {
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
	tracked := &trackedConn{Conn: raw, dialled: true}
	shown := id.shown.Load()
	c := tls.Client(tracked, &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Whatever authorities the other side names: that they differ is then said
		// as what it is.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &shown.cert, nil },
		RootCAs:              shown.roots,
		ServerName:           pki.NodeDNSName(nodeID),
		NextProtos:           names,
	})
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("connect to node %s at %s: %w", nodeID, address, err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; !slices.Contains(names, got) {
		_ = c.Close()
		return nil, fmt.Errorf("connect to node %s at %s: it does not speak %s", nodeID, address, strings.Join(protocols, " or "))
	}
	if err := id.track(tracked, nodeID, c.ConnectionState().PeerCertificates); err != nil {
		return nil, fmt.Errorf("connect to node %s at %s: %w", nodeID, address, err)
	}
	return c, nil
}

// Probe connects to an address and hangs up: the error says whether anybody
// listens there, whoever it is.
func (id *Identity) Probe(ctx context.Context, address string) error {
	c, err := id.dialTCP(ctx, address)
	if err != nil {
		return err
	}
	return c.Close()
}

func (id *Identity) dialTCP(ctx context.Context, address string) (net.Conn, error) {
	if id.DialTCP != nil {
		return id.DialTCP(ctx, address)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}
