// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"bufio"
	"io"
	"net"
	"os"
)

// postCopy is a migration whose guest goes before the last of its memory: the
// source sends one line, "devices", at the switch and one, "rest", when the test
// says so. A connection that breaks between them leaves both ends paused until
// they are connected anew, as with QEMU 7.2.
type postCopy struct {
	wanted  chan struct{}     // closed by migrate-start-postcopy
	rest    chan struct{}     // closed by Rest
	resumed chan string       // paths of migrate with resume
	again   chan net.Listener // of migrate-recover
	waits   bool              // for a connection, after migrate-recover
	mute    bool              // it never says that all has been sent
}

func newPostCopy() postCopy {
	return postCopy{wanted: make(chan struct{}), rest: make(chan struct{}), resumed: make(chan string, 1), again: make(chan net.Listener, 1)}
}

// Rest lets the last of the memory go.
func (q *QEMU) Rest() {
	q.mu.Lock()
	defer q.mu.Unlock()
	close(q.mig.post.rest)
}

// RestUnsaid is Rest for a QEMU that does not say that all has been sent.
func (q *QEMU) RestUnsaid() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mig.post.mute = true
	close(q.mig.post.rest)
}

// Passes sets how often the memory is said to have been gone through.
func (q *QEMU) Passes(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.passes = n
}

// startPostCopy carries out migrate-start-postcopy, under mu.
func (q *QEMU) startPostCopy() string {
	if q.mig.status != "active" {
		return jobRefusal("Start postcopy of a migration that is " + q.mig.status)
	}
	if q.state == "paused" {
		q.mig.was = "postmigrate" // where it stands after a failure
	}
	close(q.mig.post.wanted)
	return `"return": {}`
}

// recoverPostCopy carries out migrate-recover, under mu.
func (q *QEMU) recoverPostCopy(path string) string {
	if q.mig.status != "postcopy-paused" {
		return jobRefusal("Migrate recover can only be run when postcopy is paused.")
	}
	if n := len(q.listen); q.mig.post.waits {
		_ = q.listen[n-1].Close() // that of the recovery before
	}
	_ = os.Remove(path) // as QEMU does
	ln, err := net.Listen("unix", path)
	if err != nil {
		return jobRefusal(err.Error())
	}
	q.listen, q.mig.post.waits = append(q.listen, ln), true
	q.mig.post.again <- ln
	return `"return": {}`
}

// resumePostCopy carries out migrate with resume, under mu.
func (q *QEMU) resumePostCopy(path string) string {
	if q.mig.status != "postcopy-paused" {
		return jobRefusal("Cannot resume if there is no paused migration")
	}
	q.mig.post.resumed <- path
	return `"return": {}`
}

// hangUp is closed when the other end has.
func hangUp(c net.Conn) <-chan struct{} {
	gone := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, c); close(gone) }()
	return gone
}

// sendRest plays the source from the switch on, under mu.
func (q *QEMU) sendRest(c net.Conn, gone <-chan struct{}) {
	post := q.mig.post
	for {
		q.setMigration("postcopy-active")
		q.mu.Unlock()
		broken := false
		select {
		case <-gone:
			broken = true
		case <-post.rest:
		}
		q.mu.Lock()
		if q.ended {
			_ = c.Close()
			return
		}
		if !broken {
			_, err := io.WriteString(c, "rest\n")
			broken = err != nil
		}
		_ = c.Close()
		if !broken && q.mig.post.mute {
			return
		}
		if !broken {
			q.setState("postmigrate")
			q.setMigration("completed")
			return
		}
		q.setMigration("postcopy-paused")
		for again := false; !again; {
			q.mu.Unlock()
			path := <-post.resumed
			next, err := net.Dial("unix", path)
			q.mu.Lock()
			if again = err == nil; again {
				c, gone = next, hangUp(next)
			}
		}
	}
}

// receiveRest plays the target from the switch on.
func (q *QEMU) receiveRest(c net.Conn, r *bufio.Reader) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended {
		return
	}
	q.mig.post = newPostCopy()
	q.setState("paused")
	for {
		q.setMigration("postcopy-active")
		q.mu.Unlock()
		line, err := r.ReadString('\n')
		_ = c.Close()
		q.mu.Lock()
		if q.ended {
			return
		}
		if err == nil && line == "rest\n" {
			q.setMigration("completed")
			return
		}
		q.setMigration("postcopy-paused")
		again := q.mig.post.again
		for err = net.ErrClosed; err != nil && !q.ended; {
			q.mu.Unlock()
			ln := <-again
			c, err = ln.Accept()
			q.mu.Lock()
		}
		if q.ended {
			return
		}
		q.mig.post.waits = false
		r = bufio.NewReader(c)
	}
}
