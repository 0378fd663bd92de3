// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type eventResource struct {
	resource[api.EventSpec, struct{}]
}

func newEvents() *eventResource {
	return &eventResource{resource[api.EventSpec, struct{}]{table: configdb.Events, need: needViewer, global: true}}
}

func (r *eventResource) routes() []route {
	out := reads(&r.resource)
	out[0].handle = r.list
	out[0].params = append(slices.Clone(out[0].params), "last")
	return out
}

// list answers GET /events; with ?last=N it gives the newest N that the
// selectors leave, oldest first.
func (r *eventResource) list(q *request) error {
	last, err := q.intParam("last", 0, 1, maxListItems)
	if err != nil {
		return err
	}
	if last == 0 {
		return r.resource.list(q)
	}
	sel, err := q.selection(reflect.TypeFor[api.Event]())
	if err != nil {
		return err
	}
	sel.all = true
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	page := List[api.Event]{Kind: string(api.KindEvent) + "List", Items: []api.Event{}, Revision: v.Revision()}
	var ids []string
	for e := range v.Scan(configdb.Events.SpecPrefix(), "") {
		id, _ := configdb.Events.IDOf(e.Key)
		ids = append(ids, id)
	}
	for i := len(ids) - 1; i >= 0 && len(page.Items) < last; i-- {
		o, err := configdb.Events.Get(v, ids[i])
		if err != nil {
			q.s.log.Error("object left out of a list", "kind", api.KindEvent, "id", ids[i], "err", err)
			continue
		}
		ok, err := sel.matches(&o.Meta, &o)
		if err != nil {
			return err
		}
		if ok {
			page.Items = append(page.Items, o)
		}
	}
	slices.Reverse(page.Items)
	q.reply(http.StatusOK, v.Revision(), page)
	return nil
}

// headerSource carries the caller's address to the node that a request is sent
// on to.
const headerSource = "Muster-Forwarded-Source"

// maxSource is the longest address that is believed of another node.
const maxSource = 64

// source is the address that the request came from.
func (q *request) source() string {
	if q.who.forwarded {
		if s := q.r.Header.Get(headerSource); s != "" && len(s) <= maxSource {
			return s
		}
	}
	if q.who.local {
		return "unix socket"
	}
	host, _, err := net.SplitHostPort(q.r.RemoteAddr)
	if err != nil {
		return q.r.RemoteAddr
	}
	return host
}

// origin is the source as the history has it: the way in and the address.
func (q *request) origin() string {
	switch {
	case q.who.local:
		return q.source()
	case q.who.session:
		return "ssh " + q.source()
	}
	return "api " + q.source()
}

// audit adds an event that says who changed what, from where, to the
// transaction of the change itself: neither can be there without the other.
func (q *request) audit(tx *configdb.Txn, e *effect) error {
	target := api.Meta{ID: e.id, Name: q.name()}
	if m, ok := metaOf(e.object); ok {
		target = m
	}
	ev := q.auditEvent(e.kind, target)
	if e.changed != "" {
		ev.Spec.Details["changed"] = e.changed
		ev.Spec.Message += " (" + e.changed + ")"
	}
	return configdb.PutEvent(tx, &ev)
}

func (q *request) auditEvent(kind api.Kind, target api.Meta) api.Event {
	verb := q.verb()
	name := target.Name
	if name == "" {
		name = target.ID
	}
	what := strings.TrimSpace(string(kind) + " " + name)
	ev := api.NewEvent("audit."+string(kind)+"."+verb, api.SeverityInfo, kind, target, q.who.actor+": "+verb+" "+what, q.s.cfg.Now())
	ev.Spec.Actor, ev.Spec.Source, ev.Spec.Node = q.who.actor, q.source(), q.s.cfg.Node()
	ev.Spec.Details = map[string]string{"method": q.r.Method, "path": clip(q.r.URL.Path), "role": string(q.who.role)}
	return ev
}

// auditAlone writes the event of a change that another module carried out. The
// change stands whether it can be written or not; if not, the log has it.
func (q *request) auditAlone(kind api.Kind, target api.Meta) {
	ev := q.auditEvent(kind, target)
	if err := q.writeAudit(&ev); err != nil {
		q.s.log.Error("audit event not written", "event", ev.Spec.Type, "actor", ev.Spec.Actor, "source", ev.Spec.Source, "target", target.Name, "err", err)
	}
}

// writeAudit writes an event alone.
func (q *request) writeAudit(ev *api.Event) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx()), writeTimeout)
	defer cancel()
	tx := &configdb.Txn{Actor: q.who.actor}
	if err := configdb.PutEvent(tx, ev); err != nil {
		return err
	}
	_, err := q.db.Txn(ctx, tx)
	return err
}

// verb is what a request does: the action of its path, or what its method says.
func (q *request) verb() string {
	if q.route.verb != "" {
		return q.route.verb
	}
	switch q.r.Method {
	case http.MethodPost:
		if _, action, ok := strings.Cut(q.route.path, "{name}/"); ok {
			return action
		}
		if action, ok := strings.CutPrefix(q.route.path, base+"cluster/ca/"); ok {
			return action
		}
		if action, ok := strings.CutPrefix(q.route.path, base+"config/"); ok {
			return action
		}
		return "create"
	case http.MethodDelete:
		return "delete"
	case http.MethodGet: // few are worth an event
		return "read"
	}
	return "update"
}

// metaOf returns the metadata of an object of any kind.
func metaOf(object any) (api.Meta, bool) {
	v := reflect.ValueOf(object)
	if !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil() {
		return api.Meta{}, false
	}
	v = reflect.Indirect(v)
	if v.Kind() != reflect.Struct {
		return api.Meta{}, false
	}
	f := v.FieldByName("Meta")
	if !f.IsValid() {
		return api.Meta{}, false
	}
	m, ok := f.Interface().(api.Meta)
	return m, ok && m.Name != ""
}
