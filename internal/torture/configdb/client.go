// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
)

// createTries is how often the creation of an object is asked for with one
// Idempotency-Key while its outcome is unknown.
const createTries = 3

// client is one user of the cluster, at home on one node.
type client struct {
	c       *campaign
	id      int
	home    int
	timeout time.Duration
	stream  *torture.Stream
	rest    *caller
}

// notOwn is the life of an acknowledgement that binds no node to show it.
const notOwn = -1

// knowledge is what the clients have learned of the registers.
type knowledge struct {
	mu  sync.Mutex
	rev map[string]uint64
}

func (k *knowledge) learn(register string, rev uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rev[register] = max(k.rev[register], rev)
}

func (k *knowledge) of(register string) uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rev[register]
}

// run works until the context ends. An operation that has begun is finished.
func (u *client) run(ctx context.Context) {
	for {
		a := u.stream.Next()
		select {
		case <-ctx.Done():
			return
		case <-time.After(a.Pause):
		}
		u.operate(a)
	}
}

// operate does one operation and records it.
func (u *client) operate(a torture.Ask) {
	register := torture.Register(a, u.c.rec.Now())
	node := (u.home + a.Elsewhere) % len(u.c.daemons)
	d := u.c.daemons[node]
	op := &linear.Op{Client: u.id, Node: d.name, Group: register}
	known := u.c.known.of(register)
	what := a.What
	if (what == torture.PutIf || what == torture.DeleteIf) && known == 0 {
		what = torture.Create // it may be there or not; nobody knows a revision
	}
	if a.Rule && what == torture.Put && known == 0 {
		what = torture.Create // an object is changed, not made, by a PUT
	}
	op.Kind = string(what)
	change := linear.Change{Key: register, Value: u.stream.Value(a)}
	switch what {
	case torture.Get, torture.StaleGet:
		op.Reads, op.Stale = []string{register}, what == torture.StaleGet
	case torture.Put:
		op.Changes = []linear.Change{change}
		if a.Rule {
			op.Require = []linear.Cond{{Key: register, Kind: linear.Exists}}
		}
	case torture.PutIf:
		op.Changes = []linear.Change{change}
		op.Require = []linear.Cond{{Key: register, Revision: known}}
	case torture.Create:
		op.Changes = []linear.Change{change}
		op.Require = []linear.Cond{{Key: register}}
	case torture.Delete:
		op.Changes = []linear.Change{{Key: register, Delete: true}}
		op.Require = []linear.Cond{{Key: register, Kind: linear.Exists}}
	case torture.DeleteIf:
		op.Changes = []linear.Change{{Key: register, Delete: true}}
		op.Require = []linear.Cond{{Key: register, Revision: known}}
	}
	life := d.life.Load()
	u.c.rec.Begin(op)
	var ans answer
	reg := raw
	if a.Rule {
		reg = rule
	}
	certain := true // no earlier try may still take effect
	if a.Rule && what == torture.Create {
		var by int
		if ans, by, certain = u.create(node, register, change.Value); by != node {
			life = notOwn // another node has it
		}
	} else {
		ans = u.rest.do(context.Background(), node, reg.request(what, register, change.Value, known, u.timeout))
	}
	u.c.rec.End(op, func(o *linear.Op) { reg.read(o, &ans, certain) })
	u.learn(op, &ans, node, int(life))
}

// create repeats the creation of an object, at other nodes too, with one
// Idempotency-Key. by is who answered last; certain is false if it did not
// succeed and a try before the last may have.
func (u *client) create(node int, register, value string) (a answer, by int, certain bool) {
	r := rule.request(torture.Create, register, value, 0, u.timeout)
	r.header["Idempotency-Key"] = value
	certain = true
	for i := range createTries {
		by = (node + i) % len(u.c.daemons)
		a = u.rest.do(context.Background(), by, r)
		switch {
		case a.ok():
			return a, by, true
		case unknown(&a):
			certain = false
		case a.status != http.StatusServiceUnavailable:
			return a, by, certain
		}
	}
	return a, by, certain
}

// learn notes what the answer taught.
func (u *client) learn(op *linear.Op, a *answer, node, life int) {
	u.c.tally(op, a)
	d := u.c.daemons[node]
	if int(d.life.Load()) != life {
		life = notOwn // restarted meanwhile
	}
	register := op.Group
	if op.Stale {
		if a.ok() || a.status == http.StatusNotFound {
			r := torture.StaleRead{Node: d.name, Life: life, Call: time.Duration(op.Call), Return: u.c.rec.Now()}
			stateAge(&r, a)
			u.c.noteStale(r)
		}
		return
	}
	if op.Status != linear.Applied {
		return
	}
	if op.IsRead() {
		for _, c := range op.Cells {
			if c.Exists {
				u.c.known.learn(register, c.Revision)
			}
		}
		return
	}
	u.c.known.learn(register, op.Revision)
	u.c.noteAck(torture.Ack{Node: d.name, Life: life, Call: time.Duration(op.Call), Return: time.Duration(op.Return), Revision: op.Revision, Key: register})
}

