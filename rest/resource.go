// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/json"
	"maps"
	"net/http"
	"reflect"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// resource is what the kinds have in common: reading, and the frame of
// changing. What is special about a kind are its functions.
type resource[S, T any] struct {
	table configdb.Table[S, T]
	need  access // to read
	// global kinds belong to the cluster, not to a project.
	global bool
	// show prepares a fresh copy for readers: it takes out secrets and adds
	// what is composed at reading. May be nil.
	show func(v *configdb.View, o *api.Object[S, T])
	// update carries out a PUT or PATCH from old to want, which is validated.
	update func(c *change, old, want *api.Object[S, T]) (*effect, error)
	// past says what a revert does with objects of this kind.
	past past[S, T]
	// also lists further keys whose change shows in objects of this kind, with
	// a function that finds the object. May be empty.
	also   string
	alsoID func(key string) string
}

// kindReader is a resource without its types.
type kindReader interface {
	access() access
	isGlobal() bool
	object(v *configdb.View, id string) (any, error)
	meta(v *configdb.View, id string) (api.Meta, error)
	ids(v *configdb.View) []idRevision
	idOf(key string) (id string, deletes, ok bool)
}

// idRevision is an object with the revision of its last change.
type idRevision struct {
	kind     api.Kind
	id       string
	revision uint64
}

func (rs *resource[S, T]) access() access { return rs.need }

// object returns an object as readers see it.
func (rs *resource[S, T]) object(v *configdb.View, id string) (any, error) {
	o, err := rs.table.Get(v, id)
	if err != nil {
		return nil, err
	}
	rs.shown(v, &o)
	return &o, nil
}

func (rs *resource[S, T]) meta(v *configdb.View, id string) (api.Meta, error) {
	o, err := rs.table.Get(v, id)
	return o.Meta, err
}

func (rs *resource[S, T]) ids(v *configdb.View) []idRevision {
	var out []idRevision
	for e := range v.Scan(rs.table.SpecPrefix(), "") {
		id, _ := rs.table.IDOf(e.Key)
		status, _ := v.Get(rs.table.StatusKey(id))
		out = append(out, idRevision{rs.table.Kind, id, max(e.Revision, status.Revision)})
	}
	return out
}

// idOf returns the object that a key belongs to; deletes is true for the key
// whose deletion means that the object is gone.
func (rs *resource[S, T]) idOf(key string) (id string, deletes, ok bool) {
	if rs.also != "" && strings.HasPrefix(key, rs.also) {
		return rs.alsoID(key), false, true
	}
	id, ok = rs.table.IDOf(key)
	return id, strings.HasPrefix(key, rs.table.SpecPrefix()), ok
}

func (rs *resource[S, T]) shown(v *configdb.View, o *api.Object[S, T]) {
	if rs.show != nil {
		rs.show(v, o)
	}
}

// where returns the project in which a request's name is looked up.
func (rs *resource[S, T]) where(q *request) (string, error) {
	if rs.global {
		return api.DefaultProject, nil
	}
	p, _, err := q.project()
	return p, err
}

func (rs *resource[S, T]) find(q *request, v *configdb.View) (api.Object[S, T], error) {
	project, err := rs.where(q)
	if err != nil {
		return api.Object[S, T]{}, err
	}
	return rs.table.Find(v, project, q.name())
}

// List is a page of objects.
type List[O any] struct {
	Kind     string `json:"kind" doc:"the kind with List, such as vmList"`
	Items    []O    `json:"items"`
	Continue string `json:"continue,omitempty" doc:"give it as ?continue= for the next page"`
	Revision uint64 `json:"revision"`
}

