// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/power/powersim"
	"github.com/muster-vm/muster/internal/torture/lab"
)

const (
	askTimeout = 2 * time.Second
	diskMiB    = 256
	// bound is when, after the last fault is over, every VM must count again: a
	// node's loss is noticed after 13 s, and a guest boots in ten or more seconds
	// on emulated processors that it shares with others.
	bound     = 120 * time.Second
	firstBoot = 180 * time.Second
)

// violation is a promise that was not kept.
type violation struct {
	Kind, What string
}

// The kinds of violations.
const (
	ranTwice   = "ran_twice"
	lostWrite  = "lost_write"
	notUp      = "not_up"
	daemonDied = "daemon_died"
	notProved  = "not_proved"
	clockLost  = "lost_by_a_clock"
	netEnded   = "ended_by_the_network"
	clockEnded = "ended_by_a_clock"
	harness    = "fault_not_made"
)

// campaign is one run.
type campaign struct {
	config
	*lab.Cluster
	daemons []*lab.Daemon
	dogs    []*dog
	clocks  []lab.Clock
	guests  []*guest
	began   time.Time

	mu         sync.Mutex
	violations []violation
	faults     map[string]int
	episodes   int
	back       map[string][]time.Duration // by faults: until every VM counted again, from the first fault
	resets     int
	outlived   map[string]bool // pairs of QEMUs of which one was locked out
	looks      int             // at the processes

	// Only the campaign's own goroutine uses these. hurried: the last episode was
	// rushed.
	hurried bool
	notes   bool // the storage heartbeat is on
	disks   disks
	// old is the backup to restore, founded what the last restore said.
	old      oldState
	restored int
	founded  struct{ Token, CACert string }
	losses   map[string]bool // all that were seen, and those whose evidence holds
	proved   map[string]bool
	moves    []move

	bmcs      []*powersim.Host
	failovers []failover
}

func newCampaign(cfg config) *campaign {
	return &campaign{config: cfg, began: time.Now(), faults: map[string]int{}, outlived: map[string]bool{}, back: map[string][]time.Duration{}, notes: true, losses: map[string]bool{}, proved: map[string]bool{}}
}

func (c *campaign) now() time.Duration { return time.Since(c.began) }

func (c *campaign) say(format string, args ...any) {
	fmt.Printf("[%7.2f s] %s\n", c.now().Seconds(), fmt.Sprintf(format, args...))
}

func (c *campaign) violate(kind, format string, args ...any) {
	v := violation{Kind: kind, What: fmt.Sprintf(format, args...)}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.violations = append(c.violations, v)
	fmt.Printf("VIOLATION [%.2f s] %s: %s\n", c.now().Seconds(), v.Kind, v.What)
}

func (c *campaign) host(i int) string { return filepath.Join(c.runDir, c.Hosts.Name(i)) }

// begin makes hosts, a cluster and its VMs.
func (c *campaign) begin(ctx context.Context) error {
	hosts, err := lab.MakeHosts(c.nodes, c.work, diskMiB)
	if err != nil {
		return err
	}
	c.Cluster = &lab.Cluster{Hosts: hosts, Bin: c.bin}
	for i := range c.nodes {
		dog, err := newDog(filepath.Join(c.work, "dog-"+hosts.Name(i)))
		if err != nil {
			return err
		}
		c.dogs = append(c.dogs, dog)
		file := filepath.Join(c.work, hosts.Name(i)+".yaml")
		if err := os.WriteFile(file, []byte("watchdog: "+dog.path+"\n"), 0o600); err != nil {
			return err
		}
		d := hosts.NewDaemon(i, c.bin, c.host(i), filepath.Join(c.work, "log", hosts.Name(i)+".log"), c.now, c.noteExit, "--config", file)
		clock, err := lab.NewClock(filepath.Join(c.work, "clock-"+hosts.Name(i)))
		if err != nil {
			return err
		}
		d.Env, c.clocks = []string{clock.Env()}, append(c.clocks, clock)
		c.daemons = append(c.daemons, d)
		if err := d.Start(); err != nil {
			return err
		}
	}
	if err := c.Found(ctx, clusterName); err != nil {
		return err
	}
	if c.disks, err = c.makeDisks(); err != nil {
		return err
	}
	if c.bmc {
		if err := c.giveBMCs(); err != nil {
			return err
		}
	}
	if c.crowd > 0 {
		return nil
	}
	return c.makeGuests(ctx)
}

func (c *campaign) makeGuests(ctx context.Context) error {
	steps := [][]string{
		append([]string{"pool", "create", "shared"}, c.disks.pool...),
		{"image", "create", "tiny", "--pool", "shared", "--file", c.image},
	}
	for i := range c.vms {
		g := &guest{name: fmt.Sprintf("g%d", i+1)}
		c.guests = append(c.guests, g)
		steps = append(steps, []string{"vm", "create", g.name, "--cpu", "1", "--memory", "96M", "--image", "tiny", "--pool", "shared", "--ha", "restart", "--start"})
	}
	for _, s := range steps {
		if _, err := c.Muster(0, append([]string{"--data-dir", c.Hosts.Data(0)}, s...)...); err != nil {
			return err
		}
	}
	return lab.Eventually(ctx, firstBoot, func(ctx context.Context) error {
		for _, g := range c.guests {
			c.readConsole(ctx, g)
			if g.newest().counter < 5 {
				return fmt.Errorf("%s does not count", g.name)
			}
		}
		return nil
	})
}

