// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// program says, for each line it reads, wall clock and time since its start.
const program = `package main

import (
	"bufio"
	"fmt"
	"os"
	"time"
)

func main() {
	began := time.Now()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(time.Now().UnixNano(), int64(time.Since(began)), int64(time.Until(time.Unix(0, 0))))
	}
}
`

func TestAStepMovesTheWallClockAndNoOther(t *testing.T) {
	dir := t.TempDir()
	overlay, err := write(filepath.Join(dir, "overlay"))
	if err != nil {
		t.Fatal(err)
	}
	source, bin, file := filepath.Join(dir, "main.go"), filepath.Join(dir, "program"), filepath.Join(dir, "clock")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", overlay, "-o", bin, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	set := func(by time.Duration) {
		t.Helper()
		if err := os.WriteFile(file, binary.NativeEndian.AppendUint64(nil, uint64(by)), 0o600); err != nil { //nolint:gosec // as it is
			t.Fatal(err)
		}
	}
	set(0)
	cmd := exec.Command(bin)
	cmd.Env = append(os.Environ(), "MUSTER_TORTURE_CLOCK="+file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = in.Close() }()
	lines := bufio.NewScanner(out)
	for _, by := range []time.Duration{0, -time.Hour, time.Hour, 26*time.Hour + 999999999, 0} {
		// In place, as the campaign does it: a new file would not be the mapped one.
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(by)), 0) //nolint:gosec // as it is
		if err != nil || f.Close() != nil {
			t.Fatal(err)
		}
		before := time.Now()
		if _, err := io.WriteString(in, "\n"); err != nil || !lines.Scan() {
			t.Fatal(err)
		}
		after := time.Now()
		var wall, ran, until int64
		if _, err := fmt.Sscan(lines.Text(), &wall, &ran, &until); err != nil {
			t.Fatal(err)
		}
		for what, at := range map[string]int64{"Now": wall, "Until": -until} {
			if real := time.Unix(0, at).Add(-by); real.Before(before.Round(0)) || real.After(after.Round(0)) {
				t.Errorf("stepped by %v, %s says %v, which is not between %v and %v", by, what, time.Unix(0, at), before.Add(by), after.Add(by))
			}
		}
		if ran < 0 || time.Duration(ran) > after.Sub(began) {
			t.Errorf("stepped by %v, the program has run for %v of %v", by, time.Duration(ran), after.Sub(began))
		}
	}
}

func TestAnotherPackageTimeIsRefusedByName(t *testing.T) {
	for _, s := range []string{"", head, head + "\tsec, nsec, mono := now()\n", reads + head + reads, reads + head} {
		if _, err := replaced([]byte(s)); err == nil || !strings.Contains(err.Error(), "runtimeNow") {
			t.Errorf("%q: %v", s, err)
		}
	}
	got, err := replaced([]byte("a" + head + reads + "b"))
	if err != nil || !bytes.Equal(got, []byte("a"+head+stepped+"b")) {
		t.Errorf("%q, %v", got, err)
	}
}
