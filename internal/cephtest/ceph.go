// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cephtest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

const (
	// upWithin bounds the start, with the installation of packages; downWithin the end.
	upWithin   = 10 * time.Minute
	downWithin = time.Minute
	// adminWithin bounds one command of the administrator.
	adminWithin = 2 * time.Minute
)

// Ceph is a running one.
type Ceph struct {
	// Spec is a pool in it, with a user who may do what docs/storage.md says.
	Spec api.CephSpec
	conf string
}

// Start brings one up at an address of this host.
func Start(t testing.TB, address string) *Ceph {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	script := filepath.Join(filepath.Dir(file), "..", "..", "scripts", "ceph-test")
	parent, err := os.MkdirTemp("", "cephtest")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "ceph")
	t.Cleanup(func() {
		if out, err := run(context.Background(), downWithin, script, "down", dir); err != nil {
			t.Errorf("end Ceph: %v: %s", err, out)
		}
		_ = os.RemoveAll(parent)
	})
	began := time.Now()
	out, err := run(t.Context(), upWithin, script, "up", dir, "--address", address)
	if err != nil {
		t.Fatalf("start Ceph: %v: %s", err, out)
	}
	t.Logf("Ceph is up after %s", time.Since(began).Round(time.Second))
	has := map[string]string{}
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			has[k] = v
		}
	}
	keyring, err := os.ReadFile(has["CEPH_KEYRING"])
	if err != nil {
		t.Fatal(err)
	}
	_, key, _ := strings.Cut(string(keyring), "key = ")
	key, _, _ = strings.Cut(key, "\n")
	return &Ceph{
		Spec: api.CephSpec{Pool: has["CEPH_POOL"], Monitors: []string{has["CEPH_MONITOR"]}, User: has["CEPH_USER"], Key: strings.TrimSpace(key)},
		conf: has["CEPH_CONF"],
	}
}

func run(ctx context.Context, within time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// What stays when the command is killed is bounded by the commands' own times.
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	return out.String(), err
}

// Admin runs a command of Ceph as its administrator, and returns what it printed.
func (c *Ceph) Admin(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := run(t.Context(), adminWithin, append([]string{program, "-c", c.conf}, args...)...)
	if err != nil {
		t.Fatalf("%s %s: %v: %s", program, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}
