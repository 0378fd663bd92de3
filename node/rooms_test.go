// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/freeport"
)

// The tests of this file look at monitoring and the shell from the outside: real
// daemons, a mail server, snmptrapd, snmpwalk and the OpenSSH client.

// mailbox is a mail server that refuses its first deliveries.
type mailbox struct {
	addr string

	mu       sync.Mutex
	refuse   int
	attempts int
	mails    []string
}

type mailSession struct{ box *mailbox }

func (b *mailbox) NewSession(*smtp.Conn) (smtp.Session, error) { return &mailSession{b}, nil }

func (*mailSession) Reset()                               {}
func (*mailSession) Logout() error                        { return nil }
func (*mailSession) Mail(string, *smtp.MailOptions) error { return nil }
func (*mailSession) Rcpt(string, *smtp.RcptOptions) error { return nil }

func (s *mailSession) Data(r io.Reader) error {
	text, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	if s.box.attempts++; s.box.attempts <= s.box.refuse {
		return &smtp.SMTPError{Code: 451, EnhancedCode: smtp.EnhancedCode{4, 3, 0}, Message: "try later"}
	}
	// Unfolded, so that a text can be looked for.
	plain := strings.NewReplacer("=\r\n", "", "\r\n ", " ", "=20", " ").Replace(string(text))
	s.box.mails = append(s.box.mails, plain)
	return nil
}

// tried returns how many deliveries were tried.
func (b *mailbox) tried() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.attempts
}

// with returns the mails that have all of some words.
func (b *mailbox) with(words ...string) (out []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.mails {
		has := true
		for _, w := range words {
			has = has && strings.Contains(m, w)
		}
		if has {
			out = append(out, m)
		}
	}
	return out
}

func newMailbox(t *testing.T, refuse int) *mailbox {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &mailbox{addr: ln.Addr().String(), refuse: refuse}
	srv := smtp.NewServer(b)
	srv.Domain = "localhost"
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return b
}

const (
	mibs      = "../monitor/snmp/base:../monitor/snmp"
	community = "not public"
	snmpUser  = "watcher"
	snmpPass  = "a long pass phrase"
)

// trapReceiver is a running snmptrapd.
type trapReceiver struct {
	addr string
	mu   sync.Mutex
	text []string
}

func (d *trapReceiver) with(words ...string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, line := range d.text {
		has := true
		for _, w := range words {
			has = has && strings.Contains(line, w)
		}
		if has {
			n++
		}
	}
	return n
}

