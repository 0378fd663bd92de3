// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"crypto/hmac"
	"crypto/subtle"
	"encoding/binary"
	"net"
	"sync"

	"github.com/bougou/go-ipmi/pkg/crypto"
	"github.com/bougou/go-ipmi/pkg/types"
)

// wire is the socket below the IPMI library. The library's client takes any
// answer with the right sequence number, also one without encryption and
// authentication, and indexes into what it has not measured. Whoever can send
// packets to this host could make it believe that another host is off. So the
// wire lets in only what is well-formed and, once the session has keys,
// authenticated by them, encrypted, of this session and newer than what came
// before (IPMI v2.0, 13.28).
type wire struct {
	net.Conn
	user, password string

	mu     sync.Mutex
	suite  suite
	random []byte // the console's
	role   uint8
	myID   uint32 // of the session, chosen here
	bmcID  uint32
	k1, k2 []byte // nil until the session has keys
	newest uint32 // sequence number
	guid   [uuidBytes]byte
	// awaits is the kind of answer that the beginning of a session waits for; 0
	// before it.
	awaits types.PayloadType
}

// suite are the algorithms of a cipher suite (IPMI v2.0, table 22-20).
type suite struct {
	auth      types.AuthAlg
	integrity types.IntegrityAlg
	crypt     types.CryptAlg
}

// Offsets and lengths of packets (IPMI v2.0, tables 13-8 to 13-15).
const (
	rmcpHeader    = 4
	classIPMI     = 0x07
	formatRMCP    = 0x06
	headerV2      = 12 // from the format up to the payload
	bodyV2        = rmcpHeader + headerV2
	bodyV15       = rmcpHeader + 10
	minResponse   = 8 // an IPMI response with its completion code
	aesBlock      = 16
	flagEncrypted = 0x80
	flagSigned    = 0x40
	netFnAppReply = 0x07 << 2
	cmdAuthCaps   = 0x38
	openReplyLen  = 36
	rakp2Len      = 40
	shortReplyLen = 8
)

// Write implements net.Conn: it learns what the session is built of.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	w.sent(p)
	w.mu.Unlock()
	return w.Conn.Write(p)
}

func (w *wire) sent(p []byte) {
	if len(p) < bodyV2 || p[rmcpHeader] != formatRMCP {
		return
	}
	body := p[bodyV2:]
	w.awaits = types.PayloadType(p[rmcpHeader+1]) + 1 // as their numbers are given
	switch types.PayloadType(p[rmcpHeader+1]) {
	case types.PayloadTypeRmcpOpenSessionRequest:
		if len(body) >= 29 {
			w.suite = suite{types.AuthAlg(body[12]), types.IntegrityAlg(body[20]), types.CryptAlg(body[28])}
			w.myID = binary.LittleEndian.Uint32(body[4:])
			w.k1, w.k2, w.random, w.newest = nil, nil, nil, 0
		}
	case types.PayloadTypeRAKPMessage1:
		if len(body) >= 25 {
			w.random, w.role = append([]byte(nil), body[8:24]...), body[24]
		}
	}
}

// Read implements net.Conn: it returns the next datagram that is let in.
func (w *wire) Read(p []byte) (int, error) {
	for {
		n, err := w.Conn.Read(p)
		if err != nil {
			return n, err
		}
		w.mu.Lock()
		ok := w.lets(p[:n])
		w.mu.Unlock()
		if ok {
			return n, nil
		}
	}
}

// lets reports whether a datagram may reach the library.
func (w *wire) lets(p []byte) bool {
	if len(p) < rmcpHeader+2 || p[3] != classIPMI {
		return false
	}
	if p[rmcpHeader] != formatRMCP {
		return w.awaits == 0 && isAuthCaps(p)
	}
	if len(p) < bodyV2 {
		return false
	}
	length := int(binary.LittleEndian.Uint16(p[bodyV2-2:]))
	if len(p) < bodyV2+length {
		return false
	}
	kind, body := p[rmcpHeader+1], p[bodyV2:bodyV2+length]
	if types.PayloadType(kind&^(flagEncrypted|flagSigned)) == types.PayloadTypeIPMI {
		return kind == flagEncrypted|flagSigned && w.inSession(p, body)
	}
	if types.PayloadType(kind) != w.awaits {
		return false
	}
	return len(body) >= shortReplyLen && binary.LittleEndian.Uint32(body[4:]) == w.myID && w.begins(types.PayloadType(kind), body)
}

