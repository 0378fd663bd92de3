// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/switch/openflow"
	"github.com/muster-vm/muster/switch/ovs"
)

// Limits of network cards. What a guest receives leaves the switch through its tap
// and waits in the queue of that device (linux-htb, of the port's QoS row). What it
// sends comes in through the tap, where nothing can wait: flows let it pass through
// a meter. Both work with the datapath of the kernel and the one in user space.
// Ingress policing, the third way, does nothing with the latter.

const bitsPerByte = 8

// shapeOf is what limits what a guest receives.
func shapeOf(l api.NICLimit) ovs.Shape {
	if l.BPSIn == 0 {
		return ovs.Shape{}
	}
	return ovs.Shape{Rate: int64(l.BPSIn) * bitsPerByte, Burst: int64(l.Bucket(l.BPSIn)) * bitsPerByte}
}

// meterOf is what limits what a guest sends.
func meterOf(id uint32, l api.NICLimit) openflow.Meter {
	return openflow.Meter{ID: id, Rate: kilobits(l.BPSOut), Burst: kilobits(l.Bucket(l.BPSOut))}
}

func kilobits(n api.Size) uint32 {
	return uint32(min(max(int64(n)*bitsPerByte/1000, 1), math.MaxUint32))
}

// metered lets what flows pass go through a meter.
func metered(flows []openflow.Flow, id uint32) {
	for i := range flows {
		if flows[i].Normal {
			flows[i].Meter = id
		}
	}
}

// meters are those of the cards that are in the running switch. A meter has the
// number of its port.
func (p *pass) meters() []openflow.Meter {
	var out []openflow.Meter
	for _, t := range p.w.taps() {
		have, ok := p.state.Ports[t.name]
		if _, wanted := p.ports[t.name]; ok && wanted && have.OFPort > 0 && t.nic.Limit.BPSOut > 0 {
			out = append(out, meterOf(uint32(have.OFPort), t.nic.Limit))
		}
	}
	return out
}

// replaceFlows sets the flows with their meters. What a switch refuses to limit passes
// unlimited, which is said; the limits of other cards stay.
func (p *pass) replaceFlows(ctx context.Context, flows []openflow.Flow, meters []openflow.Meter) error {
	s := p.s
	s.unlimited = ""
	refused, err := s.flow.SetMeters(ctx, meters)
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		s.unlimited = p.refusal(refused, len(meters))
		s.log.Warn("network cards are not limited", "cards", len(refused), "of", len(meters), "reason", s.unlimited)
		flows, meters = unmetered(flows, meters, s.flow.Metered)
	}
	if err := s.flow.Replace(ctx, flowCookie, flows); err != nil {
		return err
	}
	return s.flow.DropMeters(ctx, meters)
}

// refusal says which cards are not limited, and why.
func (p *pass) refusal(refused map[uint32]*openflow.Refusal, all int) string {
	ids := slices.Sorted(maps.Keys(refused))
	why := refused[ids[0]]
	if len(refused) == all {
		return fmt.Sprintf("Open vSwitch's datapath (%s) has no meters, so what guests send is not limited: %v", p.report.Datapath, why)
	}
	return fmt.Sprintf("Open vSwitch's datapath (%s) refuses %d of %d meters, so what the guests behind the ports %v send is not limited as wished: %v", p.report.Datapath, len(refused), all, ids[:min(len(ids), shownPorts)], why)
}

// shownPorts is how many ports a message names.
const shownPorts = 8

// unmetered leaves out the meters that are not there.
func unmetered(flows []openflow.Flow, meters []openflow.Meter, there func(id uint32) bool) ([]openflow.Flow, []openflow.Meter) {
	flows = slices.Clone(flows)
	for i := range flows {
		if flows[i].Meter != 0 && !there(flows[i].Meter) {
			flows[i].Meter = 0
		}
	}
	return flows, slices.DeleteFunc(slices.Clone(meters), func(m openflow.Meter) bool { return !there(m.ID) })
}
