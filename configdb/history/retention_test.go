// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const day = 24 * time.Hour

// marksOf builds marks from words "OBJECT@DAY", with ! behind an end; each is a
// revision of its own, from 1 on, and has 10 bytes.
func marksOf(words string) (marks []mark, total int64) {
	objects := map[string]int{}
	for i, word := range strings.Fields(words) {
		word, ends := strings.CutSuffix(word, "!")
		var days int
		name, at, _ := strings.Cut(word, "@")
		if _, err := fmt.Sscan(at, &days); err != nil {
			panic(err)
		}
		if _, ok := objects[name]; !ok {
			objects[name] = len(objects)
		}
		marks = append(marks, mark{revision: uint64(i + 1), key: fmt.Sprint(i + 1), size: 10, time: epoch.Add(time.Duration(days) * day), object: objects[name], ends: ends})
	}
	return marks, int64(10 * len(marks))
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestWhatIsRemoved(t *testing.T) {
	// The limit of age is 90 days, it is day 100: what was before day 10 is old.
	for name, c := range map[string]struct {
		marks   string
		most    api.Size
		horizon uint64
		now     int // day, 100 when 0
		want    string
	}{
		"nothing is old":                       {"a@20 a@30 b@40", 1000, 0, 0, "horizon 0"},
		"the last of an object stays":          {"a@1 b@2 b@3 c@50", 1000, 0, 0, "horizon 3 age: 2"},
		"old, but nothing newer":               {"a@1 b@2", 1000, 0, 0, "horizon 0"},
		"superseded by what is young":          {"a@1 b@2 a@50", 1000, 0, 0, "horizon 0"},
		"a deleted object goes as a whole":     {"a@1 a@2! b@3 c@50", 1000, 0, 0, "horizon 2 age: 1 2"},
		"and comes back":                       {"a@1 a@2! a@3 c@50", 1000, 0, 0, "horizon 2 age: 1 2"},
		"a deletion that is young stays":       {"a@1 a@50!", 1000, 0, 0, "horizon 0"},
		"too large: the oldest first":          {"a@50 a@51 a@52 a@53 a@54 a@55 a@56 a@57 a@58 a@59", 99, 0, 0, "horizon 3 size: 1 2"},
		"too large, of old and of young":       {"a@1 a@2 a@50 a@51 a@52 a@53 a@54 a@55 a@56 a@57", 60, 0, 0, "horizon 6 size: 1 2 3 4 5"},
		"what must stay is too much":           {"a@50 b@50 c@50 d@50", 10, 0, 0, "horizon 0"},
		"and one change more":                  {"a@50 b@50 c@50 d@50 a@51", 10, 0, 0, "horizon 5 size: 1"},
		"exactly the limit":                    {"a@50 a@51", 20, 0, 0, "horizon 0"},
		"an interrupted removal goes on":       {"a@50 a@51 a@52 b@53", 1000, 3, 0, "horizon 3: 1 2"},
		"a clock that is ahead blocks nothing": {"a@1 b@4000 a@2 a@3 c@50", 1000, 0, 0, "horizon 4 age: 1 3"},
		"and makes nothing old":                {"a@50 a@4000 a@4000 a@4000", 1000, 0, 0, "horizon 0"},
		"a clock that was reset stays behind":  {"a@50 a@51 b@-9000 a@52", 1000, 0, 0, "horizon 0"},
		"the leader's clock is far behind":     {"a@1 a@2 a@3", 1000, 0, -9000, "horizon 0"},
		"nothing at all":                       {"", 1000, 0, 0, "horizon 0"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.now == 0 {
				c.now = 100
			}
			marks, total := marksOf(c.marks)
			s := api.HistorySettings{MaxAgeSeconds: 90 * 24 * 3600, MaxBytes: c.most}
			p := decide(marks, total, s, epoch.Add(time.Duration(c.now)*day), c.horizon)
			got := fmt.Sprintf("horizon %d", p.horizon)
			if p.reason != "" {
				got += " " + p.reason
			}
			slices.Sort(p.keys)
			if len(p.keys) > 0 {
				got += ": " + strings.Join(p.keys, " ")
			}
			if got != c.want || p.freed != int64(10*len(p.keys)) {
				t.Errorf("%s, %d bytes, want %s", got, p.freed, c.want)
			}
		})
	}
}