// owner is the node that runs the first VM, as the cluster has it; -1 if none does.
func (c *campaign) owner(ctx context.Context) int {
	for i := range c.nodes {
		a := c.Rest.Do(ctx, i, lab.Request{Method: "GET", Path: "/vms/" + c.guests[0].name + "?consistency=stale", Timeout: askTimeout})
		var vm struct{ Status struct{ Node string } }
		if !a.OK() || json.Unmarshal(a.Body, &vm) != nil {
			continue
		}
		for n := range c.nodes {
			if c.Hosts.Name(n) == vm.Status.Node {
				return n
			}
		}
	}
	return -1
}

func (c *campaign) noteExit(e lab.Exit) {
	c.say("the daemon of %s ended: %s (disk full: %t)", e.Node, e.Why, e.Full)
	if !e.Full {
		c.violate(daemonDied, "%s: %s", e.Node, e.Why)
	}
}

// torment lets episodes happen for a time.
func (c *campaign) torment(ctx context.Context, length time.Duration) {
	watch, stop := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { c.watchProcesses(watch) })
	watchers.Go(func() { c.watchDogs(watch) })
	for _, g := range c.guests {
		watchers.Go(func() { c.watchConsole(watch, g) })
	}
	s := newSchedule(c.seed, c.nodes, c.ceph != "")
	for end := c.now() + length; c.now() < end && ctx.Err() == nil; {
		if !c.episode(ctx, s.next()) {
			break
		}
	}
	if ctx.Err() == nil {
		c.lastWord(ctx)
	}
	stop()
	watchers.Wait()
}