// newTrapReceiver takes what has a community, trap-community, if no other access is
// configured.
func newTrapReceiver(t *testing.T, access ...string) *trapReceiver {
	t.Helper()
	if len(access) == 0 {
		access = []string{"authCommunity log trap-community"}
	}
	dir := t.TempDir()
	d := &trapReceiver{addr: freeport.Loopback(t)}
	conf := filepath.Join(dir, "snmptrapd.conf")
	if err := os.WriteFile(conf, []byte(strings.Join(access, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("snmptrapd", "-f", "-Lo", "-C", "-c", conf, "-M", mibs, "-m", "MUSTER-MIB", "-p", filepath.Join(dir, "pid"), "udp:"+d.addr)
	cmd.Env = append(os.Environ(), "SNMP_PERSISTENT_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatalf("start snmptrapd (Debian package snmptrapd): %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			d.mu.Lock()
			d.text = append(d.text, sc.Text())
			d.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
	})
	return d
}

func (h *host) alerts() (list []api.Alert) {
	h.f.t.Helper()
	var l struct {
		Items []api.Alert `json:"items"`
	}
	h.f.decode(h.run("alert", "ls", "-o", "json"), &l)
	return l.Items
}

func (h *host) events(typ string) []api.Event {
	h.f.t.Helper()
	var l struct {
		Items []api.Event `json:"items"`
	}
	h.f.decode(h.run("event", "ls", "--last", "1000", "--fields", "spec.type="+typ, "-o", "json"), &l)
	return l.Items
}

func (f *flock) leader(at *host) *host {
	f.t.Helper()
	var st api.ClusterStatus
	f.eventually(60*time.Second, "somebody leads", func() error {
		r := at.try("cluster", "status", "-o", "json")
		if r.code != 0 {
			return errors.New(r.stderr)
		}
		f.decode(r.stdout, &st)
		if st.Leader == "" {
			return errors.New("nobody leads")
		}
		return nil
	})
	return f.byName(st.Leader)
}

// TestTheEvaluatingNodeDiesWhileAnAlertIsPending: another takes over, and
// everybody is told once, through a mail server that refuses at first.
func TestTheEvaluatingNodeDiesWhileAnAlertIsPending(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 5) // two of them die
	f.up()
	box, traps := newMailbox(t, 2), newTrapReceiver(t)
	a := f.nodes[0]
	a.run("receiver", "create", "ops", "--type", "smtp", "--address", box.addr, "--from", "muster@example.org", "--to", "ops@example.org", "--tls", "none")
	a.run("receiver", "create", "nms", "--type", "snmp", "--address", traps.addr, "--secret", "trap-community")
	a.run("rule", "set", "node-lost", "--for", "8s")

	leader := f.leader(a)
	victim := f.others(leader)[0]
	var rest []*host
	for _, h := range f.nodes {
		if h != leader && h != victim {
			rest = append(rest, h)
		}
	}
	victim.end()
	pending := func(at *host) (one *api.Alert) {
		for _, al := range at.alerts() {
			if al.Spec.Rule == "node-lost" && al.Spec.Target == victim.name {
				one = &al
			}
		}
		return one
	}
	var was api.Alert
	f.eventually(60*time.Second, "the alert is pending", func() error {
		al := pending(leader)
		if al == nil || al.Status.Phase != api.AlertPending {
			return fmt.Errorf("alert %+v", al)
		}
		was = *al
		return nil
	})
	leader.end()
	f.eventually(90*time.Second, "the mail about the first node", func() error {
		if n := len(box.with("node " + victim.name + " is lost")); n == 0 {
			return fmt.Errorf("%d mails after %d attempts", n, box.tried())
		}
		return nil
	})
	if next := f.leader(rest[0]); next == leader {
		t.Errorf("%s leads, which is dead", next.name)
	}
	now := pending(rest[1])
	if now == nil || now.Meta.ID != was.Meta.ID || !now.Status.PendingAt.Equal(*was.Status.PendingAt) || now.Status.Phase != api.AlertFiring {
		t.Errorf("the alert was %+v and is %+v: the new leader began anew", was.Status, now)
	}
	f.eventually(90*time.Second, "the mail about the old leader", func() error {
		if len(box.with("node "+leader.name+" is lost")) == 0 {
			return errors.New("none")
		}
		return nil
	})
	victim.start()
	f.eventually(90*time.Second, "the mail that it is back", func() error {
		if len(box.with("RESOLVED", "node "+victim.name+" is back")) == 0 {
			return errors.New("none")
		}
		return nil
	})
	for words, want := range map[string]int{
		"FIRING critical: node " + victim.name + " is lost": 1,
		"FIRING critical: node " + leader.name + " is lost": 1,
		"RESOLVED: node " + victim.name + " is back":        1,
	} {
		if got := len(box.with(words)); got != want {
			t.Errorf("%d mails with %q, want %d", got, words, want)
		}
	}
	if len(box.with("")) != 3 || box.tried() != 5 {
		t.Errorf("%d mails after %d attempts, want 3 after 5", len(box.with("")), box.tried())
	}
	// A trap goes its own way, beside the mails.
	f.eventually(60*time.Second, "one trap of each kind, and the events", func() error {
		for kind, name := range map[string]string{"musterAlertFiring": victim.name, "musterAlertResolved": victim.name} {
			if got := traps.with("MUSTER-MIB::"+kind, "node "+name); got != 1 {
				return fmt.Errorf("%d traps %s about %s, want 1", got, kind, name)
			}
		}
		for typ, want := range map[string]int{"node.lost": 2, "alert.firing": 2, "alert.resolved": 1} {
			if got := len(rest[2].events(typ)); got != want {
				return fmt.Errorf("%d events %s, want %d", got, typ, want)
			}
		}
		return nil
	})
}

// ssh runs the real client against a node.
func (h *host) ssh(user, key string, words ...string) result {
	h.f.t.Helper()
	_, port, _ := net.SplitHostPort(h.addr)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", append([]string{
		"-F", "none", "-o", "UserKnownHostsFile=" + filepath.Join(h.f.dir, "known_hosts"), "-o", "StrictHostKeyChecking=accept-new", "-o", "HostKeyAlias=cluster",
		"-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-i", filepath.Join(h.f.dir, key), "-p", port, user + "@127.0.0.1",
	}, words...)...)
	cmd.Env = []string{"HOME=" + h.f.dir, "PATH=" + os.Getenv("PATH")}
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.f.t.Fatalf("ssh (Debian package openssh-client): %v", err)
	}
	return result{out.String(), errb.String(), cmd.ProcessState.ExitCode()}
}

