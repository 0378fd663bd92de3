// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/history"
)

// defaultLog is how many changes a page of the log has.
const defaultLog = 100

func (s *Server) configRoutes() []route {
	path := base + "config/"
	return []route{
		{method: http.MethodGet, path: path + "log", need: needViewer, handle: configLog, summary: "Who changed what, when and from where, newest first",
			params: append([]string{"object", "project", "since", "actor", "full", "limit", "continue"}, readParams...), out: typeOf[api.ConfigLog](), status: http.StatusOK},
		{method: http.MethodGet, path: path + "diff", need: needViewer, handle: configDiff, summary: "What differs between two revisions",
			params: append([]string{"object", "project", "at", "to", "limit", "continue"}, readParams...), out: typeOf[api.ConfigDiff](), status: http.StatusOK},
		{method: http.MethodPost, path: path + "revert", need: needAdministrator, handle: configRevert, summary: "Bring objects back to what they were at a revision",
			in: typeOf[api.RevertRequest](), out: typeOf[api.RevertResult](), status: http.StatusOK},
		{method: http.MethodGet, path: path + "retention", need: needViewer, handle: configRetention, summary: "How long the history is kept, and what it takes",
			params: readParams, out: typeOf[api.ConfigRetention](), status: http.StatusOK},
		{method: http.MethodPatch, path: path + "retention", need: needAdministrator, handle: setRetention, summary: "Choose how long the history is kept",
			consumes: "application/merge-patch+json", out: typeOf[api.ConfigRetention](), status: http.StatusOK},
	}
}

// globalKind reports whether objects of a kind belong to no project.
func (s *Server) globalKind(kind api.Kind) bool {
	rs, ok := s.kinds[kind]
	return !ok || rs.isGlobal()
}

// mayRead refuses a kind that the caller may not see.
func (q *request) mayRead(kind api.Kind) error {
	need := needViewer
	if rs, ok := q.s.kinds[kind]; ok {
		need = rs.access()
	}
	if q.who.may(need) {
		return nil
	}
	return api.Errorf(api.CodeForbidden, "reading %s needs the role %s", kind.Plural(), roleFor(need))
}

// selectObjects reads "KIND/NAME", "KIND/ID", "KIND" or "" as what the caller
// may see of it. Without a name, objects of every project are meant unless one
// is given; a name is looked up in the default project.
func (q *request) selectObjects(field, text, project string) (history.Selection, error) {
	s := history.Selection{}
	if project != "" && project != "*" {
		if err := api.ValidName("project", project); err != nil {
			return s, err
		}
		s.Project = project
	}
	if text == "" {
		for _, kind := range configdb.HistoryKinds() {
			if q.mayRead(kind) == nil && (s.Project == "" || !q.s.globalKind(kind)) {
				s.Kinds = append(s.Kinds, kind)
			}
		}
		return s, nil
	}
	word, name, named := strings.Cut(text, "/")
	kinds := configdb.HistoryKinds()
	at := slices.IndexFunc(kinds, func(k api.Kind) bool { return word == string(k) || word == k.Plural() })
	if at < 0 {
		return s, api.Invalid(field, "%q is not a kind with a history; choose from %s", clip(word), joinKinds(kinds))
	}
	kind := kinds[at]
	if err := q.mayRead(kind); err != nil {
		return s, err
	}
	s.Kinds = []api.Kind{kind}
	if named {
		if !api.IsID(name) {
			if err := api.ValidName(field, name); err != nil {
				return s, err
			}
		}
		s.Name = name
	}
	switch {
	case q.s.globalKind(kind):
		s.Project = ""
	case named && project == "":
		s.Project = api.DefaultProject
	}
	if api.IsID(name) {
		s.Project = ""
	}
	return s, nil
}

func joinKinds(kinds []api.Kind) string {
	var out []string
	for _, k := range kinds {
		out = append(out, string(k))
	}
	return strings.Join(out, ", ")
}

// known refuses the name of an object that the history has never heard of.
func known(v *configdb.View, s history.Selection) error {
	if s.Name == "" {
		return nil
	}
	page, _, err := history.Log(v, history.Query{Selection: s, Limit: 1})
	if err == nil && len(page) == 0 {
		where := ""
		if s.Project != "" {
			where = " in project " + s.Project
		}
		err = api.Errorf(api.CodeNotFound, "%s %q is not in the history%s: it never was there, or its history was removed for its age", s.Kinds[0], s.Name, where)
	}
	return err
}

