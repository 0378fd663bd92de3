// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package accel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/access"
)

// Limits of the probe.
const (
	// ProbeDeadline is how long one run of the probe may take. Hardware needs
	// 0.2 s; the rest is for hosts under load.
	ProbeDeadline = 8 * time.Second
	// ProbeAttempts is how often a probe that ran out of time is tried.
	ProbeAttempts = 2
	// VersionDeadline bounds "qemu --version".
	VersionDeadline = 10 * time.Second
	// maxOutput bounds what is kept of the probe's output.
	maxOutput = 4 << 10
)

// Oldest QEMU that the argument vectors are written for.
const (
	MinMajor = 7
	MinMinor = 0
)

// DefaultBinary is the QEMU program when none is configured.
const DefaultBinary = "qemu-system-x86_64"

const kvmDevice = "/dev/kvm"

// Config of Detect.
type Config struct {
	// Binary is the QEMU program: a path or a name to be found in PATH.
	Binary string
	// Want is auto, kvm or tcg; auto when empty.
	Want api.Accelerator
	// Dir keeps the probe's image and the answer of this boot.
	Dir string
	// User is who VMs run as, who has to open KVM; nil for the caller.
	User *syscall.Credential
	Log  *slog.Logger
}

// Result says what new VMs get on this host, and why.
type Result struct {
	// Binary is the absolute path of QEMU, Version its version such as
	// "7.2.22". Both are empty when QEMU cannot be used; Problem says why.
	Binary  string
	Version string
	// Accelerator is kvm or tcg.
	Accelerator api.Accelerator
	Reason      string
	// Problem is a user's sentence about what must be mended, or empty.
	Problem string
	// ProblemReason is its one word.
	ProblemReason string
}

// Detect looks for QEMU and decides about the accelerator. It never fails: what
// is wrong is in the result.
func Detect(ctx context.Context, cfg Config) Result {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	r := Result{Accelerator: api.AccelTCG}
	bin, version, err := FindQEMU(ctx, cfg.Binary)
	if err != nil {
		r.Reason = "QEMU cannot be used on this node"
		r.Problem, r.ProblemReason = err.Error(), "QEMUUnusable"
		return r
	}
	r.Binary, r.Version = bin, version
	switch cfg.Want {
	case api.AccelTCG:
		r.Reason = "set to tcg by the administrator"
	case api.AccelKVM:
		r.Accelerator, r.Reason = api.AccelKVM, "set to kvm by the administrator, not proven"
		if err := openKVM(cfg.User); err != nil {
			r.Problem = fmt.Sprintf("spec.accelerator is kvm, but %v; enable virtualization in the firmware, load the kvm modules, or set the accelerator to auto", err)
			r.ProblemReason = "KVMUnusable"
		}
	default:
		r.Accelerator, r.Reason = prove(ctx, cfg, bin)
	}
	return r
}

// FindQEMU returns the path and the version of a usable QEMU, or an error that
// says what to install.
func FindQEMU(ctx context.Context, binary string) (path, version string, err error) {
	if binary == "" {
		binary = DefaultBinary
	}
	path, err = exec.LookPath(binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", "", api.Errorf(api.CodeUnsupported, "QEMU %q is not installed; install qemu-system-x86 and qemu-utils, version %d.%d or newer", binary, MinMajor, MinMinor)
	}
	ctx, cancel := context.WithTimeout(ctx, VersionDeadline)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", "", api.Errorf(api.CodeUnsupported, "%s --version failed (%w); install qemu-system-x86, version %d.%d or newer", path, err, MinMajor, MinMinor)
	}
	version, ok := parseVersion(string(out))
	if !ok {
		return "", "", api.Errorf(api.CodeUnsupported, "%s --version does not name a version; install qemu-system-x86, version %d.%d or newer", path, MinMajor, MinMinor)
	}
	if !atLeast(version, MinMajor, MinMinor) {
		return "", "", api.Errorf(api.CodeUnsupported, "%s is version %s, which is too old; install qemu-system-x86, version %d.%d or newer", path, version, MinMajor, MinMinor)
	}
	return path, version, nil
}

