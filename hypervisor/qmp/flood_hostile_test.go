// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A QEMU that a guest has taken over, or makes speak, may send events as fast as this
// daemon reads them: it took a whole processor for one VM.
func TestFloodIsReadAtItsRate(t *testing.T) {
	for name, line := range map[string]string{
		"events":                      `{"timestamp":{"seconds":1,"microseconds":2},"event":"DEVICE_TRAY_MOVED","data":{}}` + "\n",
		"replies nobody asked for":    `{"return": {}, "id": 4711}` + "\n",
		"events as large as they get": `{"event":"X","data":{"a":"` + strings.Repeat("x", MaxEventBytes-200) + `"}}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, p := pair(t)
			var said atomic.Int64
			began := time.Now()
			go func() {
				for {
					if _, err := io.WriteString(p.Conn, line); err != nil {
						return
					}
					said.Add(int64(1 + len(line)>>10))
				}
			}()
			for time.Since(began) < 2*time.Second {
				time.Sleep(100 * time.Millisecond) // the measure is of time itself
			}
			_ = c.Disconnect()
			// The socket's buffers hold some, too.
			most := FloodBurst + FloodPerSec*int64(time.Since(began)/time.Second+1) + 1<<20/int64(len(line)) + 64
			if n := said.Load(); n > most {
				t.Errorf("%d units were taken within %v; at most %d", n, time.Since(began), most)
			}
		})
	}
}

// An event becomes maps and strings, which take many times its bytes.
func TestLargeEventEndsTheConnection(t *testing.T) {
	c, p := pair(t)
	go func() {
		_, _ = io.WriteString(p.Conn, `{"event":"X","data":{"a":"`+strings.Repeat("x", MaxEventBytes)+`"}}`+"\n")
	}()
	<-c.Done()
	if err := c.Err(); !errors.Is(err, ErrProtocol) {
		t.Error(err)
	}
}
