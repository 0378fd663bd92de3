// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package console keeps the serial console of one running VM: it reads QEMU's
// socket without pause, remembers the last HistoryBytes, and serves any number
// of readers and writers.
//
// Guarantees:
//   - The socket is read whether or not anybody looks, so QEMU is never held up
//     as long as the daemon runs.
//   - A reader gets history and what follows without a gap in between. A reader
//     that leaves QueuedChunks unread is cut off: it gets CutOff as its last
//     chunk and its channel is closed. Others notice nothing.
//   - When QEMU ends, all channels are closed after their last bytes.
//   - After a restart of the daemon the history comes from the copy that QEMU
//     writes to a file; the file is trimmed above MaxLogBytes.
//
// Non-guarantees: output that QEMU produced while no daemon ran is in the
// history, but a few bytes around the restart may be doubled if the guest goes on
// printing at that moment, as may be around a trimming of the file. While the daemon is stopped (not killed)
// the socket's buffer, about 200 KiB, fills up and then the guest's serial port
// waits.
//
// Goroutines: one reader per Console, ended by Close or by the end of QEMU.
package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits.
const (
	// HistoryBytes is the size of the ring.
	HistoryBytes = 256 << 10
	// MaxLogBytes is the size above which QEMU's copy is trimmed.
	MaxLogBytes = 4 << 20
	// QueuedChunks is what one reader may leave unread.
	QueuedChunks = 256
	// MaxReaders bounds the readers of one console.
	MaxReaders = 64
	// MaxWriteBytes bounds one Write.
	MaxWriteBytes = 64 << 10
	// ConnectTimeout bounds the connection to QEMU's socket.
	ConnectTimeout = 5 * time.Second
	// settle is how long QEMU may take from the socket to the file.
	settle    = 50 * time.Millisecond
	chunkSize = 4 << 10
)

// CutOff is the last chunk of a reader that was too slow.
var CutOff = []byte("\r\n[muster: this reader was too slow and was cut off; connect again]\r\n")

// ErrEnded: QEMU or the console has ended.
var ErrEnded = errors.New("the VM's console has ended")

// Console is one VM's. All methods may be called from any goroutine.
type Console struct {
	conn    net.Conn
	logPath string
	log     *slog.Logger
	write   chan struct{} // one token: who takes it may write
	done    chan struct{}

	mu    sync.Mutex
	ring  ring
	subs  map[*reader]struct{}
	ended bool
}

type reader struct{ ch chan []byte }

// Open connects to the socket of a running QEMU and begins to read. logPath is
// the file that QEMU copies the output to, pid the process that must listen at the
// socket, 0 for any.
func Open(ctx context.Context, socket string, pid int, logPath string, log *slog.Logger) (*Console, error) {
	ctx, cancel := context.WithTimeout(ctx, ConnectTimeout)
	defer cancel()
	conn, err := access.Dial(ctx, socket, pid)
	if err != nil {
		return nil, fmt.Errorf("connect to the serial console: %w", err)
	}
	c := &Console{
		conn: conn, logPath: logPath, log: log,
		write: make(chan struct{}, 1), done: make(chan struct{}), subs: map[*reader]struct{}{},
	}
	old, end, err := tail(logPath, HistoryBytes)
	if err != nil {
		log.Warn("console history of an earlier run is lost", "err", err)
	}
	c.ring.write(old)
	go func() { // it carries what the guest prints, so a bug there ends this console only
		if err := contain.Do(func() { c.read(old, end) }); err != nil {
			log.Error("serial console ended", "err", err)
		}
	}()
	return c, nil
}

// read runs until the socket ends. What QEMU prints after the connection is in the file,
// too, so the first of it may be the end of old, which the file had up to end.
func (c *Console) read(old []byte, end int64) {
	defer c.end()
	buf := make([]byte, chunkSize)
	for first := true; ; first = false {
		n, err := c.conn.Read(buf)
		chunk := buf[:n]
		if first {
			chunk = chunk[c.doubled(old, end, chunk):]
		}
		c.publish(chunk)
		if err != nil {
			return
		}
	}
}

