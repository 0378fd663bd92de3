// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// settle waits until the service knows everything, and has written nothing more for a
// while. On a busy machine something may still come: who wants it asks for it.
func (k *kit) settle() {
	k.t.Helper()
	k.eventually("everything is known", func(v *configdb.View) bool {
		for prefix, kind := range map[string]api.Kind{configdb.Nodes.SpecPrefix(): api.KindNode, configdb.VMs.SpecPrefix(): api.KindVM} {
			for e := range v.Scan(prefix, "") {
				if _, known := v.Get(markKey(kind, e.Key[len(prefix):])); !known {
					return false
				}
			}
		}
		_, made := v.Get(builtinMark)
		return made
	})
	last, quiet := k.db.Local().Revision(), 0
	k.eventually("the store is quiet", func(v *configdb.View) bool {
		if quiet++; v.Revision() != last {
			last, quiet = v.Revision(), 0
		}
		return quiet > 60 // looks, not time: if all stood still the service did, too
	})
}

// tells waits until there are so many events of each type, and looks that no more come.
func (k *kit) tells(want map[string]int) {
	k.t.Helper()
	for typ, n := range want {
		k.eventually(fmt.Sprintf("%d events %s", n, typ), func(*configdb.View) bool { return len(k.events(typ)) >= n })
	}
	k.settle()
	for typ, n := range want {
		if got := k.events(typ); len(got) != n {
			k.t.Errorf("%d events %s, want %d", len(got), typ, n)
		}
	}
}

func TestALostHostIsOneMailThatNamesNodeAndVM(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 2)
	k.receiver("ops", sink.spec())
	k.lead(k.service("m2"), 1)
	k.eventually("built-in rules", func(v *configdb.View) bool {
		rules, _ := configdb.Rules.List(v)
		return len(rules) == len(builtins())
	})
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 1 })
	k.rule("quorum-margin", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.settle()
	k.lose("m1", "m3")
	k.untilPhase("node-lost", api.AlertFiring)
	k.vmStatus(func(st *api.VMStatus) { st.Phase = api.VMRunning })
	k.eventually("the mail is marked", func(v *configdb.View) bool {
		a, _ := k.alert(v, "node-lost")
		return wasSent(&a, "ops/firing")
	})
	k.nodePhase("m1", api.NodeReady)
	k.eventually("the second mail is marked", func(v *configdb.View) bool {
		a, _ := k.alert(v, "node-lost")
		return wasSent(&a, "ops/resolved")
	})
	k.settle()
	mails := sink.all()
	if len(mails) != 2 || sink.attempts != 4 {
		t.Fatalf("%d mails after %d attempts, want 2 after 4:\n%s", len(mails), sink.attempts, strings.Join(mails, "\n-----\n"))
	}
	firing, resolved := unfold(mails[0]), unfold(mails[1])
	for _, want := range []string{"FIRING critical: node m1 is lost", "restarted elsewhere: web1 on m3", "no quorum margin", "Message-ID: ", "Auto-Submitted: auto-generated"} {
		if !strings.Contains(strings.ReplaceAll(firing, "=20", " "), want) {
			t.Errorf("the first mail lacks %q:\n%s", want, firing)
		}
	}
	for _, want := range []string{"RESOLVED: node m1 is back", "web1 on m3"} {
		if !strings.Contains(resolved, want) {
			t.Errorf("the second mail lacks %q:\n%s", want, resolved)
		}
	}
	k.tells(map[string]int{"node.lost": 1, "vm.recovered": 1, "node.ready": 4, "vm.started": 2, "alert.firing": 2, "alert.resolved": 2})
	r, err := configdb.Receivers.Find(k.db.Local(), "", "ops")
	if err != nil || r.Status.Phase != ReceiverOK || r.Status.LastSent == nil || r.Status.LastError != "" {
		t.Errorf("receiver %+v, %v", r.Status, err)
	}
}

func TestANewLeaderGoesOnWithAPendingAlert(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 0)
	k.receiver("ops", sink.spec())
	one, two := k.service("m2"), k.service("m3")
	stop := k.lead(one, 1)
	k.eventually("built-in rules", func(v *configdb.View) bool { return !v.Empty(configdb.Rules.SpecPrefix()) })
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 4 })
	k.settle()
	k.lose("m1", "m3")
	pending := k.untilPhase("node-lost", api.AlertPending)
	stop()
	k.lead(two, 2)
	firing := k.untilPhase("node-lost", api.AlertFiring)
	if !firing.Status.PendingAt.Equal(*pending.Status.PendingAt) {
		t.Errorf("pending since %s, was %s: the new leader began anew", firing.Status.PendingAt, pending.Status.PendingAt)
	}
	if d := firing.Status.FiringAt.Sub(*firing.Status.PendingAt); d < 4*time.Second || d > 30*time.Second {
		t.Errorf("it fired %s after it was pending, want about 4 s", d)
	}
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) > 0 })
	k.settle()
	if n := len(sink.all()); n != 1 {
		t.Fatalf("%d mails, want 1", n)
	}
	k.tells(map[string]int{"node.lost": 1, "vm.recovered": 1, "alert.firing": 2}) // node-lost, and vm-recovered, which is not mailed
}

