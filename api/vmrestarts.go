// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"slices"
	"time"
)

// VMEnd is what befell a VM that ran.
type VMEnd string

// What is told apart.
const (
	EndCrash    VMEnd = "crash"        // QEMU is gone
	EndPanic    VMEnd = "panic"        // the guest's kernel said so (pvpanic)
	EndWatchdog VMEnd = "watchdog"     // the guest has not fed its watchdog
	EndSilence  VMEnd = "agentSilence" // the guest agent answered and does no more
)

// EndAction is what is done then.
type EndAction string

// The actions.
const (
	// EndRestart starts a VM whose QEMU is gone again, and resets any other.
	EndRestart EndAction = "restart"
	// EndStop leaves the VM down; it is ended first if it runs.
	EndStop EndAction = "stop"
	// EndPause halts the guest, for somebody to look at it.
	EndPause EndAction = "pause"
	// EndIgnore does nothing.
	EndIgnore EndAction = "ignore"
)

// EndPolicy is what is done with a VM after its end, and how often.
type EndPolicy struct {
	// OnCrash: restart (default) or stop.
	OnCrash EndAction `json:"onCrash,omitempty" enum:"restart,stop" doc:"what is done when QEMU is gone"`
	// OnPanic is ignore (default), restart, stop or pause.
	OnPanic EndAction `json:"onPanic,omitempty" enum:"ignore,restart,stop,pause" doc:"what is done when the guest's kernel panics"`
	// OnWatchdog is done besides what QEMU does by spec.watchdog.action.
	OnWatchdog EndAction `json:"onWatchdog,omitempty" enum:"ignore,restart,stop,pause" doc:"what is done when the guest has not fed its watchdog"`
	// AgentSilenceSeconds is after how long without an answer a guest agent that
	// answered before counts as silent: 30 to 86400, never when 0.
	AgentSilenceSeconds int `json:"agentSilenceSeconds,omitempty" minimum:"0" maximum:"86400"`
	// OnAgentSilence is restart (default), stop, pause or ignore.
	OnAgentSilence EndAction `json:"onAgentSilence,omitempty" enum:"restart,stop,pause,ignore" doc:"what is done when the guest agent has been silent for agentSilenceSeconds"`
	// RestartLimit is how many automatic restarts there may be within
	// RestartWindowSeconds before the VM is given up: 1 to 100, any number when 0.
	RestartLimit int `json:"restartLimit,omitempty" minimum:"0" maximum:"100"`
	// RestartWindowSeconds: 60 to 604800, 3600 when left out.
	RestartWindowSeconds int `json:"restartWindowSeconds,omitempty" minimum:"0" maximum:"604800"`
	// RestartDelaySeconds is the pause before the first restart within the window;
	// it doubles with each, up to 15 minutes. 1 to 900; when left out 10 with a
	// limit, else 1, up to a minute.
	RestartDelaySeconds int `json:"restartDelaySeconds,omitempty" minimum:"0" maximum:"900"`
}

// Limits of an EndPolicy.
const (
	MinAgentSilence      = 30    // seconds
	MaxAgentSilence      = 86400 // seconds
	MaxRestartLimit      = 100
	MinRestartWindow     = 60     // seconds
	MaxRestartWindow     = 604800 // seconds
	DefaultRestartWindow = 3600   // seconds
	DefaultRestartDelay  = 10     // seconds, with a limit
	MaxRestartDelay      = 15 * time.Minute
	// quickRestartDelay and its most are those without a limit.
	quickRestartDelay    = time.Second
	maxQuickRestartDelay = time.Minute
	// maxRestartTimes is how many restarts are remembered without a limit.
	maxRestartTimes = 10
)

// EndPolicy is the one in force.
func (s *VMSpec) EndPolicy() EndPolicy {
	if s.Recovery == nil {
		return EndPolicy{}
	}
	return s.Recovery.EndPolicy
}

// Action is what is done about an end.
func (p *EndPolicy) Action(end VMEnd) EndAction {
	one := func(a, usual EndAction) EndAction {
		if a == "" {
			return usual
		}
		return a
	}
	switch end {
	case EndCrash:
		return one(p.OnCrash, EndRestart)
	case EndPanic:
		return one(p.OnPanic, EndIgnore)
	case EndWatchdog:
		return one(p.OnWatchdog, EndIgnore)
	case EndSilence:
		if p.AgentSilenceSeconds > 0 {
			return one(p.OnAgentSilence, EndRestart)
		}
	}
	return EndIgnore
}

// AgentSilence is after how long an agent counts as silent; 0: never.
func (p *EndPolicy) AgentSilence() time.Duration {
	if p.Action(EndSilence) == EndIgnore {
		return 0
	}
	return time.Duration(p.AgentSilenceSeconds) * time.Second
}

// Window is the time within which restarts are counted.
func (p *EndPolicy) Window() time.Duration {
	if p.RestartWindowSeconds > 0 {
		return time.Duration(p.RestartWindowSeconds) * time.Second
	}
	return DefaultRestartWindow * time.Second
}

