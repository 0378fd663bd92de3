// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

func (h *host) configLog(args ...string) (l api.ConfigLog) {
	h.f.t.Helper()
	h.f.decode(h.run(append([]string{"config", "log", "-o", "json"}, args...)...), &l)
	return l
}

func (h *host) revision() uint64 {
	h.f.t.Helper()
	var s api.ClusterStatus
	h.f.decode(h.run("cluster", "status", "-o", "json"), &s)
	return s.Revision
}

// Changes through one node are in the log of another, and a third brings them
// back, across the death of the leader.
func TestHistoryThroughEveryNode(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	n1, n2, n3 := f.nodes[0], f.nodes[1], f.nodes[2]

	// The cluster was founded with a history: it knows its own beginning.
	begun := n2.configLog("cluster")
	if len(begun.Items) != 1 || begun.Items[0].Actor != "local:root" || begun.Items[0].Source != "unix socket" || begun.Horizon != 0 {
		t.Errorf("the founding: %+v", begun)
	}
	n1.run("network", "create", "lan", "--type", "isolated")
	n1.run("vm", "create", "web1", "--cpu", "1", "--memory", "64M")
	n1.run("rule", "create", "hot", "--check", "metric", "--metric", "m", "--threshold", "5")
	n1.run("vm", "start", "web1")
	vm := n1.vm("web1")
	f.eventually(60*time.Second, "web1 runs", func() error {
		if vm = n1.vm("web1"); vm.Status.Phase != api.VMRunning {
			return fmt.Errorf("it is %s: %s", vm.Status.Phase, vm.Status.Message)
		}
		return nil
	})
	pids := qemus(t, vm.Meta.ID)
	if len(pids) != 1 {
		t.Fatalf("QEMU processes: %v", pids)
	}
	to := n1.revision()

	// One change through each node, one of them over the socket of its host.
	n2.run("vm", "set", "web1", "--label", "env=prod")
	n3.run("network", "rm", "lan")
	n1.run("rule", "set", "hot", "--threshold", "9", "--data-dir", n1.dataDir)
	n2.run("vm", "stop", "web1", "--force")
	n2.run("vm", "start", "web1")
	pids = qemus(t, vm.Meta.ID)

	for _, h := range f.nodes {
		for object, want := range map[string]struct{ operation, actor, source, node string }{
			"network/lan": {"delete", "admin", "api 127.0.0.1", "n3"},
			"rule/hot":    {"update", "local:root", "unix socket", "n1"},
		} {
			c := h.configLog(object).Items[0]
			if c.Operation != want.operation || c.Actor != want.actor || c.Source != want.source || c.Node != want.node || c.Revision <= to || time.Since(c.Time) > 10*time.Minute {
				t.Errorf("%s says of %s: %+v, want %+v", h.name, object, c, want)
			}
		}
	}
	// The death of the leader takes nothing of it.
	leader := f.leader(n1)
	before := leader.configLog("--limit", "1000")
	leader.kill9()
	rest := f.others(leader)
	f.eventually(60*time.Second, "a new leader", func() error {
		if r := rest[0].try("rule", "set", "hot", "--threshold", "10"); r.code != 0 {
			return fmt.Errorf("%s", r.stderr)
		}
		return nil
	})
	after := rest[1].configLog("--limit", "1000")
	if n := len(after.Items) - len(before.Items); n != 1 || after.Items[1].Revision != before.Items[0].Revision || after.Horizon != 0 {
		t.Errorf("the log has %d more, horizon %d", n, after.Horizon)
	}

	text := rest[0].run("config", "diff", "--at", fmt.Sprint(to))
	for _, line := range []string{"update vm/web1\n+ meta.labels.env: prod\n", "delete network/lan\n- spec.type: isolated\n", "update rule/hot\n- spec.threshold: 5\n+ spec.threshold: 10\n"} {
		if !strings.Contains(text, line) {
			t.Errorf("the diff lacks %q:\n%s", line, text)
		}
	}
	// Nobody at the terminal, no word: nothing happens.
	rest[0].refuse(4, "needs a person's word", "config", "revert", "--to", fmt.Sprint(to))
	rest[0].refuse(2, "newest revision is", "config", "diff", "--at", "99999999")
	rest[0].refuse(3, "not in the history", "config", "log", "vm/never")
	rest[1].run("config", "revert", "--to", fmt.Sprint(to), "--yes")

	if out := rest[0].run("network", "show", "lan"); !strings.Contains(out, "isolated") {
		t.Errorf("%s", out)
	}
	now := rest[0].vm("web1")
	if now.Meta.Labels != nil || now.Spec.Power != api.PowerRunning || now.Meta.ID != vm.Meta.ID {
		t.Errorf("%+v", now)
	}
	if is := qemus(t, vm.Meta.ID); !slices.Equal(is, pids) {
		t.Errorf("QEMU was %v and is %v", pids, is)
	}
	if r := rest[0].try("config", "diff", "--at", fmt.Sprint(to), "-o", "json"); strings.Contains(r.stdout, "lan") || strings.Contains(r.stdout, "threshold") {
		t.Errorf("what is left: %s", r.stdout)
	}
	c := rest[0].configLog("network/lan").Items[0]
	if c.Operation != "create" || c.Note != fmt.Sprintf("revert to %d", to) || c.Actor != "admin" || c.Node != rest[1].name {
		t.Errorf("%+v", c)
	}
	if out := rest[0].run("event", "ls", "--last", "1000"); !strings.Contains(out, fmt.Sprintf("revert config to revision %d", to)) {
		t.Errorf("no audit event:\n%s", out)
	}

	// The one that was away catches up with the history, too.
	leader.start()
	f.eventually(60*time.Second, "the log is the same everywhere", func() error {
		if a, b := leader.configLog("--limit", "1000"), rest[0].configLog("--limit", "1000"); len(a.Items) != len(b.Items) || a.Items[0].Revision != b.Items[0].Revision {
			return fmt.Errorf("%d and %d changes", len(a.Items), len(b.Items))
		}
		return nil
	})
	// Who may: a viewer reads and does not write.
	token := strings.TrimSpace(rest[0].run("token", "create", "reader", "--role", "viewer", "-o", "json"))
	var made struct{ Token string }
	f.decode(token, &made)
	admin := f.token
	f.token = made.Token
	if l := leader.configLog("rule/hot"); len(l.Items) < 3 {
		t.Errorf("a viewer sees %+v", l.Items)
	}
	leader.refuse(4, "administrator", "config", "revert", "--to", fmt.Sprint(to), "--yes")
	leader.refuse(4, "administrator", "config", "retention", "--max-age", "30d")
	f.token = admin
	if out := leader.run("config", "retention", "--max-age", "30d"); !strings.Contains(out, "30 days") || !strings.Contains(out, "from the beginning") {
		t.Errorf("%s", out)
	}
}
