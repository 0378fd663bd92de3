// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/internal/contain"
)

// Values of the transmission: "Request message", "Simple reply message", "Command
// flags", "Request types".
const (
	magicRequest = 0x25609513
	magicSimple  = 0x67446698

	commandFUA = 1 << 0

	commandRead  = 0
	commandWrite = 1
	commandDisc  = 2

	requestHead = 28
	replyHead   = 16
)

// Limits of a connection.
const (
	// MaxBytes of one read or write.
	MaxBytes = 1 << 20
	// maxUnderWay requests may wait for their replies.
	maxUnderWay = 64
	// leaveTime bounds the farewell.
	leaveTime = 100 * time.Millisecond
)

// ErrClosed is the end of a connection by Close.
var ErrClosed = errors.New("the connection to the NBD server was closed")

// Conn is one to an export. Its methods may be called at the same time.
type Conn struct {
	c    net.Conn
	size uint64

	sending sync.Mutex

	mu      sync.Mutex
	cookie  uint64
	waiting map[uint64]*request
	err     error // why it ended
	ended   chan struct{}
}

// request waits for its reply.
type request struct {
	want int // bytes that come with it
	data []byte
	err  error
	done chan struct{}
}

func newConn(c net.Conn, size uint64) *Conn {
	n := &Conn{c: c, size: size, waiting: map[uint64]*request{}, ended: make(chan struct{})}
	go func() {
		defer close(n.ended)
		n.fail(contain.Call(n.receive))
	}()
	return n
}

// Size of the export in bytes.
func (n *Conn) Size() uint64 { return n.size }

// Read reads bytes at an offset, at most MaxBytes, all or an error.
func (n *Conn) Read(ctx context.Context, offset uint64, bytes int) ([]byte, error) {
	data, err := n.ask(ctx, commandRead, 0, offset, bytes, nil)
	if err != nil {
		return nil, fmt.Errorf("read %d bytes at %d of an NBD export: %w", bytes, offset, err)
	}
	return data, nil
}

// Write writes data at an offset, at most MaxBytes. When it returns nil they are on
// stable storage (NBD_CMD_FLAG_FUA).
func (n *Conn) Write(ctx context.Context, offset uint64, data []byte) error {
	if _, err := n.ask(ctx, commandWrite, commandFUA, offset, len(data), data); err != nil {
		return fmt.Errorf("write %d bytes at %d of an NBD export: %w", len(data), offset, err)
	}
	return nil
}

// Close takes leave of the server (NBD_CMD_DISC) and ends the connection.
func (n *Conn) Close() {
	n.mu.Lock()
	if n.err == nil {
		n.err = ErrClosed // before the server answers the farewell by its own end
	}
	n.mu.Unlock()
	_ = n.c.SetWriteDeadline(time.Now().Add(leaveTime)) // also of who sends now
	n.sending.Lock()
	_ = n.c.SetWriteDeadline(time.Now().Add(leaveTime))
	_, _ = n.c.Write(message(commandDisc, 0, 0, 0, 0, nil))
	n.sending.Unlock()
	n.fail(ErrClosed)
	<-n.ended
}

// ask sends a request and waits for its reply.
func (n *Conn) ask(ctx context.Context, command, flags uint16, offset uint64, bytes int, data []byte) ([]byte, error) {
	if bytes <= 0 || bytes > MaxBytes || offset > n.size || uint64(bytes) > n.size-offset {
		return nil, fmt.Errorf("it has %d bytes, and one request at most %d", n.size, MaxBytes)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	r := &request{done: make(chan struct{})}
	if command == commandRead {
		r.want = bytes
	}
	cookie, err := n.enter(r)
	if err != nil {
		return nil, err
	}
	if err := n.send(ctx, message(command, flags, cookie, offset, uint32(bytes), data)); err != nil { //nolint:gosec // at most MaxBytes
		n.fail(fmt.Errorf("send a request: %w", err)) // the server may have half of it
	}
	select {
	case <-r.done:
		return r.data, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// enter gives a request its cookie.
func (n *Conn) enter(r *request) (cookie uint64, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.err != nil:
		return 0, n.err
	case len(n.waiting) >= maxUnderWay:
		return 0, fmt.Errorf("%d requests wait for their replies", len(n.waiting))
	}
	n.cookie++
	n.waiting[n.cookie] = r
	return n.cookie, nil
}

func (n *Conn) send(ctx context.Context, message []byte) error {
	n.sending.Lock()
	defer n.sending.Unlock()
	deadline, _ := ctx.Deadline() // none: no time
	if err := n.c.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := n.c.Write(message)
	return err
}

func message(command, flags uint16, cookie, offset uint64, bytes uint32, data []byte) []byte {
	b := make([]byte, 0, requestHead+len(data))
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	b = binary.BigEndian.AppendUint32(b, bytes)
	return append(b, data...)
}

// receive takes replies in until the connection ends.
func (n *Conn) receive() error {
	var head [replyHead]byte
	for {
		if _, err := io.ReadFull(n.c, head[:]); err != nil {
			return fmt.Errorf("the NBD server ended the connection: %w", err)
		}
		if magic := binary.BigEndian.Uint32(head[:]); magic != magicSimple {
			return fmt.Errorf("a reply begins with %#x", magic)
		}
		r := n.leave(binary.BigEndian.Uint64(head[8:]))
		if r == nil {
			return errors.New("a reply to what was not asked")
		}
		if code := binary.BigEndian.Uint32(head[4:]); code != 0 {
			r.err = serverError(code)
		} else if r.want > 0 {
			data := make([]byte, r.want)
			if _, err := io.ReadFull(n.c, data); err != nil {
				r.err = fmt.Errorf("the NBD server ended the connection: %w", err)
				close(r.done)
				return r.err
			}
			r.data = data
		}
		close(r.done)
	}
}

// leave returns the request of a cookie, which waits no longer; nil if there is none.
func (n *Conn) leave(cookie uint64) *request {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.waiting[cookie]
	delete(n.waiting, cookie)
	return r
}

// fail ends the connection and all that waits.
func (n *Conn) fail(why error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err == nil {
		n.err = why
	}
	for cookie, r := range n.waiting {
		delete(n.waiting, cookie)
		r.err = n.err
		close(r.done)
	}
	_ = n.c.Close()
}

// serverError is one of "Error values", which are those of Linux; others count as EINVAL.
func serverError(code uint32) error {
	errno := syscall.EINVAL
	switch e := syscall.Errno(code); e {
	case syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC, syscall.EOVERFLOW, syscall.ENOTSUP, syscall.ESHUTDOWN:
		errno = e
	}
	return fmt.Errorf("the NBD server answers: %w", errno)
}
