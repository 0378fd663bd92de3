// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// fakeBackups delivers a content, or breaks off in the middle of it.
type fakeBackups struct {
	db      configdb.DB
	mu      sync.Mutex
	content []byte
	breakAt int
	held    chan struct{} // if set, a delivery says that it begins, and waits
	begun   chan struct{}
	asked   []string
	restore api.RestoreRequest
	recover api.RecoveryRequest
}

func (b *fakeBackups) Prepare(ctx context.Context, stale bool, passphrase string) (uint64, func(io.Writer) error, error) {
	v := b.db.Local()
	if !stale {
		var err error
		if v, err = b.db.View(ctx); err != nil {
			return 0, nil, api.Errorf(api.CodeNoQuorum, "%w", err)
		}
	}
	if passphrase == "short" {
		return 0, nil, api.Invalid("passphrase", "is too short")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, passphrase)
	return v.Revision(), func(w io.Writer) error {
		if b.held != nil {
			b.begun <- struct{}{}
			<-b.held
		}
		if b.breakAt > 0 {
			_, _ = w.Write(b.content[:b.breakAt])
			return errors.New("the disk is broken")
		}
		_, err := w.Write(b.content)
		return err
	}, nil
}

type nodeBackups struct {
	*fakeBackups
	node string
}

func (b nodeBackups) Local() (api.LocalBackups, error) {
	return api.LocalBackups{Node: b.node, Directory: "/d/" + b.node, Items: []api.LocalBackup{{File: b.node + ".backup", Revision: 7}}}, nil
}

func (b *fakeBackups) Restore(_ context.Context, r api.RestoreRequest) (api.RestoreResult, error) {
	b.restore = r
	return api.RestoreResult{InitResult: api.InitResult{Cluster: r.Name, Token: "muster_x"}, TakenOver: 2}, nil
}

func (b *fakeBackups) RecoveryPlan(context.Context) (api.RecoveryPlan, error) {
	return api.RecoveryPlan{Cluster: "c", Node: "m1", Life: 1}, nil
}

func (b *fakeBackups) Recover(_ context.Context, r api.RecoveryRequest) (api.RecoveryResult, error) {
	b.recover = r
	return api.RecoveryResult{Cluster: "c", Life: 2}, nil
}

func TestBackupsAreForAdministrators(t *testing.T) {
	f := newFixture(t)
	for _, c := range []call{
		{method: "GET", path: "cluster/backup"}, {method: "POST", path: "cluster/backup", body: "{}"}, {method: "GET", path: "cluster/backups"},
		{method: "PATCH", path: "cluster/settings", body: `{"backup":{"keep":3}}`},
	} {
		for _, role := range []api.Role{api.RoleViewer, api.RoleOperator} {
			c.role = role
			wantProblem(t, f.do(c), 403, api.CodeForbidden, "")
		}
		c.role, c.token = "", "none"
		wantProblem(t, f.do(c), 401, api.CodeUnauthorized, "")
	}
	for _, c := range []call{
		{method: "POST", path: "cluster/restore", body: "{}"}, {method: "GET", path: "cluster/recover"}, {method: "POST", path: "cluster/recover", body: "{}"},
	} {
		if p := wantProblem(t, f.do(c), 403, api.CodeForbidden, ""); !strings.Contains(p.Detail, "unix socket") {
			t.Errorf("%s %s: %s", c.method, c.path, p.Detail)
		}
	}
	if len(f.backups.asked) != 0 || f.backups.restore.File != "" {
		t.Errorf("carried out: %+v", f.backups)
	}
}

func TestABackupIsStreamed(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "GET", path: "cluster/backup", node: "m2"})
	if a.status != 200 || string(a.body) != "a backup" || a.header.Get("Content-Type") != "application/octet-stream" || a.header.Get(headerRevision) == "" || a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%d %q %v", a.status, a.body, a.header)
	}
	a = f.do(call{method: "POST", path: "cluster/backup", body: api.BackupRequest{Passphrase: "correct horse"}})
	if a.status != 200 || string(a.body) != "a backup" {
		t.Errorf("%d %q", a.status, a.body)
	}
	if got := strings.Join(f.backups.asked, ","); got != ",correct horse" {
		t.Errorf("pass phrases %q", got)
	}
	events := want[List[api.Event]](t, f.do(call{method: "GET", path: "events"}), 200)
	n, told := 0, map[string]bool{}
	for _, e := range events.Items {
		told[e.Spec.Target] = true
		if strings.HasPrefix(e.Spec.Target, "backup") && e.Spec.Actor == "administrator" {
			n++
		}
		if strings.Contains(e.Spec.Message, "horse") || strings.Contains(strings.Join([]string{e.Spec.Details["path"]}, ""), "horse") {
			t.Error("the pass phrase is in an event")
		}
	}
	if n != 2 || !told["backup with the cluster key"] {
		t.Errorf("%d events tell of 2 backups: %+v", n, events.Items)
	}
	wantProblem(t, f.do(call{method: "POST", path: "cluster/backup", body: `{"passphrase":"short"}`}), 422, api.CodeInvalid, "passphrase")
	wantProblem(t, f.do(call{method: "POST", path: "cluster/backup", body: `{"pass":"x"}`}), 422, api.CodeInvalid, "pass")
	wantProblem(t, f.do(call{method: "GET", path: "cluster/backup?consistency=old"}), 422, api.CodeInvalid, "consistency")
}