func (f *flock) newKey(name string) (path string) {
	f.t.Helper()
	path = filepath.Join(f.dir, name)
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path).CombinedOutput(); err != nil {
		f.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return path
}

// walk asks a node's agent with Debian's snmpwalk.
func (f *flock) walk(addr string, args ...string) (string, error) {
	f.t.Helper()
	args = append([]string{"-M", mibs, "-m", "MUSTER-MIB", "-t", "5", "-r", "5"}, append(args, addr, "MUSTER-MIB::muster")...)
	cmd := exec.Command("snmpwalk", args...)
	cmd.Env = append(os.Environ(), "SNMP_PERSISTENT_DIR="+f.t.TempDir())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestEveryRoomOfEveryNode opens the doors of each node and looks at all others.
func TestEveryRoomOfEveryNode(t *testing.T) {
	f := newFlock(t, 3)
	agents := map[*host]string{}
	for _, h := range f.nodes {
		agents[h] = freeport.Loopback(t)
		secret := filepath.Join(f.dir, h.name+".secret")
		if err := os.WriteFile(secret, []byte(snmpPass+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		h.conf["snmpListen"], h.conf["snmpCommunity"], h.conf["snmpUser"], h.conf["snmpSecretFile"] = agents[h], community, snmpUser, secret
	}
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	a.run("vm", "create", "web1", "--memory", "64M", "--disk", "64M", "--start")
	on := f.byName(b.vm("web1").Status.Node)

	t.Run("the shell", func(t *testing.T) { f.tryShell(t, a, b, c) })
	t.Run("changes are audited whichever way they come", func(t *testing.T) { f.tryAudit(t, a, b, c) })
	t.Run("metrics of any node from any node", func(t *testing.T) {
		f.eventually(60*time.Second, "the VM is measured", func() error {
			for _, h := range f.nodes {
				out := h.run("top", "vms", "--once")
				if !strings.Contains(out, "web1") || !strings.Contains(out, on.name) || !strings.Contains(out, "64.0M") && !strings.Contains(out, "64M") {
					return errors.New(out)
				}
			}
			return nil
		})
		f.eventually(60*time.Second, "every node shows the others", func() error {
			for _, h := range f.nodes {
				out := h.run("top", "--once")
				for _, other := range f.nodes {
					if !strings.Contains(out, other.name+" ") {
						return fmt.Errorf("%s does not show %s:\n%s", h.name, other.name, out)
					}
				}
			}
			return nil
		})
	})
	t.Run("services of every node from any node", func(t *testing.T) {
		f.eventually(60*time.Second, "every node shows them", func() error { // who does not answer soon is left out
			for _, h := range f.nodes {
				out := h.run("service", "ls")
				for _, other := range f.nodes {
					for _, service := range []string{"hypervisor", "switch", "monitor", "shell", "snmp", "lease"} {
						if !hasRow(out, other.name, service, "running") {
							return fmt.Errorf("%s does not show %s of %s:\n%s", h.name, service, other.name, out)
						}
					}
				}
			}
			return nil
		})
	})
	t.Run("SNMP", func(t *testing.T) {
		v2, v3 := []string{"-v2c", "-c", community}, []string{"-v3", "-l", "authPriv", "-u", snmpUser, "-a", "SHA", "-A", snmpPass, "-x", "AES", "-X", snmpPass}
		for h, addr := range agents {
			for _, login := range [][]string{v2, v3} {
				out, err := f.walk(addr, login...)
				for _, want := range []string{"musterVmName", "STRING: web1", "musterNodeName", "STRING: " + a.name, "STRING: " + b.name, "STRING: " + c.name, "musterClusterQuorum.0 = INTEGER: true(1)"} {
					if err != nil || !strings.Contains(out, want) {
						t.Fatalf("%s by %v: %v, want %q:\n%s", h.name, login[0], err, want, out)
					}
				}
			}
			if out, err := f.walk(addr, "-v2c", "-c", "public", "-t", "2", "-r", "1"); err == nil || !strings.Contains(out, "Timeout") {
				t.Errorf("a wrong community gets an answer: %v, %s", err, out)
			}
			if out, err := f.walk(addr, "-v3", "-l", "authPriv", "-u", snmpUser, "-a", "SHA", "-A", "another pass phrase", "-x", "AES", "-X", snmpPass, "-t", "2", "-r", "1"); err == nil || strings.Contains(out, "web1") {
				t.Errorf("a wrong pass phrase gets an answer: %v, %s", err, out)
			}
		}
	})
	t.Run("events are followed across nodes", func(t *testing.T) {
		follower := startFollower(t, c)
		a.run("vm", "set", "web1", "--label", "seen=yes")
		follower.expect(t, "update vm web1")
	})
	t.Run("the shell without a quorum", func(t *testing.T) {
		b.end()
		c.end()
		a.kill9()
		a.start() // it has nothing but its replica now
		// The read waits three seconds for a majority; the login must not. One of some is
		// enough, for the machine may have stood still during another.
		var took time.Duration
		for range 5 {
			began := time.Now()
			if r := a.ssh("ann", "ann", "vm", "ls", "-o", "name"); r.code != 0 || r.stdout != "vm/web1\n" {
				t.Errorf("code %d, %q, %q", r.code, r.stdout, r.stderr)
			}
			if took = time.Since(began); took < 6*time.Second {
				break
			}
		}
		if took >= 6*time.Second {
			t.Errorf("it took %s", took)
		}
		if r := a.ssh("ann", "ann", "vm", "set", "web1", "--label", "a=b"); r.code != 5 {
			t.Errorf("a change: code %d, %q", r.code, r.stderr)
		}
	})
}

func hasRow(table string, cells ...string) bool {
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		if len(fields) >= len(cells) && strings.Join(fields[:len(cells)], " ") == strings.Join(cells, " ") {
			return true
		}
	}
	return false
}

func (f *flock) tryShell(t *testing.T, a, b, c *host) {
	f.newKey("ann")
	f.newKey("vera")
	f.newKey("stranger")
	a.run("user", "create", "ann", "--role", "administrator", "--ssh-key-file", filepath.Join(f.dir, "ann.pub"))
	b.run("user", "create", "vera", "--role", "viewer", "--ssh-key-file", filepath.Join(f.dir, "vera.pub"))
	// A node lets in whom its own replica knows.
	lists := func(h *host, user string) {
		t.Helper()
		f.eventually(60*time.Second, user+" is let in by "+h.name, func() error {
			if r := h.ssh(user, user, "vm", "ls", "-o", "name"); r.code != 0 || r.stdout != "vm/web1\n" {
				return fmt.Errorf("code %d, %q, %q", r.code, r.stdout, r.stderr)
			}
			return nil
		})
	}
	for _, h := range f.nodes { // the key of the cluster: known_hosts has one line for all
		lists(h, "ann")
	}
	lists(c, "vera")
	if r := c.ssh("vera", "vera", "vm", "stop", "web1"); r.code != 4 || !strings.Contains(r.stderr, "needs the role operator") {
		t.Errorf("a viewer stops a VM: code %d, %q", r.code, r.stderr)
	}
	if r := c.ssh("vera", "vera", "user", "ls"); r.code != 4 {
		t.Errorf("a viewer lists users: code %d, %q", r.code, r.stdout)
	}
	for _, who := range [][2]string{{"ann", "stranger"}, {"ann", "vera"}, {"nobody", "ann"}} {
		if r := a.ssh(who[0], who[1], "vm", "ls"); r.code != 255 || !strings.Contains(r.stderr, "Permission denied (publickey)") {
			t.Errorf("%s with the key of %s: code %d, %q", who[0], who[1], r.code, r.stderr)
		}
	}
	b.run("user", "set", "vera", "--disabled")
	f.eventually(60*time.Second, "the user is out on every node", func() error {
		for _, h := range f.nodes {
			if r := h.ssh("vera", "vera", "vm", "ls"); r.code != 255 {
				return fmt.Errorf("%s: code %d", h.name, r.code)
			}
		}
		return nil
	})
}

func (f *flock) tryAudit(t *testing.T, a, b, c *host) {
	a.run("vm", "set", "web1", "--label", "by=token")
	b.run("--data-dir", b.dataDir, "vm", "set", "web1", "--label", "by=socket")
	if r := c.ssh("ann", "ann", "vm", "set", "web1", "--label", "by=shell"); r.code != 0 {
		t.Fatalf("by the shell: %d %s", r.code, r.stderr)
	}
	got := a.events("audit.vm.update")
	want := []api.EventSpec{
		{Actor: "admin", Source: "127.0.0.1", Node: a.name}, {Actor: "local:root", Source: "unix socket", Node: b.name}, {Actor: "user:ann", Source: "127.0.0.1", Node: c.name},
	}
	if len(got) != len(want) {
		t.Fatalf("%d events of %d changes: %+v", len(got), len(want), got)
	}
	for i, w := range want {
		e := got[i].Spec
		if e.Actor != w.Actor || e.Source != w.Source || e.Node != w.Node || e.Target != "web1" || e.Details["changed"] != "meta.labels.by" {
			t.Errorf("event %d: %+v, want %+v", i, e, w)
		}
	}
	for typ, least := range map[string]int{"audit.cluster.init": 1, "audit.node.join": 2, "audit.user.create": 2, "audit.login": 4, "audit.logout": 3} {
		if n := len(b.events(typ)); n < least {
			t.Errorf("%d events %s, want %d", n, typ, least)
		}
	}
}

// follower is a running muster event ls --follow.
type follower struct {
	mu   sync.Mutex
	text strings.Builder
}

func (w *follower) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.Write(p)
}

func (w *follower) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

func (w *follower) expect(t *testing.T, words string) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !strings.Contains(w.String(), words); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q did not come:\n%s", words, w)
		}
	}
}