// episode returns false when the campaign cannot go on.
func (c *campaign) episode(ctx context.Context, e episode) bool {
	if !lab.Wait(ctx, e.calm) {
		return true
	}
	if err := c.calmly(ctx, &e); err != nil {
		if ctx.Err() == nil {
			c.violate(harness, "before %s: %v", e, err)
		}
		return false
	}
	boots, losses := c.bootsOf(), len(c.losses)
	began, from := time.Now(), c.now()
	var on []*active
	what := ""
	for _, f := range e.faults {
		if !lab.Wait(ctx, f.delay) {
			break
		}
		a := c.choose(ctx, f, on)
		if err := c.inject(a); err != nil {
			c.violate(harness, "%s: %v", f, err)
			return false
		}
		on = append(on, a)
		c.mu.Lock()
		c.faults[string(f.kind)]++
		c.mu.Unlock()
		c.say("%s on %s", f, c.Hosts.Name(a.node))
		what = joined(what, string(f.kind))
	}
	if e.hold > longLeast && len(e.faults) == 1 {
		what += " (long)"
	}
	lab.Wait(ctx, e.hold-time.Since(began))
	for _, a := range slices.Backward(on) {
		if err := c.heal(a); err != nil {
			c.violate(harness, "%s ends: %v", a.fault, err)
			return false
		}
	}
	healed := c.now()
	if c.hurried = e.rushed || c.hurried; e.rushed {
		c.mu.Lock()
		c.episodes++
		c.mu.Unlock()
		c.say("  over after %.1f s, and on", e.hold.Seconds())
		return ctx.Err() == nil
	}
	err := lab.Eventually(ctx, bound, c.allCount(healed))
	if ctx.Err() != nil {
		return false
	}
	if err != nil {
		c.violate(notUp, "after %s: %v", what, err)
		return false
	}
	if now := c.bootsOf(); !c.hurried && now != boots {
		switch told := fmt.Sprintf("%s: the guests had booted %d times before, %d times after", what, boots, now); {
		case e.networkAlone():
			c.violate(netEnded, "%s", told)
		case e.clockAlone():
			c.violate(clockEnded, "%s", told)
		}
	}
	if err := lab.Eventually(ctx, bound, c.prove); err != nil && ctx.Err() == nil {
		c.violate(notProved, "the evidence cannot be read: %v", err)
		return false
	}
	if now := len(c.losses); e.clockAlone() && !c.hurried && now != losses {
		c.violate(clockLost, "%s: %d losses before, %d after", what, losses, now)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.episodes++
	if !c.hurried { // else a pause may be of an earlier episode
		c.back[what] = append(c.back[what], max(0, c.lastBack()-from)) // 0: none paused
	}
	c.hurried = false
	c.say("  over after %.1f s; every VM counts %.1f s after that, %.1f s after the first fault", e.hold.Seconds(), (c.now() - healed).Seconds(), (c.now() - from).Seconds())
	return true
}

// calmly does what wants a calm cluster before an episode.
func (c *campaign) calmly(ctx context.Context, e *episode) error {
	if c.hurried && e.whole() {
		if err := lab.Eventually(ctx, bound, c.allCount(c.now())); err != nil {
			return err
		}
		c.hurried = false
	}
	if err := c.setNotes(e.notes); err != nil || c.hurried {
		return err
	}
	return c.backUp()
}

// setNotes switches the storage heartbeat, once all is calm.
func (c *campaign) setNotes(on bool) error {
	if c.hurried || on == c.notes {
		return nil
	}
	how := "off"
	if on {
		how = "on"
	}
	err := lab.Eventually(context.Background(), bound, func(context.Context) error {
		_, err := c.Muster(0, "--data-dir", c.Hosts.Data(0), "ha", "set", "--storage-heartbeat", how)
		return err
	})
	if err == nil {
		c.notes = on
		c.say("the storage heartbeat is %s", how)
	}
	return err
}

// bootsOf is how often the guests have booted, in all.
func (c *campaign) bootsOf() (n int) {
	for _, g := range c.guests {
		n += g.newest().boot
	}
	return n
}

// lastBack is when the last VM began to count again after its longest pause, of
// the present episode.
func (c *campaign) lastBack() (at time.Duration) {
	for _, g := range c.guests {
		at = max(at, g.resumed())
	}
	return at
}

// allCount succeeds when each guest has counted after a time, and again a second later:
// what a console says first when its daemon is back may be of before, of a guest that has
// ended since.
func (c *campaign) allCount(after time.Duration) func(context.Context) error {
	first := map[*guest]time.Duration{}
	return func(context.Context) (err error) {
		for _, g := range c.guests {
			n := g.newest()
			if _, heard := first[g]; !heard && n.at > after+time.Second {
				first[g] = n.at
			}
			if at, heard := first[g]; !heard || n.at < at+time.Second {
				err = fmt.Errorf("%s has not counted since %.1f s (boot %d, counter %d)", g.name, n.at.Seconds(), n.boot, n.counter)
			}
		}
		return err
	}
}

// lastWord ends each QEMU once more: a guest that boots shows what its disk has.
func (c *campaign) lastWord(ctx context.Context) {
	for i := range c.nodes {
		if err := killed(c.qemus(i)); err != nil {
			c.violate(harness, "last word: %v", err)
		}
	}
	if err := lab.Eventually(ctx, bound, c.allCount(c.now())); err != nil && ctx.Err() == nil {
		c.violate(notUp, "after the last word: %v", err)
	}
}

func joined(a, b string) string {
	if a == "" {
		return b
	}
	return a + "+" + b
}

// end takes all down. The namespaces and what else runs in them are the script's.
func (c *campaign) end() {
	for _, d := range c.daemons {
		d.End()
	}
}

// summary is the last line of a campaign.
type summary struct {
	Torture    string         `json:"torture"`
	Seed       uint64         `json:"seed"`
	Nodes      int            `json:"nodes"`
	VMs        int            `json:"vms"`
	Seconds    float64        `json:"seconds"`
	Episodes   int            `json:"episodes"`
	Faults     int            `json:"faults"`
	ByKind     map[string]int `json:"by_kind"`
	Resets     int            `json:"watchdog_resets"`
	Outlived   int            `json:"locked_out_qemus"`
	Looks      int            `json:"looks_at_processes"`
	Boots      int            `json:"boots"`
	Counted    int            `json:"counted"`
	Misread    int            `json:"misread"`
	Proved     int            `json:"losses_proved"`
	Moves      int            `json:"moves"`
	Restored   int            `json:"old_backups_restored"`
	Violations int            `json:"violations"`
}

func (c *campaign) finish(ctx context.Context) (ok bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := summary{
		Torture: "ha", Seed: c.seed, Nodes: c.nodes, VMs: c.vms, Seconds: c.now().Seconds(), Episodes: c.episodes,
		ByKind: c.faults, Resets: c.resets, Outlived: len(c.outlived), Looks: c.looks, Violations: len(c.violations), Proved: len(c.proved), Moves: len(c.moves), Restored: c.restored,
	}
	for _, n := range c.faults {
		s.Faults += n
	}
	for _, g := range c.guests {
		n := g.newest()
		s.Boots, s.Counted = s.Boots+n.boot, s.Counted+n.counter
		s.Misread += g.misreadLines()
	}
	fmt.Println("from the first fault until every VM counted again, median and most, in seconds:")
	for _, what := range slices.Sorted(maps.Keys(c.back)) {
		t := slices.Sorted(slices.Values(c.back[what]))
		fmt.Printf("  %-32s %6.1f %6.1f  (%d)\n", what, t[len(t)/2].Seconds(), t[len(t)-1].Seconds(), len(t))
	}
	c.showMoves()
	for _, v := range c.violations {
		fmt.Println("VIOLATION", v.Kind+":", v.What)
	}
	line, err := json.Marshal(s)
	if err != nil {
		return false, err
	}
	fmt.Println(string(line))
	return len(c.violations) == 0, nil
}
