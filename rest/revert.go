// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/history"
)

// Limits of a revert.
const (
	// maxRevertWords is how many objects a request may name, maxRevertObjects how
	// many may differ: to plan one takes a fraction of a millisecond.
	maxRevertWords   = 256
	maxRevertObjects = 2000
	// revertPasses is how often what was refused is tried once more, because
	// another object of the same revert was in its way.
	revertPasses = 8
	// revertReserve is how many changes of the transaction are left for the audit
	// event and the record of the request.
	revertReserve = 2 * idemSweep
	// maxRevertParts bounds the transactions that one plan looks ahead.
	maxRevertParts = 256
	// maxReasons is how many refusals the message of an error names.
	maxReasons = 3
)

// configRevert answers POST /config/revert.
func configRevert(q *request) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	var in api.RevertRequest
	if err := decode(body, &in); err != nil {
		return err
	}
	if len(in.Objects) > maxRevertWords {
		return api.Invalid("objects", "has %d words; at most %d are allowed", len(in.Objects), maxRevertWords)
	}
	selections, err := q.revertSelections(&in)
	if err != nil {
		return err
	}
	if in.DryRun {
		v, err := q.freshView(readTimeout)
		if err != nil {
			return err
		}
		r, err := q.planRevert(&change{q: q, v: v, tx: &configdb.Txn{Actor: q.who.actor}}, &in, selections)
		if err != nil {
			return err
		}
		r.Done, r.Revision = false, v.Revision()
		q.reply(http.StatusOK, v.Revision(), r)
		return nil
	}
	var r *api.RevertResult
	out, err := q.change(body, func(c *change) (*effect, error) {
		c.tx.Note = revertNote(in.To)
		if r, err = q.planRevert(c, &in, selections); err != nil {
			return nil, err
		}
		if err := acceptRevert(&in, r); err != nil {
			return nil, err
		}
		return &effect{status: http.StatusOK, kind: "config", object: eventTarget{api.Meta{Name: fmt.Sprintf("to revision %d", in.To)}}}, nil
	})
	if err != nil {
		return err
	}
	if out.replayed {
		return q.replayRevert(&in, out)
	}
	r.Revision = out.revision
	q.reply(http.StatusOK, out.revision, r)
	return nil
}

// acceptRevert refuses a plan that is not what the caller agreed to.
func acceptRevert(in *api.RevertRequest, r *api.RevertResult) error {
	switch {
	case in.Plan != "" && in.Plan != r.Plan:
		return api.Errorf(api.CodeConflict, "what there is to be done has changed since the dry run; look at the new plan")
	case r.Refused > 0 && !in.SkipRefused:
		var why []string
		for _, item := range r.Items {
			if item.Refused != "" && len(why) < maxReasons {
				why = append(why, fmt.Sprintf("%s %s: %s", item.Kind, item.Name, item.Refused))
			}
		}
		return api.Errorf(api.CodeRefused, "%d of %d objects cannot be reverted, so none was (skipRefused reverts the others): %s", r.Refused, len(r.Items), strings.Join(why, "; "))
	case r.Parts > 1 && !in.Partial:
		return api.Errorf(api.CodeRefused, "it takes %d transactions to revert %d objects, so none was reverted; choose objects, or ask for it in parts (partial)", r.Parts, len(r.Items))
	}
	return nil
}

// replayRevert answers a request that was carried out before, by what the
// history has of it.
func (q *request) replayRevert(in *api.RevertRequest, out outcome) error {
	v := q.db.Local()
	r := &api.RevertResult{Kind: "configRevert", To: in.To, Done: true, Items: []api.RevertItem{}, Revision: out.revision}
	page, _, err := history.Log(v, history.Query{
		Selection: history.Selection{Kinds: configdb.HistoryKinds()}, AfterRevision: out.revision - 1, Actor: q.who.actor, Limit: maxListItems,
	})
	if err != nil {
		return err
	}
	for i := range page {
		h, err := page[i].Head()
		if err == nil && page[i].Revision() == out.revision && h.Note == revertNote(in.To) {
			r.Items = append(r.Items, api.RevertItem{Kind: page[i].Kind, ID: page[i].ID, Name: h.Name, Project: h.Project, Operation: h.Op.String()})
		}
	}
	q.markReplay(out)
	q.reply(http.StatusOK, out.revision, r)
	return nil
}

