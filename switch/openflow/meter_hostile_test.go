// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package openflow

import (
	"encoding/binary"
	"net"
	"testing"
)

// A switch that had no room for the meter of one card took the limits of all others
// for refused, too, and they were taken away.
func TestARefusedMeterLeavesTheOthers(t *testing.T) {
	const full = 2
	path := serve(t, func(conn net.Conn) {
		greet(conn)
		for {
			typ, xid, body, err := receive(conn)
			if err != nil {
				return
			}
			switch {
			case typ == typeMeterMod && binary.BigEndian.Uint16(body) == meterAdd && binary.BigEndian.Uint32(body[4:]) == full:
				_, _ = conn.Write(message(typeError, xid, []byte{0, 12, 0, 10})) // out of meters
			case typ == typeBarrier:
				_, _ = conn.Write(message(typeBarrierEnd, xid, nil))
			}
		}
	})
	s, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	refused, err := s.SetMeters(t.Context(), []Meter{{ID: 1, Rate: 8, Burst: 8}, {ID: full, Rate: 8, Burst: 8}, {ID: 3, Rate: 8, Burst: 8}})
	if err != nil || len(refused) != 1 || refused[full] == nil || refused[full].Code != 10 {
		t.Errorf("%v, %v", refused, err)
	}
	if !s.Metered(1) || s.Metered(full) || !s.Metered(3) {
		t.Error("the wrong cards are limited")
	}
}
