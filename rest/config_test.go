// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/history"
)

// begin lets the leader begin the history and returns the revision.
func (f *fixture) begin() uint64 {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- history.New(history.ServiceConfig{DB: f.db, Log: slog.New(slog.DiscardHandler)}).Run(ctx, 1)
	}()
	for {
		v := f.db.Local()
		if _, _, ok := history.HorizonOf(v); ok {
			cancel()
			if err := <-ended; err != nil {
				f.t.Fatal(err)
			}
			return f.db.Local().Revision()
		}
		if _, err := f.db.WaitRevision(f.t.Context(), v.Revision()+1); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fixture) patch(path string, body any) answer {
	f.t.Helper()
	a := f.do(call{method: "PATCH", path: path, body: body})
	if a.status != http.StatusOK {
		f.t.Fatalf("patch %s: %d %s", path, a.status, a.body)
	}
	return a
}

// rev is the newest revision.
func (f *fixture) rev() uint64 { return f.db.Local().Revision() }

func (f *fixture) log(query string) api.ConfigLog {
	f.t.Helper()
	return want[api.ConfigLog](f.t, f.do(call{method: "GET", path: "config/log?" + query}), 200)
}

func (f *fixture) diff(query string) api.ConfigDiff {
	f.t.Helper()
	return want[api.ConfigDiff](f.t, f.do(call{method: "GET", path: "config/diff?" + query}), 200)
}

// changesOf returns "KIND/NAME OPERATION path:before→after …" of each item.
func changesOf(d api.ConfigDiff) (out []string) {
	for _, o := range d.Items {
		text := fmt.Sprintf("%s/%s %s", o.Kind, o.Name, o.Operation)
		if o.Operation == "update" {
			for _, c := range o.Changes {
				text += fmt.Sprintf(" %s:%s→%s", c.Path, c.Before, c.After)
			}
		}
		out = append(out, text)
	}
	return out
}

func TestConfigLogSaysWhoWhenAndFromWhere(t *testing.T) {
	f := newFixture(t)
	f.begin()
	vm := f.newVM("web1", api.VMStopped)
	start := f.rev()
	f.do(call{method: "PATCH", path: "vms/web1", body: `{"spec":{"cpus":3},"meta":{"labels":{"env":"prod"}}}`, role: api.RoleOperator, node: "m2"})
	f.report(vm.Meta.ID, api.VMStopped) // a status is no configuration

	l := f.log("object=vm/web1")
	if len(l.Items) != 2 || l.Items[0].Revision != start+1 || l.Items[1].Operation != "create" {
		t.Fatalf("%+v", l.Items)
	}
	c := l.Items[0]
	if c.Actor != "operator" || c.Source != "api 127.0.0.1" || c.Operation != "update" || c.Kind != api.KindVM || c.Name != "web1" || c.ID != vm.Meta.ID || c.Project != "default" {
		t.Errorf("%+v", c)
	}
	if !slices.Equal(c.Fields, []string{"meta.labels.env", "spec.cpus"}) || time.Since(c.Time) > time.Minute || c.Object != nil {
		t.Errorf("%+v", c)
	}
	// The ways in.
	do := func(h http.Handler, remote, body string) {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), "PATCH", base+"vms/web1", strings.NewReader(body))
		r.RemoteAddr = remote
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != 200 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	s := f.servers["m1"]
	do(s.LocalHandler(), "@", `{"spec":{"cpus":4}}`)
	do(s.SessionHandler("user:ann", api.RoleOperator), "10.0.0.5:4711", `{"spec":{"cpus":5}}`)
	l = f.log("object=vm/web1&limit=2")
	if got := []string{l.Items[0].Actor, l.Items[0].Source, l.Items[1].Actor, l.Items[1].Source}; !slices.Equal(got, []string{"user:ann", "ssh 10.0.0.5", "local:root", "unix socket"}) {
		t.Errorf("%q", got)
	}
	if l.Continue == "" {
		t.Fatal("there is no next page")
	}
	if next := f.log("object=vm/web1&limit=2&continue=" + l.Continue); len(next.Items) != 2 || next.Items[0].Revision >= l.Items[1].Revision || next.Continue != "" {
		t.Errorf("the next page: %+v", next)
	}
	// Filters.
	for query, n := range map[string]int{
		"object=vm&actor=operator": 1, "object=vm&actor=nobody": 0, "object=vms": 4, "object=vm&since=" + fmt.Sprint(start): 3, "object=vm&since=2h": 4, "object=vm&since=7d": 4,
		"object=vm/" + vm.Meta.ID: 4, "object=vm/web1&project=default": 4, "object=vm&project=other": 0, "object=vm/web1&project=*": 4,
	} {
		if got := f.log(query); len(got.Items) != n {
			t.Errorf("%s: %d changes, want %d", query, len(got.Items), n)
		}
	}
	full := f.log("object=vm/web1&full=true&limit=1")
	if !strings.Contains(string(full.Items[0].Object), `"cpus":5`) {
		t.Errorf("%s", full.Items[0].Object)
	}
	// Deleted, and found by name and by ID all the same.
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		configdb.VMs.Delete(tx, &o)
		return err
	})
	for _, object := range []string{"vm/web1", "vm/" + vm.Meta.ID} {
		if l := f.log("object=" + object); len(l.Items) != 5 || l.Items[0].Operation != "delete" || l.Items[0].Actor != "test" || l.Items[0].Source != "" {
			t.Errorf("%s: %+v", object, l.Items)
		}
	}
	f.skew.Store(int64(time.Hour)) // what is older than 5 minutes, an hour later
	if got := f.log("object=vm&since=5m"); len(got.Items) != 0 {
		t.Errorf("%+v", got.Items)
	}
}

