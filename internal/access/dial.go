// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package access

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Dial connects to a unix socket in a directory that a VM may write to, and refuses
// one behind which another process listens than the VM's: it may have put a link
// there to somebody else's socket. A pid of 0 stands for any process.
func Dial(ctx context.Context, path string, pid int) (net.Conn, error) {
	var d net.Dialer
	stream, err := d.DialContext(ctx, "unix", path)
	if err != nil || pid == 0 {
		return stream, err
	}
	if err := listens(stream, pid); err != nil {
		return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), stream.Close())
	}
	return stream, nil
}

// listens reports an error unless the process is the one that listens at the other
// end (SO_PEERCRED, unix(7)).
func listens(stream net.Conn, pid int) error {
	u, ok := stream.(*net.UnixConn)
	if !ok {
		return errors.New("is no unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("ask who listens: %w", err)
	}
	if int(cred.Pid) != pid {
		return fmt.Errorf("process %d listens there, not the VM's process %d", cred.Pid, pid)
	}
	return nil
}
