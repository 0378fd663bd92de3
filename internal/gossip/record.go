// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Limits of what nodes tell each other besides memberlist's own messages.
const (
	maxIDBytes = 64
	// maxRecordBytes is the longest record: ID, number and summary.
	maxRecordBytes = 1 + maxIDBytes + binary.MaxVarintLen64 + MaxSummaryBytes
	// maxRecords is the most summaries of one exchange of the whole state.
	maxRecords = 4096
	// maxAge bounds the age of a summary on the wire.
	maxAge = 24 * time.Hour
	// recordFormat and stateFormat are the first bytes of a record that goes from
	// node to node and of an exchange; what begins otherwise is of a later version.
	recordFormat = 1
	stateFormat  = 1
)

// record is a node's summary as it travels. number grows with every new one of
// the node, across its restarts too.
type record struct {
	id      string
	number  uint64
	summary []byte // encoded; passed on as it came
}

// encode returns the record as one message.
func (r *record) encode() []byte {
	b := []byte{recordFormat, byte(len(r.id))}
	b = append(b, r.id...)
	b = binary.AppendUvarint(b, r.number)
	return append(b, r.summary...)
}

// decodeRecord reads a message. The summary is not looked at yet.
func decodeRecord(b []byte) (record, error) {
	var r record
	if len(b) < 2 || len(b) > maxRecordBytes {
		return r, fmt.Errorf("decode record of %d bytes: %w", len(b), errMalformed)
	}
	if b[0] != recordFormat {
		return r, fmt.Errorf("decode record: format %d: %w", b[0], errLater)
	}
	n := int(b[1])
	if b = b[2:]; n == 0 || n > maxIDBytes || n > len(b) {
		return r, fmt.Errorf("decode record: ID: %w", errMalformed)
	}
	r.id, b = string(b[:n]), b[n:]
	var width int
	if r.number, width = binary.Uvarint(b); width <= 0 {
		return r, fmt.Errorf("decode record: number: %w", errMalformed)
	}
	r.summary = b[width:]
	return r, nil
}

// aged is a record with the time that has passed since its node made it.
type aged struct {
	record
	age time.Duration
}

// encodeState returns the state that is exchanged as a whole.
func encodeState(list []aged) []byte {
	list = list[:min(len(list), maxRecords)]
	b := []byte{stateFormat}
	for i := range list {
		age := min(max(list[i].age, 0), maxAge)
		b = binary.AppendUvarint(b, uint64(age/time.Millisecond))
		one := list[i].encode()
		b = binary.AppendUvarint(b, uint64(len(one)))
		b = append(b, one...)
	}
	return b
}

// decodeState reads it again.
func decodeState(b []byte) ([]aged, error) {
	if len(b) == 0 || b[0] != stateFormat {
		return nil, fmt.Errorf("decode state of %d bytes: %w", len(b), errMalformed)
	}
	var out []aged
	for b = b[1:]; len(b) > 0; {
		if len(out) == maxRecords {
			return nil, fmt.Errorf("decode state: more than %d records", maxRecords)
		}
		age, n := binary.Uvarint(b)
		if n <= 0 || age > uint64(maxAge/time.Millisecond) {
			return nil, fmt.Errorf("decode state: age: %w", errMalformed)
		}
		b = b[n:]
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return nil, fmt.Errorf("decode state: length: %w", errMalformed)
		}
		r, err := decodeRecord(b[n : n+int(size)])
		b = b[n+int(size):]
		switch {
		case errors.Is(err, errLater): // the others are still worth something
		case err != nil:
			return nil, err
		default:
			out = append(out, aged{r, time.Duration(age) * time.Millisecond})
		}
	}
	return out, nil
}