// TestTwoLeadersWriteOnce lets the old leader go on in its old term.
func TestTwoLeadersWriteOnce(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 0)
	k.receiver("ops", sink.spec())
	k.lead(k.service("m2"), 1)
	k.settle()
	k.lead(k.service("m3"), 2) // the first one does not know yet
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.untilPhase("node-lost", api.AlertFiring)
	k.tells(map[string]int{"node.lost": 1, "vm.recovered": 1})
}

func TestAnIdleClusterWritesNothing(t *testing.T) {
	k := newKit(t)
	k.lead(k.service("m2"), 1)
	k.settle()
	before, now := uint64(0), k.db.Local().Revision()
	for turn := 0; turn < 20 && now != before; turn++ { // the last of its beginning may come late
		before = now
		time.Sleep(500 * time.Millisecond) // fifty evaluations and ten probes
		now = k.db.Local().Revision()
	}
	if now != before {
		t.Fatalf("revision %d, was %d", now, before)
	}
}

func TestRestartWithAQueue(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 1<<30)
	k.receiver("ops", sink.spec())
	stop := k.lead(k.service("m2"), 1)
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.eventually("the receiver shows the failure", func(v *configdb.View) bool {
		r, err := configdb.Receivers.Find(v, "", "ops")
		return err == nil && r.Status.Phase == ReceiverFailing && strings.Contains(r.Status.LastError, "try later") && r.Status.Queued == 1
	})
	stop()
	sink.mu.Lock()
	sink.refuse = 0
	sink.mu.Unlock()
	k.lead(k.service("m2"), 2) // a new process: nothing but the database is left
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) == 1 })
	k.settle()
	if n := len(sink.all()); n != 1 {
		t.Fatalf("%d mails, want 1", n)
	}
}

func TestOneReceiverThatHangsDelaysNoOther(t *testing.T) {
	k := newKit(t)
	hang := newSilentServer(t)
	k.receiver("aaa", api.ReceiverSpec{Type: api.ReceiverSMTP, Address: hang, From: "a@example.org", To: []string{"b@example.org"}, TLS: "none"})
	k.receiver("bbb", api.ReceiverSpec{Type: api.ReceiverWebhook, Address: "http://" + hang + "/"})
	sink := newMailSink(t, 0)
	k.receiver("ops", sink.spec())
	k.lead(k.service("m2"), 1)
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	began := time.Now()
	k.lose("m1", "m3")
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) == 1 })
	if took := time.Since(began); took > 5*time.Second {
		t.Fatalf("the mail took %s", took)
	}
}

func TestEventsOfAVM(t *testing.T) {
	k := newKit(t)
	stop := k.lead(k.service("m2"), 1)
	k.settle()
	want := func(types ...string) {
		t.Helper()
		var got []string
		told := func(*configdb.View) bool {
			got = nil
			for _, e := range k.events("") {
				if e.Spec.TargetKind == api.KindVM && strings.HasPrefix(e.Spec.Type, "vm.") {
					got = append(got, e.Spec.Type)
				}
			}
			return len(got) >= len(types)
		}
		k.eventually(fmt.Sprintf("the events %v", types), told)
		k.settle()
		if told(nil); !slices.Equal(got, types) {
			t.Fatalf("events %v, want %v", got, types)
		}
	}
	want("vm.started")
	k.vmStatus(func(st *api.VMStatus) { st.Crashes, st.Message = 1, "QEMU was killed by signal 11" })
	want("vm.started", "vm.crashed")
	if a := k.untilPhase("vm-failed", api.AlertFiring); !strings.Contains(a.Status.Message, "crashed") {
		t.Errorf("alert after a crash: %+v", a)
	}
	k.vmStatus(func(st *api.VMStatus) { st.Phase = api.VMPaused })
	want("vm.started", "vm.crashed", "vm.paused")
	k.vmStatus(func(st *api.VMStatus) { st.Phase = api.VMRunning })
	want("vm.started", "vm.crashed", "vm.paused", "vm.resumed")
	stop() // what happens while nobody looks is told by the next leader
	k.vmStatus(func(st *api.VMStatus) { st.Phase, st.Crashes = api.VMStopped, 0 })
	k.lead(k.service("m3"), 2)
	want("vm.started", "vm.crashed", "vm.paused", "vm.resumed", "vm.stopped")
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		vm, err := configdb.VMs.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		configdb.VMs.Delete(tx, &vm)
		return nil
	})
	want("vm.started", "vm.crashed", "vm.paused", "vm.resumed", "vm.stopped", "vm.deleted")
	k.eventually("the alert of a deleted vm is resolved", func(v *configdb.View) bool {
		a, ok := k.alert(v, "vm-failed")
		return !ok || a.Status.Phase == api.AlertResolved
	})
}

