// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package snmp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gosnmp/gosnmp"

	"github.com/muster-vm/muster/api"
)

const (
	testCommunity = "look-only"
	testUser      = "watcher"
	testSecret    = "a long pass phrase"
)

type staticSource struct{ s *State }

func (s staticSource) State(context.Context) (*State, error) {
	if s.s == nil {
		return nil, errors.New("no state")
	}
	return s.s, nil
}

func testState(vms int) *State {
	s := &State{Cluster: "prod", Node: "m1", Version: "1", Status: api.ClusterStatus{Leader: "m2", Term: 1 << 40, Revision: 77, Quorum: true}}
	for i := range 3 {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", fmt.Sprintf("m%d", i+1))}
		n.Spec.Address, n.Spec.Role, n.Status.Phase, n.Status.Memory = "10.0.0.1:7600", api.RoleVoter, api.NodeReady, 8*api.GiB
		s.Nodes = append(s.Nodes, n)
	}
	s.Nodes[2].Status.Phase = api.NodeLost
	for i := range vms {
		vm := api.VM{Meta: api.NewMeta(api.KindVM, "", fmt.Sprintf("web%d", i+1))}
		vm.Spec.CPUs, vm.Spec.Memory, vm.Status.Phase, vm.Status.Node = 2, api.GiB, api.VMRunning, "m1"
		vm.Status.Message = "moved\x1b[31m from ü" + strings.Repeat("x", 300)
		s.VMs = append(s.VMs, vm)
	}
	a := api.Alert{Meta: api.NewMeta(api.KindAlert, "", "")}
	a.Spec = api.AlertSpec{Rule: "node-lost", Severity: api.SeverityCritical, TargetKind: api.KindNode, Target: "m3"}
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	a.Status = api.AlertStatus{Phase: api.AlertFiring, Message: "node m3 is lost", PendingAt: &now, FiringAt: &now}
	s.Alerts = append(s.Alerts, a)
	return s
}

// running is an agent with the address where it listens.
type running struct {
	*Agent
	addr string
}

