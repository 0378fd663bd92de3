// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// logged returns "REVISION OPERATION KIND/NAME" of all pages of a query.
func logged(t *testing.T, v *configdb.View, q Query) (out []string) {
	t.Helper()
	for range 100 {
		page, next, err := Log(v, q)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) > q.Limit {
			t.Fatalf("a page of %d, at most %d", len(page), q.Limit)
		}
		for i := range page {
			c, err := page[i].Change(v, false)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf("%d %s %s/%s", c.Revision, c.Operation, c.Kind, c.Name))
		}
		if next == "" {
			return out
		}
		q.Continue = next
	}
	t.Fatal("the pages do not end")
	return nil
}

func TestLog(t *testing.T) {
	w := newWorld(t)
	vm, _ := create(w, configdb.VMs, "web1", api.VMSpec{})           // 1
	net, _ := create(w, configdb.Networks, "lan", api.NetworkSpec{}) // 2
	w.clock = w.clock.Add(time.Hour)
	vm.Spec.CPUs, vm.Meta.Labels = 2, map[string]string{"env": "prod"}
	update(w, configdb.VMs, &vm) // 3
	remove(w, configdb.VMs, &vm) // 4
	w.clock = w.clock.Add(time.Hour)
	again, _ := create(w, configdb.VMs, "web1", api.VMSpec{}) // 5
	// Two changes in one transaction: 6.
	w.do("carol", func(v *configdb.View, tx *configdb.Txn) error {
		again.Spec.CPUs = 3
		net.Meta.Labels = map[string]string{"a": "b"}
		if err := configdb.VMs.UpdateSpec(v, tx, &again); err != nil {
			return err
		}
		return configdb.Networks.UpdateSpec(v, tx, &net)
	})
	v := w.db.Local()
	everything := []string{"6 update network/lan", "6 update vm/web1", "5 create vm/web1", "4 delete vm/web1", "3 update vm/web1", "2 create network/lan", "1 create vm/web1"}
	for name, c := range map[string]struct {
		q    Query
		want []string
	}{
		"everything, newest first": {Query{Selection: all()}, everything},
		"a name that two objects had": {Query{Selection: only(api.KindVM, "web1")}, []string{
			"6 update vm/web1", "5 create vm/web1", "4 delete vm/web1", "3 update vm/web1", "1 create vm/web1"}},
		"a deleted object by its ID": {Query{Selection: only(api.KindVM, vm.Meta.ID)}, []string{"4 delete vm/web1", "3 update vm/web1", "1 create vm/web1"}},
		"another project":            {Query{Selection: Selection{Kinds: configdb.HistoryKinds(), Project: "other"}}, nil},
		"the project":                {Query{Selection: Selection{Kinds: []api.Kind{api.KindNetwork}, Project: "default"}}, []string{"6 update network/lan", "2 create network/lan"}},
		"after a revision":           {Query{Selection: all(), AfterRevision: 4}, everything[:3]},
		"after a time":               {Query{Selection: all(), AfterTime: w.clock.Add(-90 * time.Minute)}, everything[:5]},
		"by one actor":               {Query{Selection: all(), Actor: "eve"}, []string{"4 delete vm/web1"}},
		"by nobody":                  {Query{Selection: all(), Actor: "nobody"}, nil},
		"no such name":               {Query{Selection: only(api.KindVM, "web9")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, limit := range []int{1, 2, 3, 100} { // a page may end within a revision
				c.q.Limit = limit
				if got := logged(t, v, c.q); !slices.Equal(got, c.want) {
					t.Errorf("in pages of %d:\n%s\nwant\n%s", limit, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
			}
		})
	}
	page, _, err := Log(v, Query{Selection: only(api.KindVM, vm.Meta.ID), Limit: 9})
	if err != nil {
		t.Fatal(err)
	}
	c, err := page[1].Change(v, true)
	if want := []string{"meta.labels.env", "spec.cpus"}; err != nil || !slices.Equal(c.Fields, want) || c.Actor != "bob" || !c.Time.Equal(w.clock.Add(-time.Hour)) {
		t.Errorf("%+v, %v, want the fields %v", c, err, want)
	}
	if !strings.Contains(string(c.Object), `"cpus":2`) || strings.Contains(string(c.Object), "schema") {
		t.Errorf("the object is shown as %s", c.Object)
	}
	for _, token := range []string{"!", "AAAA", "MTIgYQ"} {
		if _, _, err := Log(v, Query{Selection: all(), Limit: 1, Continue: token}); api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("page %q: %v", token, err)
		}
	}
}

// specs returns what At says, as "KIND/NAME cpus=N" or "… gone".
func specs(t *testing.T, v *configdb.View, rev uint64) (out []string) {
	t.Helper()
	for o, p := range At(v, all(), rev) {
		r, err := p.Record()
		if err != nil {
			t.Fatal(err)
		}
		text := string(o.Kind) + "/" + r.Name
		if p.Exists {
			var vm api.VM
			if _, err := vm.Decode(r.Spec, nil); err != nil {
				t.Fatal(err)
			}
			text += fmt.Sprintf(" cpus=%d", vm.Spec.CPUs)
		} else {
			text += " gone"
		}
		out = append(out, text)
	}
	slices.Sort(out)
	return out
}

func TestAt(t *testing.T) {
	w := newWorld(t)
	vm, r1 := create(w, configdb.VMs, "a", api.VMSpec{})
	_, r2 := create(w, configdb.VMs, "b", api.VMSpec{CPUs: 7})
	vm.Spec.CPUs = 2
	r3 := update(w, configdb.VMs, &vm)
	r4 := remove(w, configdb.VMs, &vm)
	w.put("other", []byte("x"))
	for rev, want := range map[uint64][]string{
		r1: {"vm/a cpus=1"}, r2: {"vm/a cpus=1", "vm/b cpus=7"}, r3: {"vm/a cpus=2", "vm/b cpus=7"},
		r4: {"vm/a gone", "vm/b cpus=7"}, r4 + 1: {"vm/a gone", "vm/b cpus=7"},
	} {
		if got := specs(t, w.db.Local(), rev); !slices.Equal(got, want) {
			t.Errorf("at %d: %v, want %v", rev, got, want)
		}
	}
}

func TestDiff(t *testing.T) {
	w := newWorld(t)
	vm, r1 := create(w, configdb.VMs, "a", api.VMSpec{})
	net, _ := create(w, configdb.Networks, "lan", api.NetworkSpec{})
	same, _ := create(w, configdb.VMs, "same", api.VMSpec{})
	vm.Spec.CPUs = 2
	r4 := update(w, configdb.VMs, &vm)
	remove(w, configdb.Networks, &net)
	same.Spec.CPUs = 5
	update(w, configdb.VMs, &same)
	same.Spec.CPUs = 1
	r7 := update(w, configdb.VMs, &same) // as it was
	v := w.db.Local()
	show := func(s Selection, from, to uint64) (out []string) {
		all, err := Diff(v, s, from, to)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range all {
			changes, err := Compare(d.Before, d.After)
			if err != nil {
				t.Fatal(err)
			}
			text := d.Operation() + " " + string(d.Kind) + "/" + d.Name
			if d.Operation() == "update" {
				for _, c := range changes {
					text += fmt.Sprintf(" %s %s→%s", c.Path, c.Before, c.After)
				}
			}
			out = append(out, text)
		}
		return out
	}
	for name, c := range map[string]struct {
		s        Selection
		from, to uint64
		want     []string
	}{
		"forth":               {all(), r1, r4, []string{"create network/lan", "update vm/a spec.cpus 1→2", "create vm/same"}},
		"back":                {all(), r4, r1, []string{"delete network/lan", "update vm/a spec.cpus 2→1", "delete vm/same"}},
		"deleted meanwhile":   {only(api.KindNetwork, "lan"), r4, r7, []string{"delete network/lan"}},
		"there and gone":      {only(api.KindNetwork, "lan"), r1, r7, nil},
		"forth and back":      {only(api.KindVM, "same"), r4, r7, []string{"update vm/same"}},
		"nothing in between":  {all(), r4, r4, nil},
		"one object":          {only(api.KindVM, "a"), r1, r7, []string{"update vm/a spec.cpus 1→2"}},
		"another object's ID": {only(api.KindVM, net.Meta.ID), r1, r7, nil},
	} {
		if got := show(c.s, c.from, c.to); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestCompare(t *testing.T) {
	stored := func(meta, spec string) []byte { return []byte(`{"schema":1,"meta":` + meta + `,"spec":` + spec + `}`) }
	for name, c := range map[string]struct {
		before, after []byte
		want          string
	}{
		"equal":              {stored(`{"name":"a"}`, `{"x":1}`), stored(`{"name":"a"}`, `{"x":1}`), ""},
		"created":            {nil, stored(`{"labels":{"a":"b"}}`, `{"x":1,"l":[1],"e":{}}`), "meta.labels.a →\"b\"; spec.e →{}; spec.l[0] →1; spec.x →1"},
		"deleted":            {stored(`{}`, `{"x":1}`), nil, "spec.x 1→"},
		"what follows":       {stored(`{"generation":1,"revision":2,"createdAt":"a"}`, `{}`), stored(`{"generation":2,"revision":3,"createdAt":"b"}`, `{}`), ""},
		"labels":             {stored(`{"labels":{"a":"1","b":"2"}}`, `{}`), stored(`{"labels":{"a":"1","c":"3"}}`, `{}`), `meta.labels.b "2"→; meta.labels.c →"3"`},
		"large numbers":      {stored(`{}`, `{"x":9007199254740993}`), stored(`{}`, `{"x":9007199254740992}`), "spec.x 9007199254740993→9007199254740992"},
		"lists":              {stored(`{}`, `{"l":["a","b"]}`), stored(`{}`, `{"l":["a","c","d"]}`), `spec.l[1] "b"→"c"; spec.l[2] →"d"`},
		"a list of objects":  {stored(`{}`, `{"n":[{"a":1}]}`), stored(`{}`, `{"n":[{"a":2,"b":3}]}`), "spec.n[0].a 1→2; spec.n[0].b →3"},
		"another type":       {stored(`{}`, `{"x":{"a":1}}`), stored(`{}`, `{"x":[1]}`), `spec.x {"a":1}→[1]`},
		"null and nothing":   {stored(`{}`, `{"x":null}`), stored(`{}`, `{}`), "spec.x null→"},
		"a list that is now": {stored(`{}`, `{}`), stored(`{}`, `{"x":[]}`), "spec.x →[]"},
		"a secret":           {stored(`{}`, `{"sealedSecret":"A","r":{"sealedCAKey":"x"}}`), stored(`{}`, `{"sealedSecret":"B","r":{"sealedCAKey":"x"}}`), "spec.sealedSecret secret"},
		"a secret that went": {stored(`{}`, `{"hash":"A"}`), stored(`{}`, `{}`), "spec.hash secret"},
	} {
		changes, err := Compare(c.before, c.after)
		var got []string
		for _, f := range changes {
			if f.Secret {
				got = append(got, f.Path+" secret"+string(f.Before)+string(f.After))
				continue
			}
			got = append(got, fmt.Sprintf("%s %s→%s", f.Path, f.Before, f.After))
		}
		if text := strings.Join(got, "; "); err != nil || text != c.want {
			t.Errorf("%s: %q, %v, want %q", name, text, err, c.want)
		}
	}
	if _, err := Compare([]byte("x"), nil); err == nil {
		t.Error("compared what is no JSON")
	}
}

// Whoever adds a field that may be a secret has to say so here or in Secret.
func TestEveryFieldOfASpecIsKnownToBeASecretOrNot(t *testing.T) {
	plain := map[string]bool{"sshKeys": true, "passwordSet": true, "keySet": true} // public keys; that there is one
	suspect := []string{"secret", "key", "pass", "hash", "token", "seal", "private", "credential", "community"}
	found := 0
	var walk func(path string, ty reflect.Type)
	walk = func(path string, ty reflect.Type) {
		switch ty.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			walk(path, ty.Elem())
		case reflect.Struct:
			for i := range ty.NumField() {
				f := ty.Field(i)
				name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				bytes := f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Uint8
				looks := bytes || slices.ContainsFunc(suspect, func(s string) bool { return strings.Contains(strings.ToLower(name), s) })
				if looks && !Secret(name) && !plain[name] {
					t.Errorf("%s.%s: is it a secret? Then name it in Secret, else in this test", path, name)
				}
				if Secret(name) {
					found++
				}
				walk(path+"."+name, f.Type)
			}
		}
	}
	kinds := map[api.Kind]reflect.Type{
		api.KindCluster: reflect.TypeFor[api.ClusterSpec](), api.KindNode: reflect.TypeFor[api.NodeSpec](), api.KindVM: reflect.TypeFor[api.VMSpec](),
		api.KindImage: reflect.TypeFor[api.ImageSpec](), api.KindVolume: reflect.TypeFor[api.VolumeSpec](), api.KindPool: reflect.TypeFor[api.PoolSpec](),
		api.KindNetwork: reflect.TypeFor[api.NetworkSpec](), api.KindUplink: reflect.TypeFor[api.UplinkSpec](), api.KindIPPool: reflect.TypeFor[api.IPPoolSpec](),
		api.KindRule: reflect.TypeFor[api.RuleSpec](), api.KindReceiver: reflect.TypeFor[api.ReceiverSpec](), api.KindUser: reflect.TypeFor[api.UserSpec](),
		api.KindPowerDevice: reflect.TypeFor[api.PowerDeviceSpec](),
	}
	for _, k := range configdb.HistoryKinds() {
		if kinds[k] == nil {
			t.Errorf("this test does not know kind %s", k)
			continue
		}
		walk(string(k), kinds[k])
	}
	if found < 3 {
		t.Errorf("only %d secrets were found; the walk is broken", found)
	}
}

func TestShownHidesSecrets(t *testing.T) {
	got, err := Shown([]byte(`{"schema":1,"meta":{"name":"ops"},"spec":{"user":"u","sealedSecret":"QUJD","list":[{"hash":"x","y":1}],"rotation":{"sealedCAKey":"k","phase":"trust"}}}`))
	if want := `{"meta":{"name":"ops"},"spec":{"list":[{"y":1}],"rotation":{"phase":"trust"},"user":"u"}}`; err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}

func TestCheck(t *testing.T) {
	w := newWorld(t)
	_, r1 := create(w, configdb.VMs, "a", api.VMSpec{})
	wants := func(rev uint64, code api.Code, words string) {
		t.Helper()
		err := Check(w.db.Local(), "at", rev)
		if err == nil && code == "" {
			return
		}
		if api.CodeOf(err) != code || !strings.Contains(err.Error(), words) {
			t.Errorf("revision %d: %v, want %s and %q", rev, err, code, words)
		}
	}
	wants(r1, api.CodeRefused, "no history yet")
	w.begin()
	now := w.db.Local().Revision()
	wants(0, api.CodeInvalid, "at: is 0")
	wants(now+1, api.CodeInvalid, fmt.Sprintf("the newest revision is %d", now))
	wants(r1, "", "")
	wants(now, "", "")
	w.put(configdb.HistoryHorizonKey, []byte(`{"revision":2,"reason":"size"}`))
	wants(1, api.CodeRefused, "complete from revision 2 on (older changes were removed for their size)")
	wants(2, "", "")
}
