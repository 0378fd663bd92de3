// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"sync"
	"time"
)

// What a QEMU says may ask for this many looks at its VM at once, and then for one in
// each such time. A guest can make QEMU say something ten thousand times in a second.
const (
	wakeBurst = 50
	wakePause = 100 * time.Millisecond
)

// waker lets a burst pass at once, and of a flood what is due. What it holds back comes
// in time: the last word always leads to a look after it.
type waker struct {
	mu    sync.Mutex
	spent time.Duration // of the burst, less each moment
	at    time.Time
	armed bool
}

func (w *waker) wake(do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.spent = max(w.spent-now.Sub(w.at), 0)
	w.at = now
	switch {
	case w.armed:
	case w.spent < wakeBurst*wakePause:
		w.spent += wakePause
		do()
	default:
		w.armed = true
		time.AfterFunc(wakePause, func() {
			w.mu.Lock()
			w.armed = false
			w.spent += wakePause
			w.mu.Unlock()
			do()
		})
	}
}