func TestANodeThatCameBackBetweenTwoLooksIsToldOf(t *testing.T) {
	k := newKit(t)
	stop := k.lead(k.service("m2"), 1)
	k.settle()
	stop()
	k.lose("m1", "m3")
	k.nodePhase("m1", api.NodeReady)
	k.lead(k.service("m3"), 2)
	k.tells(map[string]int{"node.lost": 1, "node.ready": 4, "vm.recovered": 1})
	if got := k.events("vm.recovered"); len(got) != 1 || got[0].Spec.Details["from"] != "m1" {
		t.Errorf("vm.recovered: %+v", got)
	}
}

// A drill is no loss: neither of the VM's node nor of its disks.
func TestADrillIsToldOfAsOne(t *testing.T) {
	k := newKit(t)
	k.lead(k.service("m2"), 1)
	k.settle()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		m1, err := configdb.Nodes.Get(v, b.Spec.NodeID)
		if err != nil {
			return err
		}
		to := k.nodes["m3"].Meta.ID
		b.Spec.RecoveredFrom = b.Spec.Recovered(&m1, to)
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = to, "m3", 2
		d := api.Drill{Meta: api.NewMeta(api.KindDrill, "", "web1"), Status: api.DrillStatus{Phase: api.TaskRunning, Epoch: 2}}
		d.Meta.ID = k.vm.Meta.ID
		if err := configdb.Drills.CreateUnnamed(tx, &d); err != nil {
			return err
		}
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	k.vmStatus(func(s *api.VMStatus) { s.Phase, s.Node, s.Epoch = api.VMStarting, "m3", 2 })
	k.tells(map[string]int{"vm.moved": 1})
	if moved, recovered := k.events("vm.moved"), k.events("vm.recovered"); len(moved) != 1 || len(recovered) != 0 || !strings.Contains(moved[0].Spec.Message, "in a drill") {
		t.Errorf("%+v, %+v", moved, recovered)
	}
	if a, ok := k.alert(k.db.Local(), "vm-recovered"); ok {
		t.Errorf("%+v", a.Status)
	}
}

func TestBuiltInRulesThatWereRemovedStayAway(t *testing.T) {
	k := newKit(t)
	stop := k.lead(k.service("m2"), 1)
	k.settle()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		r, err := configdb.Rules.Find(v, "", "clock-skew")
		if err != nil {
			return err
		}
		configdb.Rules.Delete(tx, &r)
		return nil
	})
	stop()
	k.lead(k.service("m3"), 2)
	k.settle()
	if _, err := configdb.Rules.Find(k.db.Local(), "", "clock-skew"); api.CodeOf(err) != api.CodeNotFound {
		t.Fatalf("the rule came back: %v", err)
	}
}

func TestClockSkewAndMetricsComeFromTheProbe(t *testing.T) {
	k := newKit(t)
	k.peers.skew["m3"] = 7 * time.Second
	k.peers.samples = []probeSample{{Metric: "muster_node_cpu_percent", Value: 97}}
	k.lead(k.service("m2"), 1)
	k.settle()
	k.rule("clock-skew", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	a := k.untilPhase("clock-skew", api.AlertFiring)
	if a.Spec.Target != "m3" || !strings.Contains(a.Status.Message, "ahead of that of node m2") {
		t.Errorf("alert %+v", a)
	}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		r := api.Rule{Meta: api.NewMeta(api.KindRule, "", "busy"), Spec: api.RuleSpec{Check: api.CheckMetric, Metric: "muster_node_cpu_percent", Threshold: 90}}
		if err := r.Prepare(); err != nil {
			return err
		}
		return configdb.Rules.Create(tx, &r)
	})
	k.untilPhase("busy", api.AlertFiring)
	k.peers.mu.Lock()
	k.peers.samples[0].Value, k.peers.skew["m3"] = 10, 0
	k.peers.mu.Unlock()
	k.untilPhase("busy", api.AlertResolved)
	k.untilPhase("clock-skew", api.AlertResolved)
}

