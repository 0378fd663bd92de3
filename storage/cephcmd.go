// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/api"
)

// Limits of the commands of Ceph.
const (
	// cephDeadline bounds a command that changes no more than a few objects,
	// cephLongDeadline one whose work grows with the size of an image.
	cephDeadline     = 30 * time.Second
	cephLongDeadline = 30 * time.Minute
	// keyFD is where a command finds the cephx key: it is neither in an argument nor
	// on a disk, nor in the environment.
	keyFD = "/proc/self/fd/3"
)

// Programs of the package ceph-common.
const (
	programRBD   = "rbd"
	programRados = "rados"
	programCeph  = "ceph"
)

// cephCmd runs the commands of Ceph as the user of a pool.
type cephCmd struct {
	spec api.CephSpec
	key  func() ([]byte, error)
	wrap []string // tests only: a command that runs others on another "host"
}

// cephError is a command that ended with an exit code other than 0, which for rbd and
// rados is an errno.
type cephError struct {
	program, verb string
	code          int
	text          string
}

func (e *cephError) Error() string { return fmt.Sprintf("%s %s: %s", e.program, e.verb, e.text) }

// Is makes the errno comparable; a full cluster looks like a full disk.
func (e *cephError) Is(target error) bool {
	errno, ok := target.(syscall.Errno)
	return ok && e.program != programCeph && e.code == int(errno)
}

// keyFile is a file in memory with the key.
func (c *cephCmd) keyFile() (*os.File, error) {
	key, err := c.key()
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("key", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("hold the cephx key in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "key")
	if _, err := f.Write(key); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// run starts a command and returns what it printed.
func (c *cephCmd) run(ctx context.Context, deadline time.Duration, program string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, api.Errorf(api.CodeUnsupported, "the command %s is missing on this node; install the package ceph-common", program)
	}
	key, err := c.keyFile()
	if err != nil {
		return nil, err
	}
	defer key.Close()
	// /dev/null: a ceph.conf of the host may be of another cluster.
	argv := append(append([]string{}, c.wrap...), path, "-c", "/dev/null", "-m", strings.Join(c.spec.Monitors, ","), "--id", c.spec.User, "--keyfile", keyFD)
	argv = append(argv, args...)
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	out, errText := &clipped{most: maxOutput}, &clipped{most: maxOutput}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, errText
	cmd.ExtraFiles = []*os.File{key}
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "CEPH_CONF=/dev/null"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil && out.cut:
		return nil, fmt.Errorf("%s %s printed more than %d bytes", program, args[0], maxOutput)
	case err == nil:
		return out.b.Bytes(), nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, api.Errorf(api.CodeTimeout, "the Ceph cluster has not answered for %s (%s); check that its monitors (%s) and OSDs are reachable from this node", deadline, program, strings.Join(c.spec.Monitors, ", "))
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case !errors.As(err, &exit):
		return nil, fmt.Errorf("run %s: %w", program, err)
	}
	return out.b.Bytes(), &cephError{program: program, verb: verbOf(args), code: exit.ExitCode(), text: cephText(errText.b.String(), exit.String())}
}

// json is run for a command that prints JSON.
func (c *cephCmd) json(ctx context.Context, deadline time.Duration, to any, program string, args ...string) error {
	out, err := c.run(ctx, deadline, program, append(args, "--format", "json")...)
	if err != nil {
		return err
	}
	// The first value: "osd blocklist ls" prints another behind it.
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(to); err != nil {
		return fmt.Errorf("understand %s %s: %w", program, verbOf(args), err)
	}
	return nil
}

// verbOf are the words of a command before its first option or name.
func verbOf(args []string) string {
	for i, a := range args {
		if strings.HasPrefix(a, "-") || strings.ContainsAny(a, "/@:") {
			return strings.Join(args[:i], " ")
		}
	}
	return strings.Join(args, " ")
}

// cephText is the last line that a command said, without the time and thread of a line
// of its log.
func cephText(said, otherwise string) string {
	text := otherwise
	for line := range strings.Lines(said) {
		if line = strings.TrimSpace(line); line != "" {
			text = line
		}
	}
	if f := strings.Fields(text); len(f) > 3 && strings.Contains(f[0], "T") && strings.Count(f[0], ":") >= 2 {
		text = strings.Join(f[3:], " ")
	}
	if len(text) > maxErrorText {
		text = text[:maxErrorText] + "…"
	}
	return text
}
