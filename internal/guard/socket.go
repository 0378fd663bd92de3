// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// maxSocketPath is what fits into sockaddr_un.sun_path with its final NUL
// (unix(7)).
const maxSocketPath = 107

// runDirName returns the absolute name of dir without symbolic links: two names
// of one directory must give one guard and one mark on its children.
func runDirName(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("guard: run directory: %w", err)
	}
	abs, err = filepath.EvalSymlinks(abs)
	if err != nil {
		return "", fmt.Errorf("guard: run directory: %w", err)
	}
	return abs, nil
}

// socketAddr names the guard's socket. A path too long for the kernel is
// reached through an open directory until release is called.
func socketAddr(dir string) (addr *net.UnixAddr, release func(), err error) {
	path := filepath.Join(dir, SocketName)
	release = func() {}
	if len(path) > maxSocketPath {
		d, err := os.Open(dir)
		if err != nil {
			return nil, nil, fmt.Errorf("guard: run directory: %w", err)
		}
		path = fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), SocketName)
		release = func() { _ = d.Close() }
	}
	return &net.UnixAddr{Net: "unix", Name: path}, release, nil
}

// splitLine is a bufio.SplitFunc for lines ended by '\n'. Unlike
// bufio.ScanLines it never yields a last line that was cut off: half a request
// must not be carried out.
func splitLine(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF {
		return len(data), nil, nil
	}
	return 0, nil, nil
}
