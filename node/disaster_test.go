// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/backupfile"
)

// path is a file of the test.
func (f *flock) path(name string) string { return filepath.Join(f.dir, name) }

func (f *flock) read(path string) []byte {
	f.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *flock) write(name string, b []byte) string {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), b, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

func (h *host) status() (s api.ClusterStatus) {
	h.f.t.Helper()
	h.f.decode(h.run("cluster", "status", "--data-dir", h.dataDir, "-o", "json"), &s)
	return s
}

// follower returns a node that does not lead.
func (f *flock) follower() *host {
	f.t.Helper()
	var out *host
	f.eventually(60*time.Second, "a leader is known", func() error {
		leader := f.nodes[0].status().Leader
		for _, h := range f.nodes {
			if leader != "" && h.name != leader {
				out = h
				return nil
			}
		}
		return fmt.Errorf("leader %q", leader)
	})
	return out
}

// joins lets a host into the cluster of another one and waits until it is ready.
func (h *host) joins(at *host) {
	h.f.t.Helper()
	h.run("cluster", "join", strings.TrimSpace(at.run("cluster", "token", "create", "--data-dir", at.dataDir)), "--data-dir", h.dataDir)
	h.f.eventually(60*time.Second, h.name+" is ready", func() error {
		var n api.Node
		h.f.decode(at.run("node", "show", h.name, "-o", "json", "--data-dir", at.dataDir), &n)
		if n.Status.Phase != api.NodeReady {
			return fmt.Errorf("%s", n.Status.Phase)
		}
		return nil
	})
}

// musterd runs the daemon's program for something else than a daemon.
func (h *host) musterd(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(binDir, "musterd"), append(args, "--data-dir", h.dataDir, "--run-dir", h.runDir, "--listen", h.addr, "--node-name", h.name)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h *host) endsSaying(words string) {
	h.f.t.Helper()
	select {
	case <-h.exited:
		if !strings.Contains(h.log(), words) {
			h.f.t.Errorf("%s ended without %q:\n%s", h.name, words, h.log())
		}
	case <-time.After(60 * time.Second):
		h.f.t.Errorf("%s goes on, want an end with %q", h.name, words)
	}
}

// leaderless waits until there is no leader, and none comes: who was elected just
// before the others went leads until it misses them.
func (h *host) leaderless() {
	h.f.t.Helper()
	var since time.Time
	h.f.eventually(60*time.Second, h.name+" knows no leader", func() error {
		if l := h.status().Leader; l != "" {
			since = time.Time{}
			return fmt.Errorf("it follows %s", l)
		}
		if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) < 3*time.Second {
			return errors.New("one may come yet")
		}
		return nil
	})
}

