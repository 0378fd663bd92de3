// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// A node that comes back must keep what it was given: between its readmission
// and its next request the leader must not count the silence from before.
func TestReadmittedNodeIsNotDeclaredLostBeforeItCanAskAgain(t *testing.T) {
	w := chaosFree(t)
	leader, ctx := w.nodes[0], context.Background()
	w.lose(3)
	if _, err := leader.svc.grant.renew(ctx, w.nodes[3].id); err == nil {
		t.Fatal("a lost node was granted a lease")
	}
	// One pass of detect, in its order.
	for _, id := range leader.svc.takeReturning() {
		must(t, leader.svc.readmit(ctx, 1, id))
	}
	for _, id := range leader.svc.grant.overdue(1, leader.svc.readyNodes()) {
		leader.svc.declareLost(ctx, 1, id)
	}
	w.now += RenewEvery
	if got := w.phase(3); got != api.NodeReady {
		t.Fatalf("the node asked for a lease, was readmitted and is %s again before its next request", got)
	}
	if _, err := leader.svc.grant.renew(ctx, w.nodes[3].id); err != nil {
		t.Errorf("the readmitted node is refused: %v", err)
	}
	w.now += LostAfter + time.Second
	if late := leader.svc.grant.overdue(1, []string{w.nodes[3].id}); len(late) != 1 {
		t.Error("a readmitted node that falls silent is not noticed")
	}
}

// A request that was read in an earlier term, however late it goes on, must
// not wipe what the leader remembers in this one.
func TestLateRequestOfAnEarlierTermForgetsNothing(t *testing.T) {
	w := chaosFree(t)
	g := w.nodes[0].svc.grant
	g.overdue(2, nil) // term 2 begins
	w.now += LostAfter + time.Second
	id := w.nodes[3].id
	if late := g.overdue(2, []string{id}); len(late) != 1 {
		t.Fatal("a silent node is not overdue")
	}
	if err := g.admissible(1, id); err == nil {
		t.Error("a request of term 1 was let through in term 2")
	}
	if err := g.admissible(2, id); err == nil {
		t.Error("the bar of a node that is being declared lost was lifted by a request of an earlier term")
	}
}