func TestConfigDiff(t *testing.T) {
	f := newFixture(t)
	f.newVM("web1", api.VMStopped)
	begun := f.begin()
	f.newVM("web2", api.VMStopped)
	made := f.rev()
	f.patch("vms/web1", `{"spec":{"memory":"1G"}}`)
	changed := f.rev()
	f.patch("vms/web1", `{"spec":{"cpus":8}}`)
	for query, want := range map[string][]string{
		fmt.Sprintf("at=%d", begun):                              {"vm/web1 update spec.cpus:1→8 spec.memory:536870912→1073741824", "vm/web2 create"},
		fmt.Sprintf("at=%d&to=%d", begun, made):                  {"vm/web2 create"},
		fmt.Sprintf("at=%d&to=%d", made, changed):                {"vm/web1 update spec.memory:536870912→1073741824"},
		fmt.Sprintf("at=%d&to=%d", changed, begun):               {"vm/web1 update spec.memory:1073741824→536870912", "vm/web2 delete"},
		fmt.Sprintf("at=%d&to=%d", changed, changed):             nil,
		fmt.Sprintf("at=%d&object=vm/web2", begun):               {"vm/web2 create"},
		fmt.Sprintf("at=%d&object=network", begun):               nil,
		fmt.Sprintf("at=%d&object=vm/web1&to=%d", made, changed): {"vm/web1 update spec.memory:536870912→1073741824"},
	} {
		if got := changesOf(f.diff(query)); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
	// In pages, with the same end.
	first := f.diff(fmt.Sprintf("at=%d&limit=1", begun))
	next := f.diff(fmt.Sprintf("at=%d&to=%d&limit=1&continue=%s", begun, first.To, first.Continue))
	if got := append(changesOf(first), changesOf(next)...); len(got) != 2 || first.Continue == "" || next.Continue != "" {
		t.Errorf("%q", got)
	}
}

func TestConfigRefusals(t *testing.T) {
	f := newFixture(t)
	f.newVM("old", api.VMStopped)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", Life: 1, FeatureLevel: 2}}
	create(f, configdb.Clusters, &c)
	// Made by a version without a history.
	rule := api.Rule{Meta: api.NewMeta(api.KindRule, "", "older"), Spec: api.RuleSpec{Check: api.CheckNodeLost}}
	b, err := rule.EncodeSpec()
	if err != nil {
		t.Fatal(err)
	}
	f.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		tx.Put(configdb.Rules.SpecKey(rule.Meta.ID), b)
		return nil
	})
	wantProblem(t, f.do(call{method: "GET", path: "config/diff?at=1"}), 409, api.CodeRefused, "") // not begun
	begun := f.begin()
	now := fmt.Sprint(f.rev())
	for name, c := range map[string]struct {
		call  call
		code  api.Code
		field string
		words string
	}{
		"no revision":          {call{path: "config/diff"}, api.CodeInvalid, "at", "muster config log"},
		"no number":            {call{path: "config/diff?at=x"}, api.CodeInvalid, "at", "not a revision"},
		"a negative one":       {call{path: "config/diff?at=-1"}, api.CodeInvalid, "at", "not a revision"},
		"the future":           {call{path: "config/diff?at=99999999"}, api.CodeInvalid, "at", "newest revision is " + now},
		"to the future":        {call{path: "config/diff?at=" + now + "&to=99999999"}, api.CodeInvalid, "to", "newest revision is"},
		"before the horizon":   {call{path: "config/diff?at=1"}, api.CodeRefused, "", "complete from revision"},
		"no such kind":         {call{path: "config/log?object=cat/tom"}, api.CodeInvalid, "object", "choose from cluster"},
		"a kind without one":   {call{path: "config/log?object=token"}, api.CodeInvalid, "object", "no"},
		"no such object":       {call{path: "config/log?object=vm/none"}, api.CodeNotFound, "", "not in the history in project default"},
		"no such ID":           {call{path: "config/diff?at=" + now + "&object=vm/" + api.NewID()}, api.CodeNotFound, "", "not in the history"},
		"a name that is none":  {call{path: "config/log?object=vm/A%20B"}, api.CodeInvalid, "object", "not a valid name"},
		"an empty name":        {call{path: "config/log?object=vm/"}, api.CodeInvalid, "object", "missing"},
		"a wrong project":      {call{path: "config/log?project=A"}, api.CodeInvalid, "project", ""},
		"a wrong age":          {call{path: "config/log?since=soon"}, api.CodeInvalid, "since", "or give a revision"},
		"a wrong page":         {call{path: "config/log?continue=x"}, api.CodeInvalid, "continue", ""},
		"a wrong page of diff": {call{path: "config/diff?at=" + now + "&continue=x"}, api.CodeInvalid, "continue", ""},
		"a wrong limit":        {call{path: "config/log?limit=0"}, api.CodeInvalid, "limit", ""},
		"users, for a viewer":  {call{path: "config/log?object=user", role: api.RoleViewer}, api.CodeForbidden, "", "administrator"},
		"receivers, too":       {call{path: "config/diff?at=" + now + "&object=receiver", role: api.RoleOperator}, api.CodeForbidden, "", "administrator"},
		"a revert, operator":   {call{method: "POST", path: "config/revert", body: `{"to":1}`, role: api.RoleOperator}, api.CodeForbidden, "", "administrator"},
		"a dry run, too":       {call{method: "POST", path: "config/revert", body: `{"to":1,"dryRun":true}`, role: api.RoleViewer}, api.CodeForbidden, "", ""},
		"retention, operator":  {call{method: "PATCH", path: "config/retention", body: `{}`, role: api.RoleOperator}, api.CodeForbidden, "", ""},
		"an age too short":     {call{method: "PATCH", path: "config/retention", body: `{"maxAgeSeconds":3599}`}, api.CodeInvalid, "maxAgeSeconds", "3600"},
		"a size too large":     {call{method: "PATCH", path: "config/retention", body: `{"maxBytes":"257M"}`}, api.CodeInvalid, "maxBytes", "256 MiB"},
		"no size":              {call{method: "PATCH", path: "config/retention", body: `{"maxBytes":"lots"}`}, api.CodeInvalid, "maxBytes", ""},
		"an unknown setting":   {call{method: "PATCH", path: "config/retention", body: `{"forever":true}`}, api.CodeInvalid, "forever", ""},
		"revert to nothing":    {call{method: "POST", path: "config/revert", body: `{}`}, api.CodeInvalid, "to", ""},
		"to the future again":  {call{method: "POST", path: "config/revert", body: `{"to":99999999}`}, api.CodeInvalid, "to", ""},
		"to before all":        {call{method: "POST", path: "config/revert", body: `{"to":1,"dryRun":true}`}, api.CodeRefused, "", "complete from revision"},
		"an empty word":        {call{method: "POST", path: "config/revert", body: `{"to":` + now + `,"objects":[""]}`}, api.CodeInvalid, "objects[0]", ""},
		"a word of no kind":    {call{method: "POST", path: "config/revert", body: `{"to":` + now + `,"objects":["vm","dog/rex"]}`}, api.CodeInvalid, "objects[1]", ""},
		"an unknown object":    {call{method: "POST", path: "config/revert", body: `{"to":` + now + `,"objects":["vm/none"]}`}, api.CodeNotFound, "", ""},
		"an unknown field":     {call{method: "POST", path: "config/revert", body: `{"to":1,"force":true}`}, api.CodeInvalid, "force", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if c.call.method == "" {
				c.call.method = "GET"
			}
			p := wantProblem(t, f.do(c.call), statuses[c.code].status, c.code, c.field)
			if !strings.Contains(p.Detail, c.words) {
				t.Errorf("%q does not say %q", p.Detail, c.words)
			}
		})
	}
	if f.rev() != begun {
		t.Errorf("something was written: revision %d, was %d", f.rev(), begun)
	}
}

