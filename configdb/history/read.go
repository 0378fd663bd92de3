// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"encoding/json"
	"fmt"
	"iter"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/feature"
)

// Entry is one record with its place.
type Entry struct {
	Kind  api.Kind
	ID    string
	entry configdb.Entry
}

// Revision of the change that the record tells of.
func (e *Entry) Revision() uint64 { return e.entry.Revision }

// Head returns the record without its spec.
func (e *Entry) Head() (configdb.HistoryRecord, error) {
	r, err := configdb.DecodeHistoryHead(e.entry.Value)
	return r, e.wrap(err)
}

// Record returns the whole record.
func (e *Entry) Record() (configdb.HistoryRecord, error) {
	r, err := configdb.DecodeHistory(e.entry.Value)
	return r, e.wrap(err)
}

func (e *Entry) wrap(err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", e.entry.Key, err)
	}
	return nil
}

// Selection says which objects are asked for.
type Selection struct {
	// Kinds that are looked at, in this order.
	Kinds []api.Kind
	// Name is a name or an ID; all objects when empty.
	Name string
	// Project of the objects; of all projects when empty.
	Project string
}

// entries yields the records of the selected objects, those of one object in
// the order of its changes. It reads the head of the first record of an object
// to know its name, which never changes.
func (s *Selection) entries(v *configdb.View) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for _, kind := range s.Kinds {
			prefix := configdb.HistoryPrefix(kind, "")
			if api.IsID(s.Name) {
				prefix = configdb.HistoryPrefix(kind, s.Name)
			}
			last, wanted := "", false
			for ce := range v.Scan(prefix, "") {
				_, id, ok := configdb.SplitHistoryKey(ce.Key)
				if !ok {
					continue
				}
				e := Entry{Kind: kind, ID: id, entry: ce}
				if id != last {
					last, wanted = id, s.wants(&e)
				}
				if wanted && !yield(e) {
					return
				}
			}
		}
	}
}

func (s *Selection) wants(e *Entry) bool {
	if s.Name == "" && s.Project == "" {
		return true
	}
	r, err := e.Head()
	if err != nil {
		return s.Name == e.ID // it can at least be asked for by its ID
	}
	return (s.Name == "" || s.Name == e.ID || s.Name == r.Name) && (s.Project == "" || s.Project == r.Project)
}

// Horizon is the revision from which on the history is complete.
type Horizon struct {
	Revision uint64 `json:"revision"`
	// Reason why it is not earlier: ReasonBegun, ReasonAge or ReasonSize.
	Reason string `json:"reason"`
	// Since is when it was set.
	Since time.Time `json:"since"`
}

// The reasons.
const (
	ReasonBegun = "begun"
	ReasonAge   = "age"
	ReasonSize  = "size"
)

// HorizonOf returns the horizon; ok is false while there is none, because no
// leader has begun the history yet.
func HorizonOf(v *configdb.View) (h Horizon, revision uint64, ok bool) {
	e, ok := v.Get(configdb.HistoryHorizonKey)
	if !ok || json.Unmarshal(e.Value, &h) != nil {
		return Horizon{}, e.Revision, false
	}
	return h, e.Revision, true
}

// Check refuses a revision at which the state cannot be told. field names the
// parameter that it came in.
func Check(v *configdb.View, field string, revision uint64) error {
	h, _, ok := HorizonOf(v)
	switch {
	case revision == 0:
		return api.Invalid(field, "is 0; give the revision of a change, such as muster config log shows")
	case revision > v.Revision():
		return api.Invalid(field, "is %d; the newest revision is %d", revision, v.Revision())
	case !ok && !feature.History.InForce(v):
		return api.Errorf(api.CodeRefused, "there is no history yet: it begins with feature level %d of the cluster, which is at %d; muster cluster status says what that waits for", feature.History.Level(), feature.Level(v))
	case !ok:
		return api.Errorf(api.CodeRefused, "there is no history yet; the leader begins it within a minute of taking over; try again")
	case revision < h.Revision:
		return api.Errorf(api.CodeRefused, "the history is complete from revision %d on (%s); what was at revision %d is not known", h.Revision, h.why(), revision)
	}
	return nil
}

func (h *Horizon) why() string {
	switch h.Reason {
	case ReasonAge:
		return "older changes were removed for their age"
	case ReasonSize:
		return "older changes were removed for their size"
	}
	return "it began there"
}

// Cluster returns the one object that describes the cluster.
func Cluster(v *configdb.View) (api.Cluster, error) {
	all, err := configdb.Clusters.List(v)
	if err == nil && len(all) != 1 {
		err = api.Errorf(api.CodeInternal, "there are %d objects that describe the cluster", len(all))
	}
	if err != nil {
		return api.Cluster{}, err
	}
	return all[0], nil
}

// Settings returns the settings in force; the defaults while there is no
// cluster object.
func Settings(v *configdb.View) api.HistorySettings {
	var s api.HistorySettings
	if c, err := Cluster(v); err == nil {
		s = c.Spec.History
	}
	s.SetDefaults()
	return s
}

// Usage returns what the history takes.
func Usage(v *configdb.View) api.ConfigRetention {
	r := api.ConfigRetention{Settings: Settings(v)}
	h, _, _ := HorizonOf(v)
	r.Horizon, r.HorizonReason, r.HorizonSince = h.Revision, h.Reason, h.Since
	for e := range v.Scan(configdb.HistoryRoot, "") {
		r.Records++
		r.Bytes += sizeOf(e)
		if t := configdb.HistoryTime(e.Value); !t.IsZero() && (r.Oldest.IsZero() || t.Before(r.Oldest)) {
			r.Oldest = t.UTC()
		}
	}
	return r
}

func sizeOf(e configdb.Entry) api.Size { return api.Size(len(e.Key) + len(e.Value)) }
