// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package snmp

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/gosnmp/gosnmp"

	"github.com/muster-vm/muster/api"
)

// MaxRows is the most rows of one table.
const MaxRows = 10_000

// State is what the tables show.
type State struct {
	Cluster, Node string
	Status        api.ClusterStatus
	Version       string
	Nodes         []api.Node
	VMs           []api.VM
	Alerts        []api.Alert
}

// binding is one variable.
type binding struct {
	name  oid
	text  string // the name as text, as gosnmp wants it
	typ   gosnmp.Asn1BER
	value any
}

// tree is all variables in order of their names.
type tree []binding

func (t *tree) add(name string, typ gosnmp.Asn1BER, value any) {
	o, ok := parseOID(name)
	if !ok {
		return // cannot be: names are made of numbers here
	}
	*t = append(*t, binding{o, "." + name, typ, value})
}

func (t *tree) str(name, s string) { t.add(name, gosnmp.OctetString, text(s)) }

func (t *tree) gauge(name string, n int64) {
	t.add(name, gosnmp.Gauge32, uint32(min(max(n, 0), math.MaxUint32)))
}

func (t *tree) enum(name string, n int) { t.add(name, gosnmp.Integer, n) }

// truth is a TruthValue (RFC 2579): 1 is true, 2 is false.
func (t *tree) truth(name string, b bool) {
	n := 2
	if b {
		n = 1
	}
	t.enum(name, n)
}

var (
	nodePhases  = []api.NodePhase{"", api.NodeJoining, api.NodeReady, api.NodeLost, api.NodeLeaving}
	vmPhases    = []api.VMPhase{"", api.VMCreating, api.VMStopped, api.VMStarting, api.VMRunning, api.VMPaused, api.VMStopping, api.VMFailed, api.VMUnknown, api.VMDeleting, api.VMSuspended}
	alertPhases = []api.AlertPhase{"", api.AlertPending, api.AlertFiring, api.AlertResolved}
)

// number is the place of a value in an enumeration; 0 is unknown.
func number[T comparable](list []T, v T) int { return max(0, slices.Index(list, v)) }

// next returns the position of the first variable after a name.
func (t tree) next(name oid) int {
	i, found := t.find(name)
	if found {
		i++
	}
	return i
}

func (t tree) find(name oid) (int, bool) {
	return slices.BinarySearchFunc(t, name, func(b binding, o oid) int { return compareOID(b.name, o) })
}

// build makes the tree. uptime is in hundredths of a second.
func build(s *State, uptime uint32) tree {
	var t tree
	t.str(sysDescr, fmt.Sprintf("muster %s node %s of cluster %s", s.Version, s.Node, s.Cluster))
	t.add(sysObjectID, gosnmp.ObjectIdentifier, "."+root)
	t.add(SysUpTime, gosnmp.TimeTicks, uptime)
	t.str(sysName, s.Node)
	t.scalars(s)
	vmsOn := map[string]int64{}
	for i := range s.VMs {
		vmsOn[s.VMs[i].Status.Node]++
	}
	for i := range s.Nodes[:min(len(s.Nodes), MaxRows)] {
		t.node(&s.Nodes[i], vmsOn[s.Nodes[i].Meta.Name])
	}
	for i := range s.VMs[:min(len(s.VMs), MaxRows)] {
		t.vm(&s.VMs[i])
	}
	for i := range s.Alerts[:min(len(s.Alerts), MaxRows)] {
		t.alert(&s.Alerts[i])
	}
	slices.SortFunc(t, func(a, b binding) int { return compareOID(a.name, b.name) })
	return t
}

func (t *tree) scalars(s *State) {
	ready, running, firing := int64(0), int64(0), int64(0)
	for i := range s.Nodes {
		if s.Nodes[i].Status.Phase == api.NodeReady {
			ready++
		}
	}
	for i := range s.VMs {
		if s.VMs[i].Status.Phase == api.VMRunning {
			running++
		}
	}
	for i := range s.Alerts {
		if s.Alerts[i].Status.Phase == api.AlertFiring {
			firing++
		}
	}
	at := func(n int) string { return fmt.Sprintf("%s.%d.0", cluster, n) }
	t.str(at(1), s.Cluster)
	t.str(at(2), s.Node)
	t.str(at(3), s.Status.Leader)
	t.add(at(4), gosnmp.Counter64, s.Status.Term)
	t.truth(at(5), s.Status.Quorum)
	t.add(at(6), gosnmp.Counter64, s.Status.Revision)
	t.gauge(at(7), int64(s.Status.StaleSeconds))
	t.gauge(at(8), int64(len(s.Nodes)))
	t.gauge(at(9), ready)
	t.gauge(at(10), int64(len(s.VMs)))
	t.gauge(at(11), running)
	t.gauge(at(12), firing)
}