// configLog answers GET /config/log.
func configLog(q *request) error {
	sel, err := q.selectObjects("object", q.param("object"), q.param("project"))
	if err != nil {
		return err
	}
	ask := history.Query{Selection: sel, Actor: q.param("actor"), Continue: q.param("continue")}
	if ask.Limit, err = q.intParam("limit", defaultLog, 1, maxListItems); err != nil {
		return err
	}
	if since := q.param("since"); since != "" {
		if ask.AfterRevision, err = strconv.ParseUint(since, 10, 64); err != nil {
			age, err := api.ParseAge(since)
			if err != nil {
				return api.Invalid("since", "%v; or give a revision", err)
			}
			ask.AfterTime = q.s.cfg.Now().Add(-age)
		}
	}
	full, err := q.boolParam("full")
	if err != nil {
		return err
	}
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	if err := known(v, sel); err != nil {
		return err
	}
	page, next, err := history.Log(v, ask)
	if err != nil {
		return err
	}
	out := api.ConfigLog{Kind: "configLog", Items: []api.ConfigChange{}, Continue: next, Revision: v.Revision()}
	h, _, _ := history.HorizonOf(v)
	out.Horizon = h.Revision
	for i := range page {
		c, err := page[i].Change(v, full)
		if err != nil {
			// One record that cannot be read must not hide all others.
			q.s.log.Error("record left out of the log", "err", err)
			continue
		}
		out.Items = append(out.Items, c)
	}
	q.reply(http.StatusOK, v.Revision(), out)
	return nil
}

// revisionParam reads a revision from the query.
func (q *request) revisionParam(name string, unset uint64) (uint64, error) {
	text := q.param(name)
	if text == "" {
		return unset, nil
	}
	rev, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, api.Invalid(name, "%q is not a revision; muster config log shows them", clip(text))
	}
	return rev, nil
}

// configDiff answers GET /config/diff.
func configDiff(q *request) error {
	sel, err := q.selectObjects("object", q.param("object"), q.param("project"))
	if err != nil {
		return err
	}
	limit, err := q.intParam("limit", listItems, 1, maxListItems)
	if err != nil {
		return err
	}
	skip, err := q.intParam("continue", 0, 0, 1<<30)
	if err != nil {
		return api.Invalid("continue", "is not a value that an earlier page gave")
	}
	at, err := q.revisionParam("at", 0)
	if err != nil {
		return err
	}
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	to, err := q.revisionParam("to", v.Revision())
	if err != nil {
		return err
	}
	for field, rev := range map[string]uint64{"at": at, "to": to} {
		if err := history.Check(v, field, rev); err != nil {
			return err
		}
	}
	if err := known(v, sel); err != nil {
		return err
	}
	all, err := history.Diff(v, sel, at, to)
	if err != nil {
		return err
	}
	out := api.ConfigDiff{Kind: "configDiff", At: at, To: to, Items: []api.ObjectDiff{}, Revision: v.Revision()}
	h, _, _ := history.HorizonOf(v)
	out.Horizon = h.Revision
	for i := min(skip, len(all)); i < len(all); i++ {
		if len(out.Items) == limit {
			out.Continue = strconv.Itoa(i)
			break
		}
		d := &all[i]
		changes, err := history.Compare(d.Before, d.After)
		if err != nil {
			return err
		}
		if len(changes) > 0 || d.Before == nil || d.After == nil {
			out.Items = append(out.Items, api.ObjectDiff{Kind: d.Kind, ID: d.ID, Name: d.Name, Project: d.Project, Operation: d.Operation(), Changes: changes})
		}
	}
	q.reply(http.StatusOK, v.Revision(), out)
	return nil
}

// configRetention answers GET /config/retention.
func configRetention(q *request) error {
	v, err := q.view(fresh)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, v.Revision(), history.Usage(v))
	return nil
}

// setRetention answers PATCH /config/retention. The leader acts on it within a
// minute.
func setRetention(q *request) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	out, err := q.change(nil, func(c *change) (*effect, error) {
		cl, err := history.Cluster(c.v)
		if err != nil {
			return nil, err
		}
		now := history.Settings(c.v)
		if err := decode(body, &now); err != nil {
			return nil, err
		}
		if err := now.Validate(); err != nil {
			return nil, err
		}
		cl.Spec.History = now
		err = configdb.Clusters.UpdateSpec(c.v, c.tx, &cl)
		// Not the object: it holds what no answer may show.
		return &effect{status: http.StatusOK, kind: api.KindCluster, id: cl.Meta.ID, object: eventTarget{api.Meta{ID: cl.Meta.ID, Name: cl.Meta.Name}}}, err
	})
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, out.revision, history.Usage(q.db.Local()))
	return nil
}

// eventTarget is what an event is about when that is no object, or not one to show.
type eventTarget struct{ Meta api.Meta }
