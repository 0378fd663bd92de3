// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/muster-vm/muster/internal/version"
)

// Format is the first byte of a log entry of feature level 1, and FormatLevel
// that of any other, which names the level after it. A build whose level is 1
// knows the first alone.
const (
	Format      = 1
	FormatLevel = 2
	// newest is the newest format that this build knows.
	newest = min(FormatLevel, version.FeatureLevel)
)

// Errors of the encoding.
var (
	ErrUnknownFormat = errors.New("log entry has a format that this version does not know; upgrade this node")
	// ErrNewerLevel: the entry or snapshot is of a feature level that this version
	// does not support. It is an ErrUnknownFormat.
	ErrNewerLevel = fmt.Errorf("it is of a higher feature level: %w", ErrUnknownFormat)
	ErrMalformed  = errors.New("malformed log entry")
	ErrTooLarge   = errors.New("transaction is over a limit")
)

// Check is the type of a precondition.
type Check uint8

// The preconditions.
const (
	// CheckRevision: the key was last changed at exactly this revision; 0
	// means that the key does not exist.
	CheckRevision Check = 1
	// CheckExists: the key exists.
	CheckExists Check = 2
	// CheckEmpty: no key begins with this prefix.
	CheckEmpty Check = 3
	// CheckTerm: the entry was committed in exactly this Raft term.
	CheckTerm Check = 4
)

// Precondition must hold for a transaction to take effect.
type Precondition struct {
	Check    Check
	Key      string
	Revision uint64 // revision, or term for CheckTerm
}

// String says what was required, for error messages.
func (p Precondition) String() string {
	switch p.Check {
	case CheckRevision:
		if p.Revision == 0 {
			return fmt.Sprintf("%s must not exist", p.Key)
		}
		return fmt.Sprintf("%s must be at revision %d", p.Key, p.Revision)
	case CheckExists:
		return fmt.Sprintf("%s must exist", p.Key)
	case CheckEmpty:
		return fmt.Sprintf("%s* must be empty", p.Key)
	case CheckTerm:
		return fmt.Sprintf("term must be %d", p.Revision)
	}
	return fmt.Sprintf("unknown check %d", p.Check)
}

// Op is one change: a put, or a delete when Delete is set.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// RequestID names a transaction so that it takes effect once. A session is one
// life of one node's daemon; sequences rise by one.
type RequestID struct {
	Session  [16]byte
	Sequence uint64
	// Done: every sequence of the session below this one has been answered, so
	// its result may be forgotten. A session begins with the command whose
	// Done equals 0; a later unknown session is refused, never applied.
	Done uint64
}

// Txn is one transaction.
type Txn struct {
	Request RequestID
	Actor   string
	Require []Precondition
	Ops     []Op
}

// Command is the content of one log entry: the leader's time and the
// transactions that were packed together. No two of them change the same key.
type Command struct {
	// Time is the leader's clock in nanoseconds since 1970.
	Time int64
	// Level is the feature level that was in force when the entry was proposed; 0
	// is 1. A node that does not support it stops before it applies the entry.
	Level int
	Txns  []Txn
}

// Validate checks the limits of a transaction.
func (t *Txn) Validate() error {
	if len(t.Require) > MaxTxnOps || len(t.Ops) > MaxTxnOps {
		return fmt.Errorf("%w: %d preconditions and %d changes, at most %d each", ErrTooLarge, len(t.Require), len(t.Ops), MaxTxnOps)
	}
	if len(t.Actor) > MaxKeyBytes {
		return fmt.Errorf("%w: actor of %d bytes, at most %d", ErrTooLarge, len(t.Actor), MaxKeyBytes)
	}
	size := 64 + len(t.Actor)
	for _, p := range t.Require {
		if p.Check < CheckRevision || p.Check > CheckTerm {
			return fmt.Errorf("%w: check %d", ErrMalformed, p.Check)
		}
		if len(p.Key) > MaxKeyBytes || (p.Key == "" && p.Check != CheckTerm) {
			return fmt.Errorf("%w: key of %d bytes, 1 to %d", ErrTooLarge, len(p.Key), MaxKeyBytes)
		}
		size += len(p.Key) + 16
	}
	for _, op := range t.Ops {
		if len(op.Key) > MaxKeyBytes || op.Key == "" {
			return fmt.Errorf("%w: key of %d bytes, 1 to %d", ErrTooLarge, len(op.Key), MaxKeyBytes)
		}
		if len(op.Value) > MaxValueBytes {
			return fmt.Errorf("%w: value of %d bytes for %s, at most %d", ErrTooLarge, len(op.Value), op.Key, MaxValueBytes)
		}
		size += len(op.Key) + len(op.Value) + 16
	}
	if size > MaxTxnBytes {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, size, MaxTxnBytes)
	}
	return nil
}

