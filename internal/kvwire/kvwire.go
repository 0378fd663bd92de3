// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package kvwire is the form of the key stream, the binary sibling of
// /api/v1/raw: many small reads and writes over one WebSocket, each with a
// number of the client's choice, answered in any order.
//
// A message is any number of frames. All numbers are unsigned varints (as in
// protocol buffers), all texts a length and bytes:
//
//	get     number · 1 · key
//	get     number · 2 · key                      of this node's replica, as old as it is
//	put     number · 3 · key · condition · value
//	delete  number · 4 · key · condition
//
// A condition is 0 for none, else 1 + the revision that the key must have, which
// is 0 for a key that must not exist. The answers:
//
//	done      number · 1 · revision               of the change
//	value     number · 2 · revision · value       revision of the key's last change
//	none      number · 3 · revision               up to which the answer holds
//	conflict  number · 4 · revision               that the key has, 0 for none
//	error     number · 5 · code · detail          as in a problem document
//
// Decoding is bounded by the size of the message; nothing is allocated for a
// length that the message does not have.
package kvwire

import (
	"encoding/binary"
	"errors"
)

// Protocol is the WebSocket subprotocol (RFC 6455 section 1.9).
const Protocol = "muster-kv-v1"

// Limits of a stream.
const (
	// MaxMessageBytes is the largest message in either direction.
	MaxMessageBytes = 4 << 20
	// MaxInFlight is how many requests of a stream are worked on at once; the
	// server reads no further until one is answered.
	MaxInFlight = 1024
)

// Op is what a request wants.
type Op byte

// The requests.
const (
	Get      Op = 1
	GetStale Op = 2
	Put      Op = 3
	Delete   Op = 4
)

// Status is the kind of an answer.
type Status byte

// The answers.
const (
	Done     Status = 1
	Value    Status = 2
	None     Status = 3
	Conflict Status = 4
	Error    Status = 5
)

// ErrMalformed: a message is not made of whole frames.
var ErrMalformed = errors.New("malformed message of the key stream")

// Request is one frame of a client. Key and Value share the message's bytes.
type Request struct {
	Number    uint64
	Op        Op
	Key       []byte
	Condition uint64
	Value     []byte
}

// Answer is one frame of a server.
type Answer struct {
	Number   uint64
	Status   Status
	Revision uint64
	Value    []byte
	Code     string
	Detail   string
}

// AppendRequest appends a frame.
func AppendRequest(b []byte, r *Request) []byte {
	b = binary.AppendUvarint(b, r.Number)
	b = append(b, byte(r.Op))
	b = appendBytes(b, r.Key)
	if r.Op == Put || r.Op == Delete {
		b = binary.AppendUvarint(b, r.Condition)
	}
	if r.Op == Put {
		b = appendBytes(b, r.Value)
	}
	return b
}

// AppendAnswer appends a frame.
func AppendAnswer(b []byte, a *Answer) []byte {
	b = binary.AppendUvarint(b, a.Number)
	b = append(b, byte(a.Status))
	if a.Status == Error {
		return appendBytes(appendBytes(b, []byte(a.Code)), []byte(a.Detail))
	}
	b = binary.AppendUvarint(b, a.Revision)
	if a.Status == Value {
		b = appendBytes(b, a.Value)
	}
	return b
}

func appendBytes(b, s []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// NextRequest reads the first frame of a message and returns what follows it.
func NextRequest(b []byte) (r Request, rest []byte, err error) {
	d := decoder{b: b}
	r.Number, r.Op = d.uvarint(), Op(d.byte())
	if r.Op < Get || r.Op > Delete {
		d.failed = true
	}
	r.Key = d.bytes()
	if r.Op == Put || r.Op == Delete {
		r.Condition = d.uvarint()
	}
	if r.Op == Put {
		r.Value = d.bytes()
	}
	if d.failed {
		return Request{}, nil, ErrMalformed
	}
	return r, d.b, nil
}

// NextAnswer reads the first frame of a message and returns what follows it.
func NextAnswer(b []byte) (a Answer, rest []byte, err error) {
	d := decoder{b: b}
	a.Number, a.Status = d.uvarint(), Status(d.byte())
	switch a.Status {
	case Error:
		a.Code, a.Detail = string(d.bytes()), string(d.bytes())
	case Value:
		a.Revision, a.Value = d.uvarint(), d.bytes()
	case Done, None, Conflict:
		a.Revision = d.uvarint()
	default:
		d.failed = true
	}
	if d.failed {
		return Answer{}, nil, ErrMalformed
	}
	return a, d.b, nil
}

type decoder struct {
	b      []byte
	failed bool
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.failed, d.b = true, nil
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.failed = true
		return 0
	}
	c := d.b[0]
	d.b = d.b[1:]
	return c
}

func (d *decoder) bytes() []byte {
	n := d.uvarint()
	if d.failed || n > uint64(len(d.b)) {
		d.failed, d.b = true, nil
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}