func revertNote(to uint64) string { return "revert to " + strconv.FormatUint(to, 10) }

func (q *request) revertSelections(in *api.RevertRequest) ([]history.Selection, error) {
	if len(in.Objects) == 0 {
		s, err := q.selectObjects("project", "", in.Project)
		return []history.Selection{s}, err
	}
	var out []history.Selection
	for i, word := range in.Objects {
		field := fmt.Sprintf("objects[%d]", i)
		if word == "" {
			return nil, api.Invalid(field, "is empty; give KIND/NAME, or no objects for all")
		}
		s, err := q.selectObjects(field, word, in.Project)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// candidate is an object that differs, on its way into the plan.
type candidate struct {
	history.Difference
	item  api.RevertItem
	named bool // asked for by its name
	done  bool
}

// planRevert decides about every object that differs and puts what can be done
// into c's transaction. An object is decided on top of those before it, so that
// a network and the addresses in it come back together; one that is refused is
// tried once more after the others, until a pass brings nothing new. What does
// not fit, or must be gone before the transaction begins, is planned for a later
// one, so that the plan tells of everything.
func (q *request) planRevert(c *change, in *api.RevertRequest, selections []history.Selection) (*api.RevertResult, error) {
	if err := history.Check(c.v, "to", in.To); err != nil {
		return nil, err
	}
	todo, err := differences(c.v, in.To, selections)
	if err != nil {
		return nil, err
	}
	p := planner{q: q, c: c, tx: c.tx, seen: c.v, todo: todo}
	for p.part = 1; p.part <= maxRevertParts; p.part++ {
		progress, err := p.fill()
		if err != nil {
			return nil, err
		}
		if !progress {
			break
		}
		p.tx = c.tx.Part() // only thought of: the first part is committed
	}
	return revertResult(in.To, todo)
}

// planner decides about objects, part by part.
type planner struct {
	q    *request
	c    *change
	part int
	tx   *configdb.Txn
	seen *configdb.View // as it will be after the decisions so far
	todo []candidate
}

// fill decides as much as goes into one transaction.
func (p *planner) fill() (progress bool, err error) {
	for range revertPasses {
		again := false
		for i := range p.todo {
			if p.todo[i].done {
				continue
			}
			full, err := p.decide(&p.todo[i])
			if err != nil || full {
				return full, err
			}
			again = again || p.todo[i].done
		}
		progress = progress || again
		if !again {
			break
		}
	}
	return progress, nil
}

// differences returns what the selections hold that is not as it was.
func differences(v *configdb.View, to uint64, selections []history.Selection) ([]candidate, error) {
	var out []candidate
	have := map[history.Object]bool{}
	for _, s := range selections {
		if err := known(v, s); err != nil {
			return nil, err
		}
		all, err := history.Diff(v, s, to, v.Revision())
		if err != nil {
			return nil, err
		}
		for _, d := range all {
			if have[d.Object] {
				continue
			}
			have[d.Object] = true
			// From now to then.
			d.Before, d.After = d.After, d.Before
			cand := candidate{Difference: d, named: s.Name != ""}
			cand.item = api.RevertItem{Kind: d.Kind, ID: d.ID, Name: d.Name, Project: d.Project, Operation: d.Operation()}
			if cand.item.Changes, err = history.Compare(d.Before, d.After); err != nil {
				return nil, err
			}
			if len(cand.item.Changes) > 0 || d.Before == nil || d.After == nil {
				out = append(out, cand)
			}
			if len(out) > maxRevertObjects {
				return nil, api.Errorf(api.CodeTooLarge, "more than %d objects differ; choose a kind (objects), a project, or single objects", maxRevertObjects)
			}
		}
	}
	return out, nil
}

// decide decides about one object on top of the others; full is true when it
// does not fit into the transaction any more.
func (p *planner) decide(cand *candidate) (full bool, err error) {
	by, err := p.q.s.reverterOf(cand.Kind)
	if err != nil {
		return false, err
	}
	was := cand.After
	if was != nil && beingDeleted(was) {
		was = nil // it was on its way out then
	}
	part := *p.c
	part.v, part.tx = p.seen, p.tx.Part()
	e, err := by.bring(&part, cand.Object, was)
	if err == nil {
		err = p.tx.Join(part.tx, revertReserve)
	}
	item := &cand.item
	switch {
	case errors.Is(err, configdb.ErrPartTooLarge) && p.tx.Len() > 0:
		return true, nil
	case err != nil:
		return false, refuse(item, err)
	}
	cand.done = true
	item.Refused, item.Code = "", ""
	if p.part == 1 {
		item.Task = e.task
	}
	item.Part = p.part
	before := p.seen
	p.seen = part.tx.Seen(before)
	return false, cand.outcome(before, p.seen, was)
}

// refuse notes the reason; it returns what is no reason but a failure.
func refuse(item *api.RevertItem, err error) error {
	if errors.Is(err, configdb.ErrPartOrder) || errors.Is(err, configdb.ErrPartTooLarge) {
		item.Code, item.Refused = api.CodeRefused, err.Error() // unless the next part can
		return nil
	}
	e := classify(err)
	if e.Code == api.CodeInternal || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	item.Code, item.Refused = e.Code, err.Error()
	return nil
}

// outcome compares what the object will be with what it is and what it was:
// the rules of its kind may have kept some of it.
func (cand *candidate) outcome(before, after *configdb.View, was []byte) error {
	key := configdb.SpecPrefixOf(cand.Kind) + cand.ID
	is, _ := before.Get(key)
	will, _ := after.Get(key)
	var err error
	if cand.item.Changes, err = history.Compare(is.Value, will.Value); err != nil {
		return err
	}
	if will.Value == nil || was == nil {
		return nil
	}
	kept, err := history.Compare(will.Value, was)
	cand.item.Kept = nil
	for _, k := range kept {
		if !strings.HasPrefix(k.Path, "meta.") {
			cand.item.Kept = append(cand.item.Kept, k.Path)
		}
	}
	return err
}

// beingDeleted reports whether a stored spec is of an object on its way out.
func beingDeleted(stored []byte) bool {
	var doc struct {
		Meta api.Meta `json:"meta"`
	}
	return json.Unmarshal(stored, &doc) == nil && doc.Meta.Deleting()
}

// revertResult puts the plan together and names it. Of objects of which only
// what is kept differs, it has those that were asked for by name.
func revertResult(to uint64, todo []candidate) (*api.RevertResult, error) {
	r := &api.RevertResult{Kind: "configRevert", To: to, Items: []api.RevertItem{}}
	for i := range todo {
		item := &todo[i].item
		same := todo[i].done && len(item.Changes) == 0
		if same && !todo[i].named {
			continue
		}
		if same {
			item.Operation = revertKeep
		}
		if item.Refused != "" {
			r.Refused++
		}
		r.Parts = max(r.Parts, item.Part)
		r.Done = r.Done || item.Part == 1 && !same
		r.Items = append(r.Items, *item)
	}
	var err error
	r.Plan, err = planName(r.Items)
	return r, err
}

// revertKeep is the operation of an object of which all that differs is kept.
const revertKeep = "keep"

// planName is a hash of what is to be done, to find out whether it still is
// what somebody has seen.
func planName(items []api.RevertItem) (string, error) {
	shown := make([]api.RevertItem, len(items))
	for i, item := range items {
		item.Task = "" // new in every attempt
		shown[i] = item
	}
	b, err := json.Marshal(shown)
	if err != nil {
		return "", err
	}
	const length = 16
	return digest(string(b))[:length], nil
}
