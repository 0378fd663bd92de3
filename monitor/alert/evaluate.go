// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package alert

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// MaxVerdicts is the most targets of one rule; what is beyond is not watched.
const MaxVerdicts = 20_000

// maxMessage is the longest message of an alert in bytes.
const maxMessage = 2000

// ID is the ID of the alert of a rule and a target: a UUID of version 8 (RFC
// 9562 section 5.8) made of the SHA-256 of both.
func ID(rule string, t Target) string {
	sum := sha256.Sum256([]byte(rule + "\x00" + string(t.Kind) + "\x00" + t.ID))
	b := sum[:16]
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// Change is what is to be done with one alert.
type Change struct {
	// Alert as it shall be; to be removed if Delete is set.
	Alert  api.Alert
	Create bool
	Delete bool
	// Spec is set when the spec changes, too.
	Spec bool
	// Entered is the phase that it enters; empty when it stays in its own.
	Entered api.AlertPhase
}

// Evaluate compares the facts with the alerts of before and returns what has
// to change, in order of alert ID.
func Evaluate(rules []api.Rule, f Facts, before map[string]api.Alert) []Change {
	var out []Change
	handled := map[string]bool{}
	active := map[string]bool{}
	for i := range rules {
		r := &rules[i]
		if r.Spec.Disabled || r.Meta.Deleting() {
			continue
		}
		active[r.Meta.Name] = true
		firing := func(t Target) bool { return before[ID(r.Meta.Name, t)].Status.Phase == api.AlertFiring }
		verdicts, unsure := check(r, f, firing)
		for _, v := range verdicts[:min(len(verdicts), MaxVerdicts)] {
			id := ID(r.Meta.Name, v.Target)
			if handled[id] {
				continue
			}
			handled[id] = true
			var was *api.Alert
			if old, ok := before[id]; ok {
				was = &old
			}
			if c, ok := step(r, v, was, f.Now); ok {
				out = append(out, c)
			}
		}
		for id, a := range before {
			if !handled[id] && a.Spec.Rule == r.Meta.Name && unsure(a.Spec.TargetID) {
				handled[id] = true // nobody knows: it stays as it is
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(before)) {
		if !handled[id] {
			a := before[id]
			if c, ok := orphaned(&a, active[a.Spec.Rule], f.Now); ok {
				out = append(out, c)
			}
		}
	}
	slices.SortFunc(out, func(a, b Change) int { return strings.Compare(a.Alert.Meta.ID, b.Alert.Meta.ID) })
	return out
}

// step moves one alert on.
func step(r *api.Rule, v Verdict, was *api.Alert, now time.Time) (Change, bool) {
	now = now.UTC()
	phase := api.AlertPhase("")
	if was != nil {
		phase = was.Status.Phase
	}
	switch {
	case v.State == Unknown:
		return Change{}, false
	case v.State == Bad && (phase == "" || phase == api.AlertResolved):
		return begin(r, v, was, now), true
	case v.State == Bad && phase == api.AlertPending:
		return ripen(r, v, was.Clone(), now)
	case v.State == Bad: // firing
		next := was.Clone()
		changed := v.Refresh && next.Status.Message != clip(v.Message)
		if changed {
			next.Status.Message = clip(v.Message)
		}
		spec := next.Spec.Severity != r.Spec.Severity
		next.Spec.Severity = r.Spec.Severity
		return Change{Alert: next, Spec: spec}, changed || spec
	case phase == api.AlertPending:
		return Change{Alert: was.Clone(), Delete: true}, true
	case phase == api.AlertFiring:
		return resolve(was.Clone(), v.Message, now), true
	}
	return Change{}, false
}

// begin makes an alert, or begins a new occurrence of a resolved one.
func begin(r *api.Rule, v Verdict, was *api.Alert, now time.Time) Change {
	c := Change{Create: was == nil, Spec: was != nil, Entered: api.AlertPending}
	if was != nil {
		c.Alert = was.Clone()
	} else {
		c.Alert.Meta = api.NewMeta(api.KindAlert, "", "")
		c.Alert.Meta.ID, c.Alert.Meta.CreatedAt = ID(r.Meta.Name, v.Target), now
		c.Alert.Meta.Name = c.Alert.Meta.ID
	}
	// The acknowledgement was of the occurrence before.
	c.Alert.Spec = api.AlertSpec{
		Rule: r.Meta.Name, Severity: r.Spec.Severity,
		TargetKind: v.Target.Kind, TargetID: v.Target.ID, Target: v.Target.Name,
	}
	c.Alert.Status = api.AlertStatus{Phase: api.AlertPending, Message: clip(v.Message), PendingAt: &now}
	if r.Spec.ForSeconds == 0 {
		c.Alert.Status.Phase, c.Alert.Status.FiringAt = api.AlertFiring, &now
		c.Entered = api.AlertFiring
	}
	return c
}

// ripen lets a pending alert fire when its time has come.
func ripen(r *api.Rule, v Verdict, next api.Alert, now time.Time) (Change, bool) {
	st := &next.Status
	if st.PendingAt == nil || st.PendingAt.After(now) {
		// This evaluator's clock is behind the one of before: count anew
		// rather than wait for hours.
		st.PendingAt = &now
		return Change{Alert: next}, true
	}
	if now.Sub(*st.PendingAt) < time.Duration(r.Spec.ForSeconds)*time.Second {
		return Change{}, false
	}
	st.Phase, st.FiringAt, st.Message = api.AlertFiring, &now, clip(v.Message)
	return Change{Alert: next, Entered: api.AlertFiring}, true
}

func resolve(next api.Alert, message string, now time.Time) Change {
	st := &next.Status
	st.Phase, st.ResolvedAt = api.AlertResolved, &now
	if message != "" {
		st.Message = clip(message)
	}
	return Change{Alert: next, Entered: api.AlertResolved}
}

// orphaned ends an alert whose rule or target is gone.
func orphaned(a *api.Alert, ruleActive bool, now time.Time) (Change, bool) {
	why := fmt.Sprintf("%s %s is no longer there", a.Spec.TargetKind, a.Spec.Target)
	if !ruleActive {
		why = fmt.Sprintf("rule %s was removed or disabled", a.Spec.Rule)
	}
	switch a.Status.Phase {
	case api.AlertPending:
		return Change{Alert: a.Clone(), Delete: true}, true
	case api.AlertFiring:
		return resolve(a.Clone(), why, now.UTC()), true
	}
	return Change{}, false
}

func clip(s string) string {
	if len(s) > maxMessage {
		return strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}
