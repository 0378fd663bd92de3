// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// kit is a cluster of three nodes and a VM on one store.
type kit struct {
	t     *testing.T
	db    *storetest.Mem
	nodes map[string]api.Node
	vm    api.VM
	peers *fakePeers
}

type fakePeers struct {
	mu      sync.Mutex
	skew    map[string]time.Duration
	samples []probeSample
	dead    map[string]bool
}

func (p *fakePeers) Call(_ context.Context, n api.Node, method string, _ []byte) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if method != MethodProbe || p.dead[n.Meta.Name] {
		return nil, errors.New("no answer")
	}
	return json.Marshal(probeAnswer{Time: time.Now().Add(p.skew[n.Meta.Name]).UnixNano(), CertNotAfter: time.Now().AddDate(1, 0, 0), Samples: p.samples})
}

// xorSealer stands for the cluster key: what it seals cannot be read as it is
// and opens under its label only.
type xorSealer struct{}

func (xorSealer) Seal(label string, plain []byte) ([]byte, error) {
	out := []byte(label + "\x00")
	for _, b := range plain {
		out = append(out, b^0x55)
	}
	return out, nil
}

func (xorSealer) Open(label string, sealed []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(sealed, []byte(label+"\x00"))
	if !ok {
		return nil, errors.New("sealed for something else")
	}
	out := []byte{}
	for _, b := range rest {
		out = append(out, b^0x55)
	}
	return out, nil
}

func (k *kit) Members(context.Context) ([]api.MemberStatus, error) {
	nodes, err := configdb.Nodes.List(k.db.Local())
	var out []api.MemberStatus
	for _, n := range nodes {
		out = append(out, api.MemberStatus{NodeID: n.Meta.ID, Node: n.Meta.Name, Voter: true, Phase: n.Status.Phase})
	}
	return out, err
}

func newKit(t *testing.T) *kit {
	t.Helper()
	k := &kit{t: t, db: storetest.New(t), nodes: map[string]api.Node{}, peers: &fakePeers{skew: map[string]time.Duration{}, dead: map[string]bool{}}}
	for _, name := range []string{"m1", "m2", "m3"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Spec: api.NodeSpec{Address: name + ":7600"}}
		n.Status.Phase = api.NodeReady
		k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Nodes.Create(tx, &n) })
		k.nodes[name] = n
	}
	k.vm = api.VM{Meta: api.NewMeta(api.KindVM, "", "web1"), Spec: api.VMSpec{CPUs: 1, Memory: api.GiB, HA: api.HARestart, Power: api.PowerRunning}}
	k.vm.Status = api.VMStatus{Phase: api.VMRunning, Node: "m1", Epoch: 1}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		b := api.Binding{Meta: api.NewMeta(api.KindBinding, "", "x"), Spec: api.BindingSpec{NodeID: k.nodes["m1"].Meta.ID, Node: "m1", Epoch: 1, Protected: true}}
		b.Meta.ID = k.vm.Meta.ID
		if err := configdb.Bindings.CreateUnnamed(tx, &b); err != nil {
			return err
		}
		return configdb.VMs.Create(tx, &k.vm)
	})
	return k
}

func (k *kit) txn(f func(*configdb.View, *configdb.Txn) error) {
	k.t.Helper()
	if _, err := configdb.Transact(k.t.Context(), k.db, "test", 20, f); err != nil {
		k.t.Fatal(err)
	}
}

// lose declares a node lost, as ha does, and moves the VM on the way, at once: a rule whose
// time is over may fire between the two.
func (k *kit) lose(name, to string) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		if err := k.phase(v, tx, name, api.NodeLost); err != nil {
			return err
		}
		b, err := configdb.Bindings.Get(v, k.vm.Meta.ID)
		if err != nil || b.Spec.Node != name {
			return err
		}
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = k.nodes[to].Meta.ID, to, b.Spec.Epoch+1
		if err := configdb.Bindings.UpdateSpec(v, tx, &b); err != nil {
			return err
		}
		vm, err := configdb.VMs.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		vm.Status = api.VMStatus{Phase: api.VMStarting, Node: to, Epoch: b.Spec.Epoch}
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
}

func (k *kit) nodePhase(name string, phase api.NodePhase) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error { return k.phase(v, tx, name, phase) })
}

func (k *kit) phase(v *configdb.View, tx *configdb.Txn, name string, phase api.NodePhase) error {
	n, err := configdb.Nodes.Get(v, k.nodes[name].Meta.ID)
	if err != nil {
		return err
	}
	n.Status.Phase = phase
	if phase == api.NodeLost {
		now := time.Now().UTC()
		n.Status.LostAt = &now
	}
	return configdb.Nodes.UpdateStatus(v, tx, &n)
}

func (k *kit) vmStatus(change func(*api.VMStatus)) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		change(&vm.Status)
		return configdb.VMs.UpdateStatus(v, tx, &vm)
	})
}

func (k *kit) receiver(name string, spec api.ReceiverSpec) api.Receiver {
	k.t.Helper()
	r := api.Receiver{Meta: api.NewMeta(api.KindReceiver, "", name), Spec: spec}
	if spec.Secret != "" {
		r.Spec.Secret = ""
		r.Spec.SealedSecret, _ = xorSealer{}.Seal(secretLabel(r.Meta.ID), []byte(spec.Secret))
	}
	if err := r.Prepare(); err != nil {
		k.t.Fatal(err)
	}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Receivers.Create(tx, &r) })
	return r
}

