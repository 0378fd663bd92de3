// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/storetest"
	"github.com/muster-vm/muster/internal/greeting"
)

// FuzzStreamHello is another node that opens a stream with any words: it gets one
// line that refuses, or the end of the connection, and nothing is opened for it.
func FuzzStreamHello(f *testing.F) {
	id := api.NewID()
	f.Add([]byte(`{"vm":"` + id + `","task":"` + id + `","purpose":"memory"}` + "\n"))
	f.Add([]byte(`{"vm":"../../etc","task":"","purpose":"disk"}` + "\n"))
	f.Add([]byte(`{"purpose":7}` + "\n"))
	f.Add([]byte("\n"))
	f.Add([]byte(strings.Repeat("x", 2*greeting.MaxLine)))
	db := storetest.New(f)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		h := &Hypervisor{cfg: Config{DB: db, NodeID: "n1", NodeName: "m1", RunDir: dir}, log: slog.New(slog.DiscardHandler), instances: map[string]*instance{}}
		near, far := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.ServeStream(t.Context(), far, "n2")
		}()
		go func() {
			_, _ = near.Write(append(b, '\n')) // a line that ends: it needs no deadline
		}()
		answer, _ := io.ReadAll(near)
		<-done
		_ = near.Close()
		if strings.HasPrefix(string(answer), streamOK) || strings.Count(string(answer), "\n") > 1 {
			t.Fatalf("%q was answered with %q", b, answer)
		}
	})
}
