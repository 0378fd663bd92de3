// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"

	"github.com/muster-vm/muster/api"
)

// memberlist tells its users who is dead, but not who is suspect, and not who has
// left in good order. It does tell the other nodes: each change of a state that it
// makes is broadcast. So what goes out is read here. Its queue may lose a message
// (see outbox), therefore what comes in is read too while somebody is suspect, and
// no suspicion is believed for longer than memberlist's own can last. If a later
// version spoke differently, alive and dead would remain, and TestSuspectIsSeen
// would fail.

// The types of memberlist's messages that are looked at, as on the wire.
const (
	msgSuspect  = 3
	msgAlive    = 4
	msgDead     = 5
	msgCompound = 7
	msgCRC      = 12

	// sealedVersion is the first byte of an encrypted packet (AES-GCM, not padded).
	sealedVersion = 1
	nonceBytes    = 12
	tagBytes      = 16
	crcBytes      = 4
	// maxNesting bounds messages within messages; memberlist makes at most two.
	maxNesting = 4
)

// rumour is a message about a node's state.
type rumour struct {
	kind byte
	body rumourBody
}

type rumourBody struct {
	Incarnation uint32
	Node        string
	From        string // of msgSuspect and msgDead
}

// newAEADs returns the ciphers of some keys.
func newAEADs(keys [][]byte) ([]cipher.AEAD, error) {
	var out []cipher.AEAD
	for _, k := range keys {
		block, err := aes.NewCipher(k)
		if err != nil {
			return nil, err
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return nil, err
		}
		out = append(out, aead)
	}
	return out, nil
}

var errSealed = errors.New("the packet is not encrypted with a key of this cluster")

// open decrypts a packet of memberlist.
func open(keys []cipher.AEAD, packet []byte) ([]byte, error) {
	if !wellSealed(packet) {
		return nil, errSealed
	}
	nonce, sealed := packet[1:1+nonceBytes], packet[1+nonceBytes:]
	for _, k := range keys {
		if plain, err := k.Open(nil, nonce, sealed, nil); err == nil {
			return plain, nil
		}
	}
	return nil, errSealed
}

// wellSealed reports whether a packet may be one of this cluster.
func wellSealed(packet []byte) bool {
	return len(packet) > 1+nonceBytes+tagBytes && packet[0] == sealedVersion
}

// rumours returns the messages about states in a plain packet.
func rumours(plain []byte) ([]rumour, error) { return appendRumours(nil, plain, maxNesting) }

func appendRumours(out []rumour, b []byte, depth int) ([]rumour, error) {
	if len(b) == 0 || depth == 0 {
		return out, fmt.Errorf("decode packet: %w", errMalformed)
	}
	kind, b := b[0], b[1:]
	switch kind {
	case msgCRC: // the encryption has checked it already
		if len(b) < crcBytes {
			return out, fmt.Errorf("decode packet: checksum: %w", errMalformed)
		}
		return appendRumours(out, b[crcBytes:], depth-1)
	case msgCompound:
		parts, err := split(b)
		if err != nil {
			return out, err
		}
		for _, p := range parts {
			if out, err = appendRumours(out, p, depth-1); err != nil {
				return out, err
			}
		}
	case msgSuspect, msgAlive, msgDead:
		r := rumour{kind: kind}
		if err := codec.NewDecoderBytes(b, &codec.MsgpackHandle{}).Decode(&r.body); err != nil {
			return out, fmt.Errorf("decode packet: %w", err)
		}
		out = append(out, r)
	}
	return out, nil
}

// split takes a compound message apart: a number, that many lengths, the messages.
func split(b []byte) ([][]byte, error) {
	if len(b) < 1 || len(b) < 1+2*int(b[0]) {
		return nil, fmt.Errorf("decode packet: lengths: %w", errMalformed)
	}
	n := int(b[0])
	lengths, b := b[1:1+2*n], b[1+2*n:]
	var out [][]byte
	for ; len(lengths) > 0; lengths = lengths[2:] {
		size := int(binary.BigEndian.Uint16(lengths))
		if size > len(b) {
			return nil, fmt.Errorf("decode packet: truncated: %w", errMalformed)
		}
		out, b = append(out, b[:size]), b[size:]
	}
	return out, nil
}

// note applies what memberlist tells the others. A message may be older than what
// is known: what was drawn from a queue before a change is sent after it.
func (t *table) note(r rumour) {
	t.move(r.body.Node, func(p *peer) (api.GossipState, bool) {
		newer := r.body.Incarnation > p.incarnation
		if r.body.Incarnation < p.incarnation {
			return "", false
		}
		p.incarnation = r.body.Incarnation
		switch r.kind {
		case msgAlive: // of the dead, joined tells
			return api.GossipAlive, newer && p.state == api.GossipSuspect
		case msgSuspect:
			return api.GossipSuspect, p.state == api.GossipAlive
		case msgDead:
			return api.GossipLeft, r.body.From == r.body.Node && p.state == api.GossipDead
		}
		return "", false
	})
}

// clear ends suspicions that are older than any can be: memberlist would have
// called the node dead.
func (t *table) clear(longest time.Duration) {
	if !t.anySuspect() {
		return
	}
	t.mu.Lock()
	var over []string
	for id, p := range t.peers {
		if p.state == api.GossipSuspect && time.Since(p.since) > longest {
			over = append(over, id)
		}
	}
	t.mu.Unlock()
	for _, id := range over {
		t.move(id, func(p *peer) (api.GossipState, bool) { return api.GossipAlive, p.state == api.GossipSuspect })
	}
}

// joined and gone apply what memberlist says itself. Who joins may have begun
// anew, and counts from one again.
func (t *table) joined(id string) {
	t.move(id, func(p *peer) (api.GossipState, bool) {
		p.incarnation = 0
		return api.GossipAlive, true
	})
}

func (t *table) gone(id string) {
	t.move(id, func(p *peer) (api.GossipState, bool) { return api.GossipDead, p.up() })
}
