// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package access

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Give makes path the file of uid and gid with these permissions. It takes regular
// files, sockets and device nodes. If the file system does not let it (a squashed root), but
// the user can open the file for reading and writing nevertheless, all is well.
func Give(path string, uid, gid int, mode fs.FileMode) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "give", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "give", Path: path, Err: err}
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFREG && st.Nlink != 1:
		return fmt.Errorf("give %s to user %d: it has %d names (hard links), so it is not given away", path, uid, st.Nlink)
	case kind != unix.S_IFREG && kind != unix.S_IFSOCK && kind != unix.S_IFBLK && kind != unix.S_IFCHR:
		return fmt.Errorf("give %s to user %d: it is neither a regular file nor a socket nor a device", path, uid)
	}
	err = nil
	if int(st.Uid) != uid || int(st.Gid) != gid {
		err = unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH)
	}
	if err == nil && fs.FileMode(st.Mode)&fs.ModePerm != mode {
		// A descriptor of O_PATH is changed by its name in /proc.
		err = unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), uint32(mode))
	}
	if err == nil || CanOpen(path, uid, gid) == nil {
		return nil
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("give %s to user %d: %w; if its file system is NFS, export it with no_root_squash to the nodes, or with all_squash to one user", path, uid, err)
	}
	return fmt.Errorf("give %s to user %d: %w", path, uid, err)
}

// CanOpen tries whether uid and gid, without further groups, may open a file for
// reading and writing.
func CanOpen(path string, uid, gid int) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with its strange ids
		// For this thread only; leaving 0 drops the file capabilities, too.
		_, _, _ = unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return &fs.PathError{Op: "open as user " + strconv.Itoa(uid), Path: path, Err: err}
	}
	return nil
}

// Device tells with which group an unprivileged user may open a device for reading
// and writing; 0: with any.
func Device(path string) (gid int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&0o006 == 0o006:
		return 0, nil
	case st.Mode&0o060 == 0o060 && st.Gid != 0:
		return int(st.Gid), nil
	}
	return 0, fmt.Errorf("%s is open to root only; give it to a group, as udev does: chgrp %s %s && chmod 0660 %s", path, filepath.Base(path), path, path)
}

// OpenWay lets a group reach dir, which exists: on dir itself and on all its
// parents it may search (x). Where that is missing, an entry for the group is
// added to the directory's access control list. It returns the directories that
// it changed.
func OpenWay(dir string, gid int) (changed []string, err error) {
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	for ; ; dir = filepath.Dir(dir) {
		did, err := openDir(dir, gid)
		if err != nil {
			return changed, err
		}
		if did {
			changed = append(changed, dir)
		}
		if dir == "/" || dir == "." {
			return changed, nil
		}
	}
}

func openDir(dir string, gid int) (changed bool, err error) {
	st, err := os.Stat(dir)
	if err != nil {
		return false, err
	}
	sys, ok := st.Sys().(*unixStat)
	if !ok || st.Mode().Perm()&0o001 != 0 || int(sys.Gid) == gid && st.Mode().Perm()&0o010 != 0 {
		return false, nil
	}
	list, err := readACL(dir, st.Mode().Perm())
	if err == nil {
		var has bool
		if list, has, err = list.withSearch(uint32(gid)); err == nil && !has {
			err = unix.Setxattr(dir, aclName, list.encode(), 0)
			changed = err == nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("let the group %d of the VMs search %s: %w; run chmod o+x %s, or choose another directory", gid, dir, err, dir)
	}
	return changed, nil
}
