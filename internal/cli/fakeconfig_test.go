// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/muster-vm/muster/api"
)

// serveConfig answers what is about the history: five changes in pages of two,
// one difference to revision 4 in pages of one, and a revert that goes wrong for
// the object "busy" and takes two parts for a kind.
func (f *fakeCluster) serveConfig(w http.ResponseWriter, r *http.Request, path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := func(v any) { b, _ := json.Marshal(v); f.send(w, http.StatusOK, b) }
	q := r.URL.Query()
	at := func(name string) uint64 { n, _ := strconv.ParseUint(q.Get(name), 10, 64); return n }
	switch r.Method + " " + path {
	case "GET config/log":
		if q.Get("object") == "vm/none" {
			f.fail(w, api.Errorf(api.CodeNotFound, "vm %q is not in the history", "none"))
			return
		}
		reply(fakeLog(int(at("continue")), q.Get("limit")))
	case "GET config/diff":
		if at("at") < 3 {
			f.fail(w, api.Errorf(api.CodeRefused, "the history is complete from revision 3 on (it began there); what was at revision %d is not known", at("at")))
			return
		}
		d := api.ConfigDiff{Kind: "configDiff", At: at("at"), To: max(at("to"), 9), Horizon: 3, Revision: 9, Items: []api.ObjectDiff{
			{Kind: api.KindVM, Name: "web1", Project: "shop", Operation: "update", Changes: fakeChanges()}}}
		switch {
		case at("at") == 9:
			d.Items = nil
		case q.Get("continue") == "":
			d.Continue = "1"
		default:
			d.Items = []api.ObjectDiff{{Kind: api.KindNetwork, Name: "lan\x1b[31m", Project: "default", Operation: "delete", Changes: []api.FieldChange{{Path: "spec.type", Before: json.RawMessage(`"isolated"`)}}}}
		}
		reply(d)
	case "POST config/revert":
		f.fakeRevert(w, r)
	case "PATCH config/retention", "GET config/retention":
		s := api.HistorySettings{}
		if r.Method == http.MethodPatch {
			if err := api.DecodeStrict(r.Body, &s); err != nil {
				f.fail(w, err)
				return
			}
		}
		s.SetDefaults()
		if err := s.Validate(); err != nil {
			f.fail(w, err)
			return
		}
		reply(api.ConfigRetention{Settings: s, Records: 12, Bytes: 3 * api.KiB, Horizon: 3, HorizonReason: "size", HorizonSince: time.Now().Add(-time.Hour), Oldest: time.Now().Add(-48 * time.Hour)})
	default:
		f.fail(w, api.Errorf(api.CodeNotFound, "no such path"))
	}
}

func fakeLog(from int, limit string) api.ConfigLog {
	when := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	all := []api.ConfigChange{
		{Revision: 9, Time: when, Operation: "delete", Actor: "user:ann", Source: "ssh 10.0.0.5", Node: "n2", Kind: api.KindVM, ID: "id1", Name: "web1", Project: "shop"},
		{Revision: 8, Time: when, Operation: "update", Actor: "ci", Source: "api 10.0.0.6", Node: "n1", Note: "revert to 4", Kind: api.KindVM, ID: "id1", Name: "web1", Project: "shop", Fields: []string{"spec.cpus", "spec.ha", "spec.memory", "spec.nics[0].mac", "x"}},
		{Revision: 7, Time: when, Operation: "update", Actor: "hypervisor", Node: "n1", Kind: api.KindVM, ID: "id1", Name: "web1", Project: "shop", Fields: []string{"spec.power"}},
		{Revision: 5, Time: when, Operation: "create", Actor: "local:root", Source: "unix socket", Node: "n1", Kind: api.KindNetwork, ID: "id2", Name: "lan\x1b[2J", Project: "default"},
		{Revision: 3, Time: when, Operation: "found", Actor: "history", Node: "n1", Kind: api.KindNode, ID: "id3", Name: "n1", Project: "default"},
	}
	l := api.ConfigLog{Kind: "configLog", Horizon: 3, Revision: 9}
	most, _ := strconv.Atoi(limit)
	to := min(from+min(2, most), len(all))
	l.Items = all[from:to]
	if to < len(all) {
		l.Continue = strconv.Itoa(to)
	}
	return l
}

func fakeChanges() []api.FieldChange {
	raw := func(s string) json.RawMessage { return json.RawMessage(s) }
	return []api.FieldChange{
		{Path: "meta.labels.env", After: raw(`"prod"`)},
		{Path: "spec.disks[0].size", Before: raw("10737418240")},
		{Path: "spec.memory", Before: raw("536870912"), After: raw("1073741824")},
		{Path: "spec.reboots", Before: raw("1024"), After: raw("2048")},
		{Path: "spec.sealedSecret", Secret: true},
	}
}

func (f *fakeCluster) fakeRevert(w http.ResponseWriter, r *http.Request) {
	var in api.RevertRequest
	if err := api.DecodeStrict(r.Body, &in); err != nil {
		f.fail(w, err)
		return
	}
	out := api.RevertResult{Kind: "configRevert", To: in.To, Plan: "plan1", Parts: 1, Revision: f.rev}
	for _, o := range in.Objects {
		switch o {
		case "vm/web1":
			out.Items = append(out.Items, api.RevertItem{Kind: api.KindVM, ID: "id1", Name: "web1", Project: "shop", Operation: "update", Part: 1, Changes: fakeChanges(), Kept: []string{"spec.power"}})
		case "vm/gone":
			out.Items = append(out.Items, api.RevertItem{Kind: api.KindVM, ID: "id4", Name: "gone", Operation: "create", Part: 1, Changes: fakeChanges()})
			if !in.DryRun {
				out.Items[len(out.Items)-1].Task = "task7"
			}
		case "vm/busy":
			out.Refused++
			out.Items = append(out.Items, api.RevertItem{Kind: api.KindVM, ID: "id5", Name: "busy", Operation: "update", Changes: fakeChanges(), Refused: "vm busy is running; stop the VM first", Code: api.CodeRefused})
		case "network":
			left := 2 - f.parts
			for part := range left {
				out.Items = append(out.Items, api.RevertItem{Kind: api.KindNetwork, ID: "n" + strconv.Itoa(f.parts+part), Name: "lan" + strconv.Itoa(f.parts+part), Operation: "delete", Part: part + 1, Changes: fakeChanges()})
			}
			out.Parts = left
		}
	}
	switch {
	case in.DryRun:
	case in.Plan != "" && in.Plan != "plan1":
		f.fail(w, api.Errorf(api.CodeConflict, "what there is to be done has changed"))
		return
	case out.Refused > 0 && !in.SkipRefused || out.Parts > 1 && !in.Partial:
		f.fail(w, api.Errorf(api.CodeRefused, "the client should have known"))
		return
	default:
		f.rev++
		out.Done, out.Revision = true, f.rev
		if out.Parts > 1 || f.parts > 0 {
			f.parts++
		}
	}
	b, _ := json.Marshal(out)
	f.send(w, http.StatusOK, b)
}
