// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/fsm"
)

// The history of configuration. A record is an ordinary key, written in the
// transaction of the change that it tells of, so that neither is there without
// the other and the revision of both is the same. Records never change; the
// leader removes old ones (configdb/history).
const (
	// HistoryRoot is the prefix of all records.
	HistoryRoot = Root + "history/"
	// HistoryHorizonKey says from which revision on the history is complete.
	HistoryHorizonKey = Root + "historyhorizon"
)

// HasHistory reports whether changes of a kind are recorded: of what people
// decide, not of what the cluster keeps for itself. Tokens have none, because
// their hashes must not outlive them.
func HasHistory(kind api.Kind) bool {
	switch kind {
	case api.KindCluster, api.KindNode, api.KindVM, api.KindImage, api.KindVolume, api.KindPool, api.KindNetwork,
		api.KindUplink, api.KindIPPool, api.KindRule, api.KindReceiver, api.KindUser, api.KindPowerDevice:
		return true
	}
	return false
}

// HistoryKinds returns those kinds, in the order in which lists show them.
func HistoryKinds() []api.Kind {
	return []api.Kind{api.KindCluster, api.KindNode, api.KindPool, api.KindNetwork, api.KindIPPool, api.KindUplink,
		api.KindImage, api.KindVolume, api.KindVM, api.KindRule, api.KindReceiver, api.KindUser, api.KindPowerDevice}
}

// HistoryPrefix is the prefix of the records of one object, or of a kind if id
// is empty.
func HistoryPrefix(kind api.Kind, id string) string {
	p := HistoryRoot + string(kind) + "/"
	if id != "" {
		p += id + "/"
	}
	return p
}

// HistoryKey is the key of the record of a change that was based on a revision
// of the object, 0 for a creation. No two changes have the same base, and the
// bases of later changes are higher.
func HistoryKey(kind api.Kind, id string, base uint64) string {
	return HistoryPrefix(kind, id) + fmt.Sprintf("%016x", base)
}

// SplitHistoryKey returns the parts of a key below HistoryRoot.
func SplitHistoryKey(key string) (kind api.Kind, id string, ok bool) {
	rest, ok := strings.CutPrefix(key, HistoryRoot)
	k, rest, ok2 := strings.Cut(rest, "/")
	id, base, ok3 := strings.Cut(rest, "/")
	_, err := strconv.ParseUint(base, 16, 64)
	return api.Kind(k), id, ok && ok2 && ok3 && len(base) == 16 && err == nil
}

// HistoryOp is what a record tells of.
type HistoryOp byte

// The operations. Found and gone are written by the leader about a change that
// was not recorded: the object was created before there was a history, or a
// node of an older version changed it.
const (
	HistoryCreate HistoryOp = 1
	HistoryUpdate HistoryOp = 2
	HistoryDelete HistoryOp = 3
	HistoryFound  HistoryOp = 4
	HistoryGone   HistoryOp = 5
)

// String returns the word for people and for the API.
func (o HistoryOp) String() string {
	switch o {
	case HistoryCreate:
		return "create"
	case HistoryUpdate:
		return "update"
	case HistoryDelete:
		return "delete"
	case HistoryFound:
		return "found"
	case HistoryGone:
		return "gone"
	}
	return "unknown"
}

// HistoryRecord is the content of a record.
type HistoryRecord struct {
	Op HistoryOp
	// Time is the clock of the node that proposed the change. Clocks differ: the
	// order of changes is that of their revisions.
	Time time.Time
	// Since is, for HistoryFound, the revision at which the object got this
	// spec.
	Since uint64
	// Actor is who, Source from where ("api 10.0.0.5", "ssh 10.0.0.5", "unix
	// socket"; empty for what a module did by itself), Node the name of the node
	// that proposed it, Note why, if there is more to say.
	Actor, Source, Node, Note string
	Project, Name             string
	// Spec is the stored form of metadata and spec after the change, without
	// what is never recorded; nil when there is no object after it.
	Spec []byte
}

// Exists reports whether there is an object after the change.
func (r *HistoryRecord) Exists() bool { return r.Op != HistoryDelete && r.Op != HistoryGone }

