// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/api"
)

const (
	// notesFolder of a pool of type shared has a file for each node, named by its ID.
	notesFolder     = "notes"
	notesFolderMode = 0o700
	noteFileMode    = 0o600
)

// noteFiles are the notes in a pool of type shared.
type noteFiles struct {
	path, nodeID  string
	reads, writes *lane

	mu   sync.Mutex
	root *rootID // of the directory that was proven to be the common one
	gone bool
}

func newNoteFiles(lp *localPool, nodeID string) *noteFiles {
	return &noteFiles{path: lp.path, nodeID: nodeID, reads: newLane(lp.what, maxNoteReads), writes: newLane(lp.what, 1)}
}

func (n *noteFiles) proven(root rootID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.root = &root
}

func (n *noteFiles) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone = true
}

func (n *noteFiles) open() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone = false
}

// commonRoot is the directory that may be written to.
func (n *noteFiles) commonRoot() (rootID, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.gone:
		return rootID{}, api.Errorf(api.CodeRefused, "the pool is not used here any more")
	case n.root == nil:
		return rootID{}, api.Errorf(api.CodeRefused, "%s was not found to be the directory that all nodes see yet", n.path)
	}
	return *n.root, nil
}

func (n *noteFiles) write(ctx context.Context, frame []byte) error {
	root, err := n.commonRoot()
	if err != nil {
		return err
	}
	path, name := n.path, n.nodeID
	return n.writes.do(ctx, noteDeadline, func() error { return writeNoteFile(path, root, name, frame) })
}

func (n *noteFiles) read(ctx context.Context, nodeID string) ([]byte, error) {
	root, err := n.commonRoot()
	if err != nil {
		return nil, err
	}
	path := n.path
	return call(ctx, n.reads, noteDeadline, func() ([]byte, error) { return readNoteFile(path, root, nodeID) })
}

func writeNoteFile(path string, root rootID, name string, frame []byte) error {
	dir, err := openNotesFolder(path, root, true)
	if err != nil {
		return err
	}
	defer dir.Close()
	buf := alignedBytes(len(frame))
	copy(buf, frame)
	return direct(func(flag int) error {
		f, err := openNoteFile(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_DSYNC|flag)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(buf, 0)
		return errors.Join(err, f.Close())
	})
}

func readNoteFile(path string, root rootID, name string) ([]byte, error) {
	dir, err := openNotesFolder(path, root, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nobody has written yet
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	buf, size := alignedBytes(noteSlot), 0
	err = direct(func(flag int) error {
		f, err := openNoteFile(dir, name, unix.O_RDONLY|flag)
		if errors.Is(err, fs.ErrNotExist) {
			// An NFS client remembers that there was none, as long as it believes the
			// directory unchanged: let it ask.
			var st unix.Statx_t
			if err := again(func() error {
				return unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_MTIME, &st)
			}); err != nil && !errors.Is(err, unix.ENOSYS) {
				return os.NewSyscallError("statx", err)
			}
			f, err = openNoteFile(dir, name, unix.O_RDONLY|flag)
		}
		if err != nil {
			return err
		}
		if size, err = f.ReadAt(buf, 0); errors.Is(err, io.EOF) {
			err = nil
		}
		return errors.Join(err, f.Close())
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return buf[:size], err
}

// direct calls f with O_DIRECT, and without it where the file system refuses that.
func direct(f func(flag int) error) error {
	err := f(unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) {
		err = f(0)
	}
	return err
}

// openNotesFolder opens the folder of the notes, below the very directory that was
// proven: what else is mounted there is not seen by others.
func openNotesFolder(path string, root rootID, create bool) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	top, err := openAt(nil, path, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, api.Errorf(api.CodeRefused, "%s does not exist any more; mount it again", path)
	}
	if err != nil {
		return nil, err
	}
	defer top.Close()
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstat(int(top.Fd()), &st) }); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if (rootID{st.Dev, st.Ino}) != root {
		return nil, api.Errorf(api.CodeRefused, "%s is not the directory that it was when the pool was checked; %s", path, remedy(path))
	}
	f, err := openAt(top, notesFolder, flags|unix.O_NOFOLLOW, 0)
	if !create || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	err = again(func() error { return unix.Mkdirat(int(top.Fd()), notesFolder, notesFolderMode) })
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, &fs.PathError{Op: "mkdir", Path: filepath.Join(path, notesFolder), Err: err}
	}
	return openAt(top, notesFolder, flags|unix.O_NOFOLLOW, 0)
}

// openNoteFile opens a node's file. Others who may write in the directory could have put
// anything in its place, such as a second name of a volume.
func openNoteFile(dir *os.File, name string, flags int) (*os.File, error) {
	// O_NONBLOCK: a FIFO of that name must not stop us.
	f, err := openAt(dir, name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, noteFileMode)
	if errors.Is(err, unix.ELOOP) {
		return nil, api.Errorf(api.CodeRefused, "%s/%s is a symbolic link; remove it", dir.Name(), name)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = again(func() error { return unix.Fstat(int(f.Fd()), &st) })
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1:
		err = api.Errorf(api.CodeRefused, "%s/%s is no file with this name alone; remove it", dir.Name(), name)
	case flags&unix.O_ACCMODE == unix.O_RDONLY:
	default:
		err = prepareNoteFile(f, &st)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// prepareNoteFile gives a file its mode and its size, which never changes afterwards, so
// that no reader is told an old one.
func prepareNoteFile(f *os.File, st *unix.Stat_t) error {
	if st.Mode&0o7777 != noteFileMode {
		if err := f.Chmod(noteFileMode); err != nil {
			return err
		}
	}
	if st.Size == noteSlot {
		return nil
	}
	return f.Truncate(noteSlot)
}

// openAt opens what has a name in a folder, or a path if that is nil.
func openAt(dir *os.File, name string, flags int, mode uint32) (*os.File, error) {
	at, path := unix.AT_FDCWD, name
	if dir != nil {
		at, path = int(dir.Fd()), filepath.Join(dir.Name(), name)
	}
	var fd int
	err := again(func() (err error) { fd, err = unix.Openat(at, name, flags, mode); return err })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// again repeats a call that a signal has interrupted.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// alignedBytes are zero, and begin where O_DIRECT wants it.
func alignedBytes(n int) []byte {
	b := make([]byte, n+noteBlock)
	at := -int(uintptr(unsafe.Pointer(&b[0]))) & (noteBlock - 1)
	return b[at : at+n : at+n]
}
