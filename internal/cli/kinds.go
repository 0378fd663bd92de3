// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// kindView is how objects of a kind look to people.
type kindView struct {
	kind    api.Kind
	columns []string
	row     func(raw json.RawMessage, now time.Time) ([]string, error)
	show    func(s *sections, raw json.RawMessage, now time.Time) error
}

// view builds a kindView from functions over the typed object.
func view[S, T any](kind api.Kind, columns string, row func(o *api.Object[S, T], now time.Time) []string, show func(s *sections, o *api.Object[S, T], now time.Time)) *kindView {
	return &kindView{
		kind:    kind,
		columns: strings.Fields(columns),
		row: func(raw json.RawMessage, now time.Time) ([]string, error) {
			o, err := client.As[S, T](raw)
			if err != nil {
				return nil, err
			}
			return row(&o, now), nil
		},
		show: func(s *sections, raw json.RawMessage, now time.Time) error {
			o, err := client.As[S, T](raw)
			if err != nil {
				return err
			}
			showMeta(s, &o.Meta, now)
			show(s, &o, now)
			return nil
		},
	}
}

// kinds returns the views of all kinds that commands show, in the order of
// help texts.
func kinds() []*kindView {
	return []*kindView{
		view(api.KindVM, "NAME STATUS NODE CPUS MEMORY HA AGE", vmRow, vmShow),
		view(api.KindImage, "NAME STATUS POOL NODE FORMAT SIZE AGE", imageRow, imageShow),
		view(api.KindVolume, "NAME STATUS POOL NODE IMAGE SIZE AGE", volumeRow, volumeShow),
		view(api.KindPool, "NAME TYPE READY FREE TOTAL PATH AGE", poolRow, poolShow),
		view(api.KindNetwork, "NAME TYPE TAG READY AGE", networkRow, networkShow),
		view(api.KindIPPool, "NAME NETWORK CIDR GATEWAY USED TOTAL AGE", ippoolRow, ippoolShow),
		view(api.KindUplink, "NAME NODE NIC READY AGE MESSAGE", uplinkRow, uplinkShow),
		view(api.KindNode, "NAME STATUS ROLE ADDRESS CPUS MEMORY ACCEL GUARD VERSION", nodeRow, nodeShow),
		view(api.KindTask, "ID ACTION TARGET STATUS PROGRESS ACTOR AGE MESSAGE", taskRow, taskShow),
		view(api.KindToken, "NAME USE ROLE EXPIRES AGE", tokenRow, tokenShow),
		view(api.KindEvent, "AGE SEVERITY TYPE NODE ACTOR MESSAGE", eventRow, eventShow),
		view(api.KindAlert, "ID STATUS SEVERITY RULE TARGET SINCE ACK MESSAGE", alertRow, alertShow),
		view(api.KindRule, "NAME STATUS CHECK SEVERITY THRESHOLD FOR METRIC AGE", ruleRow, ruleShow),
		view(api.KindReceiver, "NAME STATUS TYPE ADDRESS MIN-SEVERITY QUEUED LAST-SENT LAST-ERROR", receiverRow, receiverShow),
		view(api.KindSnapshot, "NAME VM STATUS TAKEN MEMORY CONSISTENCY DESCRIPTION", snapshotRow, snapshotShow),
		view(api.KindPowerDevice, "NAME NODE ORDER DRIVER ADDRESS USER PASSWORD TIMEOUT", powerDeviceRow, powerDeviceShow),
		view(api.KindPowerAction, "AGE NODE ACTION STATUS TRIGGER VIA ACTOR MESSAGE", powerActionRow, powerActionShow),
		view(api.KindFailover, "ID AGE NODE CAUSE SILENT LEADER TERM BACK", failoverRow, failoverShow),
		view(api.KindDrill, "VM STATUS SCHEDULE AGE TOOK FROM TO MESSAGE", drillRow, drillShow),
		view(api.KindUser, "NAME STATUS ROLE KEYS FULL-NAME AGE", userRow, userShow),
	}
}

// viewOf returns the view of a kind given in singular or plural.
func viewOf(word string) (*kindView, error) {
	all := kinds()
	names := make([]string, len(all))
	for i, k := range all {
		if word == string(k.kind) || word == k.kind.Plural() {
			return k, nil
		}
		names[i] = string(k.kind)
	}
	u := usagef("kind %q is unknown", word)
	u.hint = "the kinds are " + strings.Join(names, ", ")
	return nil, u
}