// state is what each object is at a revision, by the marks.
func state(marks []mark, rev uint64) map[int]string {
	out := map[int]string{}
	for _, m := range marks {
		if m.revision <= rev {
			out[m.object] = m.key
			if m.ends {
				delete(out, m.object)
			}
		}
	}
	return out
}

// Whatever is removed: from the horizon on everything is known as before.
func TestFromTheHorizonOnNothingIsLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var marks []mark
		var total int64
		rev := uint64(0)
		for i := range rapid.IntRange(0, 60).Draw(t, "records") {
			rev += rapid.Uint64Range(0, 2).Draw(t, "step")
			m := mark{revision: max(rev, 1), key: fmt.Sprint("k", i), size: rapid.Int64Range(1, 50).Draw(t, "size"), object: rapid.IntRange(0, 8).Draw(t, "object"),
				ends: rapid.IntRange(0, 3).Draw(t, "ends") == 0, time: epoch.Add(time.Duration(rapid.IntRange(-50, 300).Draw(t, "day")) * day)}
			if slices.ContainsFunc(marks, func(o mark) bool { return o.revision == m.revision && o.object == m.object }) {
				continue // an object changes once in a revision
			}
			marks = append(marks, m)
			total += m.size
		}
		old := rapid.Uint64Range(0, rev).Draw(t, "horizon")
		s := api.HistorySettings{MaxAgeSeconds: 90 * 24 * 3600, MaxBytes: api.Size(rapid.Int64Range(1, 2000).Draw(t, "most"))}
		p := decide(marks, total, s, epoch.Add(200*day), old)
		if p.horizon < old {
			t.Fatalf("the horizon went back from %d to %d", old, p.horizon)
		}
		left := slices.DeleteFunc(slices.Clone(marks), func(m mark) bool { return slices.Contains(p.keys, m.key) })
		for at := max(p.horizon, 1); at <= rev; at++ {
			if was, is := state(marks, at), state(left, at); !maps.Equal(was, is) {
				t.Fatalf("horizon %d: at %d the state was %v and is %v", p.horizon, at, was, is)
			}
		}
		if len(left)+len(p.keys) != len(marks) {
			t.Fatalf("%d records, %d removed, %d left", len(marks), len(p.keys), len(left))
		}
		// If it is still too large, there was nothing more to remove.
		if total-p.freed > int64(s.MaxBytes) {
			bare := len(state(marks, rev+1))
			if len(left) != bare {
				t.Fatalf("%d bytes, at most %s, but %d records are left for %d objects", total-p.freed, s.MaxBytes, len(left), bare)
			}
		}
	})
}

func TestTheHistoryOfANewClusterIsComplete(t *testing.T) {
	w := newWorld(t)
	w.begin() // the leader is there before the first objects
	h, _, ok := HorizonOf(w.db.Local())
	if !ok || h.Revision != 0 || h.Reason != ReasonBegun {
		t.Fatalf("%+v, %v", h, ok)
	}
	before := w.db.Local().Revision()
	w.begin()
	if w.db.Local().Revision() != before {
		t.Error("it began twice")
	}
}

func TestTheHistoryBeginsWithWhatThereIs(t *testing.T) {
	w := newWorld(t)
	const many = batch + 50
	for i := range many {
		vm := api.VM{Meta: api.NewMeta(api.KindVM, "", fmt.Sprintf("vm%d", i)), Spec: api.VMSpec{CPUs: 1 + i}}
		b, err := vm.EncodeSpec()
		if err != nil {
			t.Fatal(err)
		}
		w.put(configdb.VMs.SpecKey(vm.Meta.ID), b)
	}
	was := w.db.Local().Revision()
	w.begin()
	v := w.db.Local()
	h, _, ok := HorizonOf(v)
	if !ok || h.Revision <= was {
		t.Fatalf("the horizon is %+v, %v; before it, at %d, deleted objects are not known", h, ok, was)
	}
	at := At(v, all(), h.Revision)
	for o, p := range at {
		r, err := p.Record()
		e, _ := v.Get(configdb.VMs.SpecKey(o.ID))
		if err != nil || r.Op != configdb.HistoryFound || string(r.Spec) != string(e.Value) || r.Since != e.Revision || !strings.HasPrefix(r.Name, "vm") || r.Project != "default" {
			t.Fatalf("%+v: %+v, %v", o, r, err)
		}
	}
	if len(at) != many {
		t.Errorf("%d objects, want %d", len(at), many)
	}
	if err := Check(v, "at", h.Revision-1); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), fmt.Sprint(h.Revision)) {
		t.Errorf("before the horizon: %v", err)
	}
}

