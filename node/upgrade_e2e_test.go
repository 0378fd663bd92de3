// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/version"
)

// oldVersion is what the older build of these tests calls itself.
const oldVersion = "0.0.9"

// oldBuild compiles the programs as they are at feature level 1: they support no
// other, and know neither entries nor snapshots that name one.
func oldBuild(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(binDir, "level1")
	cmd := exec.Command("go", "build", "-tags", "muster_level1", "-ldflags", "-X github.com/muster-vm/muster/internal/version.Version="+oldVersion,
		"-o", dir+"/", "./cmd/musterd", "./cmd/muster-guard")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the older programs: %v\n%s", err, out)
	}
	return dir
}

// upgrade replaces the software of a running node, by that in dir ("": the new).
func (h *host) upgrade(dir string) {
	h.f.t.Helper()
	h.stop()
	h.bin = dir
	h.start()
}

// supports waits until a node has reported, of this life of its daemon, which
// levels it supports.
func (f *flock) supports(at *host, name, software string, want api.FeatureLevels) {
	f.t.Helper()
	f.eventually(60*time.Second, name+" reports its levels", func() error {
		s := at.node(name).Status
		if s.Version != software || s.Supports() != want || s.Phase != api.NodeReady {
			return fmt.Errorf("version %s supports %s, phase %s", s.Version, s.Supports(), s.Phase)
		}
		return nil
	})
}

func (h *host) featureLevel() api.FeatureLevelStatus {
	h.f.t.Helper()
	s := h.members()
	if s.FeatureLevel == nil {
		h.f.t.Fatalf("%s does not know the feature level", h.name)
	}
	return *s.FeatureLevel
}

// stays checks that the level is not raised while the leader looks several times,
// and why.
func (f *flock) stays(level int, at *host, waits ...string) {
	f.t.Helper()
	for range 6 { // more than two looks
		time.Sleep(time.Second)
		s := at.featureLevel()
		if s.Level != level || s.Highest != 2 || !slices.Equal(s.Waits, waits) {
			f.t.Fatalf("%s says %+v; want level %d that waits for %q", at.name, s, level, waits)
		}
	}
}

// leadBy hands the leadership over and waits until everybody knows.
func (f *flock) leadBy(h *host) {
	f.t.Helper()
	if h.members().Leader != h.name {
		h.run("cluster", "transfer", h.name)
	}
	f.eventually(60*time.Second, h.name+" leads", func() error {
		for _, o := range f.nodes {
			if l := o.members().Leader; l != h.name {
				return fmt.Errorf("%s says %q", o.name, l)
			}
		}
		return nil
	})
}

// recorded is how many records of the history there are.
func (h *host) recorded() int {
	h.f.t.Helper()
	return strings.Count(h.run("raw", "ls", "muster/history/", "-o", "name"), "\n")
}

// keyWriter puts one key after the other, through any node that answers.
type keyWriter struct {
	f    *flock
	stop context.CancelFunc
	done chan struct{}

	mu    sync.Mutex
	acked []int
}