func (rs *resource[S, T]) list(q *request) error {
	sel, err := q.selection(reflect.TypeFor[api.Object[S, T]]())
	if err != nil {
		return err
	}
	sel.all = sel.all || rs.global
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	page := List[api.Object[S, T]]{Kind: string(rs.table.Kind) + "List", Items: []api.Object[S, T]{}, Revision: v.Revision()}
	after := ""
	if sel.after != "" {
		after = rs.table.SpecKey(sel.after)
	}
	for e := range v.Scan(rs.table.SpecPrefix(), after) {
		id, _ := rs.table.IDOf(e.Key)
		o, err := rs.table.Get(v, id)
		if err != nil {
			// One value that cannot be read must not hide all others.
			q.s.log.Error("object left out of a list", "kind", rs.table.Kind, "id", id, "err", err)
			continue
		}
		rs.shown(v, &o)
		ok, err := sel.matches(&o.Meta, &o)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if len(page.Items) == sel.limit {
			page.Continue = continueToken(page.Items[sel.limit-1].Meta.ID)
			break
		}
		page.Items = append(page.Items, o)
	}
	q.reply(http.StatusOK, v.Revision(), page)
	return nil
}

func (rs *resource[S, T]) get(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	o, err := rs.find(q, v)
	if err != nil {
		return err
	}
	rs.shown(v, &o)
	q.w.Header().Set("ETag", etag(o.Meta.Revision))
	q.reply(http.StatusOK, v.Revision(), &o)
	return nil
}

// decodeNew reads and prepares the object of a POST. Read-only fields of the
// body are of no effect, so that what one cluster shows can be given to
// another.
func (rs *resource[S, T]) decodeNew(q *request) (api.Object[S, T], []byte, error) {
	var in, o api.Object[S, T]
	body, err := q.body()
	if err != nil {
		return o, nil, err
	}
	if err := decode(body, &in); err != nil {
		return o, nil, err
	}
	if in.Meta.Kind != "" && in.Meta.Kind != rs.table.Kind {
		return o, nil, api.Invalid("meta.kind", "is %q; this path makes a %s", clip(string(in.Meta.Kind)), rs.table.Kind)
	}
	project, err := rs.projectOfNew(q, in.Meta.Project)
	if err != nil {
		return o, nil, err
	}
	o.Meta = api.NewMeta(rs.table.Kind, project, in.Meta.Name)
	o.Meta.Labels = in.Meta.Labels
	o.Spec = in.Spec
	return o, body, o.Prepare()
}

func (rs *resource[S, T]) projectOfNew(q *request, named string) (string, error) {
	asked, all, err := q.project()
	switch {
	case err != nil:
		return "", err
	case rs.global:
		if named != "" && named != api.DefaultProject || asked != api.DefaultProject {
			return "", api.Invalid("meta.project", "a %s belongs to the whole cluster; leave the project out", rs.table.Kind)
		}
		return api.DefaultProject, nil
	case all:
		return "", api.Invalid("project", "is *; name the one project for the new %s", rs.table.Kind)
	case named == "":
		return asked, nil
	case q.param("project") != "" && named != asked:
		return "", api.Invalid("meta.project", "is %q, but the query says %q", clip(named), asked)
	}
	return named, nil
}

// create adds the object to the transaction unless its name is taken.
func (rs *resource[S, T]) create(c *change, o *api.Object[S, T]) error {
	if _, taken := c.v.Get(rs.table.NameKey(o.Meta.Project, o.Meta.Name)); taken {
		return api.Errorf(api.CodeExists, "%s %q exists already", rs.table.Kind, o.Meta.Name)
	}
	return rs.table.Recreate(c.tx, o, c.after)
}

// put answers PUT: labels and spec are replaced.
func (rs *resource[S, T]) put(q *request) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	var in api.Object[S, T]
	if err := decode(body, &in); err != nil {
		return err
	}
	return rs.write(q, func(old *api.Object[S, T]) (api.Object[S, T], error) {
		want := old.Clone()
		m := in.Meta
		for _, f := range []struct{ field, now, was string }{
			{"meta.id", m.ID, old.Meta.ID}, {"meta.kind", string(m.Kind), string(old.Meta.Kind)},
			{"meta.name", m.Name, old.Meta.Name}, {"meta.project", m.Project, old.Meta.Project},
		} {
			if f.now != "" && f.now != f.was {
				return want, api.Invalid(f.field, "is %q and cannot be changed from %q", clip(f.now), f.was)
			}
		}
		want.Meta.Labels, want.Spec = maps.Clone(m.Labels), in.Spec
		return want, nil
	})
}

