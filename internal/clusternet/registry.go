// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"sync"
)

// registry knows the open connections with other nodes, so that those of a node
// that is trusted no longer can be closed at once.
type registry struct {
	mu     sync.Mutex
	byNode map[string]map[*trackedConn]struct{}
}

// trackedConn is the TCP connection below a TLS connection. Closing it ends
// whatever runs above without a word.
type trackedConn struct {
	net.Conn
	dialled bool                // by this node
	chain   []*x509.Certificate // what the other side showed, its own first
	mu      sync.Mutex
	closed  bool
	forget  func()
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	c.mu.Lock()
	forget := c.forget
	c.closed, c.forget = true, nil
	c.mu.Unlock()
	if forget != nil {
		forget()
	}
	return c.Conn.Close()
}

func (r *registry) add(nodeID string, c *trackedConn) {
	r.mu.Lock()
	if r.byNode == nil {
		r.byNode = map[string]map[*trackedConn]struct{}{}
	}
	if r.byNode[nodeID] == nil {
		r.byNode[nodeID] = map[*trackedConn]struct{}{}
	}
	r.byNode[nodeID][c] = struct{}{}
	r.mu.Unlock()
	forget := func() { r.remove(nodeID, c) }
	c.mu.Lock()
	closed := c.closed
	c.forget = forget
	c.mu.Unlock()
	if closed {
		forget()
	}
}

func (r *registry) remove(nodeID string, c *trackedConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byNode[nodeID], c)
	if len(r.byNode[nodeID]) == 0 {
		delete(r.byNode, nodeID)
	}
}

// closeIf closes the connections that a condition holds for.
func (r *registry) closeIf(which func(nodeID string, c *trackedConn) bool) int {
	var out []*trackedConn
	r.mu.Lock()
	for id, conns := range r.byNode {
		for c := range conns {
			if which(id, c) {
				out = append(out, c)
			}
		}
	}
	r.mu.Unlock()
	for _, c := range out {
		_ = c.Close()
	}
	return len(out)
}

// track remembers a connection to a node. Its certificate may have ceased to be
// trusted during the handshake.
func (id *Identity) track(c *trackedConn, nodeID string, chain []*x509.Certificate) error {
	c.chain = chain
	id.conns.add(nodeID, c)
	if err := id.verify(chain); err != nil {
		_ = c.Close()
		return err
	}
	return nil
}

// trackAccepted is track for a connection that may be that of a node. A node
// may have been removed during the handshake, so it is asked again: from here on
// Drop finds the connection.
func (id *Identity) trackAccepted(c *trackedConn, cs tls.ConnectionState) error {
	peer, ok := PeerNode(&cs)
	if !ok {
		return nil
	}
	if err := id.track(c, peer, cs.PeerCertificates); err != nil {
		return err
	}
	if proto, _ := splitWire(cs.NegotiatedProtocol); !slices.Contains(clusterProtocols, proto) {
		return nil // the web, where a node's certificate gives no right by itself
	}
	return id.requireNode(cs)
}

// Side says who opened a connection.
type Side int

// The sides.
const (
	// Accepted connections were opened by the other node.
	Accepted Side = 1 << iota
	// Dialled connections were opened by this one.
	Dialled
)

// Drop closes the connections with a node at once, whatever runs over them, and
// returns how many there were.
func (id *Identity) Drop(nodeID string, sides Side) int {
	return id.conns.closeIf(func(peer string, c *trackedConn) bool {
		side := Accepted
		if c.dialled {
			side = Dialled
		}
		return peer == nodeID && sides&side != 0
	})
}

// Connections returns how many connections stand with a node, for tests and
// diagnosis.
func (id *Identity) Connections(nodeID string) int {
	id.conns.mu.Lock()
	defer id.conns.mu.Unlock()
	return len(id.conns.byNode[nodeID])
}
