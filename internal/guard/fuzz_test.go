// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"context"
	"net"
	"testing"
	"time"
)

// Whatever the other end of the socket says, the client answers its callers and
// ends; it neither hangs nor panics.
func FuzzClientReads(f *testing.F) {
	f.Add([]byte(`{"id":1,"deadline_ns":5}` + "\n"))
	f.Add([]byte(`{"event":"exit","vm":"a","pid":7}` + "\n" + `{"id":1,"code":"lapsed","error":"too late"}` + "\n"))
	f.Add([]byte(`{"id":0,"code":"busy","error":"full"}` + "\n"))
	f.Add([]byte("{\n\x00\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		here, there := net.Pipe()
		c := &Client{c: here, events: make(chan Event, eventBuffer), done: make(chan struct{}), pending: map[uint64]chan []byte{}}
		go c.read()
		go func() {
			buf := make([]byte, 512)
			_, _ = there.Read(buf) // the request
			_ = there.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = there.Write(said)
			_ = there.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, _ = c.Extend(ctx, 1, 2)
		if ctx.Err() != nil {
			t.Fatal("the caller was not answered")
		}
		_ = c.Close()
		if c.Err() == nil {
			t.Fatal("the connection is gone and the client does not say so")
		}
	})
}