// What is secret is neither in the log nor in a diff nor among the raw keys.
func TestTheHistoryShowsNoSecret(t *testing.T) {
	f := newFixture(t)
	withMonitors(f)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", SealedCAKey: []byte("THE-CA-KEY"), Life: 1, FeatureLevel: 2}}
	create(f, configdb.Clusters, &c)
	begun := f.begin()
	f.do(call{method: "POST", path: "receivers", body: `{"meta":{"name":"nms"},"spec":{"type":"snmp","address":"h:162","secret":"hunter2"}}`})
	f.patch("receivers/nms", `{"spec":{"secret":"hunter3"}}`)
	f.patch("config/retention", `{"maxAgeSeconds":7200}`)
	f.do(call{method: "POST", path: "tokens", body: `{"meta":{"name":"t"}}`})

	all := f.do(call{method: "GET", path: "config/log?full=true"})
	diff := f.do(call{method: "GET", path: fmt.Sprintf("config/diff?at=%d", begun)})
	raw := f.do(call{method: "GET", path: "raw/?prefix=muster/history/"})
	for what, a := range map[string]answer{"log": all, "diff": diff, "raw": raw} {
		text := string(a.body)
		for _, secret := range []string{"hunter", "HUNTER", "sealed:", "c2VhbGVk", "VEhFLUNBLUtFWQ", "THE-CA-KEY", `"hash"`} {
			if strings.Contains(text, secret) {
				t.Errorf("the %s has %q:\n%s", what, secret, text)
			}
		}
	}
	d := want[api.ConfigDiff](t, diff, 200)
	l := want[api.ConfigLog](t, all, 200)
	receivers := slices.DeleteFunc(slices.Clone(l.Items), func(c api.ConfigChange) bool { return c.Kind != api.KindReceiver })
	if len(receivers) != 2 || !slices.Equal(receivers[0].Fields, []string{"spec.sealedSecret"}) {
		t.Errorf("that the secret was changed does not show: %+v", receivers)
	}
	secret := false
	for _, o := range d.Items {
		for _, ch := range o.Changes {
			secret = secret || o.Kind == api.KindReceiver && ch.Path == "spec.sealedSecret" && ch.Secret && ch.After == nil
		}
	}
	if !secret {
		t.Errorf("%s", diff.body)
	}
	for _, key := range []string{configdb.HistoryPrefix(api.KindReceiver, ""), configdb.HistoryPrefix(api.KindCluster, c.Meta.ID)} {
		for e := range f.db.Local().Scan(key, "") {
			wantProblem(t, f.do(call{method: "GET", path: "raw/" + e.Key}), 403, api.CodeForbidden, "")
		}
	}
	// A viewer sees neither users nor receivers among all.
	f.do(call{method: "POST", path: "users", body: `{"meta":{"name":"ann"}}`})
	seen := want[api.ConfigLog](t, f.do(call{method: "GET", path: "config/log", role: api.RoleViewer}), 200)
	for _, c := range seen.Items {
		if c.Kind == api.KindUser || c.Kind == api.KindReceiver {
			t.Errorf("a viewer sees %+v", c)
		}
	}
	if len(seen.Items) == 0 || !strings.Contains(string(f.do(call{method: "GET", path: "config/log"}).body), `"name":"ann"`) {
		t.Error("the log lacks what is there")
	}
}

