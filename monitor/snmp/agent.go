// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package snmp

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/gosnmp/gosnmp"
)

// Limits of the agent.
const (
	// CacheFor is how long the tables are kept between requests.
	CacheFor = 3 * time.Second
	// maxRequest is the largest request that is read, and maxAnswer the
	// largest answer: it fits one Ethernet frame of any tunnel but few would
	// mind a fragment.
	maxRequest = 4096
	maxAnswer  = 1400
	// maxBindings is the most variables of one request and of one answer.
	maxBindings = 64
	// timeWindow of RFC 3414 section 2.2.3.
	timeWindow = 150 * time.Second
	// minSecret is the shortest pass phrase (RFC 3414 section 11.2).
	minSecret = 8
	// maxCommunity and maxUser are the longest names that open the agent.
	maxCommunity = 64
	maxUser      = 32
	// ListenPause is how long Run waits before it reports that it cannot
	// listen: often enough for an administrator, and too seldom for the
	// supervisor to hold back the restarts of others.
	ListenPause = 15 * time.Second
)

// Source supplies what the tables show.
type Source interface {
	State(ctx context.Context) (*State, error)
}

// Config of an Agent.
type Config struct {
	// Listen is the UDP address, host:port.
	Listen string
	// Community opens v2c; empty for none.
	Community string
	// User opens v3 with SHA and AES-128, both with Secret; empty for none.
	User, Secret string
	// NodeID makes the engine's ID.
	NodeID string
	Source Source
	Log    *slog.Logger
	Now    func() time.Time
}

// Stats count what the agent did.
type Stats struct {
	Answered                                                    uint64
	Malformed, WrongCommunity, UnknownUser, NotAuthentic, Stale uint64
	Unsupported                                                 uint64
}

// Agent answers requests.
type Agent struct {
	cfg    Config
	began  time.Time
	boots  uint32
	engine string
	user   *gosnmp.UsmSecurityParameters // nil: no v3

	mu     sync.Mutex
	stats  Stats
	cached tree
	asOf   time.Time
}

// bootsEpoch is what the boots of an engine count seconds from. They must rise
// with every start (RFC 3414 section 2.2.2), which the clock does without a
// file, until 2088.
var bootsEpoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// EngineID returns an engine ID (RFC 3411, snmpEngineID) made of a string.
func EngineID(of string) string {
	sum := sha256.Sum256([]byte(of))
	id := []byte{0x80 | byte(Enterprise>>24&0x7f), byte(Enterprise >> 16 & 0xff), byte(Enterprise >> 8 & 0xff), byte(Enterprise & 0xff), 5}
	return string(append(id, sum[:12]...))
}

// Check refuses what no agent could work with. It touches nothing.
func (c Config) Check() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("snmpListen: %q is not host:port, such as 0.0.0.0:161", c.Listen)
	}
	switch {
	case c.Community == "" && c.User == "":
		return errors.New("snmpListen: an agent needs snmpCommunity for v2c, or snmpUser and snmpSecret for v3")
	case len(c.Community) > maxCommunity:
		return fmt.Errorf("snmpCommunity: has more than %d characters", maxCommunity)
	case len(c.User) > maxUser:
		return fmt.Errorf("snmpUser: has more than %d characters", maxUser)
	case c.User == "" && c.Secret != "":
		return errors.New("snmpSecret: is for snmpUser, which is not given")
	case c.User != "" && len(c.Secret) < minSecret:
		return fmt.Errorf("snmpSecret: the pass phrase of user %s has fewer than %d characters", c.User, minSecret)
	}
	return nil
}

// NewAgent checks the configuration and returns an agent that does nothing
// until Run.
func NewAgent(cfg Config) (*Agent, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, began: cfg.Now(), engine: EngineID("agent/" + cfg.NodeID)}
	a.boots = uint32(max(1, a.began.Sub(bootsEpoch)/time.Second)) //nolint:gosec // fits until 2088
	if cfg.User != "" {
		a.user = userOf(cfg.User, cfg.Secret, a.engine)
		if err := a.user.InitSecurityKeys(); err != nil {
			return nil, fmt.Errorf("snmp agent: %w", err)
		}
	}
	return a, nil
}

// listen opens the port.
func (a *Agent) listen() (net.PacketConn, error) {
	conn, err := net.ListenPacket("udp", a.cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("snmp agent: cannot listen on %s: %w; free it, or choose another address with snmpListen", a.cfg.Listen, err)
	}
	return conn, nil
}

