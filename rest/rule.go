// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// maxRules is the most rules of a cluster.
const maxRules = 200

type ruleResource struct {
	resource[api.RuleSpec, struct{}]
}

func newRules() *ruleResource {
	r := &ruleResource{resource[api.RuleSpec, struct{}]{table: configdb.Rules, need: needViewer, global: true}}
	r.update = func(c *change, _, want *api.Rule) (*effect, error) { return r.store(c, want) }
	r.past = plainReverts(&r.resource, maxRules)
	return r
}

func (r *ruleResource) routes() []route {
	create := makes(&r.resource, needAdministrator, func(q *request) error { return createPlain(q, &r.resource, maxRules, nil) })
	create.out, create.status, create.params = typeOf[api.Rule](), http.StatusCreated, saveParams
	return append(append(reads(&r.resource), writes(&r.resource, needAdministrator)...), create,
		removes(&r.resource, func(q *request) error { return r.drop(q, nil) }))
}

// createPlain answers the POST of a kind that needs no task. prepare, which
// may be nil, is called before the object is stored.
func createPlain[S, T any](q *request, rs *resource[S, T], most int, prepare func(o *api.Object[S, T]) error) error {
	o, body, err := rs.decodeNew(q)
	if err != nil {
		return err
	}
	if prepare != nil {
		if err := prepare(&o); err != nil {
			return err
		}
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		made := o.Clone()
		return makePlain(c, rs, most, &made)
	})
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", base+rs.table.Kind.Plural()+"/"+out.id)
	return q.answerObject(out)
}

func makePlain[S, T any](c *change, rs *resource[S, T], most int, o *api.Object[S, T]) (*effect, error) {
	if n := count(c, rs); n >= most {
		return nil, api.Errorf(api.CodeRefused, "there are %d %s already, which is the most", n, rs.table.Kind.Plural())
	}
	if err := rs.create(c, o); err != nil {
		return nil, err
	}
	return &effect{status: http.StatusCreated, kind: rs.table.Kind, id: o.Meta.ID, object: o}, nil
}

func count[S, T any](c *change, rs *resource[S, T]) int {
	n := 0
	for range c.v.Scan(rs.table.SpecPrefix(), "") {
		n++
	}
	return n
}