// start runs an agent on loopback.
func start(t *testing.T, s *State) *running {
	t.Helper()
	a, err := NewAgent(Config{
		Listen: "127.0.0.1:0", Community: testCommunity, User: testUser, Secret: testSecret, NodeID: "n1",
		Source: staticSource{s}, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenPacket("udp", a.cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.serve(ctx, conn) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &running{a, conn.LocalAddr().String()}
}

// tool runs one of Debian's SNMP tools with our MIB.
func tool(t *testing.T, a *running, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	all := append([]string{"-M", "base:.", "-m", "MUSTER-MIB", "-t", "20", "-r", "0"}, args...)
	for i, s := range all {
		if s == "AGENT" {
			all[i] = a.addr
		}
	}
	cmd := exec.CommandContext(ctx, name, all...)
	cmd.Env = append(cmd.Environ(), "SNMP_PERSISTENT_DIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func wantLines(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("the output lacks %q:\n%s", w, out)
		}
	}
}

var v3 = []string{"-v3", "-l", "authPriv", "-u", testUser, "-a", "SHA", "-A", testSecret, "-x", "AES", "-X", testSecret}

func TestSnmpwalkPrintsNames(t *testing.T) {
	a := start(t, testState(3))
	for name, args := range map[string][]string{"v2c": {"-v2c", "-c", testCommunity}, "v3": v3} {
		t.Run(name, func(t *testing.T) {
			out, err := tool(t, a, "snmpwalk", append(args, "AGENT", "MUSTER-MIB::muster")...)
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			wantLines(t, out, "MUSTER-MIB::musterClusterName.0 = STRING: prod", "musterClusterLeader.0 = STRING: m2",
				"musterClusterTerm.0 = Counter64: 1099511627776", "musterClusterQuorum.0 = INTEGER: true(1)",
				"= STRING: web1", "= STRING: web3", "musterVmPhase", "INTEGER: running(4)", "INTEGER: lost(3)",
				"= INTEGER: critical(3)", "= STRING: node m3 is lost", "musterClusterAlertsFiring.0 = Gauge32: 1")
			if strings.Contains(out, "\x1b") || strings.Contains(out, "ü") {
				t.Errorf("control characters in %q", out)
			}
		})
	}
	out, err := tool(t, a, "snmpbulkwalk", "-v2c", "-c", testCommunity, "-Cr50", "AGENT", "MUSTER-MIB::musterObjects")
	if err != nil || strings.Count(out, "musterVmName") != 3 {
		t.Errorf("snmpbulkwalk: %v: %s", err, out)
	}
	out, err = tool(t, a, "snmptable", "-v2c", "-c", testCommunity, "AGENT", "MUSTER-MIB::musterVmTable")
	if err != nil {
		t.Errorf("snmptable: %v: %s", err, out)
	}
	wantLines(t, out, "musterVmName", "web2", "running")
	out, _ = tool(t, a, "snmpget", append(v3, "AGENT", "MUSTER-MIB::musterClusterNodes.0", "MUSTER-MIB::musterClusterNodes.7", "1.3.6.1.9.9")...)
	wantLines(t, out, "musterClusterNodes.0 = Gauge32: 3", "No Such Instance", "No Such Object")
	out, _ = tool(t, a, "snmpset", "-v2c", "-c", testCommunity, "AGENT", "1.3.6.1.2.1.1.5.0", "s", "evil")
	wantLines(t, out, "notWritable")
	if s := a.Stats(); s.Answered < 50 || s.WrongCommunity+s.NotAuthentic+s.UnknownUser+s.Malformed != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestWhoMayNotLook(t *testing.T) {
	a := start(t, testState(1))
	user := func(name, auth, priv string) []string {
		return []string{"-v3", "-l", "authPriv", "-u", name, "-a", "SHA", "-A", auth, "-x", "AES", "-X", priv}
	}
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"wrong community":     {[]string{"-v2c", "-c", "public"}, "Timeout"},
		"v1":                  {[]string{"-v1", "-c", testCommunity}, "Timeout"},
		"unknown user":        {user("nobody", testSecret, testSecret), "Unknown user"},
		"wrong pass phrase":   {user(testUser, "something else", testSecret), "Authentication failure"},
		"wrong key":           {user(testUser, testSecret, "something else"), "snmpget: "},
		"authentication only": {[]string{"-v3", "-l", "authNoPriv", "-u", testUser, "-a", "SHA", "-A", testSecret}, "Unsupported security level"},
		"neither":             {[]string{"-v3", "-l", "noAuthNoPriv", "-u", testUser}, "Unsupported security level"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := tool(t, a, "snmpget", append(tc.args, "-t", "2", "AGENT", "MUSTER-MIB::musterClusterName.0")...)
			if err == nil || strings.Contains(out, "prod") {
				t.Fatalf("got data: %s", out)
			}
			if !strings.Contains(out, tc.want) && !strings.Contains(out, "Decryption error") && !strings.Contains(out, "Timeout") {
				t.Errorf("the tool says %q, want %q", out, tc.want)
			}
		})
	}
	s := a.Stats()
	if s.Answered != 0 || s.WrongCommunity == 0 || s.UnknownUser == 0 || s.NotAuthentic < 3 || s.Unsupported == 0 {
		t.Errorf("stats %+v", s)
	}
}

// ask sends one v2c request and returns the answer and its size.
func ask(t *testing.T, a *running, typ gosnmp.PDUType, rep uint32, non uint8, names ...string) (*gosnmp.SnmpPacket, int) {
	t.Helper()
	var vars []gosnmp.SnmpPDU
	for _, n := range names {
		vars = append(vars, gosnmp.SnmpPDU{Name: n, Type: gosnmp.Null})
	}
	p := &gosnmp.SnmpPacket{Version: gosnmp.Version2c, Community: testCommunity, PDUType: typ, RequestID: 5, MaxRepetitions: rep, NonRepeaters: non, Variables: vars}
	raw, err := p.MarshalMsg()
	if err != nil {
		t.Fatal(err)
	}
	out := a.handle(t.Context(), raw)
	if out == nil {
		return nil, 0
	}
	n := len(out)
	got, err := (&gosnmp.GoSNMP{}).SnmpDecodePacket(out)
	if err != nil {
		t.Fatalf("decode the answer: %v", err)
	}
	return got, n
}

func TestAnswersAreBounded(t *testing.T) {
	a := start(t, testState(500))
	all := make([]string, maxBindings)
	for i := range all {
		all[i] = "." + root
	}
	for name, tc := range map[string]struct {
		typ   gosnmp.PDUType
		rep   uint32
		non   uint8
		names []string
		err   gosnmp.SNMPError
		least int
	}{
		"a bulk request for everything":    {gosnmp.GetBulkRequest, 1<<31 - 1, 0, []string{"." + vmEntry + ".10"}, 0, 2},
		"a bulk request without variables": {gosnmp.GetBulkRequest, 100, 255, nil, 0, 0},
		"non-repeaters beyond the list":    {gosnmp.GetBulkRequest, 100, 255, []string{"." + root}, 0, 1},
		"the end of everything":            {gosnmp.GetBulkRequest, 100, 0, []string{".2.9"}, 0, 1},
		"many names of long values":        {gosnmp.GetNextRequest, 0, 0, append([]string{"." + vmEntry + ".10", "." + vmEntry + ".10", "." + vmEntry + ".10", "." + vmEntry + ".10", "." + vmEntry + ".10"}, all[:10]...), gosnmp.TooBig, 0},
		"too many names":                   {gosnmp.GetRequest, 0, 0, append(all, "."+root), gosnmp.TooBig, 0},
		"no names":                         {gosnmp.GetNextRequest, 0, 0, nil, 0, 0},
		"set without names":                {gosnmp.SetRequest, 0, 0, nil, gosnmp.NotWritable, 0},
	} {
		t.Run(name, func(t *testing.T) {
			got, size := ask(t, a, tc.typ, tc.rep, tc.non, tc.names...)
			if got == nil {
				t.Fatal("no answer")
			}
			if size > maxAnswer || got.Error != tc.err || len(got.Variables) < tc.least || len(got.Variables) > maxBindings {
				t.Errorf("%d bytes, error %s, %d variables", size, got.Error, len(got.Variables))
			}
		})
	}
	for _, typ := range []gosnmp.PDUType{gosnmp.Trap, gosnmp.SNMPv2Trap, gosnmp.InformRequest, gosnmp.GetResponse, gosnmp.Report} {
		if typ == gosnmp.Trap {
			continue // is of v1 only
		}
		if got, _ := ask(t, a, typ, 0, 0, "."+root); got != nil {
			t.Errorf("%v was answered", typ)
		}
	}
}

func TestAWalkVisitsEverythingOnceInOrder(t *testing.T) {
	s := testState(100)
	tr := build(s, 1)
	at, n := oid{1}, 0
	for {
		i := tr.next(at)
		if i == len(tr) {
			break
		}
		if compareOID(tr[i].name, at) <= 0 {
			t.Fatalf("%v after %v", tr[i].name, at)
		}
		at, n = tr[i].name, n+1
	}
	if want := 4 + 12 + 3*10 + 100*9 + 7; n != want {
		t.Errorf("%d variables, want %d", n, want)
	}
}

func TestTheAgentsConfigurationIsChecked(t *testing.T) {
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, c := range map[string]Config{
		"nothing to log in with":  {Listen: "127.0.0.1:0"},
		"short pass phrase":       {Listen: "127.0.0.1:0", User: "u", Secret: "short"},
		"no address":              {Listen: "nonsense", Community: "c"},
		"a community without end": {Listen: "127.0.0.1:0", Community: strings.Repeat("x", 200)},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := NewAgent(c); err == nil {
				t.Fatal("accepted")
			}
		})
	}
}

