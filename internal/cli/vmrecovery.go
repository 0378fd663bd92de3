// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// recoveryFlags say how a VM is recovered when its node is lost, and what is done
// when it ends by itself.
type recoveryFlags struct {
	fs       *pflag.FlagSet
	priority string
	attempts int
	ends     map[string]*string // by flag
	silence  time.Duration
	limit    int
	window   time.Duration
	delay    time.Duration
	after    []string
	when     string
	later    time.Duration
	most     time.Duration
	back     string
	backIn   time.Duration
	drill    string
}

// endFlags are the policies: flag, field and help.
var endFlags = []struct{ flag, field, help string }{
	{"on-crash", "onCrash", "what to do when QEMU is gone: restart or stop (default \"restart\")"},
	{"on-panic", "onPanic", "what to do when the guest's kernel panics: ignore, restart, stop or pause (default \"ignore\")"},
	{"on-watchdog", "onWatchdog", "what to do, besides the action of --watchdog, when the guest has not fed it: ignore, restart, stop or pause (default \"ignore\")"},
	{"on-agent-silence", "onAgentSilence", "what to do when the guest agent is silent for --agent-silence: restart, stop, pause or ignore (default \"restart\")"},
}

func (f *recoveryFlags) add(fs *pflag.FlagSet) {
	f.fs, f.ends = fs, map[string]*string{}
	fs.StringVar(&f.priority, "ha-priority", "", "which VMs get a place first when their node is lost: highest, high, medium, low or lowest (default \"medium\")")
	fs.IntVar(&f.attempts, "ha-start-attempts", 0, fmt.Sprintf("how often a node tries to start a VM with --ha restart before another does, 1 to %d (default %d)", api.MaxStartAttempts, api.DefaultStartAttempts))
	for _, e := range endFlags {
		f.ends[e.flag] = fs.String(e.flag, "", e.help)
	}
	fs.DurationVar(&f.silence, "agent-silence", 0, "after how long a guest agent that answered before counts as silent, 30s to 24h; 0 for never")
	fs.StringSliceVar(&f.after, "after", nil, "an automatic start, after the loss of a node or a power cut, waits for these VMs; none for nobody")
	fs.StringVar(&f.when, "after-condition", "", "when those count as up: started, or healthy if their guest agents have to answer, too (default \"started\")")
	fs.DurationVar(&f.later, "after-delay", 0, "start so much later than they are up, up to 1h")
	fs.DurationVar(&f.most, "after-wait", 0, "start anyway after this time, 1s to 24h (default 2m)")
	fs.StringVar(&f.back, "failback", "", "whether a recovered VM is migrated back to the node that it was taken from: none or return (default \"none\")")
	fs.DurationVar(&f.backIn, "failback-after", 0, "how long that node must have been back, 1m to 168h (default 10m)")
	fs.StringVar(&f.drill, "drill", "", "whether it may be failed over on purpose, as by a power cut: manual, \"daily HH:MM\" or \"weekly sun HH:MM\" in UTC; none for never")
	fs.IntVar(&f.limit, "restart-limit", 0, fmt.Sprintf("give up after so many automatic restarts within --restart-window, 1 to %d; 0 for never", api.MaxRestartLimit))
	fs.DurationVar(&f.window, "restart-window", 0, "the time within which restarts are counted, 1m to 168h (default 1h)")
	fs.DurationVar(&f.delay, "restart-delay", 0, "pause before the first automatic restart, which doubles with each, 1s to 15m (default 10s with --restart-limit, else 1s)")
}