// A node of an older version writes without a record.
func TestWhatWasNotRecordedIsNoticed(t *testing.T) {
	w := newWorld(t)
	w.begin()
	vm, r1 := create(w, configdb.VMs, "a", api.VMSpec{})
	gone, _ := create(w, configdb.VMs, "b", api.VMSpec{})
	vm.Spec.CPUs = 9
	b, err := vm.EncodeSpec()
	if err != nil {
		t.Fatal(err)
	}
	changed := w.put(configdb.VMs.SpecKey(vm.Meta.ID), b)
	w.put(configdb.VMs.SpecKey(gone.Meta.ID), nil)
	w.put("other", []byte("x"))
	w.begin()
	v := w.db.Local()
	if h, _, _ := HorizonOf(v); h.Revision != 0 {
		t.Errorf("the horizon moved to %d", h.Revision)
	}
	for rev, want := range map[uint64]string{
		r1: "vm/a cpus=1", changed: "vm/a cpus=9 vm/b cpus=1", v.Revision(): "vm/a cpus=9 vm/b gone",
	} {
		if got := strings.Join(specs(t, v, rev), " "); got != want {
			t.Errorf("at %d: %s, want %s", rev, got, want)
		}
	}
	if got := logged(t, v, Query{Selection: only(api.KindVM, "b"), Limit: 9}); len(got) != 2 || !strings.Contains(got[0], "gone vm/b") {
		t.Errorf("%v", got)
	}
	before := v.Revision()
	w.begin()
	if w.db.Local().Revision() != before {
		t.Error("it was noticed twice")
	}
}

// setRetention writes settings into the cluster object, which it makes.
func (w *world) setRetention(s api.HistorySettings) {
	w.t.Helper()
	c, err := Cluster(w.db.Local())
	if err != nil {
		c, _ = create(w, configdb.Clusters, "prod", api.ClusterSpec{FeatureLevel: 2})
	}
	c.Spec.History = s
	update(w, configdb.Clusters, &c)
}

func TestRemovalKeepsWhatTheSettingsSay(t *testing.T) {
	w := newWorld(t)
	w.begin()
	w.setRetention(api.HistorySettings{MaxAgeSeconds: int64((10 * day).Seconds()), MaxBytes: api.MiB})
	vm, _ := create(w, configdb.VMs, "a", api.VMSpec{})
	for i := range 2*batch + 10 {
		vm.Spec.CPUs = 2 + i%100
		update(w, configdb.VMs, &vm)
	}
	last := vm.Meta.Revision
	w.clock = w.clock.Add(9 * day)
	vm.Spec.CPUs = 200
	young := update(w, configdb.VMs, &vm)
	w.begin()
	if n := Usage(w.db.Local()).Records; n < 2*batch {
		t.Fatalf("%d records are left before their time", n)
	}
	w.clock = w.clock.Add(2 * day)
	w.begin()
	v := w.db.Local()
	u := Usage(v)
	if u.Horizon != last || u.HorizonReason != ReasonAge || u.Records != 3 { // cluster, the VM at the horizon, and now
		t.Errorf("%+v, want the horizon %d", u, last)
	}
	if err := Check(v, "at", last-1); !strings.Contains(fmt.Sprint(err), fmt.Sprintf("from revision %d on", last)) {
		t.Error(err)
	}
	d, err := Diff(v, all(), last, young)
	if err != nil || len(d) != 1 || d[0].Name != "a" {
		t.Errorf("the difference since the horizon: %+v, %v", d, err)
	}
}