// row returns the names of the columns of a row.
func row(entry, id string) (func(column int) string, bool) {
	idx, ok := index(id)
	return func(column int) string { return fmt.Sprintf("%s.%d%s", entry, column, idx) }, ok
}

func (t *tree) node(n *api.Node, vms int64) {
	at, ok := row(nodeEntry, n.Meta.ID)
	if !ok {
		return
	}
	t.str(at(2), n.Meta.Name)
	t.enum(at(3), number(nodePhases, n.Status.Phase))
	t.str(at(4), string(n.Spec.Role))
	t.str(at(5), n.Spec.Address)
	t.gauge(at(6), int64(n.Status.CPUs))
	t.gauge(at(7), int64(n.Status.Memory/api.MiB))
	t.gauge(at(8), vms)
	t.truth(at(9), n.Spec.Maintenance)
	t.str(at(10), n.Status.Version)
	t.str(at(11), n.Status.Message)
}

func (t *tree) vm(vm *api.VM) {
	at, ok := row(vmEntry, vm.Meta.ID)
	if !ok {
		return
	}
	t.str(at(2), vm.Meta.Name)
	t.str(at(3), vm.Meta.Project)
	t.enum(at(4), number(vmPhases, vm.Status.Phase))
	t.str(at(5), vm.Status.Node)
	t.gauge(at(6), int64(vm.Spec.CPUs))
	t.gauge(at(7), int64(vm.Spec.Memory/api.MiB))
	t.str(at(8), string(vm.Spec.HA))
	t.gauge(at(9), int64(vm.Status.Crashes))
	t.str(at(10), vm.Status.Message)
}

func (t *tree) alert(a *api.Alert) {
	bindings, ok := alertBindings(a)
	if !ok {
		return
	}
	for _, b := range bindings {
		t.add(b.Name, b.Type, b.Value)
	}
	at, _ := row(alertEntry, a.Meta.ID)
	t.str(at(8), a.Spec.AcknowledgedBy)
}

// alertBindings are the columns of an alert that notifications carry, too.
func alertBindings(a *api.Alert) ([]gosnmp.SnmpPDU, bool) {
	idx, ok := index(a.Meta.ID)
	if !ok {
		return nil, false
	}
	since := a.Status.PendingAt
	switch a.Status.Phase {
	case api.AlertFiring:
		since = a.Status.FiringAt
	case api.AlertResolved:
		since = a.Status.ResolvedAt
	}
	when := ""
	if since != nil {
		when = since.UTC().Format(time.RFC3339Nano)
	}
	str := func(column, s string) gosnmp.SnmpPDU {
		return gosnmp.SnmpPDU{Name: column + idx, Type: gosnmp.OctetString, Value: text(s)}
	}
	return []gosnmp.SnmpPDU{
		str(alertRule, a.Spec.Rule),
		{Name: alertSeverity + idx, Type: gosnmp.Integer, Value: a.Spec.Severity.Rank()},
		{Name: alertPhase + idx, Type: gosnmp.Integer, Value: number(alertPhases, a.Status.Phase)},
		str(alertTarget, string(a.Spec.TargetKind)+" "+a.Spec.Target),
		str(alertMessage, a.Status.Message),
		str(alertSince, when),
	}, true
}

// NotificationBindings are the variables of a notification about an alert.
func NotificationBindings(a *api.Alert, clusterName string, uptime uint32) ([]gosnmp.SnmpPDU, bool) {
	trap := NotifyFiring
	if a.Status.Phase == api.AlertResolved {
		trap = NotifyResolved
	}
	columns, ok := alertBindings(a)
	if !ok {
		return nil, false
	}
	out := []gosnmp.SnmpPDU{
		{Name: SysUpTime, Type: gosnmp.TimeTicks, Value: uptime},
		{Name: TrapOID, Type: gosnmp.ObjectIdentifier, Value: "." + trap},
	}
	out = append(out, columns...)
	return append(out, gosnmp.SnmpPDU{Name: ClusterName, Type: gosnmp.OctetString, Value: text(clusterName)}), true
}
