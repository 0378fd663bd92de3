// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/report"
)

const seconds = report.Unit("s")

// timed notes how long something took.
func (b *bench) timed(system, row string, unit report.Unit, do func() error) error {
	began := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", system, err)
	}
	took := time.Since(began)
	value := took.Seconds()
	if unit == report.Millis {
		value *= 1000
	}
	b.sheet.Add(system, row, unit, value)
	fmt.Printf("   %-10s %-28s %10.3f %s\n", system, row, value, unit)
	return nil
}

// starts: one VM without a system, from the wish to QEMU's word that it runs.
func (b *bench) starts(ctx context.Context) error {
	if _, err := b.ours.command(ctx, append([]string{"vm", "create", "one"}, kinds[stub]...)...); err != nil {
		return err
	}
	if err := b.peer.define(ctx, stub, "one"); err != nil {
		return err
	}
	virsh := func() error { _, err := b.peer.virsh(ctx, "start", "one"); return err }
	for range b.rounds {
		if err := errors.Join(
			b.timed(muster, "start_to_running", report.Millis, func() error { return b.ours.start(ctx, "one") }), b.ours.stop(ctx, "one"),
			b.timed(bare, "start_to_running", report.Millis, func() error { return b.direct.start(ctx, stub, stub) }), b.direct.stop(stub),
			b.timed(libvirt, "start_to_running", report.Millis, virsh), b.peer.stop(ctx, "one"),
			b.timed(muster, "start_by_command", report.Millis, func() error { _, err := b.ours.command(ctx, "vm", "start", "one"); return err }), b.ours.stop(ctx, "one"),
			b.timed(libvirt, "start_by_command", report.Millis, virsh), b.peer.stop(ctx, "one"),
		); err != nil {
			return err
		}
	}
	return nil
}

// grown waits for the first byte of a serial log.
func grown(ctx context.Context, path string) error {
	return until(ctx, ready, "the serial port says something", func() bool {
		st, err := os.Stat(path)
		return err == nil && st.Size() > 0
	})
}

// serial: a VM with a guest, from the wish to the first byte that its serial port
// says.
func (b *bench) serial(ctx context.Context) error {
	const row = "start_to_first_serial_byte"
	log := filepath.Join(b.direct.argv[guest].dir, "log")
	if err := b.peer.define(ctx, guest, "talker"); err != nil {
		return err
	}
	name := "pattern-" + guest
	for range b.rounds {
		if err := os.Truncate(log, 0); err != nil {
			return err
		}
		if err := errors.Join(
			b.timed(muster, row, report.Millis, func() error { return errors.Join(b.ours.start(ctx, name), grown(ctx, log)) }), b.ours.stop(ctx, name),
			b.timed(bare, row, report.Millis, func() error {
				return errors.Join(b.direct.start(ctx, guest, guest), grown(ctx, b.direct.serialLog(guest)))
			}), b.direct.stop(guest),
			b.timed(libvirt, row, report.Millis, func() error {
				_, err := b.peer.virsh(ctx, "start", "talker")
				return errors.Join(err, grown(ctx, b.peer.serialLog("talker")))
			}), b.peer.stop(ctx, "talker"),
		); err != nil {
			return err
		}
	}
	return nil
}

// states: what is the state of a VM that runs.
func (b *bench) states(ctx context.Context) error {
	if _, err := b.peer.virsh(ctx, "start", "one"); err != nil {
		return err
	}
	if err := b.ours.start(ctx, "one"); err != nil {
		return err
	}
	for range 3 * b.rounds {
		if err := errors.Join(
			b.timed(muster, "state_by_command", report.Millis, func() error {
				out, err := b.ours.command(ctx, "vm", "show", "one")
				return errors.Join(err, contains(out, "running"))
			}),
			b.timed(libvirt, "state_by_command", report.Millis, func() error {
				out, err := b.peer.virsh(ctx, "dominfo", "one")
				return errors.Join(err, contains(out, "running"))
			}),
			b.timed(muster, "state_by_rest", report.Millis, func() error {
				var v vm
				return b.ours.request(ctx, http.MethodGet, "/vms/one", http.StatusOK, &v)
			}),
		); err != nil {
			return err
		}
	}
	return errors.Join(b.peer.stop(ctx, "one"), b.ours.stop(ctx, "one"))
}

func contains(text, what string) error {
	if !strings.Contains(text, what) {
		return fmt.Errorf("%q does not have %q", text, what)
	}
	return nil
}

func names(prefix string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s-%02d", prefix, i+1)
	}
	return out
}

