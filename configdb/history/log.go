// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"cmp"
	"encoding/base64"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Query asks for a page of the log.
type Query struct {
	Selection
	// AfterRevision and AfterTime leave out what is not after them.
	AfterRevision uint64
	AfterTime     time.Time
	// Actor, if given, is whose changes are asked for.
	Actor string
	Limit int
	// Continue is what the page before gave.
	Continue string
}

// maxFields is how many changed fields an entry of the log names.
const maxFields = 32

// position is where a page ended: pages go on below it.
type position struct {
	revision uint64
	key      string
}

// newest orders from the newest on; changes of one revision by their keys.
func newest(a, b position) int {
	return cmp.Or(cmp.Compare(b.revision, a.revision), strings.Compare(a.key, b.key))
}

func (p position) token() string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatUint(p.revision, 10) + " " + p.key))
}

func positionOf(token string) (p position, err error) {
	b, err := base64.RawURLEncoding.DecodeString(token)
	rev, key, ok := strings.Cut(string(b), " ")
	if err == nil {
		p.revision, err = strconv.ParseUint(rev, 10, 64)
	}
	if err != nil || !ok || !strings.HasPrefix(key, configdb.HistoryRoot) {
		return p, api.Invalid("continue", "is not a value that an earlier page gave")
	}
	p.key = key
	return p, nil
}

// Log returns a page of changes, newest first, and where the next one begins.
func Log(v *configdb.View, q Query) (page []Entry, next string, err error) {
	var after position
	if q.Continue != "" {
		if after, err = positionOf(q.Continue); err != nil {
			return nil, "", err
		}
	}
	at := func(e *Entry) position { return position{e.Revision(), e.entry.Key} }
	order := func(a, b Entry) int { return newest(at(&a), at(&b)) }
	for e := range q.entries(v) {
		if q.Continue != "" && newest(at(&e), after) <= 0 || !q.matches(&e) {
			continue
		}
		// Twice the page, then cut: the memory is bounded and few are sorted often.
		if page = append(page, e); len(page) > 2*q.Limit+1 {
			slices.SortFunc(page, order)
			page = page[:q.Limit+1]
		}
	}
	slices.SortFunc(page, order)
	if len(page) > q.Limit {
		page = page[:q.Limit]
		next = at(&page[q.Limit-1]).token()
	}
	return page, next, nil
}

func (q *Query) matches(e *Entry) bool {
	if e.Revision() <= q.AfterRevision {
		return false
	}
	if !q.AfterTime.IsZero() && !configdb.HistoryTime(e.entry.Value).After(q.AfterTime) {
		return false
	}
	if q.Actor == "" {
		return true
	}
	r, err := e.Head()
	return err == nil && r.Actor == q.Actor
}

// Change returns an entry as people see it. With full it carries the object.
func (e *Entry) Change(v *configdb.View, full bool) (api.ConfigChange, error) {
	r, err := e.Record()
	if err != nil {
		return api.ConfigChange{}, err
	}
	c := api.ConfigChange{
		Revision: e.Revision(), Time: r.Time, Operation: r.Op.String(), Actor: r.Actor, Source: r.Source, Node: r.Node, Note: r.Note,
		Kind: e.Kind, ID: e.ID, Name: r.Name, Project: r.Project,
	}
	if r.Op == configdb.HistoryUpdate || r.Op == configdb.HistoryFound {
		if c.Fields, err = e.fields(v, r.Spec); err != nil {
			return c, err
		}
	}
	if full && r.Spec != nil {
		c.Object, err = Shown(r.Spec)
	}
	return c, err
}

// fields names what changed since the record before.
func (e *Entry) fields(v *configdb.View, spec []byte) ([]string, error) {
	var before configdb.Entry
	for ce := range v.Scan(configdb.HistoryPrefix(e.Kind, e.ID), "") {
		if ce.Revision < e.Revision() && ce.Revision > before.Revision {
			before = ce
		}
	}
	if before.Revision == 0 {
		return nil, nil // it was removed, or there is none
	}
	was, err := configdb.DecodeHistory(before.Value)
	if err != nil || was.Spec == nil {
		return nil, err
	}
	changes, err := Compare(was.Spec, spec)
	var out []string
	for _, c := range changes {
		if len(out) == maxFields {
			break
		}
		out = append(out, c.Path)
	}
	return out, err
}