// registers of one sort.
type registers struct {
	request func(what torture.What, register, value string, known uint64, timeout time.Duration) request
	cell    func(register string, a *answer) linear.Cell
}

var (
	raw  = registers{rawRequest, rawCell}
	rule = registers{ruleRequest, ruleCell}
)

func conditions(what torture.What, known uint64) map[string]string {
	h := map[string]string{}
	switch what {
	case torture.PutIf, torture.DeleteIf:
		h["If-Match"] = fmt.Sprintf("%q", strconv.FormatUint(known, 10))
	case torture.Create:
		h["If-None-Match"] = "*"
	}
	return h
}

func rawRequest(what torture.What, register, value string, known uint64, timeout time.Duration) request {
	r := request{method: http.MethodGet, path: "/raw/" + register, header: conditions(what, known), timeout: timeout}
	switch what {
	case torture.StaleGet:
		r.path += "?consistency=stale"
	case torture.Put, torture.PutIf, torture.Create:
		r.method, r.body = http.MethodPut, []byte(value)
	case torture.Delete, torture.DeleteIf:
		r.method = http.MethodDelete
	}
	return r
}

func rawCell(register string, a *answer) linear.Cell {
	return linear.Cell{Key: register, Exists: true, Value: string(a.body), Revision: a.etag()}
}

// ruleObject is the part of an object that the campaign uses: its label is the
// register's value, and the rule itself does nothing.
type ruleObject struct {
	Meta struct {
		ID       string            `json:"id,omitempty"`
		Name     string            `json:"name"`
		Labels   map[string]string `json:"labels,omitempty"`
		Revision uint64            `json:"revision,omitempty"`
	} `json:"meta"`
	Spec map[string]any `json:"spec"`
}

const ruleLabel = "value"

func ruleRequest(what torture.What, register, value string, known uint64, timeout time.Duration) request {
	r := request{method: http.MethodGet, path: "/rules/" + url.PathEscape(register), header: conditions(what, known), timeout: timeout}
	delete(r.header, "If-None-Match") // a POST always makes a new one
	switch what {
	case torture.Get:
		r.path += "?consistency=linearizable"
	case torture.StaleGet:
		r.path += "?consistency=stale"
	case torture.Put, torture.PutIf, torture.Create:
		var o ruleObject
		o.Meta.Name, o.Meta.Labels = register, map[string]string{ruleLabel: value}
		o.Spec = map[string]any{"check": "metric", "metric": "torture", "threshold": 1, "disabled": true}
		r.body, _ = json.Marshal(o) // of strings and numbers: cannot fail
		r.method = http.MethodPut
		if what == torture.Create {
			r.method, r.path = http.MethodPost, "/rules"
		}
		r.header["Content-Type"] = "application/json"
	case torture.Delete, torture.DeleteIf:
		r.method = http.MethodDelete
	}
	return r
}

func ruleCell(register string, a *answer) linear.Cell {
	var o ruleObject
	_ = json.Unmarshal(a.body, &o) // what is no rule has no value, which the checker finds
	return linear.Cell{Key: register, Exists: true, Value: o.Meta.Labels[ruleLabel], Revision: o.Meta.Revision}
}

// unknown reports whether a change may take effect in spite of the answer.
func unknown(a *answer) bool {
	if a.err != nil {
		return a.sent
	}
	return a.status >= 500 && a.code != torture.CodeNoQuorum && a.code != "not_member"
}

// lostRace is in the text of an answer to a change without conditions that was
// given up because others were always faster.
const lostRace = "others kept changing"

// read turns an answer into the outcome of an operation.
func (r registers) read(o *linear.Op, a *answer, certain bool) {
	o.Note = ""
	switch {
	case o.IsRead():
		r.readCells(o, a)
	case a.ok():
		o.Status, o.Revision = linear.Applied, a.revision()
		return
	case unknown(a) || !certain:
		o.Status = linear.Unknown
	case a.status == http.StatusPreconditionFailed && strings.Contains(a.detail, lostRace):
		o.Status = linear.Failed
	case a.status == http.StatusPreconditionFailed, a.status == http.StatusNotFound, a.status == http.StatusConflict && a.code == "already_exists":
		o.Status = linear.Refused
	default:
		o.Status = linear.Failed
	}
	if !o.IsRead() {
		o.Note = a.word()
	}
}

func (r registers) readCells(o *linear.Op, a *answer) {
	o.Status = linear.Failed
	switch {
	case a.err == nil && a.status == http.StatusOK:
		o.Status, o.Revision = linear.Applied, a.revision()
		o.Cells = []linear.Cell{r.cell(o.Reads[0], a)}
	case a.err == nil && a.status == http.StatusNotFound:
		o.Status, o.Revision = linear.Applied, a.revision()
		o.Cells = []linear.Cell{{Key: o.Reads[0]}}
	}
}
