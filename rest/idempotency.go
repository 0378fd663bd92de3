// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// idemPrefix is where the records are. Their keys are hashes, so that the
// neighbours of a new record are a random sample of all: sweeping a few of
// them with each write keeps the number of those that are over small without
// a service of its own.
const idemPrefix = configdb.Root + "idempotency/"

// idemRecord is written in the transaction that carries out a request, so
// that either both are there or neither. The zero pointer does nothing: the
// request had no key.
type idemRecord struct {
	key     string
	request string // hash of what was asked
	now     time.Time
}

// idemValue is the stored form.
type idemValue struct {
	Request string    `json:"request"`
	At      time.Time `json:"at"`
	Status  int       `json:"status"`
	Kind    api.Kind  `json:"kind"`
	ID      string    `json:"id"`
	Task    string    `json:"task,omitempty"`
}

// idempotency reads the header of a POST.
func (q *request) idempotency(body []byte) (*idemRecord, error) {
	key := q.r.Header.Get(headerIdemKey)
	if key == "" || q.r.Method != http.MethodPost {
		return nil, nil
	}
	if len(key) > maxIdemKey {
		return nil, api.Invalid(headerIdemKey, "has %d characters; at most %d are allowed", len(key), maxIdemKey)
	}
	// How long the client waits is not part of what it asks for.
	ask := url.Values{}
	for k, v := range q.r.URL.Query() {
		if k != "wait" && k != "minRevision" {
			ask[k] = v
		}
	}
	return &idemRecord{
		key:     idemPrefix + digest(q.who.scope, key),
		request: digest(q.r.URL.Path, ask.Encode(), string(body)),
		now:     q.s.cfg.Now().UTC(),
	}, nil
}

// digest hashes strings, each with its length, so that none runs into another.
func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func (i *idemRecord) over(val idemValue) bool { return i.now.Sub(val.At) > idemLife }

// find returns what an earlier request with the same key did.
func (i *idemRecord) find(v *configdb.View) (*outcome, error) {
	if i == nil {
		return nil, nil
	}
	e, ok := v.Get(i.key)
	if !ok {
		return nil, nil
	}
	var val idemValue
	if err := json.Unmarshal(e.Value, &val); err != nil {
		return nil, fmt.Errorf("decode %s: %w", i.key, err)
	}
	switch {
	case i.over(val):
		return nil, nil
	case val.Request != i.request:
		return nil, api.Errorf(api.CodeRefused, "this %s was used for a different request; choose a new one", headerIdemKey)
	case val.Kind == api.KindToken:
		return nil, api.Errorf(api.CodeRefused, "token %s was created by an earlier request with this %s and its secret was shown then; delete it and create another", val.ID, headerIdemKey)
	}
	return &outcome{
		effect:   effect{status: val.Status, kind: val.Kind, id: val.ID, task: val.Task},
		revision: e.Revision, replayed: true,
	}, nil
}

// record adds the record of e to its transaction.
func (i *idemRecord) record(v *configdb.View, tx *configdb.Txn, e *effect) error {
	if i == nil {
		return nil
	}
	b, err := json.Marshal(idemValue{Request: i.request, At: i.now, Status: e.status, Kind: e.kind, ID: e.id, Task: e.task})
	if err != nil {
		return fmt.Errorf("encode the record of a request: %w", err)
	}
	old, _ := v.Get(i.key)
	tx.RequireRevision(i.key, old.Revision)
	tx.Put(i.key, b)
	i.sweep(v, tx)
	return nil
}

func (i *idemRecord) sweep(v *configdb.View, tx *configdb.Txn) {
	seen := 0
	for e := range v.Scan(idemPrefix, i.key) {
		if seen++; seen > idemSweep {
			return
		}
		var val idemValue
		if json.Unmarshal(e.Value, &val) == nil && i.over(val) {
			tx.RequireRevision(e.Key, e.Revision)
			tx.Delete(e.Key)
		}
	}
}
