// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package nbd

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"time"
)

// Values of the handshake: "Fixed newstyle negotiation", "Option types", "Option reply
// types", "NBD_INFO_EXPORT", "Transmission flags".
const (
	magicInit   = 0x4e42444d41474943 // NBDMAGIC
	magicOption = 0x49484156454F5054 // IHAVEOPT
	magicReply  = 0x3e889045565a9

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optGo         = 7
	replyAck      = 1
	replyInfo     = 3
	replyErrorBit = 1 << 31
	infoExport    = 0

	exportHasFlags = 1 << 0
	exportReadOnly = 1 << 1
	exportSendFUA  = 1 << 3
)

// Limits of what a server says before the transmission.
const (
	maxReplies    = 64
	maxReplyBytes = 4 << 10
	maxNameBytes  = 4096 // "String values"
)

// Open negotiates an export by name, which qemu-nbd leaves empty, with the server at the
// other end of c, within the time of ctx. It closes c if that fails. The export must be
// writable and know FUA.
func Open(ctx context.Context, c net.Conn, export string) (*Conn, error) {
	size, err := negotiate(ctx, c, export)
	if err != nil {
		_ = c.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("open an export of an NBD server: %w", err)
	}
	return newConn(c, size), nil
}

func negotiate(ctx context.Context, c net.Conn, export string) (size uint64, err error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	size, err = handshake(c, export)
	if !stop() && err == nil {
		err = context.Cause(ctx) // the deadline is set, or is about to be
	}
	return size, err
}

// handshake is "Fixed newstyle negotiation" with NBD_OPT_GO.
func handshake(c io.ReadWriter, export string) (size uint64, err error) {
	if len(export) > maxNameBytes {
		return 0, fmt.Errorf("the name of the export has %d bytes, of %d that it may have", len(export), maxNameBytes)
	}
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(hello[:]) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return 0, fmt.Errorf("it begins with %x: no NBD server of the newstyle", hello)
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if flags&flagFixedNewstyle == 0 {
		return 0, fmt.Errorf("handshake flags %#x: the fixed newstyle is missing", flags)
	}
	ask := binary.BigEndian.AppendUint32(nil, uint32(flags)&(flagFixedNewstyle|flagNoZeroes)) // "Client flags"
	ask = binary.BigEndian.AppendUint64(ask, magicOption)
	ask = binary.BigEndian.AppendUint32(ask, optGo)
	ask = binary.BigEndian.AppendUint32(ask, uint32(4+len(export)+2)) //nolint:gosec // bounded above
	ask = binary.BigEndian.AppendUint32(ask, uint32(len(export)))     //nolint:gosec // bounded above
	ask = append(ask, export...)
	ask = binary.BigEndian.AppendUint16(ask, 0) // no further information
	if _, err := c.Write(ask); err != nil {
		return 0, err
	}
	return replies(c)
}

// replies reads what is answered to NBD_OPT_GO, up to the acknowledgement.
func replies(c io.Reader) (size uint64, err error) {
	known := false
	for range maxReplies {
		kind, data, err := reply(c)
		switch {
		case err != nil:
			return 0, err
		case kind&replyErrorBit != 0:
			return 0, fmt.Errorf("the server refuses the export (reply %#x): %.200q", kind, data)
		case kind == replyAck && len(data) == 0 && known:
			return size, nil
		case kind != replyInfo || len(data) < 2:
			return 0, fmt.Errorf("reply %#x with %d bytes to NBD_OPT_GO", kind, len(data))
		}
		if binary.BigEndian.Uint16(data) != infoExport {
			continue // "the client MUST ignore information that it does not know"
		}
		if len(data) != 12 {
			return 0, fmt.Errorf("NBD_INFO_EXPORT with %d bytes", len(data))
		}
		size = binary.BigEndian.Uint64(data[2:])
		flags := binary.BigEndian.Uint16(data[10:])
		if flags&exportHasFlags == 0 || flags&exportReadOnly != 0 || flags&exportSendFUA == 0 || size > math.MaxInt64 {
			return 0, fmt.Errorf("an export of %d bytes with the flags %#x: it must be writable and know FUA", size, flags)
		}
		known = true
	}
	return 0, fmt.Errorf("more than %d replies to NBD_OPT_GO", maxReplies)
}

// reply is one of "Option reply".
func reply(c io.Reader) (kind uint32, data []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, nil, err
	}
	option, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[16:])
	if binary.BigEndian.Uint64(head[:]) != magicReply || option != optGo || n > maxReplyBytes {
		return 0, nil, fmt.Errorf("%x is no reply to NBD_OPT_GO", head)
	}
	data = make([]byte, n)
	_, err = io.ReadFull(c, data)
	return binary.BigEndian.Uint32(head[12:]), data, err
}
