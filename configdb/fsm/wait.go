// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

// wakeEvery is after how many changes everybody who waits looks, also who waits
// for other keys: a position that nothing moved would fall behind the ring,
// which keeps HistoryLength changes at least.
const wakeEvery = HistoryLength / 4

// waiters are those who wait for a change below one prefix. An entry wakes only
// whom it concerns: a thousand watchers of a thousand objects would otherwise
// all look at every entry, and the writers wait for the processor.
type waiters struct {
	changed chan struct{}
	n       int
}

// prefixes are the waiters, and how many prefixes there are of each length: a
// key concerns at most one of each.
type prefixes struct {
	waiting map[string]*waiters
	lengths map[int]int
	unseen  int // changes since everybody was woken
}

func (p *prefixes) init() { p.waiting, p.lengths = map[string]*waiters{}, map[int]int{} }

func (p *prefixes) join(prefix string) *waiters {
	w := p.waiting[prefix]
	if w == nil {
		w = &waiters{changed: make(chan struct{})}
		p.waiting[prefix] = w
		p.lengths[len(prefix)]++
	}
	w.n++
	return w
}

// leave forgets one who no longer waits, unless all of them were woken before.
func (p *prefixes) leave(prefix string, w *waiters) {
	if p.waiting[prefix] != w {
		return
	}
	if w.n--; w.n == 0 {
		p.drop(prefix)
	}
}

func (p *prefixes) drop(prefix string) {
	delete(p.waiting, prefix)
	if p.lengths[len(prefix)]--; p.lengths[len(prefix)] == 0 {
		delete(p.lengths, len(prefix))
	}
}

func (p *prefixes) wake(keys map[string]bool) {
	if p.unseen += len(keys); p.unseen >= wakeEvery {
		p.wakeAll()
		return
	}
	for k := range keys {
		for n := range p.lengths {
			if n > len(k) {
				continue
			}
			if w := p.waiting[k[:n]]; w != nil {
				close(w.changed)
				p.drop(k[:n])
			}
		}
	}
}

func (p *prefixes) wakeAll() {
	for _, w := range p.waiting {
		close(w.changed)
	}
	p.init()
	p.unseen = 0
}

// Await returns a channel that is closed with the next applied entry that
// changes a key below prefix; now and then it is closed although none did.
// Whoever no longer waits calls stop.
func (s *State) Await(prefix string) (changed <-chan struct{}, stop func()) {
	f := &s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.prefixes.join(prefix)
	return w.changed, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.prefixes.leave(prefix, w)
	}
}