// patch answers PATCH: a merge patch (RFC 7396) on meta.labels and spec.
func (rs *resource[S, T]) patch(q *request) error {
	if ct, _, _ := strings.Cut(q.r.Header.Get("Content-Type"), ";"); ct != "" && ct != "application/merge-patch+json" && ct != "application/json" {
		return api.Invalid("Content-Type", "is %q; send application/merge-patch+json", clip(ct))
	}
	body, err := q.body()
	if err != nil {
		return err
	}
	var p map[string]json.RawMessage
	if err := decode(body, &p); err != nil {
		return err
	}
	if _, ok := p["status"]; ok {
		return api.Invalid("status", "is written by the cluster only")
	}
	patch, err := generic(body)
	if err != nil {
		return err
	}
	return rs.write(q, func(old *api.Object[S, T]) (api.Object[S, T], error) { return merged(old, patch) })
}

func merged[S, T any](old *api.Object[S, T], patch any) (api.Object[S, T], error) {
	want := old.Clone()
	was, err := json.Marshal(old)
	if err != nil {
		return want, err
	}
	doc, err := generic(was)
	if err != nil {
		return want, err
	}
	now, err := json.Marshal(mergePatch(doc, patch))
	if err != nil {
		return want, err
	}
	var in api.Object[S, T]
	if err := decode(now, &in); err != nil {
		return want, err
	}
	a, b := in.Meta, old.Meta
	a.Labels, b.Labels = nil, nil
	if !reflect.DeepEqual(a, b) {
		return want, api.Invalid("meta", "only meta.labels can be changed")
	}
	want.Meta.Labels, want.Spec = in.Meta.Labels, in.Spec
	return want, nil
}

// write carries out what PUT and PATCH want.
func (rs *resource[S, T]) write(q *request, wish func(old *api.Object[S, T]) (api.Object[S, T], error)) error {
	cond, err := q.match("If-Match")
	if err != nil {
		return err
	}
	out, err := q.change(nil, func(c *change) (*effect, error) {
		old, err := rs.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if err := cond.check(rs.label(&old.Meta), old.Meta.Revision); err != nil {
			return nil, err
		}
		if old.Meta.Deleting() {
			return nil, api.Errorf(api.CodeRefused, "%s is being deleted", rs.label(&old.Meta))
		}
		want, err := wish(&old)
		if err != nil {
			return nil, err
		}
		if err := want.Prepare(); err != nil {
			return nil, err
		}
		changed := changedFields(&old, &want)
		e, err := rs.update(c, &old, &want)
		if err == nil && e.changed != "" {
			changed += "; " + e.changed
		}
		if err == nil {
			e.changed = changed
		}
		return e, err
	})
	if err != nil {
		return err
	}
	return q.answerObject(out)
}

// updateLabels is the update function of kinds whose spec never changes.
func (rs *resource[S, T]) updateLabels(c *change, old, want *api.Object[S, T]) (*effect, error) {
	before, after := old.Clone(), want.Clone()
	if !reflect.DeepEqual(before.Spec, after.Spec) {
		return nil, api.Errorf(api.CodeRefused, "the spec of %s cannot be changed; create another %s", rs.label(&old.Meta), rs.table.Kind)
	}
	return rs.store(c, want)
}

// store writes a changed object.
func (rs *resource[S, T]) store(c *change, o *api.Object[S, T]) (*effect, error) {
	if err := rs.table.UpdateSpec(c.v, c.tx, o); err != nil {
		return nil, err
	}
	return &effect{status: http.StatusOK, kind: rs.table.Kind, id: o.Meta.ID, object: o}, nil
}

