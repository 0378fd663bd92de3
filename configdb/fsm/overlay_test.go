// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"sync"
	"testing"
)

// Requests that decide at the same time do so on the same view.
func TestOneViewCanBeChangedByManyAtOnce(t *testing.T) {
	v := New().View()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				w := v.With([]Op{{Key: "a", Value: []byte("b")}})
				if _, ok := w.Get("a"); !ok {
					t.Error("the change is not in the view after it")
				}
				if _, ok := v.Get("a"); ok {
					t.Error("the change is in the view before it")
				}
			}
		})
	}
	wg.Wait()
}
