// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import "testing"

func TestTheKeyOfACephUserComesFromAKeyringOrAlone(t *testing.T) {
	for text, want := range map[string]string{
		"AQ==\n": "AQ==",
		"[client.muster]\n\tkey = AQ==\n\tcaps mon = \"profile rbd\"\n":     "AQ==",
		"[client.a]\nkey=AQ==\n[client.b]\nkey=Ag==\n":                      "",
		"[client.muster]\n\tcaps mon = \"allow command \\\"key = x\\\"\"\n": "",
	} {
		got, err := cephKey([]byte(text))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q has the key %q, %v; want %q", text, got, err, want)
		}
	}
}