func (rs *resource[S, T]) label(m *api.Meta) string { return string(rs.table.Kind) + " " + m.Name }

// unreferred refuses while something needs the object, and makes the
// transaction fail if that begins meanwhile.
func (rs *resource[S, T]) unreferred(c *change, m *api.Meta) error {
	if by := rs.table.Referrers(c.v, m.ID); len(by) > 0 {
		return api.Errorf(api.CodeRefused, "%s is used by %s", rs.label(m), c.names(by))
	}
	c.tx.RequireEmpty(rs.table.RefPrefix(m.ID))
	return nil
}

// names turns "kind/id" references into words for people.
func (c *change) names(refs []string) string {
	const most = 5
	var out []string
	for i, ref := range refs {
		if i == most {
			out = append(out, "and more")
			break
		}
		kind, id, _ := strings.Cut(ref, "/")
		name := id
		if op, err := configdb.Operations.Get(c.v, id); err == nil && kind == string(api.KindOperation) {
			out = append(out, "task "+op.Spec.TaskID+" (it is being "+op.Spec.Doing()+")")
			continue
		}
		if rs := c.q.s.kinds[api.Kind(kind)]; rs != nil {
			if m, err := rs.meta(c.v, id); err == nil {
				name = m.Name
			}
		}
		out = append(out, kind+" "+name)
	}
	return strings.Join(out, ", ")
}

// remove marks an object for its owner to clean up.
func (rs *resource[S, T]) remove(q *request, action api.Action) error {
	cond, err := q.match("If-Match")
	if err != nil {
		return err
	}
	out, err := q.change(nil, func(c *change) (*effect, error) {
		o, err := rs.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if err := cond.check(rs.label(&o.Meta), o.Meta.Revision); err != nil {
			return nil, err
		}
		if err := rs.unreferred(c, &o.Meta); err != nil {
			return nil, err
		}
		if err := rs.markDeleting(c, &o); err != nil {
			return nil, err
		}
		task, err := c.newTask(o.Meta.Project, api.TaskSpec{
			Action: action, TargetKind: rs.table.Kind, TargetID: o.Meta.ID, Target: o.Meta.Name, TargetGeneration: o.Meta.Generation,
		}, storageDeadline)
		return &effect{status: http.StatusAccepted, kind: rs.table.Kind, id: o.Meta.ID, task: task, object: &o}, err
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (rs *resource[S, T]) markDeleting(c *change, o *api.Object[S, T]) error {
	if !o.Meta.Deleting() {
		now := c.q.s.cfg.Now().UTC()
		o.Meta.DeletingAt = &now
	}
	return rs.table.UpdateSpec(c.v, c.tx, o)
}

// objectRevision returns the ETag of an object of any kind.
func objectRevision(object any) uint64 {
	if f := reflect.Indirect(reflect.ValueOf(object)).FieldByName("Meta"); f.IsValid() {
		if m, ok := f.Interface().(api.Meta); ok {
			return m.Revision
		}
	}
	return 0
}

// drop answers the DELETE of an object that goes at once. also, if set, adds
// to the transaction what goes with it, or refuses.
func (r *resource[S, T]) drop(q *request, also func(c *change, o *api.Object[S, T]) error) error {
	cond, err := q.match("If-Match")
	if err != nil {
		return err
	}
	out, err := q.change(nil, func(c *change) (*effect, error) {
		o, err := r.find(q, c.v)
		if err != nil {
			return nil, err
		}
		if err := cond.check(r.label(&o.Meta), o.Meta.Revision); err != nil {
			return nil, err
		}
		if also != nil {
			if err := also(c, &o); err != nil {
				return nil, err
			}
		}
		r.table.Delete(c.tx, &o)
		return &effect{kind: r.table.Kind, id: o.Meta.ID, object: &o}, nil
	})
	if err != nil {
		return err
	}
	q.noContent(out.revision)
	return nil
}
