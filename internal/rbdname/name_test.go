// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rbdname

import (
	"reflect"
	"testing"
)

func TestNamesComeBackAsTheyWere(t *testing.T) {
	for _, n := range []Name{
		{Monitors: []string{"10.0.0.1:3300"}, User: "muster", Key: "k1", Pool: "vms", Image: "volume-1"},
		{Monitors: []string{"[fd00::1]:3300", "mon2.example.org:6789"}, User: "m.u-s", Key: "k", Pool: ".p", Namespace: "ns", Image: "image-1", Snapshot: "muster"},
	} {
		got, err := Parse(n.String())
		if err != nil || !reflect.DeepEqual(got, n) {
			t.Errorf("%s came back as %+v, %v", n, got, err)
		}
	}
	for _, s := range []string{"", "/srv/file", "rbd://", "rbd://u@h/p/n/i#k", "rbd://u@h:1/p/i#k", "rbd://u@h:1/p//#k", "rbd://u@h:1//n/i#k", "rbd://u@h:1/p/n/i"} {
		if n, err := Parse(s); err == nil {
			t.Errorf("%q was taken for %+v", s, n)
		}
	}
}

func TestWhatQEMUTellsIsRecognized(t *testing.T) {
	path := Name{Monitors: []string{"h:3300"}, User: "u", Key: "k", Pool: "p", Image: "i"}.String()
	for file, want := range map[string]bool{
		`json:{"pool": "p", "image": "i", "server.0.host": "h", "driver": "rbd", "user": "other"}`: true,
		`json:{"pool": "p", "namespace": "n", "image": "i", "driver": "rbd"}`:                      false,
		`json:{"pool": "p", "image": "i2", "driver": "rbd"}`:                                       false,
		`json:{"pool": "p", "image": "i", "driver": "file"}`:                                       false,
		`json:{"pool": "p", "image": "i", "snapshot": "s", "driver": "rbd"}`:                       false,
		`json:{`: false, "/srv/i": false, "": false,
	} {
		if got := Same(file, path); got != want {
			t.Errorf("Same(%s) = %v, want %v", file, got, want)
		}
	}
	if !Same("/srv/a", "/srv/a") || Same("/srv/a", "/srv/b") {
		t.Error("plain files are compared wrongly")
	}
}