// The form of a record: the format, the operation, the time in milliseconds,
// since, the strings with their lengths, and the spec, plain or squeezed.
const (
	historyFormat   = 1
	historyNoSpec   = 0
	historyPlain    = 1
	historySqueezed = 2
	// maxHistoryString bounds each string of a record in bytes.
	maxHistoryString = 1024
	// squeezeAbove is the length from which squeezing pays.
	squeezeAbove = 64
)

var errHistoryRecord = errors.New("history record is malformed")

// Encode returns the stored form.
func (r *HistoryRecord) Encode() []byte {
	b := make([]byte, 0, 128+len(r.Spec)/2)
	b = append(b, historyFormat, byte(r.Op))
	b = binary.AppendVarint(b, r.Time.UnixMilli())
	b = binary.AppendUvarint(b, r.Since)
	for _, s := range []string{r.Actor, r.Source, r.Node, r.Note, r.Project, r.Name} {
		if len(s) > maxHistoryString {
			s = strings.ToValidUTF8(s[:maxHistoryString], "")
		}
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	switch {
	case r.Spec == nil:
		return append(b, historyNoSpec)
	case len(r.Spec) < squeezeAbove:
		return append(append(b, historyPlain), r.Spec...)
	}
	b = append(b, historySqueezed)
	plain := len(b)
	if b = squeeze(b, r.Spec); len(b)-plain > len(r.Spec) {
		b[plain-1] = historyPlain
		b = append(b[:plain], r.Spec...)
	}
	return b
}

// DecodeHistory reads a stored record.
func DecodeHistory(b []byte) (HistoryRecord, error) {
	r, spec, err := decodeHistoryHead(b)
	if err != nil {
		return r, err
	}
	switch spec[0] {
	case historyNoSpec:
		if len(spec) > 1 {
			return r, errHistoryRecord
		}
	case historyPlain:
		r.Spec = bytes.Clone(spec[1:])
	case historySqueezed:
		if r.Spec, err = unsqueeze(spec[1:], fsm.MaxValueBytes); err != nil {
			return r, err
		}
	default:
		return r, fmt.Errorf("history record has a spec of form %d, which this version does not know; upgrade this node", spec[0])
	}
	if (r.Spec != nil) != r.Exists() {
		return r, errHistoryRecord
	}
	return r, nil
}

// DecodeHistoryHead reads all of a record but the spec.
func DecodeHistoryHead(b []byte) (HistoryRecord, error) {
	r, _, err := decodeHistoryHead(b)
	return r, err
}

// HistoryEffect returns the operation of a stored record and the revision from
// which on its object was as the record says.
func HistoryEffect(e Entry) (op HistoryOp, from uint64) {
	b := e.Value
	if len(b) < 3 || b[0] != historyFormat {
		return 0, e.Revision
	}
	op, b = HistoryOp(b[1]), b[2:]
	_, n := binary.Varint(b)
	if op != HistoryFound || n <= 0 {
		return op, e.Revision
	}
	if since, n := binary.Uvarint(b[n:]); n > 0 && since > 0 && since < e.Revision {
		return op, since
	}
	return op, e.Revision
}

// HistoryTime returns the time of a stored record, zero if it cannot be read.
func HistoryTime(value []byte) (t time.Time) {
	if len(value) < 3 || value[0] != historyFormat {
		return t
	}
	ms, n := binary.Varint(value[2:])
	if n <= 0 {
		return t
	}
	return time.UnixMilli(ms)
}

func decodeHistoryHead(b []byte) (r HistoryRecord, spec []byte, err error) {
	if len(b) < 2 {
		return r, nil, errHistoryRecord
	}
	if b[0] != historyFormat {
		return r, nil, fmt.Errorf("history record has format %d, which this version does not know; upgrade this node", b[0])
	}
	r.Op = HistoryOp(b[1])
	if r.Op < HistoryCreate || r.Op > HistoryGone {
		return r, nil, fmt.Errorf("history record tells of operation %d, which this version does not know; upgrade this node", b[1])
	}
	b = b[2:]
	ms, n := binary.Varint(b)
	if n <= 0 {
		return r, nil, errHistoryRecord
	}
	r.Time = time.UnixMilli(ms).UTC()
	b = b[n:]
	if r.Since, n = binary.Uvarint(b); n <= 0 {
		return r, nil, errHistoryRecord
	}
	b = b[n:]
	for _, s := range []*string{&r.Actor, &r.Source, &r.Node, &r.Note, &r.Project, &r.Name} {
		l, n := binary.Uvarint(b)
		if n <= 0 || l > maxHistoryString || int(l) > len(b)-n {
			return r, nil, errHistoryRecord
		}
		*s = string(b[n : n+int(l)])
		b = b[n+int(l):]
	}
	if len(b) == 0 {
		return r, nil, errHistoryRecord
	}
	return r, b, nil
}

// pendingRecord is a record of a transaction that is being collected: who and
// where is known when it is proposed.
type pendingRecord struct {
	key string
	op  HistoryOp
	// spec is nil for a deletion.
	spec          []byte
	project, name string
}

// remember adds the record of a change to the transaction. A second change of
// the same object in it takes the place of the first.
func (t *Txn) remember(kind api.Kind, m *api.Meta, op HistoryOp, base uint64, spec []byte) {
	if !HasHistory(kind) {
		return
	}
	p := pendingRecord{key: HistoryKey(kind, m.ID, base), op: op, spec: forHistory(kind, spec), project: m.Project, name: m.Name}
	for i := range t.history {
		if t.history[i].key == p.key {
			t.history[i] = p
			return
		}
	}
	t.history = append(t.history, p)
}

// seal turns the pending records into changes.
func (t *Txn) seal() {
	now := t.Time
	if now.IsZero() {
		now = time.Now()
	}
	for i := range t.history {
		p := &t.history[i]
		r := HistoryRecord{
			Op: p.op, Time: now, Actor: t.Actor, Source: t.Source, Node: t.node, Note: t.Note,
			Project: p.project, Name: p.name, Spec: p.spec,
		}
		t.Put(p.key, r.Encode())
	}
	t.history = nil
}

// forHistory takes out of a stored spec what must not be kept: the sealed keys
// of authorities that are no more, and those of gossip.
func forHistory(kind api.Kind, spec []byte) []byte {
	if kind != api.KindCluster || spec == nil {
		return spec
	}
	dec := json.NewDecoder(bytes.NewReader(spec))
	dec.UseNumber() // no digit of a large number may be lost
	var doc any
	err := dec.Decode(&doc)
	if err == nil {
		dropKey(doc, "sealedCAKey")
		dropKey(doc, "gossip")
		spec, err = json.Marshal(doc)
	}
	if err != nil { // it cannot be told what is in it
		return []byte(`{"schema":1,"meta":{},"spec":{}}`)
	}
	return spec
}

// dropKey removes a key of objects at any depth.
func dropKey(v any, key string) {
	switch v := v.(type) {
	case map[string]any:
		delete(v, key)
		for _, x := range v {
			dropKey(x, key)
		}
	case []any:
		for _, x := range v {
			dropKey(x, key)
		}
	}
}

// Unrecorded adds a record about a change that was not recorded when it was
// made. last is the revision of the object's newest record, 0 if it has none;
// spec is nil if the object is gone.
func (t *Txn) Unrecorded(kind api.Kind, id string, last uint64, spec *Entry, r HistoryRecord) {
	key := HistoryKey(kind, id, last)
	t.RequireRevision(key, 0)
	r.Op, r.Spec = HistoryGone, nil
	found := uint64(0)
	if spec != nil {
		r.Op, r.Since, r.Spec = HistoryFound, spec.Revision, forHistory(kind, spec.Value)
		found = spec.Revision
	}
	t.RequireRevision(SpecPrefixOf(kind)+id, found)
	t.Put(key, r.Encode())
}

// SpecPrefixOf is Table.SpecPrefix for a kind whose types do not matter.
func SpecPrefixOf(kind api.Kind) string { return SpecRoot + string(kind) + "/" }

type sourceKey struct{}

// WithSource returns a context whose transactions carry a source, see
// Txn.Source.
func WithSource(ctx context.Context, source string) context.Context {
	return context.WithValue(ctx, sourceKey{}, source)
}

// SourceOf returns the source that a context carries.
func SourceOf(ctx context.Context) string {
	s, _ := ctx.Value(sourceKey{}).(string)
	return s
}