// A port in use, as by Debian's snmpd, is a failure of the agent, which its
// supervisor tries again; it is no reason not to start the node.
func TestAPortInUseIsTriedAgain(t *testing.T) {
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := testState(1)
	a, err := NewAgent(Config{Listen: taken.LocalAddr().String(), Community: testCommunity, Source: staticSource{s}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "snmpListen") {
		t.Fatalf("Run on a port in use: %v", err)
	}
	_ = taken.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	out, err := tool(t, &running{a, taken.LocalAddr().String()}, "snmpget", "-v2c", "-c", testCommunity, "-t", "1", "-r", "20", "AGENT", "MUSTER-MIB::musterClusterName.0")
	if err != nil || !strings.Contains(out, "STRING: ") {
		t.Errorf("after the port is free: %v: %s", err, out)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzHandle(f *testing.F) {
	a, err := NewAgent(Config{
		Listen: "127.0.0.1:0", Community: testCommunity, User: testUser, Secret: testSecret, NodeID: "n1",
		Source: staticSource{testState(3)}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, typ := range []gosnmp.PDUType{gosnmp.GetRequest, gosnmp.GetNextRequest, gosnmp.GetBulkRequest, gosnmp.SetRequest} {
		p := &gosnmp.SnmpPacket{Version: gosnmp.Version2c, Community: testCommunity, PDUType: typ, RequestID: 1, MaxRepetitions: 10,
			Variables: []gosnmp.SnmpPDU{{Name: "." + root, Type: gosnmp.Null}}}
		raw, err := p.MarshalMsg()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		sp := a.user.Copy().(*gosnmp.UsmSecurityParameters)
		sp.AuthoritativeEngineBoots = a.boots
		p.Version, p.MsgFlags, p.SecurityModel, p.SecurityParameters = gosnmp.Version3, gosnmp.AuthPriv|gosnmp.Reportable, gosnmp.UserSecurityModel, sp
		if err := sp.InitPacket(p); err != nil {
			f.Fatal(err)
		}
		if raw, err = p.MarshalMsg(); err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if out := a.handle(t.Context(), raw); len(out) > maxAnswer {
			t.Errorf("%d bytes", len(out))
		}
	})
}