// isAuthCaps: the one answer that comes before a session, in the format of v1.5.
func isAuthCaps(p []byte) bool {
	if len(p) < bodyV15+minResponse || p[rmcpHeader] != byte(types.AuthTypeNone) || int(p[bodyV15-1]) != len(p)-bodyV15 {
		return false
	}
	return p[bodyV15+1]&^0x03 == netFnAppReply && p[bodyV15+5] == cmdAuthCaps
}

// begins looks at the answers that make a session. What they prove is checked
// by the library; here, that they are whole and do not weaken what was asked
// for.
func (w *wire) begins(kind types.PayloadType, body []byte) bool {
	failed := body[1] != 0
	switch kind {
	case types.PayloadTypeRmcpOpenSessionResponse:
		if failed {
			return true
		}
		if len(body) < openReplyLen || body[16] != byte(w.suite.auth) || body[24] != byte(w.suite.integrity) || body[32] != byte(w.suite.crypt) {
			return false
		}
		w.bmcID = binary.LittleEndian.Uint32(body[8:])
		return true
	case types.PayloadTypeRAKPMessage2:
		if failed {
			return true
		}
		n := crypto.RAKP2AuthCodeLen(w.suite.auth)
		if n == 0 || len(body) < rakp2Len+n || w.random == nil {
			return false
		}
		w.derive(body[8:24], body[24:40], body[rakp2Len:rakp2Len+n])
		return true
	case types.PayloadTypeRAKPMessage4:
		return failed || w.k1 != nil && len(body) >= shortReplyLen+crypto.RAKP4ICVLen(w.suite.auth)
	}
	return false
}

// derive computes the session's keys if the device proved that it knows the
// password; the library says so if it did not.
func (w *wire) derive(bmcRandom, guid, code []byte) {
	kuid := crypto.PadPassword20([]byte(w.password))
	want, err := crypto.RAKP2AuthCode(w.suite.auth, w.myID, w.bmcID, w.random, bmcRandom, guid, w.role, w.user, kuid)
	if err != nil || len(want) < len(code) || !hmac.Equal(want[:len(code)], code) {
		return
	}
	_, k1, k2, err := crypto.DeriveSessionKeys(w.suite.auth, w.random, bmcRandom, w.role, w.user, kuid)
	if err != nil || len(k2) < aesBlock {
		return
	}
	w.k1, w.k2 = k1, k2
	copy(w.guid[:], guid)
}

// systemGUID is what the device that knows the password said of its host.
func (w *wire) systemGUID() [uuidBytes]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.guid
}

// inSession checks a packet of the session: whole, signed with its key, newer,
// and padded as it must be.
func (w *wire) inSession(p, body []byte) bool {
	if w.k1 == nil || binary.LittleEndian.Uint32(p[rmcpHeader+2:]) != w.myID {
		return false
	}
	n, ok := crypto.IntegrityAuthCodeLen(w.suite.integrity)
	pad := types.IntegrityPadLen(headerV2, len(body))
	signed := bodyV2 + len(body) + pad + 2
	if !ok || n == 0 || len(p) != signed+n || int(p[signed-2]) != pad {
		return false
	}
	want, err := crypto.SessionIntegrityAuthCode(w.suite.integrity, p[rmcpHeader:signed], w.k1, w.password)
	if err != nil || subtle.ConstantTimeCompare(want, p[signed:]) != 1 {
		return false
	}
	seq := binary.LittleEndian.Uint32(p[rmcpHeader+6:])
	if seq <= w.newest || !w.decrypts(body) {
		return false
	}
	w.newest = seq
	return true
}

// decrypts reports whether a payload can be decrypted to a whole response.
func (w *wire) decrypts(body []byte) bool {
	if len(body) < 2*aesBlock || len(body)%aesBlock != 0 {
		return false
	}
	plain, err := crypto.DecryptAES(append([]byte(nil), body[aesBlock:]...), w.k2[:aesBlock], body[:aesBlock])
	if err != nil || len(plain) == 0 {
		return false
	}
	return len(plain)-1-int(plain[len(plain)-1]) >= minResponse
}
