// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"time"
)

func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[int(q*float64(len(d)-1))].Round(100 * time.Microsecond)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func per(n int64, d time.Duration, unit string, scale float64) string {
	return fmt.Sprintf("%.2f %s", float64(n)/scale/d.Seconds(), unit)
}

// table writes what was found in Markdown.
func (r *result) table(w io.Writer) {
	n := int64(r.nodes)
	rows := [][2]string{
		{"nodes, voters", fmt.Sprintf("%d, %d", r.nodes, min(r.nodes, voters))},
		{"processors for all of them", fmt.Sprint(runtime.GOMAXPROCS(0))},
		{"VMs, keys, bytes of keys and values", fmt.Sprintf("%d, %d, %s", r.vms, r.keys, mib(r.stateBytes))},
		{"the group forms (one node after the other, TLS)", r.formed.took.Round(10 * time.Millisecond).String()},
		{"creating the VMs", fmt.Sprintf("%s, %.0f VMs/s", r.loaded.took.Round(10*time.Millisecond), float64(r.vms)/r.loaded.took.Seconds())},
		{"status changes", fmt.Sprintf("%d in %s, %.0f/s", r.changes, r.changed.took.Round(10*time.Millisecond), float64(r.changes)/r.changed.took.Seconds())},
		{"log entries of the changes, bytes", fmt.Sprintf("%d (%.1f changes each), %s", r.entries, float64(r.changes)/float64(max(1, r.entries)), mib(r.entryBytes))},
		{"a change, until its own node has it: p50, p99, most", fmt.Sprintf("%v, %v, %v", quantile(r.latency, 0.5), quantile(r.latency, 0.99), quantile(r.latency, 1))},
		{"during the changes, until all replicas have what some voter has: p50, p99, most", fmt.Sprintf("%v, %v, %v", quantile(r.lag, 0.5), quantile(r.lag, 0.99), quantile(r.lag, 1))},
		{"**convergence**: all replicas have all, after the last acknowledgement", r.converged.Round(100 * time.Microsecond).String()},
		{"processor time of all nodes together: idle, creating, changes", fmt.Sprintf("%.2f of a core, %s, %s", r.idlePhase.cpu.Seconds()/r.idlePhase.took.Seconds(), r.loaded.cpu.Round(100*time.Millisecond), r.changed.cpu.Round(100*time.Millisecond))},
		{"other leaders meanwhile (terms)", fmt.Sprint(r.terms)},
		{"**memory per node**, empty: heap and stacks", mib((r.formedMemory - r.emptyMemory) / n)},
		{"**memory per node**, with the VMs", mib((r.loadedMemory - r.emptyMemory) / n)},
		{"**memory per node**, after the changes", mib((r.changedMemory - r.emptyMemory) / n)},
		{"goroutines per node", fmt.Sprintf("%.0f", float64(r.goroutines)/float64(n))},
		{"**sent by the leader**, idle", fmt.Sprintf("%s in %s writes", per(r.idlePhase.leader.bytes, r.idlePhase.took, "MiB/s", 1<<20), per(r.idlePhase.leader.writes, r.idlePhase.took, "per s", 1))},
		{"sent by another node, idle (mean)", per(r.idlePhase.mean.bytes, r.idlePhase.took, "KiB/s", 1<<10)},
		{"**sent by the leader**, creating the VMs", sentLine(&r.loaded, r.vms, "VM", r.nodes)},
		{"**sent by the leader**, for the changes", sentLine(&r.changed, r.changes, "change", r.nodes)},
		{"sent by another node, for the changes: mean, most", fmt.Sprintf("%s, %s", mib(r.changed.mean.bytes), mib(r.changed.most.bytes))},
		{"revision and state of every replica", fmt.Sprintf("%d, %x", r.revision, r.hash[:8])},
	}
	fmt.Fprintln(w, "| what | found |\n|---|---|")
	for _, row := range rows {
		fmt.Fprintf(w, "| %s | %s |\n", row[0], row[1])
	}
}

// sentLine compares what the leader sent with the entries, once for each other
// node.
func sentLine(p *phase, n int, what string, nodes int) string {
	least := p.entryBytes * int64(nodes-1)
	return fmt.Sprintf("%s, %.1f KiB a %s, %.2f × the entries once for each other node; %s",
		mib(p.leader.bytes), float64(p.leader.bytes)/float64(max(1, n))/(1<<10), what, float64(p.leader.bytes)/float64(max(1, least)), per(p.leader.bytes, p.took, "MiB/s", 1<<20))
}