func TestRetentionSettings(t *testing.T) {
	f := newFixture(t)
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", SealedCAKey: []byte("key"), Life: 1, FeatureLevel: 2}}
	create(f, configdb.Clusters, &c)
	f.begin()
	get := func() api.ConfigRetention {
		t.Helper()
		return want[api.ConfigRetention](t, f.do(call{method: "GET", path: "config/retention", role: api.RoleViewer}), 200)
	}
	if r := get(); r.Settings.MaxAgeSeconds != api.DefaultHistorySeconds || r.Settings.MaxBytes != api.DefaultHistoryBytes || r.Records == 0 || r.Bytes == 0 || r.Horizon != 0 {
		t.Errorf("%+v", r)
	}
	f.patch("config/retention", `{"maxBytes":"2M"}`)
	f.patch("config/retention", `{"maxAgeSeconds":7200}`)
	if r := get(); r.Settings.MaxAgeSeconds != 7200 || r.Settings.MaxBytes != 2*api.MiB {
		t.Errorf("%+v", r)
	}
	now, err := configdb.Clusters.Get(f.db.Local(), c.Meta.ID)
	if err != nil || now.Spec.CACert != "PEM" || string(now.Spec.SealedCAKey) != "key" {
		t.Errorf("the rest of the object: %+v, %v", now.Spec, err)
	}
	l := f.log("object=cluster&actor=administrator")
	if len(l.Items) != 2 || !slices.Equal(l.Items[0].Fields, []string{"spec.history.maxAgeSeconds"}) {
		t.Errorf("%+v", l.Items)
	}
	ev := f.do(call{method: "GET", path: "events?fields=spec.type=audit.cluster.update"})
	if strings.Count(string(ev.body), `"actor":"administrator"`) != 2 {
		t.Errorf("%s", ev.body)
	}
}

// Without a quorum the log is answered from the node's own copy, and says so.
func TestConfigLogWithoutQuorum(t *testing.T) {
	f := newFixture(t)
	f.begin()
	f.newVM("web1", api.VMStopped)
	f.db.alone.Store(true)
	a := f.do(call{method: "GET", path: "config/log?object=vm"})
	if l := want[api.ConfigLog](t, a, 200); len(l.Items) != 1 || a.header.Get(headerConsistency) != "stale" {
		t.Errorf("%+v %s", l, a.header)
	}
	wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: `{"to":1,"dryRun":true}`}), 503, api.CodeNoQuorum, "")
	wantProblem(t, f.do(call{method: "POST", path: "config/revert", body: `{"to":1}`}), 503, api.CodeNoQuorum, "")
}