func (k *kit) rule(name string, change func(*api.RuleSpec)) {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		r, err := configdb.Rules.Find(v, "", name)
		if err != nil {
			return err
		}
		change(&r.Spec)
		return configdb.Rules.UpdateSpec(v, tx, &r)
	})
}

// service returns a service of a node with short periods.
func (k *kit) service(node string) *Service {
	s := New(Config{
		DB: k.db, NodeID: k.nodes[node].Meta.ID, NodeName: node, Cluster: "prod", ClusterID: "c1",
		Members: k, Peers: k.peers, Sealer: xorSealer{}, Log: slog.New(slog.NewTextHandler(k.t.Output(), nil)).With("node", node),
	})
	s.keep = retention{events: 1000, logins: 200, resolved: 50}
	s.timing = timing{
		evaluate: 10 * time.Millisecond, probe: 50 * time.Millisecond, sweep: 50 * time.Millisecond, deliver: 10 * time.Millisecond,
		backoff: 10 * time.Millisecond, maxBackoff: 50 * time.Millisecond,
	}
	return s
}

// lead runs a service in a term until stop is called.
func (k *kit) lead(s *Service, term uint64) (stop func()) {
	k.t.Helper()
	k.db.SetTerm(term)
	ctx, cancel := context.WithCancel(k.t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, term) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				k.t.Errorf("service ended: %v", err)
			}
		})
	}
	k.t.Cleanup(stop)
	return stop
}

const patience = 2 * time.Minute

// eventually waits until f holds, looking whenever the store changed.
func (k *kit) eventually(what string, f func(v *configdb.View) bool) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !f(k.db.Local()) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			all := k.events("")
			for _, e := range all[max(0, len(all)-50):] {
				k.t.Logf("event %s: %s", e.Spec.Type, e.Spec.Message)
			}
			alerts, _ := configdb.Alerts.List(k.db.Local())
			for _, a := range alerts {
				k.t.Logf("alert %s %s: %s %v", a.Spec.Rule, a.Status.Phase, a.Status.Message, a.Status.Sent)
			}
			k.t.Fatalf("not so within %s: %s", patience, what)
		}
	}
}

func (k *kit) events(typ string) []api.Event {
	k.t.Helper()
	all, err := configdb.Events.List(k.db.Local())
	if err != nil {
		k.t.Fatal(err)
	}
	var out []api.Event
	for _, e := range all {
		if typ == "" || e.Spec.Type == typ {
			out = append(out, e)
		}
	}
	return out
}

// alert returns the one alert of a rule.
func (k *kit) alert(v *configdb.View, rule string) (api.Alert, bool) {
	all, err := configdb.Alerts.List(v)
	if err != nil {
		k.t.Fatal(err)
	}
	for _, a := range all {
		if a.Spec.Rule == rule {
			return a, true
		}
	}
	return api.Alert{}, false
}

// wasSent reports that a receiver was told, as "name/phase".
func wasSent(a *api.Alert, what string) bool {
	return slices.ContainsFunc(a.Status.Sent, func(mark string) bool { return strings.HasPrefix(mark, what+"/") })
}

func (k *kit) untilPhase(rule string, phase api.AlertPhase) api.Alert {
	k.t.Helper()
	var got api.Alert
	k.eventually(rule+" is "+string(phase), func(v *configdb.View) bool {
		a, ok := k.alert(v, rule)
		got = a
		return ok && a.Status.Phase == phase
	})
	return got
}

// mailSink is a mail server that refuses its first deliveries.
type mailSink struct {
	addr string

	mu       sync.Mutex
	refuse   int
	attempts int
	mails    []string
}

func (m *mailSink) NewSession(*smtp.Conn) (smtp.Session, error) { return &mailSession{sink: m}, nil }

type mailSession struct{ sink *mailSink }

func (s *mailSession) Reset()                               {}
func (s *mailSession) Logout() error                        { return nil }
func (s *mailSession) Mail(string, *smtp.MailOptions) error { return nil }
func (s *mailSession) Rcpt(string, *smtp.RcptOptions) error { return nil }
func (s *mailSession) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.sink.mu.Lock()
	defer s.sink.mu.Unlock()
	s.sink.attempts++
	if s.sink.attempts <= s.sink.refuse {
		return &smtp.SMTPError{Code: 451, EnhancedCode: smtp.EnhancedCode{4, 3, 0}, Message: "try later"}
	}
	s.sink.mails = append(s.sink.mails, string(b))
	return nil
}

func (m *mailSink) all() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.mails...)
}

func newMailSink(t *testing.T, refuse int) *mailSink {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &mailSink{addr: ln.Addr().String(), refuse: refuse}
	srv := smtp.NewServer(m)
	srv.Domain = "localhost"
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return m
}

func (m *mailSink) spec() api.ReceiverSpec {
	return api.ReceiverSpec{Type: api.ReceiverSMTP, Address: m.addr, From: "muster@example.org", To: []string{"ops@example.org"}, TLS: "none"}
}

func unfold(mail string) string {
	return strings.ReplaceAll(strings.ReplaceAll(mail, "=\r\n", ""), "\r\n ", " ")
}
