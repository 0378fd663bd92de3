// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// BenchmarkTenThousandVMs measures a page of 100, a page found by a field of
// the last VMs, and one object, at the size that the budgets name.
func BenchmarkTenThousandVMs(b *testing.B) {
	db := storetest.New(b)
	const vms = 10_000
	for i := range vms {
		vm := api.VM{Meta: api.NewMeta(api.KindVM, "", fmt.Sprintf("vm%d", i)), Spec: api.VMSpec{Disks: []api.VMDisk{{Volume: "v"}}}}
		if err := vm.Prepare(); err != nil {
			b.Fatal(err)
		}
		vm.Status = api.VMStatus{Phase: api.VMRunning, Node: "m1", Epoch: 1, ObservedGeneration: 1}
		tx := &configdb.Txn{}
		if err := configdb.VMs.Create(tx, &vm); err != nil {
			b.Fatal(err)
		}
		if _, err := db.Txn(b.Context(), tx); err != nil {
			b.Fatal(err)
		}
	}
	c := &fakeCluster{}
	s, err := New(Config{
		Node: func() string { return "m1" }, DB: func() (configdb.DB, bool) { return db, true }, Bootstrap: c, Cluster: c, Authority: c, Placer: &fakePlacer{},
		Images: nodeImages{}, Consoles: &fakeConsoles{}, Peers: fakePeers{}, Services: func() []api.ServiceStatus { return nil }, PeerName: func(*http.Request) (string, bool) { return "", false },
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		b.Fatal(err)
	}
	h := s.LocalHandler()
	for _, bm := range []struct{ name, path string }{
		{"page of 100", "vms?limit=100"}, {"one", "vms/vm9999"}, {"by field", "vms?fields=meta.name=vm9999"},
	} {
		b.Run(bm.name, func(b *testing.B) {
			for b.Loop() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequestWithContext(b.Context(), "GET", base+bm.path, nil))
				if w.Code != 200 {
					b.Fatalf("%d %s", w.Code, w.Body)
				}
			}
		})
	}
}
