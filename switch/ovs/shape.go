// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ovs

import (
	"context"
	"fmt"
	"strconv"

	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// Shape is how fast frames leave the switch through a port: what is more waits in
// the queue of the device, and what does not fit there is dropped. The zero value
// is no limit. ovs-vswitchd makes it a linux-htb with one class for everything, and
// makes it again when it restarts. A qdisc that somebody else puts on the device
// would be removed by it.
type Shape struct {
	// Rate in bits per second, Burst in bits.
	Rate, Burst int64
}

// shapeType is the kind of a QoS row (ovs-vswitchd.conf.db(5)).
const shapeType = "linux-htb"

type (
	qosRow struct {
		UUID        string            `ovsdb:"_uuid"`
		Type        string            `ovsdb:"type"`
		Queues      map[int]string    `ovsdb:"queues"`
		OtherConfig map[string]string `ovsdb:"other_config"`
		ExternalIDs map[string]string `ovsdb:"external_ids"`
	}
	queueRow struct {
		UUID        string            `ovsdb:"_uuid"`
		OtherConfig map[string]string `ovsdb:"other_config"`
		ExternalIDs map[string]string `ovsdb:"external_ids"`
	}
)

// shaping are the rows that shape ports.
type shaping struct {
	qos    map[string]qosRow   // by UUID
	queues map[string]queueRow // by UUID
}

// of returns the shape that a port has by rows of its owner; what others made is
// theirs.
func (s *shaping) of(qos *string, owner string) (shape Shape) {
	if qos == nil {
		return shape
	}
	q, ok := s.qos[*qos]
	if !ok || owner == "" || q.ExternalIDs[OwnerKey] != owner {
		return shape
	}
	c := s.queues[q.Queues[0]].OtherConfig
	shape.Rate, _ = strconv.ParseInt(c["max-rate"], 10, 64)
	shape.Burst, _ = strconv.ParseInt(c["burst"], 10, 64)
	return shape
}

// shapeRows returns the operations that make the rows of a shape, with named UUIDs
// and the name of the one for the port.
func (c *Conn) shapeRows(shape Shape, externalIDs map[string]string) (qos *string, ops []ovsdb.Operation, err error) {
	if shape == (Shape{}) {
		return nil, nil, nil
	}
	rate := strconv.FormatInt(shape.Rate, 10)
	queue := &queueRow{
		UUID: "q0", ExternalIDs: externalIDs,
		OtherConfig: map[string]string{"min-rate": rate, "max-rate": rate, "burst": strconv.FormatInt(shape.Burst, 10)},
	}
	row := &qosRow{UUID: "s0", Type: shapeType, ExternalIDs: externalIDs, Queues: map[int]string{0: "q0"}, OtherConfig: map[string]string{"max-rate": rate}}
	ops, err = c.create(queue, row)
	return &row.UUID, ops, err
}

// DropShapes removes the rows of an owner that shape no port any more: nothing else
// removes them.
func (c *Conn) DropShapes(ctx context.Context, s *State, owner string) error {
	var ops []ovsdb.Operation
	kept := map[string]bool{}
	for uuid, q := range s.shaping.qos {
		if s.shaped[uuid] || owner == "" || q.ExternalIDs[OwnerKey] != owner {
			for _, queue := range q.Queues {
				kept[queue] = true
			}
			continue
		}
		more, err := c.c.Where(&qosRow{UUID: uuid}).Delete()
		if err != nil {
			return fmt.Errorf("remove unused limits of ports: %w", err)
		}
		ops = append(ops, more...)
	}
	for uuid, q := range s.shaping.queues {
		if kept[uuid] || owner == "" || q.ExternalIDs[OwnerKey] != owner {
			continue
		}
		more, err := c.c.Where(&queueRow{UUID: uuid}).Delete()
		if err != nil {
			return fmt.Errorf("remove unused limits of ports: %w", err)
		}
		ops = append(ops, more...)
	}
	if len(ops) == 0 {
		return nil
	}
	return c.transact(ctx, "remove unused limits of ports", ops)
}
