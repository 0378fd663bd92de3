// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/muster-vm/muster/api"
)

// How a node proves that its directory is the one that the others have.
//
// On every start, and whenever the directory under the path became another
// one, the node draws a random stamp, publishes it in its PoolState (not
// ready), writes it to nodes/<own ID>, and then looks for two things:
//
//  1. nodes/<ID> of every node that has the pool ready says what that node
//     published: a different directory of the same name has none of them;
//  2. a node that has the pool ready and is alive has answered by writing this
//     new stamp to nodes/<its ID>.saw.<own ID>. A copy of the directory has
//     the old stamps but can never get an answer.
//
// The step to ready is taken under one key in the database (writePoolState):
// when several nodes begin at once, one is first and the others are measured
// against it. A node that is down is no obstacle, since 1 needs only its file.
// Nothing but the stamps is ever written to the database.

// checkShared takes the next step of that procedure.
func (s *Service) checkShared(ctx context.Context, lp *localPool, st api.PoolState, look look, seen sight) (verdict, error) {
	now := s.cfg.Now()
	if lp.stamp == "" || lp.root != seen.root {
		lp.stamp, lp.root, lp.since, lp.badSince = rand.Text(), seen.root, now, time.Time{}
		return verdict{stamp: lp.stamp, reason: checking, again: verifyInterval}, nil
	}
	if st.Status.Stamp != lp.stamp {
		// The last write did not reach the database.
		return verdict{stamp: lp.stamp, reason: checking, again: verifyInterval}, nil
	}
	if seen.own != lp.stamp {
		if st.Status.Ready { // somebody removed or replaced our file
			lp.stamp = ""
			return verdict{reason: checking, again: verifyInterval}, nil
		}
		stamp := lp.stamp
		err := lp.check.do(ctx, checkDeadline, func() error { return writeStamp(look.path, look.nodeID, stamp) })
		if ctx.Err() != nil {
			return verdict{}, context.Cause(ctx)
		}
		if err != nil {
			return verdict{reason: err.Error(), again: checkInterval}, nil
		}
		return verdict{reason: checking, again: verifyInterval}, nil
	}
	if st.Status.Ready {
		return s.stayReady(ctx, lp, look, seen, now)
	}
	if bad := missing(look, seen); bad != "" {
		return s.wait(lp, now, fmt.Sprintf("%s here is not the directory that node %s has: %s", look.path, bad, remedy(look.path))), nil
	}
	if name := unconfirmed(look, seen, lp.stamp); name != "" {
		return s.wait(lp, now, fmt.Sprintf("node %s does not see in its %s what this node writes here: %s", name, look.path, remedy(look.path))), nil
	}
	lp.badSince = time.Time{}
	return verdict{ready: true, space: seen.space, again: checkInterval}, nil
}

const checking = "checking that this is the directory that the other nodes see"

func remedy(path string) string {
	return "mount the same file system on " + path + " on every node (a copy, or a local directory of that name, will not do)"
}

// wait keeps the neutral reason until the grace is over, so that the normal
// hand-shake writes no alarming word.
func (s *Service) wait(lp *localPool, now time.Time, why string) verdict {
	if now.Sub(lp.since) < confirmGrace {
		return verdict{reason: checking, again: verifyInterval}
	}
	return verdict{reason: why, again: 4 * verifyInterval}
}

// missing names a node that has the pool ready and whose stamp is not here.
func missing(look look, seen sight) string {
	for _, o := range look.others {
		if o.ready && seen.stamps[o.nodeID] != o.stamp {
			return o.node
		}
	}
	return ""
}

// unconfirmed names a live node that could have confirmed our stamp, if none
// has. One confirmation is enough: the others' stamps tie them to that one.
func unconfirmed(look look, seen sight, stamp string) string {
	name := ""
	for _, o := range look.others {
		if !o.ready || !o.alive {
			continue
		}
		if seen.answers[o.nodeID] == stamp {
			return ""
		}
		name = o.node
	}
	return name
}

// stayReady answers nodes that want to become ready, and notices when the
// directory stopped being the common one.
func (s *Service) stayReady(ctx context.Context, lp *localPool, look look, seen sight, now time.Time) (verdict, error) {
	got := verdict{ready: true, space: seen.space, again: checkInterval}
	var answer []other
	for _, o := range look.others {
		switch {
		case o.ready || o.stamp == "":
		case seen.stamps[o.nodeID] == o.stamp:
			if seen.answered[o.nodeID] != o.stamp {
				answer = append(answer, o)
			}
		case o.alive:
			got.again = 4 * verifyInterval // its file may be about to appear
		}
	}
	if len(answer) > 0 {
		err := lp.check.do(ctx, checkDeadline, func() error { return writeAnswers(look.path, look.nodeID, answer) })
		if ctx.Err() != nil {
			return verdict{}, context.Cause(ctx)
		}
		if err != nil {
			return verdict{reason: err.Error(), again: checkInterval}, nil
		}
	}
	bad := missing(look, seen)
	switch {
	case bad == "":
		lp.badSince = time.Time{}
	case lp.badSince.IsZero():
		lp.badSince = now
	case now.Sub(lp.badSince) > staleGrace:
		s.log.Warn("pool must prove itself again", "pool", lp.name, "node", bad)
		lp.stamp = ""
		return verdict{reason: checking, again: verifyInterval}, nil
	}
	return got, nil
}
