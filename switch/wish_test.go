// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
)

func TestTagsAreUniqueAndStable(t *testing.T) {
	net := func(id string, typ api.NetworkType, vlan int) api.Network {
		return api.Network{Meta: api.Meta{ID: id, Name: id}, Spec: api.NetworkSpec{Type: typ, VLAN: vlan}}
	}
	rapid.Check(t, func(t *rapid.T) {
		have := map[string]int{}
		var networks []api.Network
		used := map[int]bool{}
		for step := range 20 {
			if len(networks) > 0 && rapid.Bool().Draw(t, "remove") {
				i := rapid.IntRange(0, len(networks)-1).Draw(t, "which")
				delete(used, networks[i].Spec.VLAN)
				networks = append(networks[:i:i], networks[i+1:]...)
			} else {
				vlan := rapid.IntRange(api.MaxVLAN-15, api.MaxVLAN).Draw(t, "vlan")
				typ := rapid.SampledFrom([]api.NetworkType{api.NetworkVLAN, api.NetworkIsolated, api.NetworkVXLAN}).Draw(t, "type")
				if typ != api.NetworkVLAN {
					vlan = 0
				} else if used[vlan] {
					continue
				}
				used[vlan] = true
				networks = append(networks, net(fmt.Sprint("n", step), typ, vlan))
			}
			tags, left := assignTags(have, networks)
			if len(left) > 0 {
				t.Fatalf("no tag for %v", left)
			}
			owner := map[int]string{}
			for _, n := range networks {
				tag := tags[n.Meta.ID]
				if tag < 1 || tag > api.MaxVLAN || owner[tag] != "" {
					t.Fatalf("%s has the tag %d, which %q has", n.Meta.ID, tag, owner[tag])
				}
				owner[tag] = n.Meta.ID
				if n.Spec.Type == api.NetworkVLAN && tag != n.Spec.VLAN {
					t.Fatalf("vlan network %d has the tag %d", n.Spec.VLAN, tag)
				}
			}
			for id, was := range have {
				if now, there := tags[id]; there && now != was && !used[was] {
					t.Fatalf("%s had the tag %d and has %d without need", id, was, now)
				}
			}
			have = tags
		}
	})
}

func TestMoreNetworksThanTagsAreNamed(t *testing.T) {
	var networks []api.Network
	for i := range MaxNetworks + 2 {
		id := fmt.Sprint("n", i)
		networks = append(networks, api.Network{Meta: api.Meta{ID: id, Name: id}, Spec: api.NetworkSpec{Type: api.NetworkIsolated}})
	}
	tags, left := assignTags(nil, networks)
	if len(tags) != MaxNetworks || len(left) != 2 {
		t.Errorf("%d tags, %d left", len(tags), len(left))
	}
}

func TestNamesFitTheKernel(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := api.NewID()
		for nic := range api.MaxNICs {
			name := tapName(id, nic)
			if len(name) > 15 || seen[name] {
				t.Fatalf("%q", name)
			}
			seen[name] = true
		}
	}
	if name := vxlanName(api.MaxVNI); len(name) > 15 {
		t.Fatalf("%q", name)
	}
}

func TestHostAddress(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:7600": "10.0.0.1", "[fd00::1]:7600": "fd00::1", "10.0.0.1": "10.0.0.1",
		"node1.example:7600": "", "0.0.0.0:7600": "", "": "",
	} {
		a, err := hostAddress(in)
		if (err != nil) != (want == "") || err == nil && a.String() != want {
			t.Errorf("%q: %s, %v", in, a, err)
		}
	}
}
