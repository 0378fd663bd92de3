// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net"
	"sync/atomic"
	"testing"

	"github.com/bougou/go-ipmi/pkg/types"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/power/powersim"
)

// plainOff is an answer to Get Chassis Status that says "off", without any
// protection, as anybody can make it.
func plainOff(session uint32, seq, rqSeq byte) []byte {
	msg := []byte{0x81, 0x01 << 2, 0, 0x20, rqSeq << 2, 0x01, 0x00, 0x00, 0x00, 0x00, 0}
	msg[1] = 0x01 << 2
	msg[2] = -(msg[0] + msg[1])
	for _, b := range msg[3 : len(msg)-1] {
		msg[len(msg)-1] -= b
	}
	p := []byte{0x06, 0x00, 0xff, 0x07, 0x06, 0x00, 0, 0, 0, 0, seq, 0, 0, 0, byte(len(msg)), 0}
	binary.LittleEndian.PutUint32(p[6:], session)
	return append(p, msg...)
}

// TestForgedAnswersAreNotBelieved: somebody answers faster than the BMC, with
// packets that say "off", or that make a careless decoder fall over. Without the
// wire, the library takes the first and panics on the second.
func TestForgedAnswersAreNotBelieved(t *testing.T) {
	h := powersim.NewHost(nil)
	var sent atomic.Int64
	forge := func(answer []byte) [][]byte {
		var out [][]byte
		session := uint32(0xa0a1a2a3)
		for rq := range byte(64) {
			out = append(out, plainOff(session, 200, rq))
		}
		signed := plainOff(session, 200, 1) // says that it is signed and encrypted
		signed[5] = 0xc0
		short := []byte{0x06, 0x00, 0xff, 0x07, 0x06, 0xc0, 0xa3, 0xa2, 0xa1, 0xa0, 9, 0, 0, 0, 3, 0, 1, 2, 3}
		out = append(out, signed, short, []byte{6}, nil)
		if answer[5] == 0xc0 { // of the session
			bent := bytes.Clone(answer)
			bent[len(bent)-20] ^= 0x01
			out = append(out, bent)
		}
		sent.Add(int64(len(out)))
		return out
	}
	s, err := powersim.NewIPMI(powersim.IPMIConfig{Host: h, User: testUser, Password: testPassword, Forge: forge})
	tg := ipmiTarget(t, s, err)
	for range 5 {
		st, r := Read(t.Context(), &tg)
		if r.Err != nil || st != On {
			t.Fatalf("state %q, %v", st, r.Err)
		}
	}
	if n := sent.Load(); n < 100 {
		t.Errorf("only %d packets were forged", n)
	}
}

// An old answer of the same session says what was, not what is.
func TestRepeatedAnswersAreNotBelieved(t *testing.T) {
	h := powersim.NewHost(nil)
	var all [][]byte
	s, err := powersim.NewIPMI(powersim.IPMIConfig{Host: h, User: testUser, Password: testPassword, Forge: func(answer []byte) [][]byte {
		if answer[4] != formatRMCP { // the first of a session
			all = nil
		}
		old := all
		all = append(all, answer)
		return old
	}})
	tg := ipmiTarget(t, s, err)
	if r := Cycle(t.Context(), []Target{tg}); !r.Done || !h.On() {
		t.Errorf("cycle: %v\n%v", r.Err, verbs(r.Steps))
	}
}

// A BMC, or somebody before it, that offers to do without protection.
func TestSuiteIsNotWeakened(t *testing.T) {
	for name, at := range map[string]int{"authentication": 16, "integrity": 24, "confidentiality": 32} {
		t.Run(name, func(t *testing.T) {
			w := &wire{suite: suite{types.AuthAlg_HMAC_SHA256, types.IntegrityAlg_HMAC_SHA256_128, types.CryptAlg_AES_CBC_128}, myID: 7, awaits: types.PayloadTypeRmcpOpenSessionResponse}
			good := make([]byte, bodyV2+openReplyLen)
			copy(good, []byte{6, 0, 0xff, 7, 6, byte(types.PayloadTypeRmcpOpenSessionResponse)})
			good[bodyV2-2] = openReplyLen
			body := good[bodyV2:]
			body[4], body[16], body[24], body[32] = 7, 3, 4, 1
			if !w.lets(good) {
				t.Fatal("a good answer is not let in")
			}
			body[at] = 0
			if w.lets(good) {
				t.Error("an answer that takes protection away is let in")
			}
		})
	}
}

func TestUUIDs(t *testing.T) {
	want := hostUUID
	for name, guid := range map[string]string{
		"as SMBIOS has it":   "33221100554477668899aabbccddeeff",
		"as RFC 9562 has it": "00112233445566778899aabbccddeeff",
		"reversed":           "ffeeddccbbaa99887766554433221100",
	} {
		b, err := hex.DecodeString(guid)
		if err != nil {
			t.Fatal(err)
		}
		if got, why := compare(readings([16]byte(b)), nil, want); got != api.IdentitySame {
			t.Errorf("%s: %s, %s", name, got, why)
		}
	}
	if got := readings([16]byte{}); got != nil {
		t.Errorf("no GUID: %v", got)
	}
	if _, ok := parseUUID("03000200-0400-0500-0006"); ok {
		t.Error("half a UUID")
	}
	if got, _ := compare([]string{hostUUID}, nil, "Not Settable"); got != api.IdentityUnknown {
		t.Errorf("a host without UUID: %s", got)
	}
}

// loopConn gives one datagram to the wire.
type loopConn struct {
	net.Conn
	p []byte
}

func (c *loopConn) Read(p []byte) (int, error) {
	if c.p == nil {
		return 0, net.ErrClosed
	}
	n := copy(p, c.p)
	c.p = nil
	return n, nil
}

// FuzzWire: whatever arrives, before and in a session, the wire does not fall
// over, and what it lets in does not make the library's decoders fall over.
func FuzzWire(f *testing.F) {
	f.Add(plainOff(7, 1, 1), false)
	f.Add([]byte{6, 0, 0xff, 7, 6, 0xc0, 7, 0, 0, 0, 9, 0, 0, 0, 3, 0, 1, 2, 3}, true)
	f.Add([]byte{6, 0, 0xff, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0x81, 0x1c, 0x63, 0x20, 4, 0x38, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, false)
	f.Add([]byte{6, 0, 0xff, 6, 0, 0, 0x11, 0xbe, 0x40, 0, 0, 255}, false)
	f.Fuzz(func(t *testing.T, p []byte, keys bool) {
		w := &wire{Conn: &loopConn{p: p}, suite: suite{types.AuthAlg_HMAC_SHA1, types.IntegrityAlg_HMAC_SHA1_96, types.CryptAlg_AES_CBC_128}, myID: 7, random: make([]byte, 16)}
		if len(p) > 5 {
			w.awaits = types.PayloadType(p[5] &^ 0xc0)
		}
		if keys {
			w.k1, w.k2 = make([]byte, 20), make([]byte, 20)
		}
		buf := make([]byte, 4096)
		n, err := w.Read(buf)
		if err != nil {
			return
		}
		var r types.Rmcp
		if r.Unpack(buf[:n]) != nil {
			return
		}
		var res types.IPMIResponse
		if r.Session15 != nil {
			_ = res.Unpack(r.Session15.Payload)
		}
		if r.Session20 != nil && !r.Session20.SessionHeader20.PayloadEncrypted {
			_ = res.Unpack(r.Session20.SessionPayload)
		}
	})
}
