// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// consistency is how fresh a read must be.
type consistency int

const (
	fresh  consistency = iota // linearizable, else stale and said so
	strict                    // linearizable or an error
	stale                     // this node's replica
)

// view returns the state to answer a read from, and says in the headers what
// it is. whenUnset applies if the client names no consistency.
func (q *request) view(whenUnset consistency) (*configdb.View, error) {
	c := whenUnset
	switch text := q.param("consistency"); text {
	case "":
	case "linearizable":
		c = strict
	case "stale":
		c = stale
	default:
		return nil, api.Invalid("consistency", "is %q; give linearizable or stale", clip(text))
	}
	if c != stale {
		v, err := q.freshView(readTimeout)
		if err == nil {
			setRevision(q.w.Header(), v.Revision())
			return v, nil
		}
		if code := api.CodeOf(err); c == strict || code != api.CodeNoQuorum && code != api.CodeNodeFull {
			return nil, err
		}
	}
	v := q.db.Local()
	h := q.w.Header()
	setRevision(h, v.Revision())
	h.Set(headerConsistency, "stale")
	age := "unknown"
	if d, known := q.db.Staleness(); known {
		age = strconv.FormatFloat(d.Seconds(), 'f', 3, 64)
	}
	h.Set(headerAge, age)
	return v, nil
}

// freshView returns a linearizable view or fails with api.CodeNoQuorum, or with
// api.CodeNodeFull when this node's disk takes no changes.
func (q *request) freshView(within time.Duration) (*configdb.View, error) {
	ctx, cancel := context.WithTimeout(q.ctx(), within)
	defer cancel()
	v, err := q.db.View(ctx)
	switch {
	case err == nil:
		return v, nil
	case q.ctx().Err() != nil:
		return nil, context.Cause(q.ctx())
	case errors.Is(err, configdb.ErrDiskFull):
		return nil, classify(err)
	case errors.Is(err, configdb.ErrNoQuorum), errors.Is(err, configdb.ErrUncertain), ctx.Err() != nil:
		return nil, api.Errorf(api.CodeNoQuorum, "no majority of the cluster answered node %s within %s: %w", q.s.cfg.Node(), within, err)
	}
	return nil, err
}

// project returns the project that a request is about; all is true for "*".
func (q *request) project() (name string, all bool, err error) {
	switch p := q.param("project"); p {
	case "":
		return api.DefaultProject, false, nil
	case "*":
		return api.DefaultProject, true, nil
	default:
		return p, false, api.ValidName("project", p)
	}
}

// intParam reads a number from the query.
func (q *request) intParam(name string, unset, least, most int) (int, error) {
	text := q.param(name)
	if text == "" {
		return unset, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		return 0, api.Invalid(name, "is %q; give %d to %d", clip(text), least, most)
	}
	return n, nil
}

// boolParam reads ?name=true; the bare ?name is true too.
func (q *request) boolParam(name string) (bool, error) {
	values, ok := q.r.URL.Query()[name]
	if !ok {
		return false, nil
	}
	if values[0] == "" {
		return true, nil
	}
	b, err := strconv.ParseBool(values[0])
	if err != nil {
		return false, api.Invalid(name, "is %q; give true or false", clip(values[0]))
	}
	return b, nil
}

// wait reads ?wait=30s.
func (q *request) wait() (time.Duration, error) {
	text := q.param("wait")
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > maxWait {
		return 0, api.Invalid("wait", "is %q; give a duration of at most %s, such as 30s", clip(text), maxWait)
	}
	return d, nil
}

// match is what an If-Match or If-None-Match header demands.
type match struct {
	set, any bool
	revision uint64
}

// etag writes a revision as an entity tag (RFC 9110 section 8.8.3).
func etag(rev uint64) string { return fmt.Sprintf(`"%d"`, rev) }

func (q *request) match(header string) (match, error) {
	text := strings.TrimSpace(q.r.Header.Get(header))
	switch text {
	case "":
		return match{}, nil
	case "*":
		return match{set: true, any: true}, nil
	}
	inner, ok := strings.CutPrefix(text, `"`)
	inner, ok2 := strings.CutSuffix(inner, `"`)
	rev, err := strconv.ParseUint(inner, 10, 64)
	if !ok || !ok2 || err != nil || rev == 0 {
		return match{}, api.Invalid(header, "is %q; give the ETag of an earlier answer, such as \"17\", or *", clip(text))
	}
	return match{set: true, revision: rev}, nil
}

// check compares with the revision of an object that exists.
func (m match) check(what string, revision uint64) error {
	if !m.set || m.any || m.revision == revision {
		return nil
	}
	return api.Errorf(api.CodeConflict, "%s was changed meanwhile: it is at revision %d, you have %d; read it again", what, revision, m.revision)
}
