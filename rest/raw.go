// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// RawItem is one key of the configuration database.
type RawItem struct {
	Key      string `json:"key"`
	Value    []byte `json:"value" doc:"base64"`
	Revision uint64 `json:"revision"`
}

// RawList is a page of keys.
type RawList struct {
	Items    []RawItem `json:"items"`
	Continue string    `json:"continue,omitempty"`
	Revision uint64    `json:"revision"`
}

// RawReply answers a PUT.
type RawReply struct {
	Key      string `json:"key"`
	Revision uint64 `json:"revision"`
}

// secretPrefixes hold what no reply may show.
var secretPrefixes = []string{
	configdb.Tokens.SpecPrefix(), configdb.Clusters.SpecPrefix(),
	configdb.HistoryPrefix(api.KindCluster, ""), configdb.HistoryPrefix(api.KindReceiver, ""),
	configdb.PowerDevices.SpecPrefix(), configdb.HistoryPrefix(api.KindPowerDevice, ""),
}

func secret(key string) bool {
	for _, p := range secretPrefixes {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return false
}

// maxPageBytes bounds the values of one page of keys.
const maxPageBytes = 8 << 20

func rawKey(q *request) (string, error) {
	key := strings.TrimPrefix(q.r.URL.Path, base+"raw/")
	if key == "" {
		return "", api.Invalid("key", "is missing from the path")
	}
	if len(key) > maxKeyBytes {
		return "", api.Errorf(api.CodeTooLarge, "the key has %d bytes; at most %d are allowed", len(key), maxKeyBytes)
	}
	return key, nil
}

func rawKeyToWrite(q *request) (string, error) {
	key, err := rawKey(q)
	if err == nil && strings.HasPrefix(key, configdb.Root) {
		err = api.Errorf(api.CodeForbidden, "keys below %s are reserved for typed objects", configdb.Root)
	}
	return key, err
}

func rawGet(q *request) error {
	if q.r.URL.Path == base+"raw/" {
		return rawList(q)
	}
	key, err := rawKey(q)
	if err != nil {
		return err
	}
	if secret(key) {
		return api.Errorf(api.CodeForbidden, "keys below %s hold secrets and are never shown", strings.Join(secretPrefixes, " and "))
	}
	none, err := q.match("If-None-Match")
	if err != nil {
		return err
	}
	v, err := q.view(strict)
	if err != nil {
		return err
	}
	e, ok := v.Get(key)
	if !ok {
		return api.Errorf(api.CodeNotFound, "key %q does not exist", key)
	}
	h := q.w.Header()
	h.Set("ETag", etag(e.Revision))
	setRevision(h, v.Revision())
	if none.set && (none.any || none.revision == e.Revision) {
		q.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Type", "application/octet-stream")
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write(e.Value) // a failure means that the client is gone
	return nil
}

func rawList(q *request) error {
	prefix := q.param("prefix")
	if secret(prefix) {
		return api.Errorf(api.CodeForbidden, "keys below %s hold secrets and are never shown", strings.Join(secretPrefixes, " and "))
	}
	limit, err := q.intParam("limit", listItems, 1, maxListItems)
	if err != nil {
		return err
	}
	after, err := base64.RawURLEncoding.DecodeString(q.param("continue"))
	if err != nil || len(after) > maxKeyBytes || len(after) > 0 && !strings.HasPrefix(string(after), prefix) {
		return api.Invalid("continue", "is not a value that an earlier page gave")
	}
	v, err := q.view(strict)
	if err != nil {
		return err
	}
	page, size := RawList{Items: []RawItem{}, Revision: v.Revision()}, 0
	for e := range v.Scan(prefix, string(after)) {
		if secret(e.Key) {
			continue
		}
		if len(page.Items) == limit || size > 0 && size+len(e.Value) > maxPageBytes {
			page.Continue = continueToken(page.Items[len(page.Items)-1].Key)
			break
		}
		size += len(e.Value)
		page.Items = append(page.Items, RawItem{e.Key, e.Value, e.Revision})
	}
	q.reply(http.StatusOK, v.Revision(), page)
	return nil
}

// rawTxn commits a transaction on one key with the client's conditions. A
// failed one is never retried here: it is the client's answer.
func rawTxn(q *request, key string, f func(tx *configdb.Txn)) (uint64, error) {
	is, err := q.match("If-Match")
	if err != nil {
		return 0, err
	}
	none, err := q.match("If-None-Match")
	if err != nil {
		return 0, err
	}
	if none.set && !none.any {
		return 0, api.Invalid("If-None-Match", "of a write can only be *")
	}
	tx := &configdb.Txn{Actor: q.who.actor}
	if none.set {
		tx.RequireRevision(key, 0)
	}
	if is.any {
		tx.RequireExists(key)
	} else if is.set {
		tx.RequireRevision(key, is.revision)
	}
	f(tx)
	// The value stays out of it: it may be anything.
	if err := q.audit(tx, &effect{kind: "raw", id: key}); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), writeTimeout)
	defer cancel()
	rev, err := q.db.Txn(ctx, tx)
	var c *configdb.ConflictError
	if errors.As(err, &c) && (is.set || none.set) {
		switch {
		case c.Actual == 0:
			err = api.Errorf(api.CodeConflict, "key %q does not exist: %w", key, err)
		case none.set:
			err = api.Errorf(api.CodeConflict, "key %q exists already, at revision %d: %w", key, c.Actual, err)
		default:
			err = api.Errorf(api.CodeConflict, "key %q is at revision %d: %w", key, c.Actual, err)
		}
	}
	return rev, err
}

func rawPut(q *request) error {
	key, err := rawKeyToWrite(q)
	if err != nil {
		return err
	}
	value, err := q.body()
	if err != nil {
		return err
	}
	rev, err := rawTxn(q, key, func(tx *configdb.Txn) { tx.Put(key, value) })
	if err != nil {
		return err
	}
	status := http.StatusOK
	if e, ok := q.db.Local().Get(key); ok && e.Created == rev {
		status = http.StatusCreated
	}
	q.w.Header().Set("ETag", etag(rev))
	q.reply(status, rev, RawReply{key, rev})
	return nil
}

func rawDelete(q *request) error {
	key, err := rawKeyToWrite(q)
	if err != nil {
		return err
	}
	rev, err := rawTxn(q, key, func(tx *configdb.Txn) {
		tx.RequireExists(key)
		tx.Delete(key)
	})
	var c *configdb.ConflictError
	if errors.As(err, &c) && c.Actual == 0 {
		return api.Errorf(api.CodeNotFound, "key %q does not exist", key)
	}
	if err != nil {
		return err
	}
	q.noContent(rev)
	return nil
}