func userOf(name, secret, engine string) *gosnmp.UsmSecurityParameters {
	return &gosnmp.UsmSecurityParameters{
		UserName: name, AuthoritativeEngineID: engine,
		AuthenticationProtocol: gosnmp.SHA, AuthenticationPassphrase: secret,
		PrivacyProtocol: gosnmp.AES, PrivacyPassphrase: secret,
	}
}

// Stats returns the counters.
func (a *Agent) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stats
}

func (a *Agent) count(field func(*Stats) *uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*field(&a.stats)++
}

// Run answers until the context ends. A port that cannot be opened is no
// reason for the node to stay down: it is an error of this service, which its
// supervisor tries again.
func (a *Agent) Run(ctx context.Context) error {
	conn, err := a.listen()
	if err != nil {
		select {
		case <-time.After(ListenPause):
			return err
		case <-ctx.Done():
			return nil
		}
	}
	return a.serve(ctx, conn)
}

// serve answers on the port until the context ends, which closes it.
func (a *Agent) serve(ctx context.Context, conn net.PacketConn) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	buf := make([]byte, maxRequest+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			a.cfg.Log.Debug("snmp request not read", "err", err)
			continue
		}
		if n > maxRequest {
			a.count(malformed)
			continue
		}
		answer := a.handle(ctx, buf[:n])
		if answer == nil {
			continue
		}
		if _, err := conn.WriteTo(answer, from); err != nil && ctx.Err() == nil {
			a.cfg.Log.Debug("snmp answer not sent", "err", err)
		}
	}
}

func malformed(s *Stats) *uint64      { return &s.Malformed }
func wrongCommunity(s *Stats) *uint64 { return &s.WrongCommunity }
func unknownUser(s *Stats) *uint64    { return &s.UnknownUser }
func notAuthentic(s *Stats) *uint64   { return &s.NotAuthentic }
func stale(s *Stats) *uint64          { return &s.Stale }
func unsupported(s *Stats) *uint64    { return &s.Unsupported }
func answered(s *Stats) *uint64       { return &s.Answered }

// handle returns the answer to a request, or nil.
func (a *Agent) handle(ctx context.Context, request []byte) (answer []byte) {
	defer func() {
		if p := recover(); p != nil { // of the decoder, which reads what strangers send
			a.count(malformed)
			a.cfg.Log.Debug("snmp request panicked", "panic", p, "stack", string(debug.Stack()))
			answer = nil
		}
	}()
	// The decoder writes into what it reads.
	raw := append([]byte(nil), request...)
	plain := &gosnmp.GoSNMP{SecurityParameters: &gosnmp.UsmSecurityParameters{}}
	p, err := plain.SnmpDecodePacket(raw)
	if p == nil || p.Version != gosnmp.Version3 && err != nil {
		a.count(malformed)
		return nil
	}
	switch p.Version {
	case gosnmp.Version2c:
		if a.cfg.Community == "" || subtle.ConstantTimeCompare([]byte(p.Community), []byte(a.cfg.Community)) != 1 {
			a.count(wrongCommunity)
			return nil
		}
		return a.finish(ctx, p, &gosnmp.SnmpPacket{Version: p.Version, Community: p.Community})
	case gosnmp.Version3:
		return a.handleV3(ctx, request, p)
	}
	a.count(unsupported)
	return nil
}

// finish carries out an authentic request and encodes the answer.
func (a *Agent) finish(ctx context.Context, p, frame *gosnmp.SnmpPacket) []byte {
	switch p.PDUType {
	case gosnmp.GetRequest, gosnmp.GetNextRequest, gosnmp.GetBulkRequest, gosnmp.SetRequest:
	default:
		a.count(unsupported)
		return nil
	}
	frame.PDUType, frame.RequestID = gosnmp.GetResponse, p.RequestID
	limit := maxAnswer
	if p.Version == gosnmp.Version3 && p.MsgMaxSize >= 484 && int64(p.MsgMaxSize) < int64(limit) {
		limit = int(p.MsgMaxSize)
	}
	t, err := a.tree(ctx)
	if err != nil {
		a.cfg.Log.Warn("snmp request not answered", "err", err)
		frame.Error, frame.Variables = gosnmp.GenErr, p.Variables
	} else {
		a.answer(t, p, frame)
	}
	bulk := p.PDUType == gosnmp.GetBulkRequest
	for {
		out, err := a.encode(frame)
		switch {
		case err != nil:
			a.count(malformed)
			a.cfg.Log.Debug("snmp answer not encoded", "err", err)
			return nil
		case len(out) <= limit:
			a.count(answered)
			return out
		case bulk && len(frame.Variables) > 1:
			frame.Variables = frame.Variables[:len(frame.Variables)*3/4]
		case frame.Error == gosnmp.TooBig:
			return nil
		default:
			frame.Error, frame.ErrorIndex, frame.Variables = gosnmp.TooBig, 0, nil
		}
	}
}