// AppendTxn appends the encoding of a transaction.
func AppendTxn(b []byte, t *Txn) []byte {
	b = append(b, t.Request.Session[:]...)
	b = binary.AppendUvarint(b, t.Request.Sequence)
	b = binary.AppendUvarint(b, t.Request.Done)
	b = appendString(b, t.Actor)
	b = binary.AppendUvarint(b, uint64(len(t.Require)))
	for _, p := range t.Require {
		b = append(b, byte(p.Check))
		b = appendString(b, p.Key)
		b = binary.AppendUvarint(b, p.Revision)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Ops)))
	for _, op := range t.Ops {
		if op.Delete {
			b = append(b, 1)
			b = appendString(b, op.Key)
			continue
		}
		b = append(b, 0)
		b = appendString(b, op.Key)
		b = binary.AppendUvarint(b, uint64(len(op.Value)))
		b = append(b, op.Value...)
	}
	return b
}

// DecodeTxn reads one encoded transaction that fills b.
func DecodeTxn(b []byte) (Txn, error) {
	d := decoder{b: b}
	t := d.txn()
	return t, d.finish()
}

// Encode returns the bytes of a log entry.
func (c *Command) Encode() []byte {
	b := appendLevel(nil, c.Level)
	b = binary.AppendVarint(b, c.Time)
	b = binary.AppendUvarint(b, uint64(len(c.Txns)))
	for i := range c.Txns {
		b = AppendTxn(b, &c.Txns[i])
	}
	return b
}

// DecodeCommand reads a log entry.
func DecodeCommand(b []byte) (*Command, error) {
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrMalformed)
	}
	d := decoder{b: b[1:]}
	level, err := d.level(b[0])
	if err != nil {
		return nil, err
	}
	c := &Command{Level: level, Time: d.varint()}
	n := d.count(MaxPackTxns)
	for range n {
		if d.err != nil {
			break
		}
		c.Txns = append(c.Txns, d.txn())
	}
	return c, d.finish()
}

// appendLevel appends the format, and the level where that is not the first.
func appendLevel(b []byte, level int) []byte {
	if level <= 1 {
		return append(b, Format)
	}
	return binary.AppendUvarint(append(b, FormatLevel), uint64(level))
}

// level reads what follows a format, and refuses a level that this build does
// not support.
func (d *decoder) level(format byte) (int, error) {
	switch {
	case format < Format || format > newest:
		return 0, fmt.Errorf("%w: format %d", ErrUnknownFormat, format)
	case format == Format:
		return 1, nil
	}
	level := d.uvarint()
	switch {
	case d.err != nil:
		return 0, d.err
	case level < 2 || level > math.MaxInt32:
		return 0, fmt.Errorf("%w: feature level %d", ErrMalformed, level)
	case level > version.FeatureLevel:
		return 0, fmt.Errorf("%w: it needs feature level %d, this version (%s) supports up to %d", ErrNewerLevel, level, version.Version, version.FeatureLevel)
	}
	return int(level), nil
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// decoder reads fields until the first error, which it keeps.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", ErrMalformed, what)
	}
	d.b = nil
}

func (d *decoder) finish() error {
	if d.err == nil && len(d.b) != 0 {
		d.fail("trailing bytes")
	}
	return d.err
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail("number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) count(most int) int {
	v := d.uvarint()
	if v > uint64(most) {
		d.fail("count over its limit")
		return 0
	}
	return int(v)
}

func (d *decoder) bytes(most int) []byte {
	n := d.count(most)
	if n > len(d.b) || n > math.MaxInt32 {
		d.fail("length beyond the end")
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.fail("short")
		return 0
	}
	c := d.b[0]
	d.b = d.b[1:]
	return c
}

func (d *decoder) session() (s [16]byte) {
	if len(d.b) < len(s) {
		d.fail("short")
		return s
	}
	copy(s[:], d.b)
	d.b = d.b[len(s):]
	return s
}

func (d *decoder) txn() Txn {
	var t Txn
	t.Request.Session = d.session()
	t.Request.Sequence = d.uvarint()
	t.Request.Done = d.uvarint()
	t.Actor = string(d.bytes(MaxKeyBytes))
	for range d.count(MaxTxnOps) {
		p := Precondition{Check: Check(d.byte()), Key: string(d.bytes(MaxKeyBytes)), Revision: d.uvarint()}
		t.Require = append(t.Require, p)
		if d.err != nil {
			return t
		}
		if p.Check < CheckRevision || p.Check > CheckTerm {
			d.fail("unknown check")
		}
	}
	for range d.count(MaxTxnOps) {
		var op Op
		switch d.byte() {
		case 0:
			op.Key = string(d.bytes(MaxKeyBytes))
			op.Value = d.bytes(MaxValueBytes)
		case 1:
			op.Key, op.Delete = string(d.bytes(MaxKeyBytes)), true
		default:
			d.fail("unknown change")
		}
		t.Ops = append(t.Ops, op)
		if d.err != nil {
			return t
		}
	}
	return t
}