// doubled is how much of the first chunk is in old: what has come to the file since is
// not. QEMU writes to the socket a moment before it does to the file.
func (c *Console) doubled(old []byte, end int64, chunk []byte) int {
	n := len(chunk)
	for again := false; n > 0; again = true {
		st, err := os.Stat(c.logPath)
		if err != nil || st.Size() < end { // it was trimmed
			return overlap(old, chunk)
		}
		n = max(0, len(chunk)-int(min(st.Size()-end, int64(len(chunk)))))
		if again {
			break
		}
		time.Sleep(settle)
	}
	if n > len(old) || !bytes.Equal(old[len(old)-n:], chunk[:n]) {
		return overlap(old, chunk)
	}
	return n
}

// overlap returns how much of the begin of b is the end of a.
func overlap(a, b []byte) int {
	for n := min(len(a), len(b)); n > 0; n-- {
		if string(a[len(a)-n:]) == string(b[:n]) {
			return n
		}
	}
	return 0
}

func (c *Console) publish(p []byte) {
	if len(p) == 0 {
		return
	}
	chunk := append([]byte(nil), p...) // shared by all readers, changed by none
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ring.write(chunk)
	for r := range c.subs {
		if len(r.ch) < QueuedChunks {
			r.ch <- chunk
			continue
		}
		r.ch <- CutOff // the channel has room for one more than the queue
		close(r.ch)
		delete(c.subs, r)
	}
}

func (c *Console) end() {
	_ = c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	for r := range c.subs {
		close(r.ch)
		delete(c.subs, r)
	}
	close(c.done)
}

// Close ends the console and waits for its goroutine. QEMU goes on.
func (c *Console) Close() {
	_ = c.conn.Close()
	<-c.done
}

// Done is closed when the console has ended.
func (c *Console) Done() <-chan struct{} { return c.done }

// Subscribe returns a channel that first gives the last history bytes, at most
// HistoryBytes, and then what the guest writes, until QEMU ends. The chunks
// must not be changed. cancel may be called more than once.
func (c *Console) Subscribe(history int) (out <-chan []byte, cancel func(), err error) {
	r := &reader{ch: make(chan []byte, QueuedChunks+1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil, nil, api.Errorf(api.CodeRefused, "%w", ErrEnded)
	}
	if len(c.subs) >= MaxReaders {
		return nil, nil, api.Errorf(api.CodeRefused, "the console has %d readers, which is the limit; close one", MaxReaders)
	}
	if h := c.ring.last(history); len(h) > 0 {
		r.ch <- h
	}
	c.subs[r] = struct{}{}
	return r.ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if _, ok := c.subs[r]; ok {
			delete(c.subs, r)
			close(r.ch)
		}
	}, nil
}

// History returns the last n bytes, at most HistoryBytes.
func (c *Console) History(n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ring.last(n)
}

// Write types p on the console, at most MaxWriteBytes, and returns when QEMU
// has taken it or the context ends; then a part may have been typed.
func (c *Console) Write(ctx context.Context, p []byte) error {
	if len(p) > MaxWriteBytes {
		return api.Errorf(api.CodeTooLarge, "console input of %d bytes; at most %d at once", len(p), MaxWriteBytes)
	}
	select {
	case c.write <- struct{}{}:
		defer func() { <-c.write }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return api.Errorf(api.CodeRefused, "%w", ErrEnded)
	}
	if err := c.conn.SetWriteDeadline(time.Time{}); err != nil {
		return api.Errorf(api.CodeRefused, "%w", ErrEnded)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	_, err := c.conn.Write(p)
	if !stop() {
		<-interrupted
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("write to the console: %w", context.Cause(ctx))
	}
	return api.Errorf(api.CodeRefused, "%w", ErrEnded)
}

// Trim shortens QEMU's copy to the history if it is over MaxLogBytes. QEMU
// appends, so that it goes on at the new end.
func Trim(logPath string) error {
	st, err := os.Stat(logPath)
	if errors.Is(err, os.ErrNotExist) || err == nil && st.Size() <= MaxLogBytes {
		return nil
	}
	if err != nil {
		return err
	}
	keep, _, err := tail(logPath, HistoryBytes)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(logPath, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.Write(keep)
	}
	return errors.Join(err, f.Close())
}

// tail returns the last n bytes of a file, nothing if it does not exist, and the place
// after them.
func tail(path string, n int64) (b []byte, end int64, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	from := max(0, st.Size()-n)
	b, err = io.ReadAll(io.NewSectionReader(f, from, n))
	return b, from + int64(len(b)), err
}