func startFollower(t *testing.T, h *host) *follower {
	t.Helper()
	w := &follower{}
	cmd := exec.Command(filepath.Join(binDir, "muster"), "event", "ls", "--follow", "--last", "1")
	cmd.Env = append(os.Environ(), "MUSTER_SERVER=https://"+h.addr, "MUSTER_TOKEN="+h.f.token, "MUSTER_CACERT="+h.f.ca, "NO_PROXY=127.0.0.1", "HOME="+h.f.dir)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	w.expect(t, "Z  ") // the time of the last event, whichever it is
	return w
}

// TestAnAgentWithoutItsPortHarmsNothingElse: Debian's snmpd may have it.
func TestAnAgentWithoutItsPortHarmsNothingElse(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 1)
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	h := f.nodes[0]
	h.conf["snmpListen"], h.conf["snmpCommunity"] = taken.LocalAddr().String(), community
	f.up()
	h.run("raw", "put", "a", "b")
	f.eventually(60*time.Second, "the reason is shown", func() error {
		out := h.run("service", "ls")
		if !strings.Contains(out, "snmpListen") || !hasRow(out, h.name, "switch", "running") {
			return errors.New(out)
		}
		return nil
	})
	_ = taken.Close()
	f.eventually(60*time.Second, "the agent has its port", func() error {
		if out := h.run("service", "ls"); !hasRow(out, h.name, "snmp", "running") {
			return errors.New(out)
		}
		if out, err := f.walk(taken.LocalAddr().String(), "-v2c", "-c", community); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}
