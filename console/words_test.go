// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"slices"
	"strings"
	"testing"
)

func TestSplit(t *testing.T) {
	for in, want := range map[string][]string{
		"":                           nil,
		"  \t ":                      nil,
		"vm ls":                      {"vm", "ls"},
		"  vm   ls\t-o json ":        {"vm", "ls", "-o", "json"},
		`vm create 'a b' "c d"`:      {"vm", "create", "a b", "c d"},
		`raw put k ''`:               {"raw", "put", "k", ""},
		`a'b'"c"d`:                   {"abcd"},
		`a\ b \"x\" 'it'\''s'`:       {"a b", `"x"`, "it's"},
		`"a \"b\" \\ \n $HOME"`:      {`a "b" \ \n $HOME`},
		`--project * $HOME ~ {a,b}?`: {"--project", "*", "$HOME", "~", "{a,b}?"},
		`'a|b' "c;d" e\&f`:           {"a|b", "c;d", "e&f"},
		"grüße ☕":                    {"grüße", "☕"},
	} {
		if got, err := split(in); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		`vm ls | grep x`: "pipes", "vm ls > f": "pipes", "vm ls; vm ls": "pipes", "a & b": "pipes", "$(x)": "pipes", "`x`": "pipes", "a < b": "pipes",
		`vm ls 'a`: "quotes", `vm ls "a`: "quotes", `vm ls \`: "backslash",
	} {
		if got, err := split(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v; want an error about %s", in, got, err, want)
		}
	}
}

func TestUnfinished(t *testing.T) {
	for in, want := range map[string][]string{"": {""}, "vm": {"vm"}, "vm ": {"vm", ""}, "vm start w": {"vm", "start", "w"}} {
		if got, ok := unfinished(in); !ok || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %t; want %q", in, got, ok, want)
		}
	}
	for _, in := range []string{`vm "a`, `vm a\`, "vm |"} {
		if _, ok := unfinished(in); ok {
			t.Errorf("%q is completed", in)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add(`vm create 'a b' "c\"d" e\ f`)
	f.Fuzz(func(t *testing.T, in string) {
		words, err := split(in)
		if err != nil {
			return
		}
		var quoted []string
		for _, w := range words {
			quoted = append(quoted, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
		}
		again, err := split(strings.Join(quoted, " "))
		if err != nil || !slices.Equal(again, words) {
			t.Errorf("%q: %q, again %q, %v", in, words, again, err)
		}
	})
}
