// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bufio"
	"bytes"
	"image/png"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestGuestIsSeenAndSpokenToThroughEveryNode: what a person does with a guest
// that is not on the network, through the node that runs it and another one.
func TestGuestIsSeenAndSpokenToThroughEveryNode(t *testing.T) {
	f := newFlock(t, 2)
	f.up()
	f.withGuest(f.nodes[0])
	f.counting(f.nodes[1], 90*time.Second, 1, 0)
	for _, h := range f.nodes {
		t.Run("screen through "+h.name, func(t *testing.T) { h.sees(t) })
	}
	f.nodes[0].refuse(3, "no-such", "vm", "vnc", "no-such")
	f.nodes[0].refuse(2, "ADDRESS:PORT", "vm", "vnc", "web1", "--listen", "5900")
}

// sees looks at the screen of web1, twice over one port, and takes a picture.
func (h *host) sees(t *testing.T) {
	cmd := exec.Command(filepath.Join(binDir, "muster"), "--data-dir", h.dataDir, "vm", "vnc", "web1")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(strings.TrimSpace(line), "vnc://")
	if err != nil || !ok {
		t.Fatalf("muster vm vnc printed %q (%v) and said %s", line, err, said.String())
	}
	for range 2 {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		greeting := make([]byte, 12)
		if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "RFB 003.008\n" {
			t.Fatalf("greeting %q, %v; %s", greeting, err, said.String())
		}
		if _, err := c.Write(greeting); err != nil {
			t.Fatal(err)
		}
		types := make([]byte, 2)
		if _, err := io.ReadFull(c, types); err != nil || !bytes.Equal(types, []byte{1, 1}) {
			t.Fatalf("security types %v, %v", types, err)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("muster vm vnc at its end: %v, %s", err, said.String())
	}
	file := h.f.path(h.name + ".png")
	h.run("vm", "screenshot", "web1", file)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := png.Decode(bytes.NewReader(b)); err != nil {
		t.Errorf("the picture of %d bytes: %v", len(b), err)
	}
}
