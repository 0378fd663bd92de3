// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of qemu-img. The file it reads may be hostile, so it gets little
// memory and time, and what it says is cut.
const (
	infoDeadline    = 30 * time.Second
	createDeadline  = 2 * time.Minute
	checkFileTime   = 30 * time.Minute
	convertDeadline = 6 * time.Hour
	infoCPUSeconds  = 20
	addressSpace    = 4 * int64(api.GiB)
	maxOutput       = 1 << 20
	maxErrorText    = 400
	// maxVirtualSize of an image.
	maxVirtualSize = int64(api.MaxDisk)
)

// qemuImg runs the program.
type qemuImg struct {
	program string
	prlimit string // path of prlimit(1), empty if missing
}

func newQemuImg(program string) *qemuImg {
	p, err := exec.LookPath("prlimit")
	if err != nil {
		p = ""
	}
	return &qemuImg{program: program, prlimit: p}
}

// exitError is a run that ended with an exit code other than 0.
type exitError struct {
	verb string
	code int
	text string
}

func (e *exitError) Error() string { return fmt.Sprintf("qemu-img %s: %s", e.verb, e.text) }

// locked reports that another process has the file open.
func (e *exitError) locked() bool {
	return strings.Contains(e.text, "Is another process using the image")
}

// Is makes a full disk, which qemu-img only tells in words, look like itself.
func (e *exitError) Is(target error) bool {
	switch target {
	case syscall.ENOSPC:
		return strings.Contains(e.text, "No space left on device")
	case syscall.EDQUOT:
		return strings.Contains(e.text, "Disk quota exceeded")
	}
	return false
}

// run starts qemu-img with limits and returns what it printed.
func (q *qemuImg) run(ctx context.Context, deadline time.Duration, cpuSeconds int, args ...string) ([]byte, error) {
	out := &clipped{most: maxOutput}
	err := q.runTo(ctx, deadline, cpuSeconds, out, args...)
	var exit *exitError
	switch {
	case err == nil && out.cut:
		return nil, fmt.Errorf("qemu-img %s printed more than %d bytes", args[0], maxOutput)
	case err == nil, errors.As(err, &exit):
		return out.b.Bytes(), err
	}
	return nil, err
}

// runTo is run for a program whose output somebody follows.
func (q *qemuImg) runTo(ctx context.Context, deadline time.Duration, cpuSeconds int, out io.Writer, args ...string) error {
	return q.runWith(ctx, deadline, cpuSeconds, out, nil, args...)
}

// runWith is runTo for a program that gets files, from descriptor 3 on.
func (q *qemuImg) runWith(ctx context.Context, deadline time.Duration, cpuSeconds int, out io.Writer, files []*os.File, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	name, verb := q.program, args[0]
	if _, err := exec.LookPath(q.program); err != nil {
		return api.Errorf(api.CodeUnsupported, "qemu-img cannot be used on this node (%w); install the package qemu-utils", err)
	}
	if q.prlimit != "" {
		limits := []string{"--as=" + strconv.FormatInt(addressSpace, 10), "--core=0"}
		if cpuSeconds > 0 {
			limits = append(limits, "--cpu="+strconv.Itoa(cpuSeconds))
		}
		args = append(append(limits, q.program), args...)
		name = q.prlimit
	}
	errText := &clipped{most: maxErrorText}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = out, errText, files
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return api.Errorf(api.CodeTimeout, "qemu-img %s did not end within %s", verb, deadline)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !errors.As(err, &exit):
		return fmt.Errorf("run qemu-img %s: %w", verb, err)
	}
	text := strings.Join(strings.Fields(errText.b.String()), " ")
	if text == "" {
		text = exit.String()
	}
	return &exitError{verb: verb, code: exit.ExitCode(), text: text}
}

// clipped keeps the first bytes and swallows the rest, so that the program
// neither blocks nor fills our memory.
type clipped struct {
	b    bytes.Buffer
	most int
	cut  bool
}

func (c *clipped) Write(p []byte) (int, error) {
	n := len(p)
	if room := c.most - c.b.Len(); n > room {
		p, c.cut = p[:room], true
	}
	c.b.Write(p)
	return n, nil
}