// at once runs f for all names and waits for all.
func atOnce(names []string, f func(name string) error) error {
	errs := make([]error, len(names))
	var all sync.WaitGroup
	for i, n := range names {
		all.Go(func() { errs[i] = f(n) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func inTurn(names []string, f func(name string) error) error {
	for _, n := range names {
		if err := f(n); err != nil {
			return err
		}
	}
	return nil
}

// fleets: twenty VMs one after the other, and twenty at once.
func (b *bench) fleets(ctx context.Context) error {
	vms := names("f", fleet)
	if _, err := b.ours.command(ctx, append([]string{"vm", "create", "f", "--count", fmt.Sprint(fleet)}, kinds[stub]...)...); err != nil {
		return err
	}
	if err := inTurn(vms, func(n string) error { return b.peer.define(ctx, stub, n) }); err != nil {
		return err
	}
	virsh := func(n string) error { _, err := b.peer.virsh(ctx, "start", n); return err }
	destroy := func(n string) error { return b.peer.stop(ctx, n) }
	oursOne := func(n string) error { _, err := b.ours.command(ctx, "vm", "start", n); return err }
	oursAll := func() error { _, err := b.ours.command(ctx, append([]string{"vm", "start"}, vms...)...); return err }
	var mu sync.Mutex
	direct := func(n string) error {
		mu.Lock()
		cmd, await, err := b.direct.prepare(n)
		mu.Unlock()
		if err != nil {
			return err
		}
		return errors.Join(cmd.Start(), await(ctx))
	}
	for range max(3, b.rounds/2) {
		for _, way := range []struct {
			row string
			do  func([]string, func(string) error) error
		}{{"start_20_in_a_row", inTurn}, {"start_20_at_once", atOnce}} {
			ours := func() error { return inTurn(vms, oursOne) }
			if way.row == "start_20_at_once" {
				ours = oursAll
			}
			if err := inTurn(vms, b.direct.lay); err != nil {
				return err
			}
			if err := errors.Join(
				b.timed(muster, way.row, seconds, ours), b.allRun(ctx, vms), b.ours.stop(ctx, vms...),
				b.timed(bare, way.row, seconds, func() error { return way.do(vms, direct) }), inTurn(vms, b.direct.stop),
				b.timed(libvirt, way.row, seconds, func() error { return way.do(vms, virsh) }), inTurn(vms, destroy),
			); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) allRun(ctx context.Context, vms []string) error {
	for _, n := range vms {
		if v, err := b.ours.get(ctx, n); err != nil || v.Status.Phase != "running" {
			return errors.Join(err, fmt.Errorf("vm %s is %q", n, v.Status.Phase))
		}
	}
	return nil
}

// idle: what the servers take beside twenty VMs whose guests are paused.
func (b *bench) idle(ctx context.Context) error {
	vms := names("f", fleet)
	if _, err := b.ours.command(ctx, append([]string{"vm", "start"}, vms...)...); err != nil {
		return err
	}
	if _, err := b.ours.command(ctx, append([]string{"vm", "pause"}, vms...)...); err != nil {
		return err
	}
	if err := inTurn(vms, func(n string) error { _, err := b.peer.virsh(ctx, "start", n, "--paused"); return err }); err != nil {
		return err
	}
	window := 30 * time.Second
	if b.quick {
		window = 10 * time.Second
	}
	oursPIDs := b.ours.pids()
	peerPIDs, err := b.peer.pids()
	if err != nil {
		return err
	}
	time.Sleep(5 * time.Second) // what the starts left behind is done
	before, err := usage(oursPIDs, peerPIDs)
	if err != nil {
		return err
	}
	select {
	case <-time.After(window):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	after, err := usage(oursPIDs, peerPIDs)
	if err != nil {
		return err
	}
	for i, system := range []string{muster, libvirt} {
		b.sheet.Add(system, "idle_20_vms_cpu", report.Percent, 100*(after[i].cpu-before[i].cpu).Seconds()/window.Seconds())
		b.sheet.Add(system, "idle_20_vms_rss", report.MiB, after[i].rss)
	}
	return errors.Join(b.ours.stop(ctx, vms...), inTurn(vms, func(n string) error { return b.peer.stop(ctx, n) }))
}

type used struct {
	cpu time.Duration
	rss float64
}

func usage(groups ...[]int) ([]used, error) {
	out := make([]used, len(groups))
	for i, pids := range groups {
		for _, pid := range pids {
			c, err1 := cpu(pid)
			m, err2 := rss(pid)
			if err := errors.Join(err1, err2); err != nil {
				return nil, err
			}
			out[i].cpu += c
			out[i].rss += m
		}
	}
	return out, nil
}

// clones: many VMs, each with a linked clone of one image. libvirt has no command
// for that: qemu-img and virsh define for each, four at a time.
func (b *bench) clones(ctx context.Context) error {
	n := clones
	if b.quick {
		n = quickClones
	}
	row := fmt.Sprintf("create_%d_linked_clones", n)
	if err := b.timed(muster, row, seconds, func() error {
		_, err := b.ours.command(ctx, append([]string{"vm", "create", "c", "--count", fmt.Sprint(n)}, kinds[guest]...)...)
		return err
	}); err != nil {
		return err
	}
	const atATime = 4
	slots := make(chan struct{}, atATime)
	return b.timed(libvirt, row, seconds, func() error {
		return atOnce(names("c", n), func(name string) error {
			slots <- struct{}{}
			defer func() { <-slots }()
			return b.peer.define(ctx, guest, name)
		})
	})
}
