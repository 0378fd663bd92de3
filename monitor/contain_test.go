// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// buggySealer meets a bug with the secrets of one receiver.
type buggySealer struct {
	xorSealer
	bad string
}

func (s buggySealer) Open(label string, sealed []byte) ([]byte, error) {
	if label == s.bad {
		panic("a bug of this receiver")
	}
	return s.xorSealer.Open(label, sealed)
}

func TestABugOfOneReceiverStopsNoOther(t *testing.T) {
	k := newKit(t)
	sink := newMailSink(t, 0)
	bad := k.receiver("aaa", api.ReceiverSpec{Type: api.ReceiverWebhook, Address: "http://127.0.0.1:9/", Secret: "key"})
	k.receiver("ops", sink.spec())
	s := k.service("m2")
	s.cfg.Sealer = buggySealer{bad: secretLabel(bad.Meta.ID)}
	k.lead(s, 1) // which fails the test if Run returns an error
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) == 1 })
	k.eventually("the receiver shows the bug", func(v *configdb.View) bool {
		r, err := configdb.Receivers.Find(v, "", "aaa")
		return err == nil && r.Status.Phase == ReceiverFailing && strings.Contains(r.Status.LastError, "a bug of this receiver")
	})
}

// buggyPeers meets a bug with one node.
type buggyPeers struct {
	*fakePeers
	bad   string
	calls atomic.Int64
}

func (p *buggyPeers) Call(ctx context.Context, n api.Node, method string, request []byte) ([]byte, error) {
	if n.Meta.Name == p.bad {
		p.calls.Add(1)
		panic("a bug of this node")
	}
	return p.fakePeers.Call(ctx, n, method, request)
}

func TestABugWithOneNodeStopsNoProbe(t *testing.T) {
	k := newKit(t)
	k.peers.skew["m3"] = time.Hour
	s := k.service("m2")
	peers := &buggyPeers{fakePeers: k.peers, bad: "m1"}
	s.cfg.Peers = peers
	k.lead(s, 1)
	k.eventually("built-in rules", func(v *configdb.View) bool { return !v.Empty(configdb.Rules.SpecPrefix()) })
	k.rule("clock-skew", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.untilPhase("clock-skew", api.AlertFiring)
	k.eventually("the bad node is asked again", func(*configdb.View) bool { return peers.calls.Load() > 2 })
}

type buggyMembers struct{}

func (buggyMembers) Members(context.Context) ([]api.MemberStatus, error) {
	panic("a bug of the evaluation")
}

// A bug in the evaluation cannot be worked around: the service ends with an
// error, and its supervisor starts it again.
func TestABugOfTheEvaluationIsTheErrorOfTheService(t *testing.T) {
	k := newKit(t)
	s := k.service("m2")
	s.cfg.Members = buggyMembers{}
	k.db.SetTerm(1)
	err := s.Run(t.Context(), 1)
	var p *contain.Panic
	if !errors.As(err, &p) || !strings.Contains(p.Stack, "evaluate") {
		t.Fatalf("Run returned %v", err)
	}
	sink := newMailSink(t, 0)
	k.receiver("ops", sink.spec())
	s.cfg.Members = k
	k.lead(s, 1) // again, in the same term
	k.settle()
	k.rule("node-lost", func(r *api.RuleSpec) { r.ForSeconds = 0 })
	k.lose("m1", "m3")
	k.eventually("mail", func(*configdb.View) bool { return len(sink.all()) == 1 })
}