// delay is the pause before a restart that so many preceded.
func (p *EndPolicy) delay(before int) time.Duration {
	first, most := time.Duration(p.RestartDelaySeconds)*time.Second, MaxRestartDelay
	switch {
	case first > 0:
	case p.RestartLimit > 0:
		first = DefaultRestartDelay * time.Second
	default:
		first, most = quickRestartDelay, maxQuickRestartDelay
	}
	return min(first<<min(before, 16), most)
}

func (p *EndPolicy) validate() error {
	for _, f := range []struct {
		field string
		value EndAction
		may   []EndAction
	}{
		{"onCrash", p.OnCrash, []EndAction{EndRestart, EndStop}},
		{"onPanic", p.OnPanic, []EndAction{EndIgnore, EndRestart, EndStop, EndPause}},
		{"onWatchdog", p.OnWatchdog, []EndAction{EndIgnore, EndRestart, EndStop, EndPause}},
		{"onAgentSilence", p.OnAgentSilence, []EndAction{EndRestart, EndStop, EndPause, EndIgnore}},
	} {
		switch {
		case f.value == "" || slices.Contains(f.may, f.value):
		case f.field == "onCrash" && (f.value == EndPause || f.value == EndIgnore):
			return Invalid("spec.recovery.onCrash", "is %s, but without QEMU there is no guest that could be left as it is; give restart or stop", f.value)
		default:
			return Invalid("spec.recovery."+f.field, "is %q; give one of %v", clip(string(f.value)), f.may)
		}
	}
	for _, n := range []struct {
		field            string
		value, from, to  int
		unit, leftOutFor string
	}{
		{"agentSilenceSeconds", p.AgentSilenceSeconds, MinAgentSilence, MaxAgentSilence, " seconds", "never"},
		{"restartLimit", p.RestartLimit, 1, MaxRestartLimit, " restarts", "any number"},
		{"restartWindowSeconds", p.RestartWindowSeconds, MinRestartWindow, MaxRestartWindow, " seconds", fmt.Sprint(DefaultRestartWindow)},
		{"restartDelaySeconds", p.RestartDelaySeconds, 1, int(MaxRestartDelay / time.Second), " seconds", "the usual pauses"},
	} {
		if n.value != 0 && (n.value < n.from || n.value > n.to) {
			return Invalid("spec.recovery."+n.field, "is %d; give %d to %d%s, or 0 for %s", n.value, n.from, n.to, n.unit, n.leftOutFor)
		}
	}
	if p.OnAgentSilence != "" && p.OnAgentSilence != EndIgnore && p.AgentSilenceSeconds == 0 {
		return Invalid("spec.recovery.onAgentSilence", "is %s, but spec.recovery.agentSilenceSeconds does not say after how long; give both", p.OnAgentSilence)
	}
	return nil
}

// VMLeft is how a VM was left by a policy.
type VMLeft string

// The ways.
const (
	LeftGaveUp  VMLeft = "gaveUp"  // down, because it was restarted too often
	LeftStopped VMLeft = "stopped" // down, as its policy says
	LeftPaused  VMLeft = "paused"  // halted, as its policy says
)

// VMRestarts is what is remembered of automatic restarts, since the last start
// that somebody wished for.
type VMRestarts struct {
	// Times of those that count, the oldest first.
	Times []time.Time `json:"times,omitempty"`
	// Due is when the next one is carried out, while one waits.
	Due *time.Time `json:"due,omitempty"`
	// Cause and Reason are of the last end.
	Cause  VMEnd  `json:"cause,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Left is set while the VM is left as it is until somebody starts or resumes it.
	Left VMLeft `json:"left,omitempty" enum:"gaveUp,stopped,paused"`
}

// Clone returns a copy, empty if there is none.
func (r *VMRestarts) Clone() *VMRestarts {
	if r == nil {
		return &VMRestarts{}
	}
	out := *r
	out.Times = slices.Clone(r.Times)
	return &out
}

// Count adds a restart for what happened at a time, and says after which pause
// it is due; gaveUp: it would be one too many, and is not added. A time that is
// there already is not counted twice.
func (r *VMRestarts) Count(p *EndPolicy, at, now time.Time) (pause time.Duration, gaveUp bool) {
	at = at.UTC()
	known := slices.ContainsFunc(r.Times, at.Equal)
	r.Times = slices.DeleteFunc(slices.Clone(r.Times), func(t time.Time) bool { return now.Sub(t).Abs() >= p.Window() })
	n := len(r.Times)
	if known {
		return p.delay(max(n-1, 0)), false
	}
	if p.RestartLimit > 0 && n >= p.RestartLimit {
		return 0, true
	}
	r.Times = append(r.Times, at)
	if keep := max(p.RestartLimit, maxRestartTimes); len(r.Times) > keep {
		r.Times = slices.Delete(r.Times, 0, len(r.Times)-keep)
	}
	return p.delay(n), false
}

// Ordinal says which restart this is, for messages.
func (r *VMRestarts) Ordinal(p *EndPolicy) string {
	if p.RestartLimit > 0 {
		return fmt.Sprintf("restart %d of at most %d within %v", len(r.Times), p.RestartLimit, p.Window())
	}
	return fmt.Sprintf("restart %d within %v", len(r.Times), p.Window())
}
