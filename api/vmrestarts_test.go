// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"errors"
	"testing"
	"time"
)

func TestRestartsAreCountedWithinTheWindow(t *testing.T) {
	t0 := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	p := &EndPolicy{RestartLimit: 3}
	r := (*VMRestarts)(nil).Clone()
	for i, want := range []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second} {
		at := t0.Add(time.Duration(i) * time.Minute)
		if pause, gaveUp := r.Count(p, at, at); pause != want || gaveUp {
			t.Errorf("restart %d: %v %v", i+1, pause, gaveUp)
		}
		if pause, gaveUp := r.Count(p, at, at.Add(time.Second)); pause != want || gaveUp || len(r.Times) != i+1 {
			t.Errorf("counted twice: %v %v %v", pause, gaveUp, r.Times)
		}
	}
	if _, gaveUp := r.Count(p, t0.Add(59*time.Minute), t0.Add(59*time.Minute)); !gaveUp || len(r.Times) != 3 {
		t.Errorf("a fourth: %v", r.Times)
	}
	if pause, gaveUp := r.Count(p, t0.Add(60*time.Minute+30*time.Second), t0.Add(60*time.Minute+30*time.Second)); gaveUp || pause != 40*time.Second || len(r.Times) != 3 {
		t.Errorf("when the first is out of the window: %v %v %v", pause, gaveUp, r.Times)
	}
	back := t0.Add(-24 * time.Hour)
	if pause, gaveUp := r.Count(p, back, back); gaveUp || pause != 10*time.Second {
		t.Errorf("the clock was set back a day: %v %v", pause, gaveUp)
	}
}

func TestPausesOfRestarts(t *testing.T) {
	for name, tc := range map[string]struct {
		p             EndPolicy
		first, eighth time.Duration
	}{
		"without a limit": {EndPolicy{}, time.Second, time.Minute},
		"with a limit":    {EndPolicy{RestartLimit: 9}, 10 * time.Second, MaxRestartDelay},
		"own pause":       {EndPolicy{RestartDelaySeconds: 2}, 2 * time.Second, 256 * time.Second},
		"long pause":      {EndPolicy{RestartDelaySeconds: 900}, 900 * time.Second, MaxRestartDelay},
	} {
		if a, b := tc.p.delay(0), tc.p.delay(7); a != tc.first || b != tc.eighth {
			t.Errorf("%s: %v, then %v", name, a, b)
		}
	}
	r := VMRestarts{}
	now := time.Now()
	for i := range 100 {
		if _, gaveUp := r.Count(&EndPolicy{}, now.Add(time.Duration(i)), now); gaveUp {
			t.Fatal("given up without a limit")
		}
	}
	if len(r.Times) != maxRestartTimes {
		t.Error("remembered:", len(r.Times))
	}
}

func TestEndPolicies(t *testing.T) {
	usual := EndPolicy{}
	for end, want := range map[VMEnd]EndAction{EndCrash: EndRestart, EndPanic: EndIgnore, EndWatchdog: EndIgnore, EndSilence: EndIgnore} {
		if got := usual.Action(end); got != want {
			t.Errorf("%s: %s", end, got)
		}
	}
	if p := (EndPolicy{AgentSilenceSeconds: 60}); p.Action(EndSilence) != EndRestart || p.AgentSilence() != time.Minute {
		t.Error("a time alone restarts")
	}
	for field, p := range map[string]EndPolicy{
		"spec.recovery.onCrash":              {OnCrash: EndPause},
		"spec.recovery.onPanic":              {OnPanic: "explode"},
		"spec.recovery.onWatchdog":           {OnWatchdog: "reset"},
		"spec.recovery.onAgentSilence":       {OnAgentSilence: EndStop},
		"spec.recovery.agentSilenceSeconds":  {AgentSilenceSeconds: 29},
		"spec.recovery.restartLimit":         {RestartLimit: -1},
		"spec.recovery.restartWindowSeconds": {RestartWindowSeconds: 59},
		"spec.recovery.restartDelaySeconds":  {RestartDelaySeconds: 901},
	} {
		err := (&VMRecovery{EndPolicy: p}).validate()
		if e := new(Error); CodeOf(err) != CodeInvalid || !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
}