func (f *recoveryFlags) into(spec map[string]any) {
	r := map[string]any{}
	set(r, "priority", f.priority)
	if f.attempts != 0 {
		r["startAttempts"] = f.attempts
	}
	if f.fs.Changed("agent-silence") {
		r["agentSilenceSeconds"] = wholeSeconds(f.silence)
		if f.silence == 0 {
			r["onAgentSilence"] = nil
		}
	}
	for _, e := range endFlags {
		set(r, e.field, *f.ends[e.flag])
	}
	if f.fs.Changed("after") {
		r["after"] = f.after
		if len(f.after) == 1 && f.after[0] == none {
			r["after"] = nil
		}
	}
	set(r, "afterCondition", f.when)
	if f.fs.Changed("after-delay") {
		r["afterDelaySeconds"] = wholeSeconds(f.later)
	}
	if f.fs.Changed("after-wait") {
		r["afterWaitSeconds"] = wholeSeconds(f.most)
	}
	set(r, "failback", f.back)
	set(r, "drill", f.drill)
	if f.drill == "none" {
		r["drill"] = nil
	}
	if f.fs.Changed("failback-after") {
		r["failbackAfterMinutes"] = (wholeSeconds(f.backIn) + 59) / 60
	}
	if f.fs.Changed("restart-limit") {
		r["restartLimit"] = f.limit
	}
	if f.fs.Changed("restart-window") {
		r["restartWindowSeconds"] = wholeSeconds(f.window)
	}
	if f.fs.Changed("restart-delay") {
		r["restartDelaySeconds"] = wholeSeconds(f.delay)
	}
	if len(r) > 0 {
		spec["recovery"] = r
	}
}

// wholeSeconds rounds up, so that too little is not taken for nothing.
func wholeSeconds(d time.Duration) int {
	if d < 0 {
		return -1 // the cluster says what may be given
	}
	return int((d + time.Second - 1) / time.Second)
}

// haText is the policy, with the priority if it is not the usual one.
func haText(s *api.VMSpec) string {
	if p := s.RecoveryPriority(); s.HA == api.HARestart && p != api.PriorityMedium {
		return string(s.HA) + ", priority " + string(p)
	}
	return string(s.HA)
}

// showRecovery shows what is set or happened besides the usual.
func showRecovery(s *sections, o *api.VM, now time.Time) {
	s.field("HA", haText(&o.Spec))
	after := o.Spec.StartAfter()
	s.field("Starts after", after.String())
	if d := o.Spec.FailsBackAfter(); d > 0 {
		s.field("Failback", fmt.Sprintf("to the node that it was recovered from, when that has been back for %v", d))
	}
	if o.Spec.Drilled() {
		s.field("Drill", drillText(o.Spec.Recovery.Drill, now))
	}
	s.field("On its end", endText(&o.Spec))
	s.field("Restarts", restartsText(o, now))
}

// endText has the policies that are set.
func endText(s *api.VMSpec) string {
	p := s.EndPolicy()
	var out []string
	add := func(what string, a api.EndAction) {
		if a != "" {
			out = append(out, what+": "+string(a))
		}
	}
	add("crash", p.OnCrash)
	add("panic", p.OnPanic)
	add("watchdog", p.OnWatchdog)
	if d := p.AgentSilence(); d > 0 {
		add("agent silent for "+d.String(), p.Action(api.EndSilence))
	}
	switch {
	case p.RestartLimit > 0:
		out = append(out, fmt.Sprintf("at most %d restarts in %v", p.RestartLimit, p.Window()))
	case p.RestartDelaySeconds > 0:
		out = append(out, fmt.Sprintf("restarts after %v and more", time.Duration(p.RestartDelaySeconds)*time.Second))
	}
	return strings.Join(out, ", ")
}

// restartsText says how often the VM was restarted by itself, as far as it counts.
func restartsText(o *api.VM, now time.Time) string {
	r := o.Status.Restarts
	if r == nil || len(r.Times) == 0 {
		return ""
	}
	p := o.Spec.EndPolicy()
	n := 0
	for _, t := range r.Times {
		if now.Sub(t) < p.Window() {
			n++
		}
	}
	text := fmt.Sprintf("%d by itself in the last %v, the last %s", n, p.Window(), moment(r.Times[len(r.Times)-1], now))
	if r.Left == api.LeftGaveUp {
		text += "; given up"
	}
	return text
}