func TestOldEventsGoInBatches(t *testing.T) {
	k := newKit(t)
	for batch := range 5 {
		k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
			for i := range 500 {
				e := api.NewEvent("test.event", api.SeverityInfo, "", api.Meta{}, fmt.Sprint(batch*500+i), time.Now())
				e.Meta.ID = fmt.Sprintf("00000000-0000-7000-8000-%012d", batch*500+i)
				if err := configdb.PutEvent(tx, &e); err != nil {
					return err
				}
			}
			return nil
		})
	}
	s := k.service("m2")
	k.lead(s, 1)
	k.eventually("the oldest are gone", func(v *configdb.View) bool { return countEvents(v) == s.keep.events })
	k.settle()
	if n := countEvents(k.db.Local()); n != s.keep.events {
		t.Fatalf("%d events, want %d", n, s.keep.events)
	}
	all := k.events("test.event")
	if all[0].Spec.Message == "0" || all[len(all)-1].Spec.Message != "2499" {
		t.Errorf("kept %s to %s", all[0].Spec.Message, all[len(all)-1].Spec.Message)
	}
}

func countEvents(v *configdb.View) int {
	n := 0
	for range v.Scan(configdb.Events.SpecPrefix(), "") {
		n++
	}
	return n
}

func TestAnAcknowledgementIsOfOneOccurrence(t *testing.T) {
	k := newKit(t)
	k.lead(k.service("m2"), 1)
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	a := k.untilPhase("node-lost", api.AlertFiring)
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.Alerts.Get(v, a.Meta.ID)
		if err != nil {
			return err
		}
		now.Spec.AcknowledgedBy = "alice"
		return configdb.Alerts.UpdateSpec(v, tx, &now)
	})
	k.nodePhase("m1", api.NodeReady)
	if a = k.untilPhase("node-lost", api.AlertResolved); a.Spec.AcknowledgedBy != "alice" {
		t.Errorf("acknowledged by %q after it was resolved", a.Spec.AcknowledgedBy)
	}
	k.nodePhase("m1", api.NodeLost)
	if b := k.untilPhase("node-lost", api.AlertFiring); b.Meta.ID != a.Meta.ID || b.Spec.AcknowledgedBy != "" || b.Status.ResolvedAt != nil {
		t.Errorf("the second occurrence is %+v", b)
	}
}

func TestANodeThatIsLockedOutIsToldOf(t *testing.T) {
	k := newKit(t)
	k.lead(k.service("m3"), 1)
	k.settle()
	fence := func(f ...api.StorageFence) {
		k.txn(func(v *configdb.View, tx *configdb.Txn) error {
			n, err := configdb.Nodes.Get(v, k.nodes["m1"].Meta.ID)
			if err != nil {
				return err
			}
			n.Status.StorageFences = f
			return configdb.Nodes.UpdateStatus(v, tx, &n)
		})
	}
	fence(api.StorageFence{ID: "f", PoolID: "p", Pool: "ceph", Reason: "nothing was heard of it for 5.1 s"})
	k.settle()
	if got := k.events("node.locked-out"); len(got) != 0 {
		t.Fatalf("told of before it is in force: %+v", got)
	}
	at := time.Now().UTC()
	fence(api.StorageFence{ID: "f", PoolID: "p", Pool: "ceph", Reason: "nothing was heard of it for 5.1 s", InForceAt: &at})
	k.tells(map[string]int{"node.locked-out": 1})
	if got := k.events("node.locked-out"); len(got) != 1 || got[0].Spec.Severity != api.SeverityCritical || !strings.Contains(got[0].Spec.Message, "pool ceph (nothing was heard of it") {
		t.Fatalf("node.locked-out: %+v", got)
	}
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		b, err := configdb.Bindings.Get(v, k.vm.Meta.ID)
		if err != nil {
			return err
		}
		from, err := configdb.Nodes.Get(v, b.Spec.NodeID)
		if err != nil {
			return err
		}
		b.Spec.RecoveredFrom = b.Spec.Recovered(&from, k.nodes["m2"].Meta.ID)
		b.Spec.NodeID, b.Spec.Node, b.Spec.Epoch = k.nodes["m2"].Meta.ID, "m2", b.Spec.Epoch+1
		return configdb.Bindings.UpdateSpec(v, tx, &b)
	})
	k.tells(map[string]int{"vm.recovered": 1})
	if got := k.events("vm.recovered"); len(got) != 1 || !strings.Contains(got[0].Spec.Message, "from node m1, which was locked out of its disks, to node m2") {
		t.Fatalf("vm.recovered: %+v", got)
	}
	fence()
	k.tells(map[string]int{"node.let-in": 1, "node.locked-out": 1, "node.ready": 3})
	if got := k.events("node.let-in"); len(got) != 1 || len(k.events("node.locked-out")) != 1 || len(k.events("node.ready")) != 3 {
		t.Fatalf("node.let-in: %+v", got)
	}
}
