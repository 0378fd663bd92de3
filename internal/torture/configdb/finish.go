// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/internal/linear"
	"github.com/muster-vm/muster/internal/torture"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// Limits of the end.
const (
	// staleSlack is how much older than stated a stale read may be: a node
	// hears from its leader before it has what the leader has.
	staleSlack  = 2 * time.Second
	watchWithin = 30 * time.Second
	listTimeout = 30 * time.Second
	eventsKept  = 10_000 // of the cluster
	lastRule    = torture.RulePrefix + "end"
	// writesEnd is when a write whose client has given up has ended too.
	writesEnd = 11 * time.Second
)

// stateAge reads what a stale answer says of itself.
func stateAge(r *torture.StaleRead, a *lab.Answer) {
	age, err := strconv.ParseFloat(a.Header.Get("Muster-Age"), 64)
	r.Known, r.Age = err == nil, time.Duration(age*float64(time.Second))
	r.Stated = a.Header.Get("Muster-Consistency") == "stale" && a.Header.Get("Muster-Age") != ""
	r.Revision = a.Revision()
}

// firstWord makes the object that the last write changes: at the end there may be
// as many as the cluster allows.
func (c *campaign) firstWord(ctx context.Context) error {
	a := c.rest.Do(ctx, 0, ruleRequest(torture.Create, lastRule, "begin", 0, listTimeout))
	if !a.OK() {
		return fmt.Errorf("the first write: %s", a.Word())
	}
	return nil
}