func TestADeposedLeaderRemovesNothing(t *testing.T) {
	w := newWorld(t)
	w.begin()
	w.setRetention(api.HistorySettings{MaxAgeSeconds: 3600, MaxBytes: api.MiB})
	vm, _ := create(w, configdb.VMs, "a", api.VMSpec{})
	vm.Spec.CPUs = 2
	update(w, configdb.VMs, &vm)
	w.clock = w.clock.Add(day)
	w.db.SetTerm(2)
	before := Usage(w.db.Local())
	if _, _, err := w.service().keep(context.Background(), 1); !errors.Is(err, configdb.ErrConflict) {
		t.Errorf("in a term that is over: %v", err)
	}
	if after := Usage(w.db.Local()); after.Records != before.Records || after.Horizon != before.Horizon {
		t.Errorf("%+v became %+v", before, after)
	}
}

// The service counts what is recorded and acts when it is too much, or too old,
// or when the settings change. Otherwise it writes nothing.
func TestService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.clock = time.Now()
		s := w.service()
		s.cfg.Now = time.Now
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error)
		go func() { done <- s.Run(ctx, 1) }()
		pass := func(d time.Duration) {
			time.Sleep(d) // of the bubble
			synctest.Wait()
			w.clock = time.Now()
		}
		pass(time.Second)
		w.setRetention(api.HistorySettings{MaxAgeSeconds: int64((10 * day).Seconds()), MaxBytes: api.MiB})
		pass(5 * time.Minute)
		idle := w.db.Local().Revision()
		pass(3 * time.Hour)
		if now := w.db.Local().Revision(); now != idle {
			t.Errorf("an idle cluster wrote up to revision %d, from %d", now, idle)
		}
		user, _ := create(w, configdb.Users, "ann", api.UserSpec{})
		for range 30 {
			noise := make([]byte, 50_000)
			for j := range noise {
				noise[j] = byte(rand.IntN(256))
			}
			user.Spec.FullName = hex.EncodeToString(noise)
			update(w, configdb.Users, &user)
		}
		if large := Usage(w.db.Local()); large.Bytes < 2*api.MiB {
			t.Fatalf("only %s were recorded", large.Bytes)
		}
		pass(2 * time.Minute)
		if u := Usage(w.db.Local()); u.Bytes > api.MiB || u.Bytes < api.MiB/2 || u.HorizonReason != ReasonSize {
			t.Errorf("%+v", u)
		}
		user.Spec.FullName = "Ann"
		update(w, configdb.Users, &user)
		pass(time.Minute)
		pass(2*time.Hour + 50*time.Minute)
		// Shorter: at once, not when the next survey is due.
		w.setRetention(api.HistorySettings{MaxAgeSeconds: 3600, MaxBytes: api.MiB})
		pass(2 * time.Minute)
		if u := Usage(w.db.Local()); u.HorizonReason != ReasonAge || u.Records > 4 {
			t.Errorf("after the age was shortened: %+v", u)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestUsageAndSettings(t *testing.T) {
	w := newWorld(t)
	if s := Settings(w.db.Local()); s.MaxAgeSeconds != api.DefaultHistorySeconds || s.MaxBytes != api.DefaultHistoryBytes {
		t.Errorf("without a cluster object: %+v", s)
	}
	if _, err := Cluster(w.db.Local()); err == nil {
		t.Error("there is a cluster object")
	}
	w.setRetention(api.HistorySettings{MaxAgeSeconds: 7200})
	if s := Settings(w.db.Local()); s.MaxAgeSeconds != 7200 || s.MaxBytes != api.DefaultHistoryBytes {
		t.Errorf("%+v", s)
	}
	w.clock = w.clock.Add(time.Hour)
	create(w, configdb.VMs, "a", api.VMSpec{})
	u := Usage(w.db.Local())
	var want api.Size
	for e := range w.db.Local().Scan(configdb.HistoryRoot, "") {
		want += api.Size(len(e.Key) + len(e.Value))
	}
	if u.Records != 3 || u.Bytes != want || !u.Oldest.Equal(w.clock.Add(-time.Hour)) {
		t.Errorf("%+v, want %d bytes", u, want)
	}
}
