// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"net/http"

	"github.com/muster-vm/muster/api"
)

// serveMove answers POST /vms/{name}/move and /volumes/{name}/move.
func (f *fakeCluster) serveMove(w http.ResponseWriter, r *http.Request, o *fakeObject) {
	var in api.MoveRequest
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		f.fail(w, err)
		return
	}
	if in.Node == "m1" && in.Pool == "" {
		f.fail(w, &api.Error{Code: api.CodeRefused, Field: "node", Detail: o.meta.Name + " is there already"})
		return
	}
	var doc map[string]any
	_ = json.Unmarshal(o.raw, &doc)
	change := map[string]any{"spec": map[string]any{"pool": in.Pool, "node": in.Node}}
	action := api.ActionVolumeMove
	if o.meta.Kind == api.KindVM {
		change, action = map[string]any{"status": map[string]any{"node": in.Node}}, api.ActionVMMove
	}
	b, _ := json.Marshal(merge(doc, change))
	if _, err := f.put(o.meta.Kind, b, o); err != nil {
		f.fail(w, err)
		return
	}
	f.accept(w, action, o)
}
