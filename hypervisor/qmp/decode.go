// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	goqmp "github.com/digitalocean/go-qemu/qmp"
)

// ErrProtocol: what came is not QMP, or a message over the limit.
var ErrProtocol = errors.New("protocol violation")

// message is one line from QEMU; exactly one of the pointers is set.
type message struct {
	greeting *goqmp.Version
	event    *goqmp.Event
	reply    *reply
}

// reply answers the command with its id.
type reply struct {
	id  uint64
	raw []byte // the whole line
	ret json.RawMessage
	err *CommandError
}

// wire is the union of all messages (docs/interop/qmp-spec in QEMU).
type wire struct {
	QMP *struct {
		Version goqmp.Version `json:"version"`
	} `json:"QMP"`
	Event  *string         `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID *uint64 `json:"id"`
}

// decode reads one line. The bytes are not kept except in reply.raw and what it
// holds, so the caller hands over a line of its own.
func decode(line []byte) (message, error) {
	var w wire
	if err := json.Unmarshal(line, &w); err != nil {
		return message{}, fmt.Errorf("%w: %q is not a QMP message: %w", ErrProtocol, clip(line), err)
	}
	switch {
	case w.QMP != nil:
		return message{greeting: &w.QMP.Version}, nil
	case w.Event != nil && len(line) > MaxEventBytes:
		return message{}, fmt.Errorf("%w: an event of %d bytes, at most %d are expected", ErrProtocol, len(line), MaxEventBytes)
	case w.Event != nil:
		var e goqmp.Event
		if err := json.Unmarshal(line, &e); err != nil || e.Event == "" {
			return message{}, fmt.Errorf("%w: bad event %q", ErrProtocol, clip(line))
		}
		return message{event: &e}, nil
	case w.Return == nil && w.Error == nil:
		return message{}, fmt.Errorf("%w: unknown message %q", ErrProtocol, clip(line))
	case w.ID == nil && w.Error != nil:
		// QEMU answers so when it could not read a command at all.
		return message{}, fmt.Errorf("%w: QEMU did not understand a command: %s: %s", ErrProtocol, w.Error.Class, w.Error.Desc)
	case w.ID == nil:
		return message{}, fmt.Errorf("%w: reply without an id %q", ErrProtocol, clip(line))
	}
	r := &reply{id: *w.ID, raw: line, ret: w.Return}
	if w.Error != nil {
		r.err = &CommandError{Class: w.Error.Class, Desc: w.Error.Desc}
	}
	return message{reply: r}, nil
}

func clip(b []byte) []byte {
	const most = 200
	return b[:min(len(b), most)]
}

// readLine returns the next line that is not empty, without its end, in memory
// of its own. io.EOF means that the stream ended between two lines.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("%w: a message of more than %d bytes", ErrProtocol, limit)
		}
		line = append(line, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(bytes.TrimSpace(line)) > 0:
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			return line, nil
		}
	}
}