func TestABackupOfAFollowerFoundsAnotherCluster(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	f.nodes[0].run("receiver", "create", "hook", "--type", "webhook", "--address", "https://hooks.example.org/SECRET-IN-ADDRESS", "--secret", "SECRET-OF-HOOK")
	f.nodes[0].run("vm", "create", "runs", "--memory", "64M", "--disk", "64M", "--ha", "restart", "--start")
	f.nodes[0].run("vm", "create", "halted", "--memory", "64M", "--disk", "64M")
	f.nodes[0].run("raw", "put", "notes/free", "kept")
	b := f.follower()
	file := f.path("prod.backup")
	phrase := f.write("phrase.txt", []byte("correct horse battery staple\n"))
	b.run("cluster", "backup", file, "--passphrase-file", phrase)
	plain := f.path("plain.backup")
	b.run("cluster", "backup", plain)
	f.nodes[0].run("raw", "put", "notes/free", "changed after the backup")
	key := f.write("cluster.key", f.read(filepath.Join(b.dataDir, "cluster.key")))
	var h backupfile.Header
	f.decode(b.run("cluster", "backup", "verify", file, "-o", "json"), &h)
	if h.Cluster != "test" || h.Node != b.name || h.Objects[api.KindVM] != 2 || h.Objects[api.KindNode] != 3 || h.Stale {
		t.Errorf("header %+v", h)
	}
	for _, path := range []string{file, plain} {
		for _, secret := range []string{"SECRET-IN-ADDRESS", "SECRET-OF-HOOK", "correct horse", "PRIVATE KEY", f.token, string(f.read(key)), "notes/free"} {
			if bytes.Contains(f.read(path), []byte(secret)) {
				t.Errorf("%s holds %q in clear", path, secret)
			}
		}
	}

	// A host of another name, on which everything that is wrong is refused.
	fresh := f.add("fresh")
	fresh.start()
	nothing := func(what string) {
		t.Helper()
		for _, name := range []string{"node.json", "cluster.key", "configdb", "founding"} {
			if _, err := os.Stat(filepath.Join(fresh.dataDir, name)); err == nil {
				t.Errorf("%s: %s is left", what, name)
			}
		}
	}
	refuse := func(what string, code int, words string, args ...string) {
		t.Helper()
		fresh.refuse(code, words, append(append([]string{"cluster", "restore"}, args...), "--data-dir", fresh.dataDir)...)
		nothing(what)
	}
	whole := f.read(file)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	later := bytes.Clone(whole)
	later[7] = 9
	refuse("no key", 2, "--passphrase-file", file)
	refuse("no key", 2, "--cluster-key-file", plain)
	refuse("wrong phrase", 2, "the pass phrase is wrong", file, "--passphrase-file", f.write("wrong.txt", []byte("another long phrase")))
	refuse("wrong key", 2, "needs the cluster key", plain, "--cluster-key-file", f.write("wrong.key", make([]byte, 32)))
	refuse("no such file", 2, "no such file", f.path("nowhere"), "--cluster-key-file", key)
	refuse("damaged", 1, "its checksum does not match", f.write("flipped", flipped), "--passphrase-file", phrase)
	refuse("cut", 1, "ends too early", f.write("cut", whole[:len(whole)-40]), "--passphrase-file", phrase)
	refuse("newer", 1, "newer version", f.write("later", later), "--passphrase-file", phrase)
	refuse("no backup", 2, "no backup", phrase, "--passphrase-file", phrase)
	refuse("unknown node", 2, "no node of the cluster in the backup", file, "--passphrase-file", phrase, "--yes-i-have-switched-off", "n7")
	b.refuse(4, "already", "cluster", "restore", file, "--passphrase-file", phrase, "--data-dir", b.dataDir)

	var r api.RestoreResult
	f.decode(fresh.run("cluster", "restore", file, "--passphrase-file", phrase, "--data-dir", fresh.dataDir, "-o", "json"), &r)
	if r.Cluster != "test" || r.ClusterID == h.ClusterID || r.From.ClusterID != h.ClusterID || r.TakenOver != 0 || len(r.Waiting) != 3 {
		t.Errorf("restored %+v", r)
	}
	other := &flock{t: t, dir: f.dir, token: r.Token, ca: f.write("new.crt", []byte(r.CACert))}
	fresh.f = other
	if got := fresh.run("raw", "get", "notes/free"); got != "kept" {
		t.Errorf("the note is %q", got)
	}
	if s := fresh.status(); s.Life != 2 || len(s.Members) != 1 || s.Leader != "fresh" {
		t.Errorf("status %+v", s)
	}
	// The old cluster lives. Not one of its VMs may be started here.
	for _, name := range []string{"runs", "halted"} {
		vm := fresh.vm(name)
		if vm.Status.Phase != api.VMUnknown || !strings.Contains(vm.Status.Message, "muster node remove") {
			t.Errorf("%s is %+v", name, vm.Status)
		}
	}
	fresh.refuse(4, "has not said that vm halted is stopped", "vm", "start", "halted")
	if s := f.nodes[0].vm("runs").Status; s.Phase != api.VMRunning {
		t.Errorf("in the old cluster: %+v", s)
	}
	old := fresh.try("node", "ls", "--token", f.token)
	if old.code != 4 {
		t.Errorf("a token of the old cluster: exit %d, %s", old.code, old.stderr)
	}
	if r := f.nodes[0].try("node", "ls", "--server", "https://"+fresh.addr); r.code == 0 {
		t.Error("the authority of the old cluster is believed")
	}
	// The word about a host sets its VMs free, stopped.
	at := fresh.vm("halted").Status.Node
	fresh.refuse(4, "switched off", "node", "remove", at)
	for _, n := range []string{"n1", "n2"} {
		fresh.run("node", "remove", n, "--force")
	}
	for _, name := range []string{"runs", "halted"} { // the old cluster may have moved them there
		if vm := fresh.vm(name); vm.Status.Phase != api.VMUnknown || vm.Status.Node != "n3" {
			t.Errorf("%s: %+v", name, vm.Status)
		}
	}
	fresh.refuse(4, "has not said that vm halted is stopped", "vm", "start", "halted")
	fresh.run("node", "remove", "n3", "--force")
	for _, name := range []string{"runs", "halted"} {
		if vm := fresh.vm(name); vm.Status.Phase != api.VMStopped || vm.Status.Node != "fresh" || vm.Spec.Power != api.PowerStopped {
			t.Errorf("%s: %+v %+v", name, vm.Spec, vm.Status)
		}
	}
	second := f.add("second")
	second.f = other
	second.start()
	second.joins(fresh)
	if out := second.run("receiver", "show", "hook", "-o", "json"); !strings.Contains(out, "SECRET-IN-ADDRESS") {
		t.Errorf("the receiver: %s", out)
	}
	// And once more from its own files, then into yet another cluster, at once.
	fresh.stop()
	fresh.start()
	if got := fresh.run("raw", "get", "notes/free"); got != "kept" {
		t.Errorf("after a restart: %q", got)
	}
	n1 := f.add("n1")
	n1.dataDir, n1.runDir = n1.dataDir+"-b", n1.runDir+"-b"
	n1.start()
	n1.refuse(4, "has a node n1, as this host is called", "cluster", "restore", plain, "--cluster-key-file", key, "--data-dir", n1.dataDir)
	r = api.RestoreResult{}
	f.decode(n1.run("cluster", "restore", plain, "--cluster-key-file", key, "--data-dir", n1.dataDir, "--name", "third", "--yes-i-have-switched-off", "n1,n2,n3", "-o", "json"), &r)
	if r.Cluster != "third" || r.TakenOver != 2 || len(r.Waiting) != 0 {
		t.Errorf("restored at once: %+v", r)
	}
	var vm api.VM
	f.decode(n1.run("vm", "show", "runs", "-o", "json", "--data-dir", n1.dataDir), &vm)
	if vm.Status.Phase != api.VMStopped || vm.Status.Node != "n1" {
		t.Errorf("%+v", vm.Status)
	}
}

