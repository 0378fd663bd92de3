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
	"github.com/muster-vm/muster/internal/torture/lab"
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
	rest    *lab.Caller
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
	op := &linear.Op{Client: u.id, Node: d.Name, Group: register}
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
	life := d.Life()
	u.c.rec.Begin(op)
	var ans lab.Answer
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
		ans = u.rest.Do(context.Background(), node, reg.request(what, register, change.Value, known, u.timeout))
	}
	u.c.rec.End(op, func(o *linear.Op) { reg.read(o, &ans, certain) })
	u.learn(op, &ans, node, int(life))
}

// create repeats the creation of an object, at other nodes too, with one
// Idempotency-Key. by is who answered last; certain is false if it did not
// succeed and a try before the last may have.
func (u *client) create(node int, register, value string) (a lab.Answer, by int, certain bool) {
	r := rule.request(torture.Create, register, value, 0, u.timeout)
	r.Header["Idempotency-Key"] = value
	certain = true
	for i := range createTries {
		by = (node + i) % len(u.c.daemons)
		a = u.rest.Do(context.Background(), by, r)
		switch {
		case a.OK():
			return a, by, true
		case unknown(&a):
			certain = false
		case a.Status != http.StatusServiceUnavailable:
			return a, by, certain
		}
	}
	return a, by, certain
}

// learn notes what the answer taught.
func (u *client) learn(op *linear.Op, a *lab.Answer, node, life int) {
	u.c.tally(op, a)
	d := u.c.daemons[node]
	if int(d.Life()) != life {
		life = notOwn // restarted meanwhile
	}
	register := op.Group
	if op.Stale {
		if a.OK() || a.Status == http.StatusNotFound {
			r := torture.StaleRead{Node: d.Name, Life: life, Call: time.Duration(op.Call), Return: u.c.rec.Now()}
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
	u.c.noteAck(torture.Ack{Node: d.Name, Life: life, Call: time.Duration(op.Call), Return: time.Duration(op.Return), Revision: op.Revision, Key: register})
}

// registers of one sort.
type registers struct {
	request func(what torture.What, register, value string, known uint64, timeout time.Duration) lab.Request
	cell    func(register string, a *lab.Answer) linear.Cell
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

func rawRequest(what torture.What, register, value string, known uint64, timeout time.Duration) lab.Request {
	r := lab.Request{Method: http.MethodGet, Path: "/raw/" + register, Header: conditions(what, known), Timeout: timeout}
	switch what {
	case torture.StaleGet:
		r.Path += "?consistency=stale"
	case torture.Put, torture.PutIf, torture.Create:
		r.Method, r.Body = http.MethodPut, []byte(value)
	case torture.Delete, torture.DeleteIf:
		r.Method = http.MethodDelete
	}
	return r
}

func rawCell(register string, a *lab.Answer) linear.Cell {
	return linear.Cell{Key: register, Exists: true, Value: string(a.Body), Revision: a.ETag()}
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

func ruleRequest(what torture.What, register, value string, known uint64, timeout time.Duration) lab.Request {
	r := lab.Request{Method: http.MethodGet, Path: "/rules/" + url.PathEscape(register), Header: conditions(what, known), Timeout: timeout}
	delete(r.Header, "If-None-Match") // a POST always makes a new one
	switch what {
	case torture.Get:
		r.Path += "?consistency=linearizable"
	case torture.StaleGet:
		r.Path += "?consistency=stale"
	case torture.Put, torture.PutIf, torture.Create:
		var o ruleObject
		o.Meta.Name, o.Meta.Labels = register, map[string]string{ruleLabel: value}
		o.Spec = map[string]any{"check": "metric", "metric": "torture", "threshold": 1, "disabled": true}
		r.Body, _ = json.Marshal(o) // of strings and numbers: cannot fail
		r.Method = http.MethodPut
		if what == torture.Create {
			r.Method, r.Path = http.MethodPost, "/rules"
		}
		r.Header["Content-Type"] = "application/json"
	case torture.Delete, torture.DeleteIf:
		r.Method = http.MethodDelete
	}
	return r
}

func ruleCell(register string, a *lab.Answer) linear.Cell {
	var o ruleObject
	_ = json.Unmarshal(a.Body, &o) // what is no rule has no value, which the checker finds
	return linear.Cell{Key: register, Exists: true, Value: o.Meta.Labels[ruleLabel], Revision: o.Meta.Revision}
}

// unknown reports whether a change may take effect in spite of the answer.
func unknown(a *lab.Answer) bool {
	if a.Err != nil {
		return a.Sent
	}
	return a.Status >= 500 && a.Code != torture.CodeNoQuorum && a.Code != "not_member"
}

// lostRace is in the text of an answer to a change without conditions that was
// given up because others were always faster.
const lostRace = "others kept changing"

// read turns an answer into the outcome of an operation.
func (r registers) read(o *linear.Op, a *lab.Answer, certain bool) {
	o.Note = ""
	switch {
	case o.IsRead():
		r.readCells(o, a)
	case a.OK():
		o.Status, o.Revision = linear.Applied, a.Revision()
		return
	case unknown(a) || !certain:
		o.Status = linear.Unknown
	case a.Status == http.StatusPreconditionFailed && strings.Contains(a.Detail, lostRace):
		o.Status = linear.Failed
	case a.Status == http.StatusPreconditionFailed, a.Status == http.StatusNotFound, a.Status == http.StatusConflict && a.Code == "already_exists":
		o.Status = linear.Refused
	default:
		o.Status = linear.Failed
	}
	if !o.IsRead() {
		o.Note = a.Word()
	}
}

func (r registers) readCells(o *linear.Op, a *lab.Answer) {
	o.Status = linear.Failed
	switch {
	case a.Err == nil && a.Status == http.StatusOK:
		o.Status, o.Revision = linear.Applied, a.Revision()
		o.Cells = []linear.Cell{r.cell(o.Reads[0], a)}
	case a.Err == nil && a.Status == http.StatusNotFound:
		o.Status, o.Revision = linear.Applied, a.Revision()
		o.Cells = []linear.Cell{{Key: o.Reads[0]}}
	}
}