func (f *flock) writeKeys() *keyWriter {
	f.t.Helper()
	var servers []string
	for _, h := range f.nodes {
		servers = append(servers, "https://"+h.addr)
	}
	c, err := client.New(client.Config{Servers: servers, Token: f.token, CACert: f.read(f.ca)})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	w := &keyWriter{f: f, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for n := 1; ctx.Err() == nil; n++ {
			wctx, cancel := context.WithTimeout(ctx, writeDeadline)
			_, err := c.Do(wctx, client.Request{Method: http.MethodPut, Path: fmt.Sprintf("/raw/written/%06d", n), Body: []byte("x")})
			cancel()
			if err == nil {
				w.mu.Lock()
				w.acked = append(w.acked, n)
				w.mu.Unlock()
			}
			select { // the point is that they go on, not how many there are
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	f.t.Cleanup(func() { stop(); <-w.done })
	return w
}

func (w *keyWriter) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// goesOn waits until writes are acknowledged as it is now.
func (w *keyWriter) goesOn() {
	w.f.t.Helper()
	before := w.count()
	w.f.eventually(60*time.Second, "writes are acknowledged", func() error {
		if n := w.count(); n < before+20 {
			return fmt.Errorf("%d, and %d before", n, before)
		}
		return nil
	})
}

// check ends the writing and looks for each acknowledged key, at every node.
func (w *keyWriter) check() {
	w.f.t.Helper()
	w.stop()
	<-w.done
	for _, h := range w.f.nodes {
		found := h.run("raw", "ls", "written/", "-o", "name")
		for _, n := range w.acked {
			if !strings.Contains(found, fmt.Sprintf("written/%06d\n", n)) {
				w.f.t.Errorf("%s does not have the acknowledged key %d", h.name, n)
			}
		}
	}
	w.f.t.Logf("%d writes were acknowledged", w.count())
}

// refusesToRun starts a host's daemon, which must end by itself and say why.
func (h *host) refusesToRun(words string) {
	h.f.t.Helper()
	was := len(h.log())
	h.spawn()
	select {
	case <-h.exited:
	case <-time.After(60 * time.Second):
		h.f.t.Fatalf("%s goes on:\n%s", h.name, h.log()[was:])
	}
	said := h.log()[was:]
	if code := h.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(said, words) {
		h.f.t.Fatalf("%s ended with %d and does not say %q:\n%s", h.name, code, words, said)
	}
}

// Two builds run one cluster while its software is replaced node by node.
func TestRollingUpgrade(t *testing.T) {
	t.Parallel()
	old := oldBuild(t)
	one, both := api.FeatureLevels{Min: 1, Max: 1}, feature.Supported()
	f := newFlock(t, 3)
	for _, h := range f.nodes {
		h.bin = old
	}
	f.up()
	n1, n2, n3 := f.nodes[0], f.nodes[1], f.nodes[2]
	if s := n1.featureLevel(); s.Level != 1 || s.Highest != 1 || len(s.Waits) > 0 {
		t.Fatalf("a cluster that an older build founded: %+v", s)
	}
	w := f.writeKeys()
	w.goesOn()

	// A new node under an old leader.
	f.leadBy(n1)
	n2.upgrade("")
	f.supports(n1, "n2", version.Version, both)
	f.stays(1, n2, "n1: supports 1", "n3: supports 1")
	w.goesOn()
	for _, h := range []*host{n1, n2} {
		if err := os.Mkdir(f.path("pool-"+h.name), 0o700); err != nil {
			t.Fatal(err)
		}
		h.run("pool", "create", "pool-"+h.name, "--type", "shared", "--path", f.path("pool-"+h.name))
	}
	n2.refuse(4, "begins with feature level 2", "config", "diff", "--at", "1")
	n2.run("vm", "create", "kept", "--memory", "64M", "--disk", "8M", "--pool", "pool-n2")
	for _, words := range [][]string{{"suspend", "kept"}, {"snapshot", "create", "kept", "a"}, {"clone", "kept", "copy"}} {
		n2.refuse(4, "need feature level 2, and the cluster is at 1", append([]string{"vm"}, words...)...)
	}
	n2.run("vm", "rm", "kept")

	// A new leader of old nodes.
	f.leadBy(n2)
	f.stays(1, n1, "n1: supports 1", "n3: supports 1")
	w.goesOn()
	n3.run("node", "set", "n1", "--reserved-memory", "256M")
	if n := n2.recorded(); n > 0 {
		t.Errorf("%d records of a history, which level 1 does not have", n)
	}
	if out := n1.run("cluster", "status"); !strings.Contains(out, "1; 2 waits for n1: supports 1, n3: supports 1") {
		t.Errorf("cluster status does not say what the level waits for:\n%s", out)
	}

	// All new, but held: there is a way back.
	n2.run("cluster", "set", "--feature-level-hold")
	n3.upgrade("")
	n1.upgrade("")
	f.supports(n2, "n3", version.Version, both)
	f.supports(n2, "n1", version.Version, both)
	f.stays(1, n3, "held; to go on: muster cluster set --feature-level-hold=false")
	n1.upgrade(old)
	f.supports(n2, "n1", oldVersion, one)
	n1.upgrade("")
	f.supports(n2, "n1", version.Version, both)
	w.goesOn()

	// A node that is down counts with what it said.
	n3.stop()
	n1.run("cluster", "set", "--feature-level-hold=false")
	f.eventually(60*time.Second, "the level is raised by itself", func() error {
		for _, h := range []*host{n1, n2} {
			if s := h.featureLevel(); s.Level != 2 || len(s.Waits) > 0 {
				return fmt.Errorf("%s says %+v", h.name, s)
			}
		}
		return nil
	})
	w.goesOn()
	if out := n2.run("event", "ls", "--last", "1000"); strings.Count(out, "cluster.featurelevel") != 1 {
		t.Errorf("events of the raise:\n%s", out)
	}
	f.eventually(60*time.Second, "the history begins", func() error {
		if n := n1.recorded(); n == 0 {
			return fmt.Errorf("nothing is recorded")
		}
		return nil
	})

	// Its directory does not know of the raise: the entries stop the old build.
	n3.bin = old
	n3.refusesToRun("upgrade this node")
	n3.refusesToRun("upgrade this node")
	n3.bin = ""
	n3.start()
	f.supports(n1, "n3", version.Version, both)
	f.eventually(60*time.Second, "n3 knows the level", func() error {
		if b := f.read(filepath.Join(n3.dataDir, "featurelevel")); !bytes.Equal(b, []byte("2\n")) {
			return fmt.Errorf("it has noted %q", b)
		}
		return nil
	})
	// Now it does, and the old build opens nothing at all.
	n3.stop()
	n3.bin = old
	was := len(n3.log())
	n3.refusesToRun("cluster test is at feature level 2, and version 0.0.9 supports 1; upgrade this node's software first")
	if strings.Contains(n3.log()[was:], "musterd ready") {
		t.Error("the old build was ready on the directory of a node of a higher level")
	}
	n3.bin = ""
	n3.start()

	// Nor does it come in by the door.
	n4 := f.add("n4")
	n4.bin = old
	n4.start()
	token := f.joinToken(n1)
	n4.refuse(4, "version 0.0.9 supports 1; upgrade this node's software first", "cluster", "join", token, "--data-dir", n4.dataDir)
	n4.upgrade("")
	n4.run("cluster", "join", token, "--data-dir", n4.dataDir)
	f.supports(n1, "n4", version.Version, both)
	w.goesOn()
	w.check()
}
