// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// flock is some members in one process: real UDP and real TLS on loopback. Links
// between them can be cut.
type flock struct {
	tb            testing.TB
	mem           *memNet // nil for the real network
	caCert, caKey []byte
	nodes         []*member

	mu  sync.Mutex
	cut map[[2]string]bool // from address to address
}

// member is one of them.
type member struct {
	*Service
	flock    *flock
	id       string
	addr     string
	udp      net.PacketConn
	identity *clusternet.Identity
	port     *clusternet.Port
	load     atomic.Uint64 // its number of VMs
	stop     func()        // ends Run, in good order

	// What it sent, in bytes and packets, UDP and TLS.
	udpBytes, udpPackets, tlsBytes atomic.Uint64
}

func secret(n byte) []byte {
	k := make([]byte, KeyBytes)
	k[0] = n
	return k
}

// newFlock prepares n members that know each other and have a key. Nothing runs.
func newFlock(tb testing.TB, n int) *flock { return newFlockOn(tb, n, nil) }

func newFlockOn(tb testing.TB, n int, mem *memNet) *flock {
	tb.Helper()
	f := &flock{tb: tb, mem: mem, cut: map[[2]string]bool{}}
	if mem != nil {
		tb.Cleanup(func() { time.Sleep(time.Minute) }) // for the probes under way; a minute of the bubble
	}
	var err error
	if f.caCert, f.caKey, err = pki.NewCA("test", "id"); err != nil {
		tb.Fatal(err)
	}
	for i := range n {
		f.nodes = append(f.nodes, f.newMember(fmt.Sprintf("node-%d", i+1)))
	}
	tb.Cleanup(f.stopAll) // before the ports end
	for _, m := range f.nodes {
		m.SetMembers(f.members())
		if err := m.SetKeys(Keys{Primary: secret(1)}); err != nil {
			tb.Fatal(err)
		}
	}
	return f
}

func (f *flock) newMember(id string) *member {
	f.tb.Helper()
	ln, udp := f.listen()
	m := &member{flock: f, id: id, addr: ln.Addr().String()}
	m.identity = f.newIdentity(id)
	m.identity.DialTCP = m.dialTCP
	m.udp = &cutPackets{udp, m}
	m.port = clusternet.NewPort(&countingListener{ln, m}, m.identity, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.port.Serve(ctx) }()
	f.tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.tb.Errorf("port of %s: %v", id, err)
		}
		_ = udp.Close()
	})
	m.Service = m.newService()
	m.stop = func() {}
	return m
}

// newService is what a daemon that begins anew has.
func (m *member) newService() *Service {
	return New(Config{
		NodeID: m.id, Packets: m.udp, Dial: m.identity,
		Listen: func() net.Listener { return m.port.Listener(clusternet.ProtoGossip) },
		Local:  func() Summary { return Summary{CPUPercent: 1.5, VMs: m.load.Load(), Version: "0.1"} },
		Log:    slog.New(slog.DiscardHandler),
	})
}

// listen takes a port number that is free for TCP and for UDP.
func (f *flock) listen() (net.Listener, net.PacketConn) {
	f.tb.Helper()
	if f.mem != nil {
		p := f.mem.open()
		return p, p
	}
	for range 100 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			f.tb.Fatal(err)
		}
		udp, err := net.ListenUDP("udp", literalUDP(ln.Addr().String()))
		if err == nil {
			return ln, udp
		}
		_ = ln.Close()
	}
	f.tb.Fatal("no port number is free for TCP and UDP")
	return nil, nil
}

