// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/monitor/notify"
)

// TestTheLastNodeSaysThatTheQuorumIsLost: what a person sees at the last of three.
func TestTheLastNodeSaysThatTheQuorumIsLost(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a := f.nodes[0]
	for _, h := range f.nodes[1:] {
		a.run("node", "maintenance", "on", h.name)
	}
	a.run("vm", "create", "free", "--memory", "64M", "--disk", "64M", "--start")
	a.run("vm", "create", "kept", "--memory", "64M", "--disk", "64M", "--ha", "restart", "--start")
	if a.status().NoQuorum != nil {
		t.Error("a loss is told of while there is a quorum")
	}
	for _, h := range f.nodes[1:] {
		h.end()
	}
	f.eventually(60*time.Second, "the loss is told of, with what became of the guests", func() error {
		l := a.status().NoQuorum
		if l == nil {
			return errors.New("nothing is said")
		}
		got := map[string]api.LostOutcome{}
		for _, g := range l.Guests {
			got[g.VM] = g.Outcome
		}
		if l.Reachable != 1 || l.Needed != 2 || len(l.Missing) != 2 || got["free"] != api.LostRunsOn || got["kept"] != api.LostEnded {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	for _, args := range [][]string{{"vm", "ls"}, {"vm", "ls", "-o", "json"}, {"vm", "show", "free"}, {"node", "ls"}, {"alert", "ls"}, {"event", "ls"}, {"vm", "console", "free", "--log"}} {
		r := a.try(args...)
		if r.code != 0 || strings.Count(r.stderr, "no quorum") != 1 || strings.Contains(r.stdout, "missing n2, n3") {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, r.code, r.stdout, r.stderr)
		}
	}
	a.run("vm", "screenshot", "free", filepath.Join(f.dir, "free.png"))
	for _, args := range [][]string{{"cluster", "status"}, {"ha", "status"}} {
		r := a.try(args...)
		for _, words := range []string{"start 1 of the missing voters", "muster cluster recover --data-dir " + a.dataDir, "runs-on"} {
			if r.code != 0 || !strings.Contains(r.stdout, words) {
				t.Errorf("%v: exit %d, %q is not in %s%s", args, r.code, words, r.stdout, r.stderr)
			}
		}
	}
	r := a.try("vm", "set", "free", "--cpu", "2")
	if r.code != 5 || !strings.Contains(r.stderr, "missing n2, n3") {
		t.Errorf("a change: exit %d, %s", r.code, r.stderr)
	}
	if age := a.metric("muster_cluster_data_age_seconds"); age < 5 {
		t.Errorf("without a quorum what is shown is %v s old", age)
	}
	if q := a.metric("muster_cluster_quorum"); q != 0 {
		t.Errorf("a quorum of %v is told of", q)
	}

	f.nodes[1].start()
	f.eventually(60*time.Second, "the loss is over", func() error {
		if l := a.status().NoQuorum; l != nil {
			return fmt.Errorf("%+v", l)
		}
		if r := a.try("vm", "ls"); r.code != 0 || strings.Contains(r.stderr, "no quorum") {
			return fmt.Errorf("vm ls: exit %d, %s", r.code, r.stderr)
		}
		if age := a.metric("muster_cluster_data_age_seconds"); age >= 5 {
			return fmt.Errorf("what is shown is %v s old", age)
		}
		if q := a.metric("muster_cluster_quorum"); q != 1 {
			return fmt.Errorf("a quorum of %v is told of", q)
		}
		return nil
	})
}

// TestALostQuorumIsToldByMailAndTrap: the last of three tells people itself, from
// what its replica knows, once; and that it is back, over a restart of its daemon. The
// manager of SNMP v3 takes what is signed and encrypted alone, for which the node opens
// a sealed pass phrase without a quorum.
func TestALostQuorumIsToldByMailAndTrap(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	a, box, traps := f.nodes[0], newMailbox(t, 0), newTrapReceiver(t)
	sealed := newTrapReceiver(t, fmt.Sprintf("createUser -e 0x%x %s SHA %q AES %q", notify.TrapEngineID(a.members().ClusterID), snmpUser, snmpPass, snmpPass), "authUser log "+snmpUser+" priv")
	pass, phrase := filepath.Join(f.dir, "password"), filepath.Join(f.dir, "phrase")
	for path, secret := range map[string]string{pass: "trap-community", phrase: snmpPass} {
		if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a.run("receiver", "create", "ops", "--type", "smtp", "--address", box.addr, "--from", "muster@example.org", "--to", "ops@example.org", "--tls", "none")
	a.run("receiver", "create", "nms", "--type", "snmp", "--address", traps.addr, "--secret-file", pass)
	a.run("receiver", "create", "nms3", "--type", "snmp", "--address", sealed.addr, "--snmp-version", "3", "--user", snmpUser, "--secret-file", phrase)
	a.run("rule", "set", "quorum-lost", "--for", "7s")
	f.eventually(60*time.Second, "every replica has the rule", func() error {
		if out := a.run("rule", "show", "quorum-lost", "-o", "json"); !strings.Contains(out, `"forSeconds": 7`) && !strings.Contains(out, `"forSeconds":7`) {
			return errors.New(out)
		}
		return nil
	})
	for _, h := range f.nodes[1:] {
		h.end()
	}
	words := []string{"no quorum at node n1", "1 of 3 voters reachable", "missing n2, n3"}
	f.eventually(60*time.Second, "the mail and the trap of the loss", func() error {
		if m, n, n3 := len(box.with(append(words, "FIRING: ", "sent by node n1")...)), traps.with(words...), sealed.with(words...); m != 1 || n != 1 || n3 != 1 {
			return fmt.Errorf("%d mails, %d traps, %d of SNMP v3; all mails: %q", m, n, n3, box.with())
		}
		return nil
	})
	file := filepath.Join(a.dataDir, "quorum-told.json")
	f.eventually(60*time.Second, "the daemon has noted whom it told", func() error {
		var noted struct{ Told []string }
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &noted)
		}
		if err == nil && len(noted.Told) != 3 {
			err = fmt.Errorf("%s", b)
		}
		return err
	})
	a.kill9()
	a.start()
	f.eventually(60*time.Second, "the restarted daemon says that the quorum is lost", func() error {
		if a.status().NoQuorum == nil {
			return errors.New("nothing is said")
		}
		return nil
	})
	back := []string{"node n1 has its quorum again"}
	if m, n, n3 := len(box.with(back...)), traps.with(back...), sealed.with(back...); m != 0 || n != 0 || n3 != 0 {
		t.Errorf("%d mails, %d traps and %d of SNMP v3 say that it is back", m, n, n3)
	}
	f.nodes[1].start()
	f.eventually(90*time.Second, "the mail and the trap of the end", func() error {
		if m, n, n3 := len(box.with(append(back, "RESOLVED: ")...)), traps.with(back...), sealed.with(back...); m != 1 || n != 1 || n3 != 1 {
			return fmt.Errorf("%d mails, %d traps, %d of SNMP v3", m, n, n3)
		}
		return nil
	})
	if m, n, n3 := len(box.with("no quorum at node n1")), traps.with("no quorum at node n1"), sealed.with("no quorum at node n1"); m != 1 || n != 1 || n3 != 1 {
		t.Errorf("%d mails, %d traps and %d of SNMP v3 of one loss", m, n, n3)
	}
	told, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"trap-community", snmpPass} {
		if strings.Contains(a.log(), secret) || strings.Contains(string(told), secret) {
			t.Errorf("the log or the file of who was told has the secret %q", secret)
		}
	}
}

// metric reads one series without labels from a daemon's /metrics.
func (h *host) metric(name string) float64 {
	h.f.t.Helper()
	ca, err := os.ReadFile(h.f.ca)
	if err != nil {
		h.f.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, Timeout: 30 * time.Second}
	r, err := client.Get("https://" + h.addr + "/metrics")
	if err != nil {
		h.f.t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		h.f.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				h.f.t.Fatal(err)
			}
			return n
		}
	}
	h.f.t.Fatalf("%s is not in the metrics of %s", name, h.name)
	return 0
}
