// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/pki"
)

// fakeKey is the cluster key of the fake cluster.
var fakeKey = bytes.Repeat([]byte("k"), pki.ClusterKeyBytes)

// fakeBackup is a backup of the fake cluster.
func fakeBackup(passphrase string, stale bool) ([]byte, error) {
	h := &backupfile.Header{
		ClusterID: "c-1", Cluster: "prod", Life: 1, Node: "m1", Version: "1.2.3", Time: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC), Revision: 4711, Term: 3,
		Schema: 1, Nodes: []string{"m1", "m2"}, Keys: 9, Bytes: 900, Objects: map[api.Kind]int{api.KindVM: 3, api.KindNode: 2}, Stale: stale, StaleSeconds: 3,
	}
	var err error
	if passphrase != "" {
		if h.Slot, err = backupfile.NewSlot(fakeKey, passphrase); err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	w, err := backupfile.NewWriter(&b, h, fakeKey)
	if err == nil {
		_, err = w.Write(make([]byte, 100_000))
	}
	if err == nil {
		err = w.Close()
	}
	return b.Bytes(), err
}

// serveBackups answers what is about backups and recovery; f.mu is held.
func (f *fakeCluster) serveBackups(w http.ResponseWriter, r *http.Request, node, path string) {
	reply := func(status int, v any) { b, _ := json.Marshal(v); f.send(w, status, b) }
	switch r.Method + " " + path {
	case "GET cluster/backup", "POST cluster/backup":
		f.sendBackup(w, r, node)
	case "GET cluster/backups":
		at := time.Now().Add(-2 * time.Hour)
		reply(200, map[string]any{"settings": api.BackupSettings{EveryMinutes: 60, Keep: 3}, "unreachable": map[string]string{"m3": "no answer"}, "nodes": []api.LocalBackups{
			{Node: "m1", Directory: "/d", Items: []api.LocalBackup{{File: "old.backup", Size: 1 << 20, Time: at.Add(-time.Hour), Revision: 5, Life: 1}, {File: "new.backup", Time: at, Revision: 7, Life: 1}, {File: "bad.backup", Time: at, Error: "damaged"}}},
			{Node: "m2", Items: []api.LocalBackup{}, LastError: "the disk is full"},
		}})
	case "PATCH cluster/settings":
		s := api.ClusterSettings{Backup: api.BackupSettings{EveryMinutes: 1440, Keep: 7}}
		if err := api.DecodeStrict(r.Body, &s); err != nil {
			f.fail(w, err)
			return
		}
		reply(200, s)
	case "POST cluster/restore":
		var in api.RestoreRequest
		if err := api.DecodeStrict(r.Body, &in); err != nil {
			f.fail(w, err)
			return
		}
		if !bytes.Equal(in.ClusterKey, fakeKey) && in.Passphrase != "correct horse battery" {
			f.fail(w, api.Errorf(api.CodeInvalid, "the backup does not open: wrong key"))
			return
		}
		out := api.RestoreResult{InitResult: api.InitResult{Cluster: first(in.Name, "prod"), Node: "m9", Address: "10.0.0.9:7600", Token: "muster_01_again"}, TakenOver: 2 * len(in.SwitchedOff), Waiting: map[string]int{}}
		for _, n := range []string{"m1", "m2"} {
			if !slices.Contains(in.SwitchedOff, n) {
				out.Waiting[n] = 2
			}
		}
		reply(200, out)
	case "GET cluster/recover":
		reply(200, f.plan(node))
	case "POST cluster/recover":
		f.recover(w, r)
	default:
		f.fail(w, api.Errorf(api.CodeNotFound, "no such path"))
	}
}

func (f *fakeCluster) sendBackup(w http.ResponseWriter, r *http.Request, node string) {
	var in api.BackupRequest
	if r.Method == http.MethodPost {
		if err := api.DecodeStrict(r.Body, &in); err != nil {
			f.fail(w, err)
			return
		}
	}
	stale := r.URL.Query().Get("consistency") == "stale"
	if f.mode[node] == "alone" && !stale {
		f.fail(w, api.Errorf(api.CodeNoQuorum, "no quorum"))
		return
	}
	b, err := fakeBackup(in.Passphrase, stale)
	if err != nil {
		f.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	switch f.mode[node] {
	case "torn": // the connection breaks off in the middle
		_, _ = w.Write(b[:len(b)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case "flipped":
		b[len(b)/2] ^= 1
	}
	_, _ = w.Write(b)
}

func (f *fakeCluster) plan(string) api.RecoveryPlan {
	now := time.Now()
	p := api.RecoveryPlan{Cluster: "prod", ClusterID: "c-1", Node: "m1", Life: f.life, Revision: 77, LastIndex: 80, LastTerm: 4, WrittenAt: now.Add(-time.Hour), StartedAt: now.Add(-2 * time.Hour),
		Others: []api.RecoveryMember{{NodeID: "i2", Node: "m2", Address: "10.0.0.2:7600", Role: api.RoleVoter, Voter: true, Phase: api.NodeReady, VMs: 3}, {NodeID: "i3", Node: "m3", Voter: true, VMs: 1}}}
	if f.mode["cluster"] == "quorum" {
		p.Refused = "node m2 leads the cluster: it has its quorum, there is nothing to recover"
	}
	return p
}

func (f *fakeCluster) recover(w http.ResponseWriter, r *http.Request) {
	var in api.RecoveryRequest
	if err := api.DecodeStrict(r.Body, &in); err != nil {
		f.fail(w, err)
		return
	}
	if in.Cluster != "prod" || !slices.Equal(in.SwitchedOff, []string{"m2", "m3"}) {
		f.fail(w, api.Invalid("switchedOff", "lacks a node"))
		return
	}
	f.life++
	b, _ := json.Marshal(api.RecoveryResult{Cluster: "prod", Node: "m1", Life: f.life, Removed: in.SwitchedOff, TakenOver: []string{"web1", "db1"}})
	f.send(w, 202, b)
}