// lastWord writes an object that every watch must then see: what was written
// before it was seen too.
func (c *campaign) lastWord(ctx context.Context) error {
	if err := c.serves(ctx, true); err != nil {
		return err
	}
	lab.Wait(ctx, c.lastUnknown()+writesEnd-c.rec.Now())
	a := c.rest.Do(ctx, 0, ruleRequest(torture.Put, lastRule, "end", 0, listTimeout))
	if !a.OK() {
		return fmt.Errorf("the last write: %s", a.Word())
	}
	for _, w := range c.watchers {
		err := lab.Eventually(ctx, watchWithin, func(context.Context) error {
			if !w.sees(lastRule, "end") {
				return fmt.Errorf("the watch of %s has not seen the last write", w.name)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// lastUnknown is when the last write was given up whose outcome is not known.
func (c *campaign) lastUnknown() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gaveUp
}

// finish reads the final state on every node, checks all, and reports.
func (c *campaign) finish(ctx context.Context) (ok bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	final, rules := map[string]map[string]linear.Cell{}, map[string]map[string]linear.Cell{}
	for i, d := range c.daemons {
		for _, stale := range []string{"", "&consistency=stale"} {
			cells, err := c.list(ctx, i, stale)
			if err != nil {
				c.violate(torture.NotRecovered, d.Name, "its final state cannot be read: %v", err)
				continue
			}
			final[d.Name+strings.Replace(stale, "&consistency=", " ", 1)] = cells
			rules[d.Name] = onlyRules(cells)
		}
	}
	c.say("checking %d operations", len(c.rec.Ops()))
	began := time.Now()
	ops := append(c.rec.Ops(), c.observations()...)
	report, err := linear.Check(ops, linear.Options{Pictures: c.work})
	if err != nil {
		return false, err
	}
	c.violations = append(c.violations, report.Violations...)
	c.violations = append(c.violations, linear.CheckFinal(ops, final)...)
	c.violations = append(c.violations, torture.CheckStale(c.stale, c.acks, staleSlack)...)
	c.violations = append(c.violations, torture.CheckProbes(c.probes)...)
	events, relists := c.checkWatches(rules)
	c.say("checked in %.1f s: %d groups of keys", time.Since(began).Seconds(), report.Groups)
	return c.report(report, result{lost: linear.LostKeys(ops, final), events: events, relists: relists})
}

// list reads all registers of a node at one view, and records it as an
// operation on each.
func (c *campaign) list(ctx context.Context, node int, query string) (map[string]linear.Cell, error) {
	cells := map[string]linear.Cell{}
	call := c.rec.Now()
	for next := ""; ; {
		a := c.rest.Do(ctx, node, lab.Request{Method: http.MethodGet, Path: "/raw/?limit=1000&prefix=" + torture.RawPrefix + query + next, Timeout: listTimeout})
		var page struct {
			Items []struct {
				Key      string
				Value    []byte
				Revision uint64
			}
			Continue string
		}
		if !a.OK() {
			return nil, errors.New(a.Word())
		}
		if err := json.Unmarshal(a.Body, &page); err != nil {
			return nil, err
		}
		for _, it := range page.Items {
			cells[it.Key] = linear.Cell{Key: it.Key, Exists: true, Value: string(it.Value), Revision: it.Revision}
		}
		if page.Continue == "" {
			break
		}
		next = "&continue=" + url.QueryEscape(page.Continue)
	}
	if err := c.listRules(ctx, node, query, cells); err != nil {
		return nil, err
	}
	if query == "" {
		c.recordList(c.hosts.Name(node), call, cells)
	}
	return cells, nil
}

func (c *campaign) listRules(ctx context.Context, node int, query string, cells map[string]linear.Cell) error {
	a := c.rest.Do(ctx, node, lab.Request{Method: http.MethodGet, Path: "/rules?limit=1000" + query, Timeout: listTimeout})
	var page struct{ Items []ruleObject }
	if !a.OK() {
		return errors.New(a.Word())
	}
	if err := json.Unmarshal(a.Body, &page); err != nil {
		return err
	}
	for _, o := range page.Items {
		if name := o.Meta.Name; strings.HasPrefix(name, torture.RulePrefix) {
			cells[name] = linear.Cell{Key: name, Exists: true, Value: o.Meta.Labels[ruleLabel], Revision: o.Meta.Revision}
		}
	}
	return nil
}

func onlyRules(cells map[string]linear.Cell) map[string]linear.Cell {
	out := maps.Clone(cells)
	maps.DeleteFunc(out, func(key string, _ linear.Cell) bool { return !strings.HasPrefix(key, torture.RulePrefix) })
	return out
}

// recordList records the final read of every register that was ever asked
// about, also of those that are absent.
func (c *campaign) recordList(node string, call time.Duration, cells map[string]linear.Cell) {
	groups := map[string]bool{}
	for _, o := range c.rec.Ops() {
		groups[o.Group] = true
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		o := &linear.Op{Client: len(c.clients), Node: node, Kind: "final", Group: key, Reads: []string{key}}
		cell := cells[key]
		cell.Key = key
		c.rec.Begin(o)
		c.rec.End(o, func(o *linear.Op) {
			o.Call, o.Status, o.Cells = int64(call), linear.Applied, []linear.Cell{cell}
		})
	}
}

// observations turns what the watches delivered into reads that may be stale:
// their facts are checked like all others.
func (c *campaign) observations() []linear.Op {
	var out []linear.Op
	for _, w := range c.watchers {
		for _, s := range w.all() {
			if s.Type != "put" || s.Kind != torture.WatchedRule || s.Target == lastRule {
				continue
			}
			out = append(out, linear.Op{
				Client: len(c.clients), Node: w.name, Kind: "watch", Group: s.Target, Reads: []string{s.Target}, Stale: true, Return: linear.Forever,
				Status: linear.Applied, FailedCond: -1, Cells: []linear.Cell{{Key: s.Target, Exists: true, Value: s.Value, Revision: s.Revision}},
			})
		}
	}
	return out
}

// checkWatches checks every node's watch. Changes whose events the cluster no
// longer keeps may be missing if the watch had to begin anew.
func (c *campaign) checkWatches(rules map[string]map[string]linear.Cell) (events, relists int) {
	for _, w := range c.watchers {
		seen := w.all()
		st := torture.Replay(w.name, seen)
		delete(st.Rules, lastRule)
		final := maps.Clone(rules[w.name])
		delete(final, lastRule)
		events, relists = events+len(seen), relists+st.Relists
		c.violations = append(c.violations, st.Violations...)
		c.violations = append(c.violations, torture.CheckWatch(w.name, st, c.acks, final, c.forgotten())...)
	}
	return events, relists
}

// forgotten is the revision up to which events may be gone.
func (c *campaign) forgotten() uint64 {
	if len(c.acks) <= eventsKept {
		return 0
	}
	revs := make([]uint64, len(c.acks))
	for i, a := range c.acks {
		revs[i] = a.Revision
	}
	slices.Sort(revs)
	return revs[len(revs)-eventsKept/2]
}
