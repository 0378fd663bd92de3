// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package feature_test

import (
	"fmt"
	"testing"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
	"github.com/muster-vm/muster/configdb/fsm"
)

// world is a database whose cluster object is put as text.
type world struct {
	t     *testing.T
	state *fsm.State
}

func (w *world) put(key, value string) {
	w.t.Helper()
	op := fsm.Op{Key: key, Value: []byte(value), Delete: value == ""}
	c := fsm.Command{Txns: []fsm.Txn{{Ops: []fsm.Op{op}}}}
	if _, err := w.state.Apply(w.state.View().Revision()+1, 1, c.Encode()); err != nil {
		w.t.Fatal(err)
	}
}

func TestLevelOfAView(t *testing.T) {
	w := &world{t, fsm.New()}
	var r feature.Reader
	key := configdb.Clusters.SpecKey("c1")
	check := func(what string, level int, history bool) {
		t.Helper()
		v := w.state.View()
		for range 2 { // the second answer is remembered
			if feature.Level(v) != level || r.Level(v) != level {
				t.Errorf("%s: level %d, the reader says %d; want %d", what, feature.Level(v), r.Level(v), level)
			}
			if feature.History.InForce(v) != history || feature.History.At(r.Level(v)) != history {
				t.Errorf("%s: a history is %v, want %v", what, feature.History.InForce(v), history)
			}
		}
	}
	founding := feature.History.Level() <= feature.Supported().Max
	check("no cluster", 0, founding)
	w.put("muster/spec/clusters/c1", `{"spec":{"featureLevel":9}}`)
	w.put("muster/spec/node/n1", `{"spec":{"featureLevel":9}}`)
	check("other keys", 0, founding)
	w.put(key, `{"schema":1,"spec":{"life":1}}`)
	check("founded before there were levels", 1, false)
	w.put(key, `{"schema":1,"spec":{"featureLevel":1,"life":1}}`)
	check("level 1", 1, false)
	w.put(key, `{"schema":1,"spec":{"featureLevel":2}}`)
	check("raised", 2, true)
	w.put("other", "x")
	check("something else changed", 2, true)
	w.put(key, `{"schema":1,"spec":{"featureLevel":3}}`)
	check("raised again", 3, true)
	w.put(key, `damaged`)
	check("cannot be read", 1, false)
	w.put(key, "")
	check("gone", 0, founding)
}

func TestUnknownFeaturesAreNeverInForce(t *testing.T) {
	w := &world{t, fsm.New()}
	w.put(configdb.Clusters.SpecKey("c1"), fmt.Sprintf(`{"spec":{"featureLevel":%d}}`, 1<<40))
	if feature.Feature("tomorrow").InForce(w.state.View()) {
		t.Error("a feature that the table does not have is in force")
	}
}