// mustView returns the view of a kind that this program names itself.
func mustView(kind api.Kind) *kindView {
	k, err := viewOf(string(kind))
	if err != nil {
		panic("cli: no view for kind " + string(kind))
	}
	return k
}

func vmRow(o *api.VM, now time.Time) []string {
	return []string{o.Meta.Name, status(&o.Meta, string(o.Status.Phase)) + pendingMark(o), dash(o.Status.Node), strconv.Itoa(o.Spec.CPUs),
		sizeOr(o.Spec.Memory), dash(string(o.Spec.HA)), age(o.Meta.CreatedAt, now)}
}

func imageRow(o *api.Image, now time.Time) []string {
	return []string{o.Meta.Name, withProgress(status(&o.Meta, string(o.Status.Phase)), o.Status.Progress, o.Status.Phase == api.StorageImporting),
		o.Spec.Pool, dash(o.Spec.Node), dash(o.Status.Format), sizeOr(o.Status.VirtualSize), age(o.Meta.CreatedAt, now)}
}

func volumeRow(o *api.Volume, now time.Time) []string {
	size := o.Status.Size
	if size == 0 {
		size = o.Spec.Size
	}
	return []string{o.Meta.Name, status(&o.Meta, string(o.Status.Phase)), o.Spec.Pool, dash(o.Spec.Node), dash(o.Spec.Image), sizeOr(size), age(o.Meta.CreatedAt, now)}
}

func poolRow(o *api.Pool, now time.Time) []string {
	ready, free, total := 0, api.Size(0), api.Size(0)
	for _, n := range o.Status.Nodes {
		if n.Ready {
			ready++
		}
		if o.Spec.Shared() {
			free, total = max(free, n.Free), max(total, n.Total)
		} else {
			free, total = free+n.Free, total+n.Total
		}
	}
	return []string{o.Meta.Name, string(o.Spec.Type), fmt.Sprintf("%d/%d", ready, len(o.Status.Nodes)), sizeOr(free), sizeOr(total),
		poolPlace(&o.Spec), age(o.Meta.CreatedAt, now)}
}

func nodeRow(o *api.Node, _ time.Time) []string {
	state := status(&o.Meta, string(o.Status.Phase))
	if a := o.Status.Absence; a != nil && o.Status.Phase == api.NodeReady {
		state = map[api.RebootAction]string{api.RebootHost: "rebooting (planned)", api.ShutdownHost: "off (planned)"}[a.Action]
	}
	if o.Spec.Maintenance {
		state += ",maintenance"
	}
	return []string{o.Meta.Name, state, dash(string(o.Spec.Role)), dash(o.Spec.Address), strconv.Itoa(o.Status.CPUs), sizeOr(o.Status.Memory),
		dash(string(o.Status.Accelerator)), dash(o.Status.GuardLevel), dash(o.Status.Version)}
}

func taskRow(o *api.Task, now time.Time) []string {
	return []string{o.Meta.ID, string(o.Spec.Action), taskTarget(o), dash(string(o.Status.Phase)), fmt.Sprintf("%d%%", o.Status.Progress),
		dash(o.Spec.Actor), age(o.Meta.CreatedAt, now), o.Status.Message}
}

func taskTarget(o *api.Task) string {
	return string(o.Spec.TargetKind) + "/" + first(o.Spec.Target, o.Spec.TargetID)
}

func tokenRow(o *api.Token, now time.Time) []string {
	role := string(o.Spec.Role)
	if o.Spec.Use == api.TokenJoin {
		role = string(o.Spec.JoinRole)
	}
	expires := until(o.Spec.ExpiresAt, now)
	if o.Spec.UsedBy != "" {
		expires = "used" // it works once
	}
	return []string{first(o.Meta.Name, o.Meta.ID), string(o.Spec.Use), role, expires, age(o.Meta.CreatedAt, now)}
}

// status is the phase, or that the object is on its way out.
func status(m *api.Meta, phase string) string {
	if m.Deleting() {
		return "deleting"
	}
	return dash(phase)
}

func withProgress(word string, percent int, doing bool) string {
	if doing && percent > 0 {
		return fmt.Sprintf("%s,%d%%", word, percent)
	}
	return word
}

