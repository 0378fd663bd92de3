// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

func TestRawKeys(t *testing.T) {
	f := newFixture(t)
	wantProblem(t, f.do(call{method: "GET", path: "raw/app/a"}), 404, api.CodeNotFound, "")
	value := []byte{0, 1, 0xff, '\n'}
	a := f.do(call{method: "PUT", path: "raw/app/a", body: value})
	r := want[RawReply](t, a, 201)
	tag := fmt.Sprintf(`"%d"`, r.Revision)
	if r.Key != "app/a" || a.header.Get("ETag") != tag || a.header.Get(headerRevision) != fmt.Sprint(r.Revision) {
		t.Fatalf("%+v %v", r, a.header)
	}
	a = f.do(call{method: "GET", path: "raw/app/a", node: "m2"})
	if a.status != 200 || !bytes.Equal(a.body, value) || a.header.Get("ETag") != tag {
		t.Fatalf("%d %q %v", a.status, a.body, a.header)
	}
	if a := f.do(call{method: "GET", path: "raw/app/a", header: map[string]string{"If-None-Match": tag}}); a.status != 304 {
		t.Errorf("If-None-Match: %d", a.status)
	}
	wantProblem(t, f.do(call{method: "PUT", path: "raw/app/a", body: "x", header: map[string]string{"If-None-Match": "*"}}), 412, api.CodeConflict, "")
	want[RawReply](t, f.do(call{method: "PUT", path: "raw/app/b", body: "x", header: map[string]string{"If-None-Match": "*"}}), 201)
	r = want[RawReply](t, f.do(call{method: "PUT", path: "raw/app/a", body: "2", header: map[string]string{"If-Match": tag}}), 200)
	wantProblem(t, f.do(call{method: "PUT", path: "raw/app/a", body: "3", header: map[string]string{"If-Match": tag}}), 412, api.CodeConflict, "")
	wantProblem(t, f.do(call{method: "DELETE", path: "raw/app/a", header: map[string]string{"If-Match": tag}}), 412, api.CodeConflict, "")
	wantProblem(t, f.do(call{method: "PUT", path: "raw/app/none", body: "3", header: map[string]string{"If-Match": "*"}}), 412, api.CodeConflict, "")
	want[RawReply](t, f.do(call{method: "PUT", path: "raw/app/a", body: "3", header: map[string]string{"If-Match": "*"}}), 200)
	wantProblem(t, f.do(call{method: "PUT", path: "raw/app/a", body: "3", header: map[string]string{"If-None-Match": tag}}), 422, api.CodeInvalid, "If-None-Match")
	wantProblem(t, f.do(call{method: "PUT", path: "raw/app/a", body: "3", header: map[string]string{"If-Match": `W/"3"`}}), 422, api.CodeInvalid, "If-Match")
	if a := f.do(call{method: "DELETE", path: "raw/app/a"}); a.status != 204 || a.header.Get(headerRevision) == "" {
		t.Errorf("DELETE: %d %s", a.status, a.body)
	}
	wantProblem(t, f.do(call{method: "DELETE", path: "raw/app/a"}), 404, api.CodeNotFound, "")
	want[RawReply](t, f.do(call{method: "PUT", path: "raw/empty", body: ""}), 201)
	if a := f.do(call{method: "GET", path: "raw/empty"}); a.status != 200 || len(a.body) != 0 {
		t.Errorf("empty value: %d %q", a.status, a.body)
	}
}

func TestRawKeyMayBeAnyText(t *testing.T) {
	f := newFixture(t)
	for _, key := range []string{"a//b", "../up", "a/../b", "ключ", "with space", "a?b=c", "%", "/slash", "end/"} {
		path := "raw/" + strings.ReplaceAll(url.PathEscape(key), "%2F", "/")
		if r := want[RawReply](t, f.do(call{method: "PUT", path: path, body: key}), 201); r.Key != key {
			t.Errorf("key %q became %q", key, r.Key)
		}
		if a := f.do(call{method: "GET", path: path}); string(a.body) != key {
			t.Errorf("%q: %d %s", key, a.status, a.body)
		}
	}
}

func TestRawGuardsWhatIsTyped(t *testing.T) {
	f := newFixture(t)
	for _, key := range []string{"muster/spec/vm/x", "muster/x", "muster/"} {
		wantProblem(t, f.do(call{method: "PUT", path: "raw/" + key, body: "x"}), 403, api.CodeForbidden, "")
		wantProblem(t, f.do(call{method: "DELETE", path: "raw/" + key}), 403, api.CodeForbidden, "")
	}
	for _, key := range []string{"muster/spec/token/x", "muster/spec/cluster/x", "?prefix=muster/spec/token/", "?prefix=muster/spec/cluster/0"} {
		wantProblem(t, f.do(call{method: "GET", path: "raw/" + key}), 403, api.CodeForbidden, "")
	}
	for _, prefix := range []string{"", "muster/", "muster/spec/", "muster/spec/t"} {
		a := f.do(call{method: "GET", path: "raw/?limit=1000&prefix=" + prefix})
		for _, it := range want[RawList](t, a, 200).Items {
			if secret(it.Key) {
				t.Fatalf("prefix %q shows %s", prefix, it.Key)
			}
		}
	}
	want[RawReply](t, f.do(call{method: "PUT", path: "raw/musterx", body: "x"}), 201)
	wantProblem(t, f.do(call{method: "PUT", path: "raw/", body: "x"}), 422, api.CodeInvalid, "key")
	wantProblem(t, f.do(call{method: "PUT", path: "raw/" + strings.Repeat("k", 513), body: "x"}), 413, api.CodeTooLarge, "")
	wantProblem(t, f.do(call{method: "PUT", path: "raw/k", body: strings.Repeat("v", maxBodyBytes+1)}), 413, api.CodeTooLarge, "")
	want[RawReply](t, f.do(call{method: "PUT", path: "raw/" + strings.Repeat("k", 512), body: strings.Repeat("v", maxBodyBytes)}), 201)
}

func TestRawListPages(t *testing.T) {
	f := newFixture(t)
	for i := range 5 {
		want[RawReply](t, f.do(call{method: "PUT", path: fmt.Sprintf("raw/app/%d", i), body: fmt.Sprint(i)}), 201)
	}
	var got []string
	next := ""
	for range 3 {
		l := want[RawList](t, f.do(call{method: "GET", path: "raw/?prefix=app/&limit=2&continue=" + next}), 200)
		for _, it := range l.Items {
			got = append(got, it.Key+"="+string(it.Value))
		}
		if next = l.Continue; next == "" {
			break
		}
	}
	if strings.Join(got, " ") != "app/0=0 app/1=1 app/2=2 app/3=3 app/4=4" || next != "" {
		t.Errorf("%v, continue %q", got, next)
	}
}
