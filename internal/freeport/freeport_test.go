// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package freeport

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
)

// drawn are more than the port numbers of a block.
const drawn = block + block/2

// TestNoOtherProcessIsGivenTheSame: the test of another package, which runs at the same
// time, is this one in a process of its own.
func TestNoOtherProcessIsGivenTheSame(t *testing.T) {
	const other = "MUSTER_FREEPORT_OTHER"
	if os.Getenv(other) != "" {
		for range drawn {
			fmt.Println(Loopback(t))
		}
		_, _ = io.Copy(io.Discard, os.Stdin) // they stay its own until it ends
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), other+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	seen := map[string]bool{}
	take := func(addr string) {
		if seen[addr] {
			t.Errorf("%s is given twice", addr)
		}
		seen[addr] = true
	}
	theirs := bufio.NewScanner(out)
	for range drawn {
		if !theirs.Scan() {
			t.Fatalf("the other process ended: %v", theirs.Err())
		}
		take(theirs.Text())
	}
	for range drawn {
		take(Loopback(t))
	}
}
