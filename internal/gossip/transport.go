// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/muster-vm/muster/internal/clusternet"
)

// Limits of the transport.
const (
	// maxPacketBytes is the largest packet that is taken; packetBytes the largest
	// that is sent, which fits in an Ethernet frame even through a tunnel.
	maxPacketBytes = 2048
	packetBytes    = 1350
	// packetQueue is how many packets may wait; what comes then is dropped, as the
	// network may do at any time.
	packetQueue = 256
	// maxStreams is how many connections of others are served at a time.
	maxStreams = 64
	// readPause is the wait after a failure to read from the socket or to accept.
	readPause = 50 * time.Millisecond
	// socketBuffer is what the kernel is asked to keep of packets not read yet.
	socketBuffer = 512 << 10
)

// dummyAddress goes out as this node's own: an address that is nobody's (RFC 7600
// section 4.8). Where a node is, only the configuration database says.
var dummyAddress = net.IPv4(192, 0, 0, 8).To4()

const dummyPort = 1

// Dialler connects to a node and makes sure that it is that node.
// *clusternet.Identity is one.
type Dialler interface {
	Dial(ctx context.Context, nodeID, address string, protocols ...string) (*tls.Conn, error)
}

// transport implements memberlist.NodeAwareTransport. Names are node IDs, and
// addresses are looked up by them.
type transport struct {
	table *table
	conn  net.PacketConn
	ln    net.Listener
	dial  Dialler
	// sent sees each packet before it goes out, heard each that came.
	sent, heard func(packet []byte)
	// contained calls a function whose panic must not end the daemon.
	contained func(func())
	log       *slog.Logger

	packets chan *memberlist.Packet
	streams chan net.Conn
	slots   chan struct{}
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

// start begins to read packets and to accept connections, until Shutdown.
func (t *transport) start() {
	t.packets = make(chan *memberlist.Packet, packetQueue)
	t.streams = make(chan net.Conn)
	t.slots = make(chan struct{}, maxStreams)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	_ = t.conn.SetReadDeadline(time.Time{}) // an earlier run ended with one
	t.wg.Go(func() { t.contained(t.read) })
	t.wg.Go(func() { t.contained(t.accept) })
}

// Shutdown implements memberlist.Transport. The socket stays open: it is the
// node's.
func (t *transport) Shutdown() error {
	t.cancel()
	_ = t.conn.SetReadDeadline(time.Now())
	err := t.ln.Close()
	t.wg.Wait()
	return err
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return dummyAddress, dummyPort, nil
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

func (t *transport) read() {
	buf := make([]byte, maxPacketBytes+1)
	for t.ctx.Err() == nil {
		n, from, err := t.conn.ReadFrom(buf)
		at := time.Now()
		switch {
		case t.ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			t.log.Debug("packet not read", "err", err)
			t.pause()
			continue
		case n > maxPacketBytes || !wellSealed(buf[:n]):
			continue // of somebody else
		}
		p := &memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: from, Timestamp: at}
		t.heard(p.Buf)
		select {
		case t.packets <- p:
		default:
		}
	}
}

func (t *transport) pause() {
	select {
	case <-time.After(readPause):
	case <-t.ctx.Done():
	}
}

func (t *transport) accept() {
	for t.ctx.Err() == nil {
		c, err := t.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			t.log.Debug("connection not accepted", "err", err)
			t.pause()
			continue
		}
		if !t.admit(c) {
			_ = c.Close()
		}
	}
}

// admit hands on a connection of a member.
func (t *transport) admit(c net.Conn) bool {
	conn, ok := c.(*tls.Conn)
	if !ok {
		return false
	}
	state := conn.ConnectionState()
	id, ok := clusternet.PeerNode(&state)
	if !ok || !t.table.member(id) {
		t.log.Debug("connection of a node that is no member refused", "node", id)
		return false
	}
	select {
	case t.slots <- struct{}{}:
	default:
		return false
	}
	held := t.hold(c, func() { <-t.slots })
	select {
	case t.streams <- held:
		return true
	case <-t.ctx.Done():
		_ = held.Close()
		return false
	}
}

// heldConn is closed with the transport, and calls release once when it is.
type heldConn struct {
	net.Conn
	release func()
}

func (t *transport) hold(c net.Conn, release func()) net.Conn {
	h := &heldConn{Conn: c}
	stop := context.AfterFunc(t.ctx, func() { _ = c.Close() })
	h.release = sync.OnceFunc(func() {
		stop()
		release()
	})
	return h
}

// Close implements net.Conn.
func (c *heldConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// sendError makes memberlist count a packet as lost, so that it goes on to ask
// others and to try a connection. It knows failures of the network by their type.
func sendError(id string, err error) error {
	return &net.OpError{Op: "write", Net: "udp", Err: fmt.Errorf("send to node %s: %w", id, err)}
}

var (
	errNoMember   = errors.New("it is no member of the cluster")
	errUnresolved = errors.New("its address is not resolved yet")
)

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *transport) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	t.sent(b)
	_, udp, ok := t.table.where(to.Name)
	switch {
	case !ok:
		return time.Time{}, sendError(to.Name, errNoMember)
	case udp == nil:
		return time.Time{}, sendError(to.Name, errUnresolved)
	}
	_, err := t.conn.WriteTo(b, udp)
	return time.Now(), err
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	address, _, ok := t.table.where(to.Name)
	if !ok {
		return nil, fmt.Errorf("connect to node %s: %w", to.Name, errNoMember)
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	c, err := t.dial.Dial(ctx, to.Name, address, clusternet.ProtoGossip)
	if err != nil {
		return nil, err
	}
	return t.hold(c, func() {}), nil
}

// WriteTo implements memberlist.Transport; without a name nobody can be reached.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// literalUDP returns the address of host:port if host is an IP address.
func literalUDP(address string) *net.UDPAddr {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil
	}
	return net.UDPAddrFromAddrPort(ap)
}

// resolveUDP asks the resolver.
func resolveUDP(ctx context.Context, address string) (*net.UDPAddr, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, err
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("%s has no address", host)
	}
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(ips[0].Unmap(), uint16(n))), nil
}