var versionLine = regexp.MustCompile(`QEMU emulator version (\d+\.\d+(?:\.\d+)?)`)

func parseVersion(out string) (string, bool) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return "", false
	}
	return m[1], true
}

func atLeast(version string, major, minor int) bool {
	parts := strings.Split(version, ".")
	a, errA := strconv.Atoi(parts[0])
	b, errB := strconv.Atoi(parts[1])
	if errA != nil || errB != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

// openKVM tries the device, and whether VMs may open it.
func openKVM(user *syscall.Credential) error {
	if user != nil {
		if _, err := access.Device(kvmDevice); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(kvmDevice, os.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// prove decides for auto, from the answer of this boot if there is one.
func prove(ctx context.Context, cfg Config, bin string) (api.Accelerator, string) {
	if err := openKVM(cfg.User); err != nil {
		return api.AccelTCG, fmt.Sprintf("KVM is not available (%v)", err)
	}
	key := cacheKey(bin)
	if c, ok := readCache(cfg.Dir, key); ok {
		return c.Accelerator, c.Reason
	}
	var last outcome
	for range ProbeAttempts {
		start := time.Now()
		o, err := runProbe(ctx, cfg, bin, "kvm", "host", ProbeDeadline)
		if err != nil {
			return api.AccelTCG, fmt.Sprintf("KVM could not be proven (%v)", err) // not kept: try again next time
		}
		if last = o; o.passed {
			last.reason = fmt.Sprintf("a test program ran under KVM in %v", time.Since(start).Round(time.Millisecond))
			break
		}
		if !o.timedOut {
			break
		}
	}
	c := answer{Key: key, Accelerator: api.AccelTCG, Reason: last.reason}
	if last.passed {
		c.Accelerator = api.AccelKVM
	}
	if err := writeCache(cfg.Dir, c); err != nil {
		cfg.Log.Warn("the answer about KVM could not be kept", "err", err)
	}
	return c.Accelerator, c.Reason
}

type outcome struct {
	passed, timedOut bool
	reason           string
}

// runProbe runs the program once. An error means that it could not be tried.
func runProbe(ctx context.Context, cfg Config, bin, accel, cpu string, limit time.Duration) (outcome, error) {
	rom, err := os.CreateTemp(cfg.Dir, "probe-*.rom")
	if err != nil {
		return outcome{}, err
	}
	defer os.Remove(rom.Name())
	_, err = rom.Write(image())
	if cfg.User != nil && err == nil {
		if _, err = access.OpenWay(cfg.Dir, int(cfg.User.Groups[0])); err == nil {
			err = rom.Chown(int(cfg.User.Uid), int(cfg.User.Gid))
		}
	}
	if err = errors.Join(err, rom.Close()); err != nil {
		return outcome{}, err
	}
	runCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(runCtx, bin, probeArgs(rom.Name(), accel, cpu)...)
	var out, errOut limited
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: cfg.User}
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return outcome{}, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && runCtx.Err() == nil {
		return outcome{}, err
	}
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == passCode && bytes.HasSuffix(out.b, []byte("OK")) {
		return outcome{passed: true}, nil
	}
	if runCtx.Err() != nil {
		return outcome{timedOut: true, reason: fmt.Sprintf("%s opens, but a test program did not get through %s within %v", kvmDevice, failedStep(out.b), limit)}, nil
	}
	return outcome{reason: fmt.Sprintf("%s opens, but QEMU failed to run a test program under KVM at %s: %s", kvmDevice, failedStep(out.b), firstLine(errOut.b, err))}, nil
}

// probeArgs is the argument vector of the probe. The CPU is the one that VMs
// get, so that what it fails to set up is found here.
func probeArgs(rom, accel, cpu string) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-accel", accel, "-cpu", cpu, "-m", "16",
		"-bios", rom, "-no-reboot",
		"-chardev", "stdio,id=debug,signal=off", "-device", "isa-debugcon,iobase=0x402,chardev=debug",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=1",
	}
}

func firstLine(b []byte, err error) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	if line == "" && err != nil {
		return err.Error()
	}
	return line
}

// limited keeps the first bytes of what is written.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), maxOutput-len(l.b))]...)
	return len(p), nil
}