func (f *flock) newIdentity(id string) *clusternet.Identity {
	f.tb.Helper()
	key, err := pki.NewKey()
	if err != nil {
		f.tb.Fatal(err)
	}
	csrPEM, err := pki.NewCSR(key, id)
	if err != nil {
		f.tb.Fatal(err)
	}
	csr, err := pki.ParseCSR(csrPEM)
	if err != nil {
		f.tb.Fatal(err)
	}
	cert, err := pki.SignNode(f.caCert, f.caKey, csr, id, id, "127.0.0.1")
	if err != nil {
		f.tb.Fatal(err)
	}
	out, err := clusternet.NewIdentity(cert, key, f.caCert)
	if err != nil {
		f.tb.Fatal(err)
	}
	return out
}

// members is the list as the database would have it.
func (f *flock) members() (out []Member) {
	for _, m := range f.nodes {
		out = append(out, Member{ID: m.id, Name: m.id, Address: m.addr})
	}
	return out
}

// start runs a member until stop, or the end of the test.
func (m *member) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	s := m.Service
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			m.flock.tb.Errorf("run %s: %v", m.id, err)
		}
	}()
	m.stop = func() {
		cancel()
		<-done
	}
}

// stopAll stops all at once.
func (f *flock) stopAll() {
	var wg sync.WaitGroup
	for _, m := range f.nodes {
		wg.Go(m.stop)
	}
	wg.Wait()
}

// up starts all and waits until all see each other.
func (f *flock) up() {
	f.tb.Helper()
	for _, m := range f.nodes {
		m.start()
	}
	for _, m := range f.nodes {
		for _, o := range f.nodes {
			m.waits(patience, o, api.GossipAlive)
		}
	}
}

// peer returns what a member knows of another.
func (m *member) peer(o *member) Peer {
	for _, p := range m.Peers() {
		if p.ID == o.id {
			return p
		}
	}
	return Peer{}
}

// waits waits until a member has another in a state, and returns how long it took.
func (m *member) waits(most time.Duration, o *member, want ...api.GossipState) time.Duration {
	m.flock.tb.Helper()
	began := time.Now()
	m.flock.eventually(most, fmt.Sprintf("%s has %s as %v", m.id, o.id, want), func() error {
		got := m.peer(o).State
		for _, w := range want {
			if got == w {
				return nil
			}
		}
		return fmt.Errorf("it is %q", got)
	})
	return time.Since(began)
}

func (f *flock) eventually(most time.Duration, what string, try func() error) {
	f.tb.Helper()
	deadline := time.Now().Add(most)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			f.tb.Fatalf("%s: not within %v: %v", what, most, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// split cuts all links between two groups; join mends all.
func (f *flock) split(a, b []*member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range a {
		for _, y := range b {
			f.cut[[2]string{x.addr, y.addr}], f.cut[[2]string{y.addr, x.addr}] = true, true
		}
	}
}

func (f *flock) mend() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.cut)
}

func (f *flock) isCut(from, to string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cut[[2]string{from, to}]
}

var errCut = errors.New("the link is cut")

func (m *member) dialTCP(ctx context.Context, address string) (net.Conn, error) {
	if m.flock.isCut(m.addr, address) {
		return nil, errCut
	}
	dial := (&net.Dialer{}).DialContext
	if mem := m.flock.mem; mem != nil {
		dial = func(ctx context.Context, _, address string) (net.Conn, error) { return mem.dial(ctx, address) }
	}
	c, err := dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &countingConn{c, m}, nil
}

// cutPackets loses the packets of links that are cut.
type cutPackets struct {
	net.PacketConn
	m *member
}

func (c *cutPackets) WriteTo(b []byte, to net.Addr) (int, error) {
	if c.m.flock.isCut(c.m.addr, to.String()) {
		return len(b), nil
	}
	c.m.udpBytes.Add(uint64(len(b)))
	c.m.udpPackets.Add(1)
	return c.PacketConn.WriteTo(b, to)
}

type countingListener struct {
	net.Listener
	m *member
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countingConn{c, l.m}, nil
}

// countingConn counts what is sent.
type countingConn struct {
	net.Conn
	m *member
}

func (c *countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.m.tlsBytes.Add(uint64(n))
	return n, err
}
