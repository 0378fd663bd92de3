// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/muster-vm/muster/internal/clusternet"
)

// Raft's server address carries the node's ID with its host:port, so that a
// dialler can check that it reached the node it meant: "<id>@<host:port>".

// ServerAddress returns the address of a node as Raft stores it.
func ServerAddress(nodeID, hostport string) raft.ServerAddress {
	return raft.ServerAddress(nodeID + "@" + hostport)
}

// SplitAddress takes such an address apart.
func SplitAddress(a raft.ServerAddress) (nodeID, hostport string, err error) {
	nodeID, hostport, ok := strings.Cut(string(a), "@")
	if !ok || nodeID == "" || hostport == "" {
		return "", "", fmt.Errorf("raft address %q is not of the form id@host:port", a)
	}
	return nodeID, hostport, nil
}

// streamLayer lets Raft dial and accept over the one port.
type streamLayer struct {
	net.Listener
	id   *clusternet.Identity
	self raft.ServerAddress
	// broken is called when a connection of a node broke.
	broken func(nodeID string)
}

type layerAddr raft.ServerAddress

func (a layerAddr) Network() string { return "muster-raft" }
func (a layerAddr) String() string  { return string(a) }

// Addr implements net.Listener with this node's Raft address.
func (l *streamLayer) Addr() net.Addr { return layerAddr(l.self) }

// Dial implements raft.StreamLayer.
func (l *streamLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	nodeID, hostport, err := SplitAddress(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.id.Dial(ctx, nodeID, hostport, clusternet.ProtoRaft)
}
