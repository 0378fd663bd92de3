// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"cmp"
	"math"
	"slices"
	"sync"
)

// outbox holds the summaries that are passed on, each a number of times. It is
// not memberlist's queue, which counts its entries anew whenever it is empty and
// then takes two of the same length for one: summaries are all of one length.
type outbox struct {
	members func() int

	mu   sync.Mutex
	list []parcel // those sent least often first
}

type parcel struct {
	id      string
	message []byte
	sent    int
}

// put adds a summary in place of an older one of the same node.
func (o *outbox) put(id string, message []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = slices.DeleteFunc(o.list, func(p parcel) bool { return p.id == id })
	o.list = slices.Insert(o.list, 0, parcel{id: id, message: message})
}

// take returns messages that fit in a packet with limit bytes left, where each
// takes overhead more.
func (o *outbox) take(overhead, limit int) [][]byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out [][]byte
	for i := range o.list {
		p := &o.list[i]
		if need := overhead + len(p.message); need <= limit {
			limit -= need
			p.sent++
			out = append(out, p.message)
		}
	}
	if out != nil {
		most := timesPassedOn(o.members())
		o.list = slices.DeleteFunc(o.list, func(p parcel) bool { return p.sent >= most })
		slices.SortStableFunc(o.list, func(a, b parcel) int { return cmp.Compare(a.sent, b.sent) })
	}
	return out
}

// timesPassedOn is how often a node passes a summary on: enough that it reaches
// all but a few in a thousand, which the next one does.
func timesPassedOn(members int) int {
	return int(math.Ceil(summaryMult*math.Log10(float64(members)+1) + 1))
}
