// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package torture

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/muster-vm/muster/internal/linear"
)

// Further violations.
const (
	// MisstatedAge: a stale read was older than it said, or did not say.
	MisstatedAge linear.ViolationKind = "misstated_age"
	// OwnWriteUnread: a node did not show what it had acknowledged.
	OwnWriteUnread linear.ViolationKind = "own_write_unread"
	// WatchGap: a watch did not show an acknowledged change.
	WatchGap linear.ViolationKind = "watch_gap"
	// WatchOrder: a watch went back.
	WatchOrder linear.ViolationKind = "watch_order"
	// WatchWrong: a watch ended with another state than the cluster.
	WatchWrong linear.ViolationKind = "watch_wrong"
	// NoAnswer: a node that is cut off did not say so within the deadline.
	NoAnswer linear.ViolationKind = "no_answer"
	// WrongAnswer: it served what needs a majority.
	WrongAnswer linear.ViolationKind = "wrong_answer"
	// NotRecovered: the cluster did not serve again.
	NotRecovered linear.ViolationKind = "not_recovered"
	// Died: a daemon ended by itself.
	Died linear.ViolationKind = "died"
)

// mostTold bounds the violations of one rule that are told one by one.
const mostTold = 10

// StaleRead is one answer from a node's own replica.
type StaleRead struct {
	Node string
	// Life counts the starts of the node's daemon, from 1; less if it is not
	// known.
	Life         int
	Call, Return time.Duration
	// Stated is false if the answer does not say that it is stale.
	Stated bool
	// Age as stated; Known is false if the node says that it cannot know.
	Age      time.Duration
	Known    bool
	Revision uint64
}

// Ack is one acknowledged write. Life is that of the node if the node must show
// it, else less than 1.
type Ack struct {
	Node         string
	Life         int
	Call, Return time.Duration
	Revision     uint64
	// Key of the register, as audit events name it.
	Key string
}

// ackIndex finds the highest revision that was acknowledged before a time.
type ackIndex struct {
	returns []time.Duration
	highest []uint64 // of this and all before
}

func newAckIndex(acks []Ack) *ackIndex {
	sorted := slices.Clone(acks)
	slices.SortFunc(sorted, func(a, b Ack) int { return cmp.Compare(a.Return, b.Return) })
	x := &ackIndex{}
	most := uint64(0)
	for _, a := range sorted {
		most = max(most, a.Revision)
		x.returns, x.highest = append(x.returns, a.Return), append(x.highest, most)
	}
	return x
}

func (x *ackIndex) before(t time.Duration) uint64 {
	if x == nil {
		return 0
	}
	i, _ := slices.BinarySearch(x.returns, t)
	if i == 0 {
		return 0
	}
	return x.highest[i-1]
}

// CheckStale checks that stale reads are no older than they say, but for
// slack, and have what their own node acknowledged before.
func CheckStale(reads []StaleRead, acks []Ack, slack time.Duration) []linear.Violation {
	type life struct {
		node string
		n    int
	}
	all, lives, own := newAckIndex(acks), map[life][]Ack{}, map[life]*ackIndex{}
	for _, a := range acks {
		lives[life{a.Node, a.Life}] = append(lives[life{a.Node, a.Life}], a)
	}
	for l, list := range lives {
		own[l] = newAckIndex(list)
	}
	var out []linear.Violation
	for i := range reads {
		r := &reads[i]
		tell := func(kind linear.ViolationKind, format string, args ...any) {
			out = append(out, linear.Violation{Kind: kind, Group: r.Node, Text: fmt.Sprintf("stale read at %.3f s, revision %d: ", r.Call.Seconds(), r.Revision) + fmt.Sprintf(format, args...)})
		}
		if want := own[life{r.Node, r.Life}].before(r.Call); r.Life > 0 && r.Revision < want {
			tell(OwnWriteUnread, "the node had acknowledged revision %d", want)
		}
		if !r.Stated {
			tell(MisstatedAge, "the answer does not say that it is stale")
			continue
		}
		if want := all.before(r.Call - r.Age - slack); r.Known && r.Revision < want {
			tell(MisstatedAge, "it says that it is %.3f s old; revision %d was acknowledged more than %s before that", r.Age.Seconds(), want, slack)
		}
	}
	return few(out)
}

func few(all []linear.Violation) []linear.Violation {
	n := map[linear.ViolationKind]int{}
	return slices.DeleteFunc(all, func(v linear.Violation) bool {
		n[v.Kind]++
		return n[v.Kind] > mostTold
	})
}

// Probe is a question to a node that was cut off during all of it.
type Probe struct {
	Node string
	// Write or linearizable read.
	Write        bool
	Call, Return time.Duration
	// Status of the HTTP answer and its code; 0 if there was none.
	Status int
	Code   string
}

// Deadlines of the server, with what the machine may add.
const (
	writeDeadline = 10 * time.Second
	readDeadline  = 3 * time.Second
	deadlineSlack = 3 * time.Second
)

// Codes of an honest answer without a majority: nothing was done, or nobody
// knows.
const (
	CodeNoQuorum = "no_quorum"
	CodeTimeout  = "timeout"
)

// CheckProbes checks that a node without a majority says so in time. A write
// that it had proposed as leader may also end as unknown.
func CheckProbes(probes []Probe) []linear.Violation {
	var out []linear.Violation
	for _, p := range probes {
		what, within := "linearizable read", readDeadline
		if p.Write {
			what, within = "write", writeDeadline
		}
		took := p.Return - p.Call
		v := linear.Violation{Group: p.Node}
		switch {
		case p.Status == 0 || took > within+deadlineSlack:
			v.Kind, v.Text = NoAnswer, fmt.Sprintf("a %s was not answered within %s (%.1f s, status %d)", what, within, took.Seconds(), p.Status)
		case p.Status/100 == 2:
			v.Kind, v.Text = WrongAnswer, fmt.Sprintf("a %s was answered with status %d", what, p.Status)
		case p.Code != CodeNoQuorum && (!p.Write || p.Code != CodeTimeout):
			v.Kind, v.Text = WrongAnswer, fmt.Sprintf("a %s was answered with status %d and code %q", what, p.Status, p.Code)
		default:
			continue
		}
		out = append(out, v)
	}
	return few(out)
}
