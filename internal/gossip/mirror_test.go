// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"

	"github.com/muster-vm/muster/api"
)

func encodeRumour(tb testing.TB, kind byte, body any) []byte {
	tb.Helper()
	b := []byte{kind}
	var rest []byte
	if err := codec.NewEncoderBytes(&rest, &codec.MsgpackHandle{}).Encode(body); err != nil {
		tb.Fatal(err)
	}
	return append(b, rest...)
}

func compound(parts ...[]byte) []byte {
	b := []byte{msgCompound, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

// seal is what memberlist does with a packet.
func seal(tb testing.TB, key, plain []byte) []byte {
	tb.Helper()
	aeads, err := newAEADs([][]byte{key})
	if err != nil {
		tb.Fatal(err)
	}
	b := make([]byte, 1+nonceBytes)
	b[0] = sealedVersion
	_, _ = rand.Read(b[1:])
	return aeads[0].Seal(b, b[1:], plain, nil)
}

func TestRumoursAreRead(t *testing.T) {
	t.Parallel()
	suspect := encodeRumour(t, msgSuspect, rumourBody{4, "x", "y"})
	alive := encodeRumour(t, msgAlive, map[string]any{"Incarnation": 5, "Node": "x", "Addr": []byte{1, 2, 3, 4}, "Port": 1, "Meta": nil, "Vsn": []uint8{1, 5, 2, 0, 0, 0}})
	ping := encodeRumour(t, 0, map[string]any{"SeqNo": 1})
	plain := append([]byte{msgCRC, 1, 2, 3, 4}, compound(ping, suspect, compound(alive), []byte{8, 1, 2})...)
	got, err := rumours(plain)
	want := []rumour{{msgSuspect, rumourBody{4, "x", "y"}}, {msgAlive, rumourBody{5, "x", ""}}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"empty": {}, "no checksum": {msgCRC, 1}, "no number": {msgCompound}, "no lengths": {msgCompound, 3, 0}, "truncated": {msgCompound, 1, 0, 9, 1},
		"empty part": {msgCompound, 1, 0, 0}, "no map": {msgAlive, 0xc1}, "nested": compound(compound(compound(compound(suspect)))),
	} {
		if got, err := rumours(b); err == nil {
			t.Errorf("%s: taken as %+v", name, got)
		}
	}
	aeads, err := newAEADs([][]byte{secret(1), secret(2)})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []byte{1, 2} {
		if b, err := open(aeads, seal(t, secret(key), plain)); err != nil || !bytes.Equal(b, plain) {
			t.Errorf("key %d: %v", key, err)
		}
	}
	if _, err := open(aeads, seal(t, secret(3), plain)); err == nil {
		t.Error("opened what is sealed with another key")
	}
	for n := range 1 + nonceBytes + tagBytes + 1 {
		if _, err := open(aeads, make([]byte, n)); err == nil {
			t.Errorf("opened %d bytes", n)
		}
	}
}

func TestStatesFollowRumours(t *testing.T) {
	t.Parallel()
	fresh := func() *table {
		tb := newTable("me", func(Member, api.GossipState) {})
		tb.setMembers([]Member{{ID: "me", Name: "me"}, {ID: "x", Name: "x", Address: "127.0.0.1:1"}})
		return tb
	}
	state := func(tb *table) api.GossipState { return tb.list()[1].State }
	alive := func(i uint32) func(*table) {
		return func(tb *table) { tb.note(rumour{msgAlive, rumourBody{i, "x", ""}}) }
	}
	suspect := func(i uint32) func(*table) {
		return func(tb *table) { tb.note(rumour{msgSuspect, rumourBody{i, "x", "y"}}) }
	}
	dead := func(i uint32, from string) func(*table) {
		return func(tb *table) { tb.note(rumour{msgDead, rumourBody{i, "x", from}}) }
	}
	joined := func(tb *table) { tb.joined("x") }
	gone := func(tb *table) { tb.gone("x") }
	for name, c := range map[string]struct {
		steps []func(*table)
		want  api.GossipState
	}{
		"nothing heard":               {nil, api.GossipUnknown},
		"suspect before it joined":    {[]func(*table){suspect(1)}, api.GossipUnknown},
		"joined":                      {[]func(*table){joined}, api.GossipAlive},
		"suspect":                     {[]func(*table){joined, alive(1), suspect(1)}, api.GossipSuspect},
		"it objects":                  {[]func(*table){joined, alive(1), suspect(1), alive(2)}, api.GossipAlive},
		"it does not object":          {[]func(*table){joined, alive(1), suspect(1), alive(1)}, api.GossipSuspect},
		"a late word of suspicion":    {[]func(*table){joined, alive(1), suspect(1), alive(2), suspect(1)}, api.GossipAlive},
		"dead":                        {[]func(*table){joined, suspect(1), gone, dead(1, "y")}, api.GossipDead},
		"suspicion after death":       {[]func(*table){joined, suspect(1), gone, suspect(1)}, api.GossipDead},
		"left":                        {[]func(*table){joined, gone, dead(1, "x")}, api.GossipLeft},
		"left, the word first":        {[]func(*table){joined, dead(1, "x"), gone, dead(1, "x")}, api.GossipLeft},
		"back":                        {[]func(*table){joined, alive(9), gone, dead(9, "x"), joined}, api.GossipAlive},
		"back, and suspect":           {[]func(*table){joined, alive(9), gone, joined, alive(1), suspect(1)}, api.GossipSuspect},
		"suspicion older than can be": {[]func(*table){joined, suspect(1), func(tb *table) { tb.clear(-1) }}, api.GossipAlive},
		"suspicion that may be":       {[]func(*table){joined, suspect(1), func(tb *table) { tb.clear(time.Minute) }}, api.GossipSuspect},
	} {
		tb := fresh()
		for _, s := range c.steps {
			s(tb)
		}
		if got := state(tb); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
		suspects := 0
		if c.want == api.GossipSuspect {
			suspects = 1
		}
		if got := int(tb.suspects.Load()); got != suspects {
			t.Errorf("%s: %d suspects counted", name, got)
		}
	}
}

func TestLongestSuspicionIsLongerThanMemberlists(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]time.Duration{1: 7 * time.Second, 3: 7 * time.Second, 200: 14 * time.Second} {
		if got := longestSuspicion(n); got < want || got > want+time.Second {
			t.Errorf("%d members: %v", n, got)
		}
	}
	for n, want := range map[int]time.Duration{1: 5 * time.Second, 100: 5 * time.Second, 200: 10 * time.Second, 1000: 50 * time.Second} {
		if got := summaryPause(n); got != want {
			t.Errorf("a summary of each of %d every %v", n, got)
		}
	}
}

// lonePackets is a socket that delivers what a test says.
type lonePackets struct {
	net.PacketConn
	in   chan []byte
	once sync.Once
	end  chan struct{}
}

func (l *lonePackets) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-l.in:
		return copy(b, p), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, nil
	case <-l.end:
		return 0, nil, os.ErrDeadlineExceeded
	}
}

