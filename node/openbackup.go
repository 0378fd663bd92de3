// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/backup"
	"github.com/muster-vm/muster/configdb/fsm"
	"github.com/muster-vm/muster/internal/backupfile"
)

// readBuffer of a backup, in bytes.
const readBuffer = 1 << 18

// openBackup reads a backup twice: first for its checksum, which tells damage
// without any key, then for its content.
func openBackup(path string, key func(*backup.Header) ([]byte, error)) (state *fsm.State, h *backup.Header, err error) {
	err = readTwice(path, func(r io.Reader) error {
		state, h, err = backup.Read(r, key)
		return err
	})
	return state, h, err
}

// proveBackup checks all that openBackup does, and returns how many bytes the
// state has.
func proveBackup(path string, key []byte) (h *backup.Header, size int64, err error) {
	err = readTwice(path, func(r io.Reader) error {
		h, size, err = backup.Prove(r, func(*backup.Header) ([]byte, error) { return key, nil })
		return err
	})
	return h, size, err
}

// readTwice checks the checksum of a backup and then lets content read it.
func readTwice(path string, content func(io.Reader) error) error {
	in, err := os.Open(path)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "open the backup: %w", err)
	}
	defer func() { _ = in.Close() }()
	if info, err := in.Stat(); err == nil && !info.Mode().IsRegular() {
		return api.Errorf(api.CodeInvalid, "%s is not a regular file", path)
	}
	if _, _, err := backupfile.Verify(bufio.NewReaderSize(in, readBuffer)); err != nil {
		return fileError(path, err)
	}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := content(bufio.NewReaderSize(in, readBuffer)); err != nil {
		return fileError(path, err)
	}
	return nil
}

// fileError names the file and keeps the code.
func fileError(path string, err error) error {
	var known *api.Error
	if errors.As(err, &known) {
		return api.Errorf(known.Code, "%s: %w", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}