func showMeta(s *sections, m *api.Meta, now time.Time) {
	s.field("Name", m.Name)
	s.field("ID", m.ID)
	if client.Scoped(m.Kind) {
		s.field("Project", m.Project)
	}
	s.field("Labels", labelText(m.Labels))
	s.field("Created", moment(m.CreatedAt, now))
	if m.DeletingAt != nil {
		s.field("Deleting since", moment(*m.DeletingAt, now))
		s.field("Waits for", strings.Join(m.Finalizers, ", "))
	}
	s.field("Revision", strconv.FormatUint(m.Revision, 10))
}

func labelText(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ", ")
}

func showConditions(s *sections, list []api.Condition, now time.Time) {
	if len(list) == 0 {
		return
	}
	s.title("Conditions")
	t := &table{head: []string{"TYPE", "OK", "REASON", "SINCE", "MESSAGE"}}
	for _, c := range list {
		t.add(c.Type, yesNo(c.OK), dash(c.Reason), age(c.Since, now), c.Message)
	}
	s.table(t)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func vmShow(s *sections, o *api.VM, now time.Time) {
	st := &o.Status
	state := status(&o.Meta, string(st.Phase))
	if st.Node != "" {
		state += " on " + st.Node
	}
	s.title("State")
	s.field("Status", state)
	s.field("Wished", string(o.Spec.Power))
	s.field("Message", st.Message)
	if st.StartedAt != nil {
		s.field("Started", moment(*st.StartedAt, now))
	}
	if st.PID != 0 {
		s.field("Process", strconv.Itoa(st.PID))
	}
	s.field("Accelerator", st.Accelerator)
	s.field("Guest's CPU", runningCPUText(st.CPU))
	s.field("Epoch", number(st.Epoch))
	if o.Spec.HA == api.HARestart && st.PID != 0 {
		fence := "guard: it ends with the lease of its node"
		if st.StorageGuard {
			fence = "storage: it outlives the lease, and moves when its node is locked out of its pools"
		}
		s.field("Fence", fence)
	}
	s.field("Crashes", number(uint64(st.Crashes)))
	if st.ObservedGeneration < o.Meta.Generation {
		s.field("Pending", "the node has not seen the last change yet")
	}
	s.title("Hardware")
	s.field("Machine", machineText(&o.Spec))
	s.field("CPUs", strconv.Itoa(o.Spec.CPUs)+" "+cpuText(&o.Spec))
	s.field("Memory", sizeOr(o.Spec.Memory))
	if o.Spec.MemoryMin > 0 {
		s.field("Memory min", sizeOr(o.Spec.MemoryMin))
	}
	if m := st.Memory; m != nil {
		s.field("Memory now", strings.TrimSuffix(sizeOr(m.Target)+", "+m.Reason, ", "))
	}
	showRecovery(s, o, now)
	showGuest(s, o)
	if len(o.Spec.Disks) > 0 {
		s.title("Disks")
		t := &table{head: []string{"SLOT", "VOLUME", "POOL", "IMAGE", "SIZE"}}
		for _, d := range o.Spec.Disks {
			t.add(dash(number(uint64(d.Slot))), dash(d.Volume), dash(d.Pool), dash(d.Image), sizeOr(d.Size))
		}
		s.table(t)
	}
	if len(o.Spec.NICs) > 0 {
		s.title("Networks")
		t := nicTable(o.Spec.NICs)
		s.table(t)
	}
	showConditions(s, st.Conditions, now)
}

func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

func imageShow(s *sections, o *api.Image, now time.Time) {
	s.title("State")
	s.field("Status", withProgress(status(&o.Meta, string(o.Status.Phase)), o.Status.Progress, o.Status.Phase == api.StorageImporting))
	s.field("Message", o.Status.Message)
	s.field("Format", o.Status.Format)
	s.field("Virtual size", sizeOr(o.Status.VirtualSize))
	s.field("File size", sizeOr(o.Status.Size))
	s.field("SHA-256", first(o.Status.SHA256, o.Spec.SHA256))
	s.title("Place")
	s.field("Pool", o.Spec.Pool)
	s.field("Node", o.Spec.Node)
	s.field("Imported from", o.Spec.Path)
	s.field("Copied from", o.Spec.SourceVolume)
	showConditions(s, o.Status.Conditions, now)
}

func volumeShow(s *sections, o *api.Volume, now time.Time) {
	s.title("State")
	s.field("Status", status(&o.Meta, string(o.Status.Phase)))
	s.field("Message", o.Status.Message)
	s.field("Format", o.Status.Format)
	s.field("Size", sizeOr(max(o.Status.Size, o.Spec.Size)))
	s.field("Clone of", o.Spec.Image)
	s.field("Copied from", o.Spec.SourceVolume)
	s.field("Content", string(o.Spec.Content))
	s.field("Owner", o.Meta.Owner)
	s.title("Place")
	s.field("Pool", o.Spec.Pool)
	s.field("Node", o.Spec.Node)
	showConditions(s, o.Status.Conditions, now)
}

func poolShow(s *sections, o *api.Pool, _ time.Time) {
	s.field("Type", string(o.Spec.Type))
	s.field("Path", first(o.Spec.Path, "(data directory)"))
	s.title("Nodes")
	t := &table{head: []string{"NODE", "READY", "FREE", "TOTAL", "REASON"}}
	for _, n := range o.Status.Nodes {
		t.add(n.Node, yesNo(n.Ready), sizeOr(n.Free), sizeOr(n.Total), first(n.Reason, n.Notes))
	}
	s.table(t)
}

func nodeShow(s *sections, o *api.Node, now time.Time) {
	st := &o.Status
	s.title("State")
	s.field("Status", status(&o.Meta, string(st.Phase)))
	if o.Spec.Maintenance {
		s.field("Maintenance", "on: takes no new VMs")
	}
	s.field("Message", st.Message)
	if c := st.CutOff; c != nil {
		where := "and hears some of the other nodes"
		if c.Isolated {
			where = "and hears no other node"
		}
		s.field("Network", fmt.Sprintf("cut off since %s, %s; its lease goes on by notes in pools", moment(c.Since, now), where))
	}
	if st.LostAt != nil {
		s.field("Last lost", moment(*st.LostAt, now))
	}
	for _, f := range st.StorageFences {
		how := "locked out"
		if f.InForceAt == nil {
			how = "being locked out"
		}
		s.field("Pool "+f.Pool, fmt.Sprintf("%s since %s: %s", how, moment(f.BeganAt, now), f.Reason))
	}
	s.field("Role", string(o.Spec.Role))
	s.field("Address", o.Spec.Address)
	s.field("Version", st.Version)
	s.title("Host")
	s.field("CPUs", strconv.Itoa(st.CPUs))
	s.field("Memory", sizeOr(st.Memory))
	s.field("Reserved", sizeOr(o.Spec.ReservedMemory))
	accel := string(st.Accelerator)
	if st.AcceleratorReason != "" {
		accel += ": " + st.AcceleratorReason
	}
	s.field("Accelerator", accel)
	s.field("QEMU", first(st.QEMUVersion, "not usable"))
	s.field("Guard", st.GuardLevel)
	showCertificate(s, st.Certificate, now)
	showConditions(s, st.Conditions, now)
}

func taskShow(s *sections, o *api.Task, now time.Time) {
	s.title("State")
	s.field("Status", string(o.Status.Phase))
	s.field("Progress", fmt.Sprintf("%d%%", o.Status.Progress))
	s.field("Message", o.Status.Message)
	s.field("Code", string(o.Status.Code))
	s.field("Action", string(o.Spec.Action))
	s.field("Target", taskTarget(o))
	s.field("Asked by", o.Spec.Actor)
	if o.Status.StartedAt != nil {
		s.field("Started", moment(*o.Status.StartedAt, now))
	}
	if o.Status.FinishedAt != nil {
		s.field("Finished", moment(*o.Status.FinishedAt, now))
	}
	if !o.Status.Phase.Final() && !o.Spec.Deadline.IsZero() {
		s.field("Deadline", until(o.Spec.Deadline, now))
	}
}

func tokenShow(s *sections, o *api.Token, now time.Time) {
	row := tokenRow(o, now)
	s.field("Use", row[1])
	s.field("Role", row[2])
	s.field("Expires", until(o.Spec.ExpiresAt, now))
	s.field("Used by", o.Spec.UsedBy)
}
