// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package lab

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
)

// Clock is the file by which the wall clock of a host's programs is stepped: those that
// were built with the overlay of internal/torture/clockoverlay.
type Clock struct{ path string }

// NewClock makes the file; the clock is right at first.
func NewClock(path string) (Clock, error) {
	c := Clock{path}
	if err := os.WriteFile(path, make([]byte, 8), 0o600); err != nil {
		return c, err
	}
	return c, nil
}

// Env is what the programs of the host need in their environment.
func (c Clock) Env() string { return "MUSTER_TORTURE_CLOCK=" + c.path }

// Set makes the clock wrong by a time, at once.
func (c Clock) Set(by time.Duration) error {
	f, err := os.OpenFile(c.path, os.O_WRONLY, 0) // in place: the programs have it mapped
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(by)), 0) //nolint:gosec // as it is
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("step a clock by %s: %w", by, err)
	}
	return nil
}