func (l *lonePackets) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }

func (l *lonePackets) SetReadDeadline(t time.Time) error {
	if !t.IsZero() {
		l.once.Do(func() { close(l.end) })
	}
	return nil
}

// FuzzPacket gives a running service packets that are sealed with its key, as a
// node of another version or a broken one might send, and such as anybody sends.
func FuzzPacket(f *testing.F) {
	suspect := encodeRumour(f, msgSuspect, rumourBody{4, "node-2", "node-1"})
	f.Add(suspect)
	f.Add(encodeRumour(f, msgAlive, map[string]any{"Incarnation": 5, "Node": "node-2", "Addr": []byte{1, 2, 3, 4}, "Port": 1, "Vsn": []uint8{1, 5, 2, 0, 0, 0}}))
	f.Add(encodeRumour(f, msgAlive, map[string]any{"Incarnation": 5, "Node": "node-2", "Vsn": []uint8{1, 5, 2}}))
	f.Add(encodeRumour(f, msgDead, rumourBody{4, "node-2", "node-2"}))
	f.Add(encodeRumour(f, 0, map[string]any{"SeqNo": 1, "Node": "node-1", "SourceNode": "node-2"}))
	f.Add(encodeRumour(f, 1, map[string]any{"SeqNo": 1, "Node": "node-2", "Target": []byte{1}, "Port": 1, "SourceNode": "node-2", "Nack": true}))
	f.Add(compound(suspect, append([]byte{8}, (&record{id: "node-2", number: 9, summary: fullSummary.encode()}).encode()...)))
	f.Add([]byte{msgCRC, 0, 0, 0, 0, 1})
	f.Add([]byte{9, 0x82, 0xa4, 'A', 'l', 'g', 'o', 0, 0xa3, 'B', 'u', 'f', 0xa1, 1})
	fl := newFlock(f, 2)
	m := fl.nodes[0]
	l := &lonePackets{in: make(chan []byte), end: make(chan struct{})}
	m.udp = l
	m.Service = m.newService()
	m.SetMembers(fl.members())
	if err := m.SetKeys(Keys{Primary: secret(1)}); err != nil {
		f.Fatal(err)
	}
	m.start()
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxPacketBytes-100 {
			return
		}
		for _, p := range [][]byte{b, seal(t, secret(1), b), seal(t, secret(2), b)} {
			l.in <- p
		}
		if _, err := rumours(b); err != nil && !strings.Contains(err.Error(), "decode packet") {
			t.Errorf("an error without a word of what it is: %v", err)
		}
	})
}
