// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ovs

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/ovn-kubernetes/libovsdb/model"
	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// failMode: without a controller the bridge switches by itself.
const failMode = "standalone"

// create returns the operations that insert rows of different tables.
func (c *Conn) create(rows ...model.Model) ([]ovsdb.Operation, error) {
	var out []ovsdb.Operation
	for _, r := range rows {
		ops, err := c.c.Create(r)
		if err != nil {
			return nil, err
		}
		out = append(out, ops...)
	}
	return out, nil
}

// AddBridge makes a bridge that is not there.
func (c *Conn) AddBridge(ctx context.Context, s *State, owner, name, datapath string) error {
	mode := failMode
	iface := &interfaceRow{UUID: "i0", Name: name, Type: "internal"}
	port := &portRow{UUID: "p0", Name: name, Interfaces: []string{"i0"}, ExternalIDs: map[string]string{OwnerKey: owner}}
	bridge := &bridgeRow{UUID: "b0", Name: name, Datapath: datapath, FailMode: &mode, Ports: []string{"p0"}, ExternalIDs: map[string]string{OwnerKey: owner}}
	ops, err := c.create(iface, port, bridge)
	if err != nil {
		return fmt.Errorf("make bridge %s: %w", name, err)
	}
	root := &rootRow{UUID: s.root}
	more, err := c.c.Where(root).Mutate(root, model.Mutation{Field: &root.Bridges, Mutator: ovsdb.MutateOperationInsert, Value: []string{"b0"}})
	if err != nil {
		return fmt.Errorf("make bridge %s: %w", name, err)
	}
	return c.transact(ctx, "make bridge "+name, append(ops, more...))
}

// SetBridge sets what may change of a bridge of ours.
func (c *Conn) SetBridge(ctx context.Context, b Bridge, datapath string, externalIDs map[string]string) error {
	if b.Owner == "" || externalIDs[OwnerKey] != b.Owner {
		return fmt.Errorf("change bridge %s: it is not ours", b.Name)
	}
	if b.Datapath == datapath && maps.Equal(b.ExternalIDs, externalIDs) {
		return nil
	}
	row := &bridgeRow{UUID: b.uuid, Datapath: datapath, ExternalIDs: externalIDs}
	ops, err := c.c.Where(row).Update(row, &row.Datapath, &row.ExternalIDs)
	if err != nil {
		return fmt.Errorf("change bridge %s: %w", b.Name, err)
	}
	return c.transact(ctx, "change bridge "+b.Name, ops)
}

// PortWish is how a port should be.
type PortWish struct {
	Name string
	// Tag makes it an access port of a VLAN, Trunks a trunk of these.
	Tag         int
	Trunks      []int
	ExternalIDs map[string]string // with OwnerKey
	// Shape limits what leaves the switch through the port.
	Shape Shape
}

func (w *PortWish) met(p Port) bool {
	return p.Tag == w.Tag && slices.Equal(p.Trunks, w.Trunks) && maps.Equal(p.ExternalIDs, w.ExternalIDs) && p.Shape == w.Shape
}

func (w *PortWish) row() *portRow {
	r := &portRow{Name: w.Name, Trunks: w.Trunks, ExternalIDs: w.ExternalIDs}
	mode := "trunk"
	if w.Tag != 0 {
		mode = "access"
		r.Tag = &w.Tag
	}
	r.VLANMode = &mode
	return r
}

// SetPort makes a port in a bridge of ours, or changes the one that is there.
// changed is false when the database has it like this already.
func (c *Conn) SetPort(ctx context.Context, s *State, bridge string, w PortWish) (changed bool, err error) {
	slices.Sort(w.Trunks) // as the database keeps sets
	owner, what := w.ExternalIDs[OwnerKey], "plug "+w.Name+" into "+bridge
	b, ok := s.Bridges[bridge]
	if !ok || b.Owner != owner || owner == "" {
		return false, fmt.Errorf("%s: the bridge is not there or not ours", what)
	}
	p, exists := s.Ports[w.Name]
	switch {
	case exists && (p.Bridge != bridge || p.Owner != owner):
		return false, fmt.Errorf("%s: it is a port of bridge %s that is not ours; free it: ovs-vsctl del-port %s %s", what, p.Bridge, p.Bridge, w.Name)
	case exists && w.met(p):
		return false, nil
	case exists:
		ops, err := c.changePort(p, w)
		if err != nil {
			return false, fmt.Errorf("%s: %w", what, err)
		}
		return true, c.transact(ctx, what, ops)
	}
	iface := &interfaceRow{UUID: "i0", Name: w.Name, ExternalIDs: w.ExternalIDs}
	row := w.row()
	row.UUID, row.Interfaces = "p0", []string{"i0"}
	qos, shape, err := c.shapeRows(w.Shape, w.ExternalIDs)
	if err != nil {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	row.QoS = qos
	ops, err := c.create(iface, row)
	if err != nil {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	ops = append(shape, ops...)
	br := &bridgeRow{UUID: b.uuid}
	more, err := c.c.Where(br).Mutate(br, model.Mutation{Field: &br.Ports, Mutator: ovsdb.MutateOperationInsert, Value: []string{"p0"}})
	if err != nil {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	return true, c.transact(ctx, what, append(ops, more...))
}

// changePort returns the operations that make a port like this. Another shape has
// rows of its own; those that it had are swept up later. What others have put on
// the port stays as long as no limit is wished for.
func (c *Conn) changePort(p Port, w PortWish) ([]ovsdb.Operation, error) {
	row := w.row()
	row.UUID = p.uuid
	columns := []any{&row.Tag, &row.Trunks, &row.VLANMode, &row.ExternalIDs}
	var ops []ovsdb.Operation
	if p.Shape != w.Shape {
		qos, made, err := c.shapeRows(w.Shape, w.ExternalIDs)
		if err != nil {
			return nil, err
		}
		row.QoS, ops = qos, made
		columns = append(columns, &row.QoS)
	}
	more, err := c.c.Where(row).Update(row, columns...)
	return append(ops, more...), err
}

// RemovePort removes a port of ours.
func (c *Conn) RemovePort(ctx context.Context, s *State, owner, name string) error {
	p, ok := s.Ports[name]
	if !ok {
		return nil
	}
	b, known := s.Bridges[p.Bridge]
	if !known || p.Owner != owner || owner == "" || b.Owner != owner {
		return fmt.Errorf("remove port %s: it is not ours", name)
	}
	br := &bridgeRow{UUID: b.uuid}
	ops, err := c.c.Where(br).Mutate(br, model.Mutation{Field: &br.Ports, Mutator: ovsdb.MutateOperationDelete, Value: []string{p.uuid}})
	if err != nil {
		return fmt.Errorf("remove port %s: %w", name, err)
	}
	return c.transact(ctx, "remove port "+name, ops)
}
