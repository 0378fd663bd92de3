// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// said is what a guest prints from one number to another.
func said(boot, from, to int) []byte {
	var b strings.Builder
	for n := from; n <= to; n++ {
		fmt.Fprintf(&b, "muster-guest name=g1 boot=%d counter=%d\r\n", boot, n)
	}
	return []byte(b.String())
}

func TestWhatAGuestSaysIsChecked(t *testing.T) {
	for name, c := range map[string]struct {
		then  []byte
		wrong bool
	}{
		"counts on":                    {said(1, 1254, 1260), false},
		"the next boot":                {said(2, 1254, 1260), false},
		"a character was doubled":      {[]byte("muster-guest name=g1 boot=1 counter=12533\r\n"), false},
		"doubled, and then boots":      {append([]byte("muster-guest name=g1 boot=1 counter=12533\r\n"), said(2, 1254, 1260)...), false},
		"a boot was misread":           {append([]byte("muster-guest name=g1 boot=11 counter=1254\r\n"), said(2, 1255, 1260)...), false},
		"a written number is lost":     {said(2, 1253, 1253), true},
		"an earlier boot writes, too":  {append(said(2, 1254, 1256), said(1, 1254, 1255)...), true},
		"boots with numbers of before": {said(2, 1000, 1001), true},
	} {
		t.Run(name, func(t *testing.T) {
			g := &guest{name: "g1"}
			if w := g.hear(said(1, 1241, 1253), time.Minute); w != nil {
				t.Fatal(w)
			}
			if w := g.hear(c.then, time.Minute+3*time.Second); (w != nil) != c.wrong {
				t.Errorf("%v", w)
			}
		})
	}
}
