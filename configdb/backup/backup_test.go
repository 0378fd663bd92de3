// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backup

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/pki"
)

var key = bytes.Repeat([]byte{5}, pki.ClusterKeyBytes)

func withKey(*Header) ([]byte, error) { return key, nil }

// someState has a cluster, two nodes, a user's key and a receiver whose address
// is a secret by itself.
func someState(t testing.TB) *fsm.State {
	t.Helper()
	state := fsm.New()
	db := configdb.NewOffline(state, 3)
	tx := &configdb.Txn{Actor: "test"}
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "prod"), Spec: api.ClusterSpec{CACert: "PEM", SealedCAKey: []byte{1}, Life: 2}}
	err := configdb.Clusters.Create(tx, &c)
	for _, name := range []string{"n1", "n2"} {
		n := api.Node{Meta: api.NewMeta(api.KindNode, "", name), Spec: api.NodeSpec{Address: name + ":7600"}}
		err = errors.Join(err, configdb.Nodes.Create(tx, &n))
	}
	r := api.Receiver{Meta: api.NewMeta(api.KindReceiver, "", "hook"), Spec: api.ReceiverSpec{Type: api.ReceiverWebhook, Address: "https://hooks.example.org/SECRET-PATH"}}
	err = errors.Join(err, configdb.Receivers.Create(tx, &r))
	tx.Put("notes/free", []byte("text"))
	if err == nil {
		_, err = db.Txn(context.Background(), tx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func source(state *fsm.State) Source {
	return Source{Snapshot: state.Snapshot(), Node: "n1", Version: "0.1", Time: time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC)}
}

func all(v *configdb.View) map[string]configdb.Entry {
	out := map[string]configdb.Entry{}
	for e := range v.Scan("", "") {
		out[e.Key] = e
	}
	return out
}

func TestAStateComesBackWhole(t *testing.T) {
	state := someState(t)
	var b bytes.Buffer
	wrote, err := Write(&b, source(state), key, "")
	if err != nil {
		t.Fatal(err)
	}
	if h, _, err := backupfile.Verify(bytes.NewReader(b.Bytes())); err != nil || !reflect.DeepEqual(h, wrote) {
		t.Fatalf("verified %+v, wrote %+v, %v", h, wrote, err)
	}
	back, h, err := Read(bytes.NewReader(b.Bytes()), withKey)
	if err != nil {
		t.Fatal(err)
	}
	v, w := state.View(), back.View()
	if !reflect.DeepEqual(all(v), all(w)) || v.Revision() != w.Revision() || v.Term() != w.Term() || v.Time() != w.Time() {
		t.Errorf("the state is another one: %d and %d keys", v.Len(), w.Len())
	}
	objects := map[api.Kind]int{api.KindCluster: 1, api.KindNode: 2, api.KindReceiver: 1}
	if h.Cluster != "prod" || h.Life != 2 || h.Revision != v.Revision() || h.Term != 3 || h.Keys != v.Len() || h.Bytes != v.Bytes() ||
		!maps.Equal(h.Objects, objects) || !slices.Equal(h.Nodes, []string{"n1", "n2"}) || h.Stale || h.Slot != nil || h.Time.Nanosecond() != 0 {
		t.Errorf("header %+v", h)
	}
	if bytes.Contains(b.Bytes(), []byte("SECRET-PATH")) || bytes.Contains(b.Bytes(), []byte("notes/free")) {
		t.Error("the content is readable")
	}
}

func TestAPassphraseCarriesTheKey(t *testing.T) {
	var b bytes.Buffer
	src := source(someState(t))
	src.Stale, src.Age = true, 90*time.Second
	const words = "correct horse battery"
	if _, err := Write(&b, src, key, words); err != nil {
		t.Fatal(err)
	}
	_, h, err := Read(bytes.NewReader(b.Bytes()), func(h *Header) ([]byte, error) { return h.Slot.Open(words) })
	if err != nil || !h.Stale || h.StaleSeconds != 90 {
		t.Errorf("%+v, %v", h, err)
	}
	if _, _, err := Read(bytes.NewReader(b.Bytes()), func(h *Header) ([]byte, error) { return h.Slot.Open("another phrase") }); !errors.Is(err, backupfile.ErrKey) {
		t.Errorf("a wrong pass phrase: %v", err)
	}
	if _, err := Write(&b, src, key, "short"); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("a short pass phrase: %v", err)
	}
}

func TestOnlyTheStateOfOneClusterIsBackedUp(t *testing.T) {
	if _, err := Write(&bytes.Buffer{}, source(fsm.New()), key, ""); err == nil || !strings.Contains(err.Error(), "0 clusters") {
		t.Errorf("an empty state: %v", err)
	}
	state := someState(t)
	tx := &configdb.Txn{}
	c := api.Cluster{Meta: api.NewMeta(api.KindCluster, "", "second")}
	if err := configdb.Clusters.Create(tx, &c); err != nil {
		t.Fatal(err)
	}
	if _, err := configdb.NewOffline(state, 3).Txn(context.Background(), tx); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(&bytes.Buffer{}, source(state), key, ""); err == nil || !strings.Contains(err.Error(), "2 clusters") {
		t.Errorf("two clusters: %v", err)
	}
}

// The writer has the key, and lies: the content must be what the header says.
func TestContentAndHeaderBelongTogether(t *testing.T) {
	state := someState(t)
	for name, lie := range map[string]func(*Header){
		"revision":   func(h *Header) { h.Revision++ },
		"keys":       func(h *Header) { h.Keys++ },
		"cluster":    func(h *Header) { h.ClusterID = "x" },
		"life":       func(h *Header) { h.Life++ },
		"no content": nil,
	} {
		h, err := headerOf(source(state))
		if err != nil {
			t.Fatal(err)
		}
		if lie != nil {
			lie(h)
		}
		var b bytes.Buffer
		w, err := backupfile.NewWriter(&b, h, key)
		if err != nil {
			t.Fatal(err)
		}
		if lie != nil {
			if _, err := state.Snapshot().WriteTo(w); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Read(&b, withKey); err == nil || !strings.Contains(err.Error(), "backup") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
