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
)

var _ hypervisor.Streams = (*member)(nil)

// Stream implements hypervisor.Streams.
func (m *member) Stream(ctx context.Context, nodeID string) (net.Conn, error) {
	n, err := configdb.Nodes.Get(m.store.Local(), nodeID)
	if err != nil {
		return nil, err
	}
	return m.identity.Dial(ctx, nodeID, n.Spec.Address, clusternet.ProtoStream)
}

// serveStreams takes the streams of other nodes, hypervisor.MaxStreams at a
// time.
func (m *member) serveStreams(ctx context.Context) error {
	group, ctx := contain.NewGroup(ctx)
	stop := context.AfterFunc(ctx, func() { _ = m.streamListener.Close() })
	defer stop()
	places := make(chan struct{}, hypervisor.MaxStreams)
	for {
		c, err := m.streamListener.Accept()
		if err != nil {
			if ctx.Err() == nil {
				return errors.Join(err, group.Stop())
			}
			return group.Stop()
		}
		select {
		case places <- struct{}{}:
		default:
			m.log.Warn("a stream is refused: too many are open", "peer", c.RemoteAddr(), "limit", hypervisor.MaxStreams)
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
			if err := contain.Do(func() { m.hyper.ServeStream(ctx, c, peer) }); err != nil {
				m.log.Error("a stream was ended by a bug", "peer", peer, "err", err)
				_ = c.Close()
			}
		})
	}
}