// encode gives an encrypted answer a fresh salt first.
func (a *Agent) encode(frame *gosnmp.SnmpPacket) ([]byte, error) {
	if frame.Version == gosnmp.Version3 && frame.MsgFlags&gosnmp.AuthPriv == gosnmp.AuthPriv {
		if err := a.user.InitPacket(frame); err != nil {
			return nil, err
		}
	}
	return frame.MarshalMsg()
}

// answer fills in the variables (RFC 3416 section 4.2).
func (a *Agent) answer(t tree, p, frame *gosnmp.SnmpPacket) {
	if len(p.Variables) > maxBindings {
		frame.Error = gosnmp.TooBig
		return
	}
	names := make([]oid, len(p.Variables))
	for i, v := range p.Variables {
		o, ok := parseOID(v.Name)
		if !ok {
			frame.Error, frame.ErrorIndex, frame.Variables = gosnmp.GenErr, uint8(i+1), p.Variables //nolint:gosec // at most maxBindings
			return
		}
		names[i] = o
	}
	switch p.PDUType {
	case gosnmp.SetRequest:
		frame.Error, frame.Variables = gosnmp.NotWritable, p.Variables
		if len(names) > 0 {
			frame.ErrorIndex = 1
		}
	case gosnmp.GetRequest:
		for i, o := range names {
			frame.Variables = append(frame.Variables, t.get(o, p.Variables[i].Name))
		}
	case gosnmp.GetNextRequest:
		for i, o := range names {
			frame.Variables = append(frame.Variables, t.after(o, p.Variables[i].Name))
		}
	case gosnmp.GetBulkRequest:
		frame.Variables = t.bulk(names, p)
	}
}

func (t tree) get(o oid, name string) gosnmp.SnmpPDU {
	if i, ok := t.find(o); ok {
		return t[i].pdu()
	}
	// Is there an object at all, if not this instance of it?
	parent := o[:max(0, len(o)-1)]
	if i, _ := t.find(parent); len(parent) > 0 && i < len(t) && len(t[i].name) > len(parent) && compareOID(t[i].name[:len(parent)], parent) == 0 {
		return gosnmp.SnmpPDU{Name: name, Type: gosnmp.NoSuchInstance}
	}
	return gosnmp.SnmpPDU{Name: name, Type: gosnmp.NoSuchObject}
}

func (t tree) after(o oid, name string) gosnmp.SnmpPDU {
	if i := t.next(o); i < len(t) {
		return t[i].pdu()
	}
	return gosnmp.SnmpPDU{Name: name, Type: gosnmp.EndOfMibView}
}

func (t tree) bulk(names []oid, p *gosnmp.SnmpPacket) []gosnmp.SnmpPDU {
	var out []gosnmp.SnmpPDU
	once := min(int(p.NonRepeaters), len(names))
	for i := range once {
		out = append(out, t.after(names[i], p.Variables[i].Name))
	}
	repeat := names[once:]
	if len(repeat) == 0 {
		return out
	}
	at := make([]int, len(repeat))
	for i, o := range repeat {
		at[i] = t.next(o)
	}
	for range min(p.MaxRepetitions, maxBindings) {
		ended := 0
		for i := range repeat {
			if len(out) >= maxBindings {
				return out
			}
			if at[i] < len(t) {
				out = append(out, t[at[i]].pdu())
				at[i]++
				continue
			}
			name := p.Variables[once+i].Name
			if len(t) > 0 {
				name = t[len(t)-1].text
			}
			out = append(out, gosnmp.SnmpPDU{Name: name, Type: gosnmp.EndOfMibView})
			ended++
		}
		if ended == len(repeat) {
			break
		}
	}
	return out
}

func (b *binding) pdu() gosnmp.SnmpPDU {
	return gosnmp.SnmpPDU{Name: b.text, Type: b.typ, Value: b.value}
}

// tree returns the variables, made anew when they are old.
func (a *Agent) tree(ctx context.Context) (tree, error) {
	now := a.cfg.Now()
	a.mu.Lock()
	t, age := a.cached, now.Sub(a.asOf)
	a.mu.Unlock()
	if t != nil && age >= 0 && age < CacheFor {
		return t, nil
	}
	s, err := a.cfg.Source.State(ctx)
	if err != nil {
		return nil, err
	}
	t = build(s, uint32(now.Sub(a.began)/(10*time.Millisecond))) //nolint:gosec // it wraps, as TimeTicks do
	a.mu.Lock()
	a.cached, a.asOf = t, now
	a.mu.Unlock()
	return t, nil
}