func TestANodeKeepsBackupsByItself(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	f.up()
	a := f.nodes[0]
	a.run("cluster", "set", "--backup-every", "1m", "--backup-keep", "2")
	for _, h := range f.nodes { // the spread of the new interval counts from a start
		h.stop()
		h.start()
	}
	var list struct {
		Nodes []api.LocalBackups `json:"nodes"`
	}
	f.eventually(60*time.Second, "every node has a backup", func() error {
		r := a.try("cluster", "backup", "ls", "-o", "json")
		if r.code != 0 {
			return fmt.Errorf("exit %d: %s", r.code, r.stderr)
		}
		f.decode(r.stdout, &list)
		for _, n := range list.Nodes {
			if len(n.Items) == 0 {
				return fmt.Errorf("%s has none", n.Node)
			}
		}
		if len(list.Nodes) != 2 {
			return fmt.Errorf("%d nodes answer", len(list.Nodes))
		}
		return nil
	})
	for _, n := range list.Nodes {
		h := f.byName(n.Node)
		path := filepath.Join(n.Directory, n.Items[0].File)
		out := h.run("cluster", "backup", "verify", path, "--cluster-key-file", filepath.Join(h.dataDir, "cluster.key"))
		if !strings.Contains(out, "Opens:        yes") {
			t.Errorf("%s: %s", path, out)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

func TestOneOfThreeIsRecovered(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	for _, h := range []*host{a, c} {
		a.run("node", "maintenance", "on", h.name)
	}
	a.run("vm", "create", "loner", "--memory", "64M", "--disk", "64M", "--start") // on n2
	for _, h := range []*host{a, c} {
		a.run("node", "maintenance", "off", h.name)
	}
	if at := a.vm("loner").Status.Node; at != "n2" {
		t.Fatalf("the vm is on %s", at)
	}
	a.run("raw", "put", "notes/free", "old life")
	oldToken := f.joinToken(a)
	const flag = "--yes-i-have-switched-off"
	rescue := func(h *host, args ...string) []string {
		return append([]string{"cluster", "recover", "--data-dir", h.dataDir}, args...)
	}
	a.refuse(4, "leads the cluster: it has its quorum", rescue(a, flag, "n2,n3")...)
	c.end()
	f.eventually(60*time.Second, "two of three are a quorum", func() error {
		if r := a.try("raw", "put", "x", "y"); r.code != 0 {
			return fmt.Errorf("%s", r.stderr)
		}
		return nil
	})
	f.eventually(60*time.Second, "two of three need no recovery", func() error { // nor is there one while they elect
		if r := a.try(rescue(a, flag, "n2,n3")...); r.code != 4 || !strings.Contains(r.stderr, "it has its quorum") {
			return fmt.Errorf("exit %d: %s", r.code, r.stderr)
		}
		return nil
	})
	b.end()
	a.leaderless()
	// The survivor was switched off, too: it knows what it has only from its log.
	a.stop()
	a.start()
	var plan api.RecoveryPlan
	f.eventually(60*time.Second, "the plan has no leader", func() error {
		r := a.try(rescue(a, "-o", "json")...)
		if r.code != 4 || r.stdout == "" {
			return fmt.Errorf("exit %d, %s", r.code, r.stderr)
		}
		f.decode(r.stdout, &plan)
		if plan.Refused != "" {
			return fmt.Errorf("%s", plan.Refused)
		}
		return nil
	})
	if len(plan.Others) != 2 || plan.Others[0].Node != "n2" || plan.Others[0].VMs != 1 || plan.Others[1].Node != "n3" || plan.Others[0].Answers || plan.LastIndex == 0 || plan.WrittenAt.IsZero() {
		t.Errorf("plan %+v", plan)
	}
	// Without a quorum: a backup only when asked for what is here.
	a.refuse(5, "stale", "cluster", "backup", f.path("none"), "--data-dir", a.dataDir)
	a.run("cluster", "backup", f.path("survivor.backup"), "--stale", "--data-dir", a.dataDir)
	a.refuse(4, "needs a person's word", rescue(a)...)
	a.refuse(2, "lacks n3", rescue(a, flag, "n2")...)
	a.refuse(2, `"n9" is no other node`, rescue(a, flag, "n2,n3,n9")...)
	if s := a.status(); s.Life != 1 || len(s.Members) != 3 {
		t.Fatalf("a refused recovery changed something: %+v", s)
	}

	out := a.run(rescue(a, flag, "n3,n2")...)
	if !strings.Contains(out, "life 2 with node n1 alone") || !strings.Contains(out, "taken over, stopped: loner") {
		t.Errorf("it says %s", out)
	}
	if s := a.status(); s.Life != 2 || len(s.Members) != 1 || s.Leader != "n1" || !s.Quorum {
		t.Errorf("status %+v", s)
	}
	a.run("raw", "put", "notes/new", "new life") // with the same token and authority
	if got := a.run("raw", "get", "notes/free"); got != "old life" {
		t.Errorf("the note is %q", got)
	}
	vm := a.vm("loner")
	if vm.Status.Phase != api.VMStopped || vm.Status.Node != "n1" || vm.Spec.Power != api.PowerStopped {
		t.Errorf("the vm: %+v %+v", vm.Spec, vm.Status)
	}
	if got := a.run("node", "ls", "-o", "name"); got != "node/n1\n" {
		t.Errorf("nodes: %s", got)
	}
	if kept, _ := filepath.Glob(filepath.Join(a.dataDir, "backups", "*.before-life-2.backup")); len(kept) != 1 {
		t.Errorf("the state before is not kept: %v", kept)
	}
	if out := a.run("event", "ls"); !strings.Contains(out, "cluster.recovered") {
		t.Errorf("events: %s", out)
	}
	a.refuse(4, "it has its quorum", rescue(a, flag, "n2,n3")...)

	t.Run("an old node that comes back is refused by name and ends", func(t *testing.T) {
		c.spawn()
		c.endsSaying("was removed from cluster test")
		if !strings.Contains(c.log(), "musterd forget") {
			t.Errorf("it does not say what to do:\n%s", c.log())
		}
		if s := a.status(); s.Life != 2 || len(s.Members) != 1 {
			t.Errorf("status %+v", s)
		}
	})
	t.Run("it is cleared and joins again", func(t *testing.T) {
		if out, err := c.musterd("forget"); err == nil || !strings.Contains(out, "--cluster test") {
			t.Errorf("without the name: %v, %s", err, out)
		}
		if out, err := a.musterd("forget", "--cluster", "test"); err == nil || !strings.Contains(out, "another musterd is running") {
			t.Errorf("of a daemon that runs: %v, %s", err, out)
		}
		if out, err := c.musterd("forget", "--cluster", "test"); err != nil {
			t.Fatalf("%v, %s", err, out)
		}
		if _, err := os.Stat(filepath.Join(c.dataDir, "pool")); err != nil {
			t.Error("the disks are gone")
		}
		c.start()
		c.refuse(4, "not known", "cluster", "join", oldToken, "--data-dir", c.dataDir)
		c.joins(a)
		if got := c.run("raw", "get", "notes/new"); got != "new life" {
			t.Errorf("it reads %q", got)
		}
		if s := c.status(); s.Life != 2 || len(s.Members) != 2 {
			t.Errorf("status %+v", s)
		}
		c.stop() // it remembers its life
		c.start()
		a.run("raw", "put", "notes/new", "still")
		f.eventually(60*time.Second, "it follows", func() error {
			if r := c.try("raw", "get", "notes/new"); r.stdout != "still" {
				return fmt.Errorf("%q %s", r.stdout, r.stderr)
			}
			return nil
		})
	})
}

// The two others were only cut off. Together they are the majority of the old
// life: they go on in it and reach the recovered node no more than it does them.
func TestAnOldMajorityComesBack(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	b.kill9()
	c.kill9()
	a.leaderless()
	a.run("cluster", "recover", "--data-dir", a.dataDir, "--yes-i-have-switched-off", "n2,n3")
	a.signal(syscall.SIGSTOP) // still cut off: nobody tells them what they are
	b.spawn()
	c.spawn()
	f.eventually(60*time.Second, "the old majority works", func() error {
		if r := b.try("raw", "put", "k", "old"); r.code != 0 {
			return fmt.Errorf("%s", r.stderr)
		}
		return nil
	})
	a.signal(syscall.SIGCONT)
	a.run("raw", "put", "k", "new")
	for range 5 {
		b.run("raw", "put", "k", "old")
		a.run("raw", "put", "k", "new")
	}
	for h, want := range map[*host]string{a: "new", b: "old", c: "old"} {
		if got := h.run("raw", "get", "k"); got != want {
			t.Errorf("%s reads %q", h.name, got)
		}
	}
	if s := a.status(); s.Life != 2 || s.Leader != "n1" || len(s.Members) != 1 {
		t.Errorf("recovered: %+v", s)
	}
	if s := b.status(); s.Life != 1 || s.Leader == "n1" || s.Leader == "" {
		t.Errorf("old life: %+v", s)
	}
	// One of them alone has no leader; then it asks, and is told.
	b.kill9()
	c.endsSaying("was removed from cluster test")
}

func TestTheNewestSurvivorIsRecovered(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 5)
	f.up()
	older, newer := f.nodes[0], f.nodes[1]
	f.eventually(60*time.Second, "all five vote", func() error {
		n := 0
		for _, m := range newer.status().Members {
			if m.Voter {
				n++
			}
		}
		if n != 5 {
			return fmt.Errorf("%d voters", n)
		}
		return nil
	})
	older.stop()
	f.eventually(60*time.Second, "four of five are a quorum", func() error {
		if r := newer.try("raw", "put", "k", "acknowledged"); r.code != 0 {
			return fmt.Errorf("%s", r.stderr)
		}
		return nil
	})
	for _, h := range f.nodes[2:] {
		h.end()
	}
	newer.leaderless() // a leader would send the other what it lacks
	older.start()
	older.leaderless()
	all := "--yes-i-have-switched-off"
	older.refuse(4, "newer log, which may have what was acknowledged last: n2", "cluster", "recover", "--data-dir", older.dataDir, all, "n2,n3,n4,n5")
	newer.refuse(4, "still answer, none with a newer log: n1", "cluster", "recover", "--data-dir", newer.dataDir, all, "n1,n3,n4,n5")
	older.end()
	newer.run("cluster", "recover", "--data-dir", newer.dataDir, all, "n1,n3,n4,n5")
	if got := newer.run("raw", "get", "k"); got != "acknowledged" {
		t.Errorf("the acknowledged write is %q", got)
	}
}