func TestABackupThatBreaksOffIsNone(t *testing.T) {
	f := newFixture(t)
	f.backups.content, f.backups.breakAt = make([]byte, 1<<20), 600_000
	a, err := f.try(call{method: "GET", path: "cluster/backup"})
	if err == nil {
		t.Errorf("%d bytes came with status %d and no error", len(a.body), a.status)
	}
	f.backups.breakAt = 0
	if a := f.do(call{method: "GET", path: "cluster/backup"}); a.status != 200 || len(a.body) != 1<<20 {
		t.Errorf("the next one: %d, %d bytes", a.status, len(a.body))
	}
}

func TestBackupWithoutAQuorum(t *testing.T) {
	f := newFixture(t)
	f.db.alone.Store(true)
	wantProblem(t, f.do(call{method: "GET", path: "cluster/backup"}), 503, api.CodeNoQuorum, "")
	if a := f.do(call{method: "GET", path: "cluster/backup?consistency=stale"}); a.status != 200 || string(a.body) != "a backup" {
		t.Errorf("stale: %d %s", a.status, a.body)
	}
}

func TestFewBackupsAtATime(t *testing.T) {
	f := newFixture(t)
	f.backups.held, f.backups.begun = make(chan struct{}), make(chan struct{}, maxBackups+1)
	var wg sync.WaitGroup
	for range maxBackups {
		wg.Go(func() {
			if a, err := f.try(call{method: "GET", path: "cluster/backup"}); err != nil || a.status != 200 {
				t.Errorf("%d, %v", a.status, err)
			}
		})
	}
	for range maxBackups {
		<-f.backups.begun
	}
	wantProblem(t, f.do(call{method: "GET", path: "cluster/backup"}), 409, api.CodeRefused, "")
	close(f.backups.held)
	wg.Wait()
	if a := f.do(call{method: "GET", path: "cluster/backup"}); a.status != 200 {
		t.Errorf("afterwards: %d %s", a.status, a.body)
	}
}

func withCluster(f *fixture) {
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "c"), Spec: api.ClusterSpec{Life: 1, FeatureLevel: 2, SealedCAKey: []byte("sealed")}}
	create(f, configdb.Clusters, &c)
}

func TestBackupsOfAllNodes(t *testing.T) {
	f := newFixture(t)
	withCluster(f)
	l := want[BackupList](t, f.do(call{method: "GET", path: "cluster/backups", node: "m2"}), 200)
	if len(l.Nodes) != 2 || l.Nodes[0].Node != "m1" || l.Nodes[1].Node != "m2" || l.Nodes[0].Items[0].File != "m1.backup" || l.Settings.EveryMinutes != 1440 || l.Settings.Keep != 7 {
		t.Errorf("%+v", l)
	}
	if l := want[BackupList](t, f.do(call{method: "GET", path: "cluster/backups?node=m1", node: "m2"}), 200); len(l.Nodes) != 1 || l.Nodes[0].Node != "m1" {
		t.Errorf("%+v", l)
	}
	wantProblem(t, f.do(call{method: "GET", path: "cluster/backups?node=m9"}), 404, api.CodeNotFound, "")
	delete(f.urls, "m2")
	if l := want[BackupList](t, f.do(call{method: "GET", path: "cluster/backups"}), 200); len(l.Nodes) != 1 || l.Unreachable["m2"] == "" {
		t.Errorf("with m2 away: %+v", l)
	}
}

