// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// logQueue bounds the log lines waiting to be written.
	logQueue = 1024
	// logFlushWait bounds the wait for the last lines at exit.
	logFlushWait = time.Second
)

// logWriter makes log writes non-blocking: stderr may be a pipe to a stopped
// process or a file on dead storage, and no kill may wait for it. When the queue
// is full, lines are dropped and counted. It owns one goroutine until close.
type logWriter struct {
	out   io.Writer
	lines chan []byte
	done  chan struct{}

	mu      sync.Mutex
	closed  bool
	dropped int
}

// newLogWriter returns a writer that passes whole lines on to out.
func newLogWriter(out io.Writer) *logWriter {
	w := &logWriter{out: out, lines: make(chan []byte, logQueue), done: make(chan struct{})}
	go w.run()
	return w
}

func (w *logWriter) run() {
	defer close(w.done)
	for line := range w.lines {
		w.mu.Lock()
		n := w.dropped
		w.dropped = 0
		w.mu.Unlock()
		if n > 0 {
			_, _ = fmt.Fprintf(w.out, "guard: %d log lines dropped\n", n)
		}
		_, _ = w.out.Write(line) // nowhere to report a failing log
	}
}

// Write queues one line (slog writes whole lines). It never blocks and never fails.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return len(line), nil
	}
	select {
	case w.lines <- append([]byte(nil), line...):
	default:
		w.dropped++
	}
	return len(line), nil
}

// close writes what is queued, for a second at most.
func (w *logWriter) close() {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return
	}
	w.closed = true
	close(w.lines)
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-time.After(logFlushWait):
	}
}