// imageInfo is what "qemu-img info --output=json" says (QAPI ImageInfo).
type imageInfo struct {
	Format      string         `json:"format"`
	VirtualSize int64          `json:"virtual-size"`
	ActualSize  int64          `json:"actual-size"`
	ClusterSize int64          `json:"cluster-size"`
	Backing     string         `json:"backing-filename"`
	FullBacking string         `json:"full-backing-filename"`
	BackingFmt  string         `json:"backing-filename-format"`
	Encrypted   bool           `json:"encrypted"`
	Dirty       bool           `json:"dirty-flag"`
	Snapshots   []snapshotInfo `json:"snapshots"`
	Specific    *specificInfo  `json:"format-specific"`
}

type specificInfo struct {
	Type string `json:"type"`
	Data struct {
		Corrupt    bool            `json:"corrupt"`
		DataFile   string          `json:"data-file"`
		Encrypt    json.RawMessage `json:"encrypt"`
		CreateType string          `json:"create-type"`
		Extents    []struct {
			Filename string `json:"filename"`
		} `json:"extents"`
	} `json:"data"`
}

// fileArg names a file so that nothing in its path can be taken for a
// protocol or an option.
func fileArg(path string) string { return "file:" + path }

// info asks what a file is. An empty format lets qemu-img detect it; the
// caller must have looked at the header before (checkHeader).
func (q *qemuImg) info(ctx context.Context, path, format string) (*imageInfo, error) {
	args := []string{"info", "--output=json"}
	if format != "" {
		args = append(args, "-f", format)
	}
	out, err := q.run(ctx, infoDeadline, infoCPUSeconds, append(args, fileArg(path))...)
	if err != nil {
		return nil, err
	}
	var i imageInfo
	if err := json.Unmarshal(out, &i); err != nil {
		return nil, fmt.Errorf("understand qemu-img info: %w", err)
	}
	return &i, nil
}

// sizeOf is the virtual size of an image that a QEMU may have open.
func (q *qemuImg) sizeOf(ctx context.Context, path string) (int64, error) {
	out, err := q.run(ctx, infoDeadline, infoCPUSeconds, "info", "--force-share", "--output=json", "-f", formatQcow2, fileArg(path))
	if err != nil {
		return 0, err
	}
	var i imageInfo
	if err := json.Unmarshal(out, &i); err != nil {
		return 0, fmt.Errorf("understand qemu-img info: %w", err)
	}
	return i.VirtualSize, nil
}

// grow enlarges an image that no QEMU has open. It never makes one smaller.
func (q *qemuImg) grow(ctx context.Context, path string, size int64) error {
	_, err := q.run(ctx, createDeadline, 0, "resize", "-q", "-f", formatQcow2, fileArg(path), strconv.FormatInt(size, 10))
	return err
}

// checkResult is what "qemu-img check" says (QAPI ImageCheck).
type checkResult struct {
	Errors      int64 `json:"check-errors"`
	Corruptions int64 `json:"corruptions"`
	EndOffset   int64 `json:"image-end-offset"`
}

// Exit codes of "qemu-img check": 2 is corruption, 3 is leaked clusters only.
const exitLeaksOnly = 3

// check examines the tables of a qcow2 file.
func (q *qemuImg) check(ctx context.Context, path string) (checkResult, error) {
	out, err := q.run(ctx, checkFileTime, 0, "check", "--output=json", "-f", "qcow2", fileArg(path))
	var exit *exitError
	if err != nil && (!errors.As(err, &exit) || len(out) == 0) {
		return checkResult{}, err
	}
	var r checkResult
	if jsonErr := json.Unmarshal(out, &r); jsonErr != nil {
		return r, errors.Join(err, fmt.Errorf("understand qemu-img check: %w", jsonErr))
	}
	if exit != nil && exit.code != exitLeaksOnly && r.Errors == 0 && r.Corruptions == 0 {
		return r, exit
	}
	return r, nil
}

// convert writes a qcow2 copy of a file of another format.
func (q *qemuImg) convert(ctx context.Context, from, format, to string) error {
	_, err := q.run(ctx, convertDeadline, 0, "convert", "-f", format, "-O", "qcow2", fileArg(from), fileArg(to))
	return err
}

// create makes an empty qcow2 file, or with a backing image a linked clone.
func (q *qemuImg) create(ctx context.Context, path, backing, backingFormat string, size int64) error {
	args := []string{"create", "-q", "-f", "qcow2"}
	if backing != "" {
		args = append(args, "-F", backingFormat, "-b", backing)
	}
	_, err := q.run(ctx, createDeadline, 0, append(args, fileArg(path), strconv.FormatInt(size, 10))...)
	return err
}