func TestClusterSettings(t *testing.T) {
	f := newFixture(t)
	withCluster(f)
	s := want[api.ClusterSettings](t, f.do(call{method: "GET", path: "cluster/settings", role: api.RoleViewer}), 200)
	if s.Backup != (api.BackupSettings{EveryMinutes: 1440, Keep: 7}) {
		t.Errorf("defaults %+v", s)
	}
	for body, want3 := range map[string]api.BackupSettings{
		`{"backup":{"keep":3}}`:                         {EveryMinutes: 1440, Keep: 3},
		`{"backup":{"keep":4,"everyMinutes":60}}`:       {EveryMinutes: 60, Keep: 4},
		`{"backup":{"disabled":true}}`:                  {EveryMinutes: 1440, Keep: 7, Disabled: true},
		`{"backup":{"disabled":false,"keep":1000}}`:     {EveryMinutes: 1440, Keep: 1000},
		`{"backup":{"everyMinutes":44640,"keep":1000}}`: {EveryMinutes: 44640, Keep: 1000},
	} {
		want[api.ClusterSettings](t, f.do(call{method: "PATCH", path: "cluster/settings", body: `{"backup":{"keep":7,"everyMinutes":1440,"disabled":false}}`}), 200)
		if s := want[api.ClusterSettings](t, f.do(call{method: "PATCH", path: "cluster/settings", body: body, node: "m2"}), 200); s.Backup != want3 {
			t.Errorf("%s gives %+v", body, s)
		}
		if s := want[api.ClusterSettings](t, f.do(call{method: "GET", path: "cluster/settings"}), 200); s.Backup != want3 {
			t.Errorf("%s is stored as %+v", body, s)
		}
	}
	for _, hold := range []bool{true, false} {
		body := fmt.Sprintf(`{"featureLevelHold":%v}`, hold)
		if s := want[api.ClusterSettings](t, f.do(call{method: "PATCH", path: "cluster/settings", body: body}), 200); s.FeatureLevelHold != hold {
			t.Errorf("%s gives %+v", body, s)
		}
		if s := want[api.ClusterSettings](t, f.do(call{method: "GET", path: "cluster/settings", role: api.RoleViewer}), 200); s.FeatureLevelHold != hold {
			t.Errorf("%s is stored as %+v", body, s)
		}
	}
	for body, field := range map[string]string{
		`{"featureLevel":9}`: "featureLevel", `{"featureLevelHold":"yes"}`: "featureLevelHold",
		`{"backup":{"keep":-1}}`: "backup.keep", `{"backup":{"keep":1001}}`: "backup.keep", `{"backup":{"everyMinutes":-5}}`: "backup.everyMinutes",
		`{"backup":{"everyMinutes":44641}}`: "backup.everyMinutes", `{"backup":{"colour":1}}`: "backup.colour", `{"caCert":"x"}`: "caCert",
	} {
		wantProblem(t, f.do(call{method: "PATCH", path: "cluster/settings", body: body}), 422, api.CodeInvalid, field)
	}
	c, err := configdb.Clusters.List(f.db.Local())
	if err != nil || len(c) != 1 || string(c[0].Spec.SealedCAKey) != "sealed" || c[0].Spec.Life != 1 || c[0].Spec.FeatureLevel != 2 {
		t.Errorf("the rest of the cluster: %+v, %v", c, err)
	}
}

func TestRestoreAndRecoverOnTheSocket(t *testing.T) {
	f := newFixture(t)
	local := httptest.NewServer(f.servers["m1"].LocalHandler())
	defer local.Close()
	f.urls["local"] = local.URL
	r := want[api.RestoreResult](t, f.do(call{method: "POST", path: "cluster/restore", node: "local", body: api.RestoreRequest{File: "/b", Name: "again", SwitchedOff: []string{"n1"}}}), 200)
	if r.Cluster != "again" || r.Token != "muster_x" || r.TakenOver != 2 || f.backups.restore.File != "/b" || len(f.backups.restore.SwitchedOff) != 1 {
		t.Errorf("%+v, asked %+v", r, f.backups.restore)
	}
	if p := want[api.RecoveryPlan](t, f.do(call{method: "GET", path: "cluster/recover", node: "local"}), 200); p.Cluster != "c" {
		t.Errorf("%+v", p)
	}
	if r := want[api.RecoveryResult](t, f.do(call{method: "POST", path: "cluster/recover", node: "local", body: api.RecoveryRequest{Cluster: "c", SwitchedOff: []string{"n2"}}}), 202); r.Life != 2 || f.backups.recover.SwitchedOff[0] != "n2" {
		t.Errorf("%+v, asked %+v", r, f.backups.recover)
	}
	f.member.Store(false)
	want[api.RestoreResult](t, f.do(call{method: "POST", path: "cluster/restore", node: "local", body: "{}"}), 200)
	wantProblem(t, f.do(call{method: "GET", path: "cluster/recover", node: "local"}), 503, api.CodeNotMember, "")
}
