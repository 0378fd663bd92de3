// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backupfile

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/version"
)

// Format of the file as a whole. A reader refuses any other.
const Format = 1

// Limits of a file, in bytes.
const (
	MaxHeader = 1 << 20
	MaxChunk  = 64 << 10 // before it is sealed
)

const (
	magic     = "MUSTERB"
	saltBytes = 32
	lenBytes  = 4
)

// What a file can be, for errors.Is.
var (
	// ErrNoBackup: the file is something else.
	ErrNoBackup = errors.New("this is no backup of a muster cluster")
	// ErrDamaged: the bytes are not those that were written.
	ErrDamaged = errors.New("the backup is damaged")
	// ErrNewer: a later version of muster wrote it.
	ErrNewer = errors.New("the backup was made by a newer version of muster")
	// ErrForged: the bytes were changed on purpose, with a new checksum.
	ErrForged = errors.New("the backup was changed after it was made")
	// ErrKey: the key, or the pass phrase, is not the one of this file.
	ErrKey = errors.New("the backup does not open")
)

// Header says what is in a backup. Anybody can read it.
type Header struct {
	// ClusterID and Cluster name the cluster; Life counts its recoveries from
	// lost quorum.
	ClusterID string `json:"clusterID"`
	Cluster   string `json:"cluster"`
	Life      uint64 `json:"life"`
	// Node that wrote the file, with its version, and when (UTC).
	Node    string    `json:"node"`
	Version string    `json:"version"`
	Time    time.Time `json:"time"`
	// Revision of the database that the file holds, and the Raft term of it.
	Revision uint64 `json:"revision"`
	Term     uint64 `json:"term"`
	// Stale is set when no leader confirmed that this was the newest state;
	// StaleSeconds is how old it may have been.
	Stale        bool    `json:"stale,omitempty"`
	StaleSeconds float64 `json:"staleSeconds,omitempty"`
	// Schema of the objects (api.Schema).
	Schema int `json:"schema"`
	// FeatureLevel of the cluster; 0 is 1.
	FeatureLevel int `json:"featureLevel,omitempty"`
	// Nodes are the names of the cluster's nodes.
	Nodes []string `json:"nodes,omitempty"`
	// Keys and Bytes of the database, and the number of objects per kind.
	Keys    int              `json:"keys"`
	Bytes   int64            `json:"bytes"`
	Objects map[api.Kind]int `json:"objects,omitempty"`
	// KeyID recognises the cluster key that opens the file.
	KeyID string `json:"keyID"`
	// Salt makes the key of this file different from all others.
	Salt []byte `json:"salt"`
	// Slot, if there is one, is the cluster key sealed with a pass phrase.
	Slot *Slot `json:"slot,omitempty"`
}

// encode returns everything before the first chunk.
func (h *Header) encode() ([]byte, error) {
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode header: %w", err)
	}
	if len(b) > MaxHeader {
		return nil, fmt.Errorf("encode header: it has %d bytes, at most %d are allowed", len(b), MaxHeader)
	}
	out := append([]byte(magic), Format)
	out = binary.BigEndian.AppendUint32(out, uint32(len(b)))
	return append(out, b...), nil
}

// readHeader returns the header and the bytes that it was read from.
func readHeader(r io.Reader) (*Header, []byte, error) {
	head := make([]byte, len(magic)+1+lenBytes)
	if n, err := io.ReadFull(r, head); err != nil {
		if isEnd(err) && (n == 0 || !bytes.HasPrefix([]byte(magic), head[:min(n, len(magic))])) {
			return nil, nil, api.Errorf(api.CodeInvalid, "%w: it has only %d bytes", ErrNoBackup, n)
		}
		return nil, nil, cut(err)
	}
	if string(head[:len(magic)]) != magic {
		return nil, nil, api.Errorf(api.CodeInvalid, "%w: it begins with %q", ErrNoBackup, head[:len(magic)])
	}
	if f := head[len(magic)]; f != Format {
		return nil, nil, api.Errorf(api.CodeUnsupported, "%w: it has format %d, this version reads %d; use the version that made it, or a later one", ErrNewer, f, Format)
	}
	n := binary.BigEndian.Uint32(head[len(magic)+1:])
	if n > MaxHeader {
		return nil, nil, damaged("its header would have %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, nil, cut(err)
	}
	var h Header
	if err := json.Unmarshal(body, &h); err != nil {
		return nil, nil, damaged("its header cannot be read: %v", err)
	}
	if err := h.check(); err != nil {
		return nil, nil, err
	}
	return &h, append(head, body...), nil
}

func (h *Header) check() error {
	switch {
	case h.ClusterID == "" || h.Cluster == "" || h.KeyID == "" || len(h.Salt) != saltBytes:
		return damaged("its header lacks the cluster or the key's name")
	case h.Keys < 0 || h.Bytes < 0:
		return damaged("its header has a negative size")
	case h.Schema > api.Schema:
		return api.Errorf(api.CodeUnsupported, "%w (%s): its objects have schema %d, this version knows %d; use version %s or a later one", ErrNewer, h.Version, h.Schema, api.Schema, h.Version)
	case h.FeatureLevel > version.FeatureLevel:
		return api.Errorf(api.CodeUnsupported, "%w (%s): it is of a cluster at feature level %d, this version supports up to %d; use version %s or a later one", ErrNewer, h.Version, h.FeatureLevel, version.FeatureLevel, h.Version)
	}
	return h.Slot.check()
}

func damaged(format string, args ...any) error {
	return api.Errorf(api.CodeChecksum, "%w: %s; use another backup", ErrDamaged, fmt.Sprintf(format, args...))
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// cut tells a file that ends too early from a disk or a connection that fails.
func cut(err error) error {
	if isEnd(err) {
		return damaged("it ends too early")
	}
	return fmt.Errorf("read backup: %w", err)
}
