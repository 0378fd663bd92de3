// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/storage"
)

var _ hypervisor.Streams = (*member)(nil)

// Stream implements hypervisor.Streams.
func (m *member) Stream(ctx context.Context, nodeID string) (net.Conn, error) {
	return m.dial(ctx, nodeID, clusternet.ProtoStream)
}

// volumeStreams are streams for the files of volumes.
type volumeStreams struct{ m *member }

// Stream implements storage.Streams.
func (s volumeStreams) Stream(ctx context.Context, nodeID string) (net.Conn, error) {
	return s.m.dial(ctx, nodeID, clusternet.ProtoVolume)
}

func (m *member) dial(ctx context.Context, nodeID, protocol string) (net.Conn, error) {
	n, err := configdb.Nodes.Get(m.store.Local(), nodeID)
	if err != nil {
		return nil, err
	}
	return m.identity.Dial(ctx, nodeID, n.Spec.Address, protocol)
}

// serveStreams takes the memory and disks of VMs that come here.
func (m *member) serveStreams(ctx context.Context) error {
	return m.serveConns(ctx, m.streamListener, hypervisor.MaxStreams, m.hyper.ServeStream)
}

// serveVolumes sends volumes to the nodes that they move to.
func (m *member) serveVolumes(ctx context.Context) error {
	return m.serveConns(ctx, m.volumeListener, storage.MaxStreams, m.storage.ServeStream)
}

// serveConns serves the connections of other nodes, most at a time.
func (m *member) serveConns(ctx context.Context, ln net.Listener, most int, serve func(ctx context.Context, conn net.Conn, peer string)) error {
	group, ctx := contain.NewGroup(ctx)
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	places := make(chan struct{}, most)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil {
				return errors.Join(err, group.Stop())
			}
			return group.Stop()
		}
		select {
		case places <- struct{}{}:
		default:
			m.log.Warn("a stream is refused: too many are open", "peer", c.RemoteAddr(), "limit", most)
			_ = c.Close()
			continue
		}
		group.Go(func() {
			defer func() { <-places }()
			t, ok := c.(*tls.Conn)
			if !ok {
				_ = c.Close()
				return
			}
			state := t.ConnectionState()
			peer, ok := clusternet.PeerNode(&state)
			if !ok {
				_ = c.Close()
				return
			}
			if err := contain.Do(func() { serve(ctx, c, peer) }); err != nil {
				m.log.Error("a stream was ended by a bug", "peer", peer, "err", err)
				_ = c.Close()
			}
		})
	}
}
