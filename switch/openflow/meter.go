// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package openflow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Meter bounds what the flows that name it let pass together; the rest is dropped
// (OpenFlow 1.3, section 5.7).
type Meter struct {
	ID uint32
	// Rate in kilobits per second; Burst in kilobits is what may pass at once.
	Rate, Burst uint32
}

// Numbers of section 7.3.4.4.
const (
	typeMeterMod     = 29
	meterAdd         = 0
	meterModify      = 1
	meterDelete      = 2
	meterKilobits    = 1
	meterBurst       = 4
	meterAll         = 0xffffffff
	bandDrop         = 1
	bandLength       = 16
	instructionMeter = 6
)

// Refusal is a switch's answer that it does not do what it was told.
type Refusal struct{ Type, Code uint16 }

func (r *Refusal) Error() string {
	return fmt.Sprintf("the switch refused a message: error type %d code %d", r.Type, r.Code)
}

// meterMod encodes the body of OFPT_METER_MOD.
func meterMod(command uint16, m Meter) []byte {
	b := binary.BigEndian.AppendUint16(nil, command)
	b = binary.BigEndian.AppendUint16(b, meterKilobits|meterBurst)
	b = binary.BigEndian.AppendUint32(b, m.ID)
	if command == meterDelete {
		return b
	}
	b = binary.BigEndian.AppendUint16(b, bandDrop)
	b = binary.BigEndian.AppendUint16(b, bandLength)
	b = binary.BigEndian.AppendUint32(b, m.Rate)
	b = binary.BigEndian.AppendUint32(b, m.Burst)
	return append(b, 0, 0, 0, 0)
}

// SetMeters makes meters that flows are about to name, and returns those that the switch
// refuses, with the reasons; one that is refused says nothing of the others. Those of an
// earlier session go first, and the flows that name them with them.
func (s *Session) SetMeters(ctx context.Context, meters []Meter) (refused map[uint32]*Refusal, err error) {
	if s.meters == nil {
		err := s.call(ctx, "remove old meters", func(xid uint32) []byte {
			return message(typeMeterMod, xid, meterMod(meterDelete, Meter{ID: meterAll}))
		})
		var no *Refusal
		if err != nil && !errors.As(err, &no) { // a switch without meters has none to remove
			return nil, err
		}
		s.meters = map[uint32]Meter{}
	}
	refused = map[uint32]*Refusal{}
	for _, m := range meters {
		have, there := s.meters[m.ID]
		if there && have == m {
			continue
		}
		command := uint16(meterAdd)
		if there {
			command = meterModify
		}
		err := s.call(ctx, "set a meter", func(xid uint32) []byte { return message(typeMeterMod, xid, meterMod(command, m)) })
		var no *Refusal
		if errors.As(err, &no) {
			refused[m.ID] = no
			continue // a former one of that number stays in force
		}
		if err != nil {
			return nil, err
		}
		s.meters[m.ID] = m
	}
	return refused, nil
}

// Metered reports whether there is a meter of a number.
func (s *Session) Metered(id uint32) bool {
	_, ok := s.meters[id]
	return ok
}

// DropMeters removes all other meters, which no flow names any more.
func (s *Session) DropMeters(ctx context.Context, keep []Meter) error {
	kept := map[uint32]bool{}
	for _, m := range keep {
		kept[m.ID] = true
	}
	for id := range s.meters {
		if kept[id] {
			continue
		}
		err := s.call(ctx, "remove a meter", func(xid uint32) []byte { return message(typeMeterMod, xid, meterMod(meterDelete, Meter{ID: id})) })
		if err != nil {
			return err
		}
		delete(s.meters, id)
	}
	return nil
}
