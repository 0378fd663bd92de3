// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bufio"
	"bytes"
	"fmt"
	"image/png"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// TestGuestIsSeenAndSpokenToThroughEveryNode: what a person does with a guest
// that is not on the network, through the node that runs it and another one.
func TestGuestIsSeenAndSpokenToThroughEveryNode(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	f.up()
	f.withGuest(f.nodes[0], "--ci-user", "ops", "--ssh-key", f.newKey("ops")+".pub", "--ci-password-file", f.write("password", []byte("pa:ss of ops\n")), "--user-data", f.write("script", []byte("#!/bin/sh\necho hello\n")))
	f.counting(f.nodes[1], bootPatience, 1, 0)
	for _, h := range f.nodes {
		t.Run("screen through "+h.name, func(t *testing.T) { h.sees(t) })
	}
	defer func() {
		if !t.Failed() {
			return
		}
		t.Logf("agent: %+v", f.nodes[0].try("vm", "agent", "web1"))
	}()
	t.Run("agent", func(t *testing.T) { f.tryAgent(t) })
	t.Run("cloud-init", func(t *testing.T) { f.trySeed(t) })
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
		c, err := net.DialTimeout("tcp", addr, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
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

// trySeed reads the cloud-init CD-ROM in the guest, with the guest's own kernel.
func (f *flock) trySeed(t *testing.T) {
	h := f.nodes[1]
	out := h.run("vm", "exec", "web1", "--", "/bin/sh", "-c", "mkdir -p /mnt && mount -t iso9660 -o ro /dev/sr0 /mnt && cd /mnt && ls && cat meta-data user-data")
	key := strings.TrimSpace(string(f.read(f.path("ops.pub"))))
	for _, want := range []string{"meta-data\nuser-data\n", "instance-id: muster-" + h.vm("web1").Meta.ID, "local-hostname: web1", "name: ops", key, "hashed_passwd: $6$", "#!/bin/sh\necho hello"} {
		// YAML may go on with a long value in the next line.
		if !strings.Contains(out, want) && !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("the CD-ROM has no %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "pa:ss") || strings.Contains(h.run("vm", "show", "web1", "-o", "json"), "$6$") {
		t.Error("the password is in clear, or its hash is shown")
	}
	if r := h.try("vm", "exec", "web1", "--", "/bin/sh", "-c", "echo x > /mnt/x"); r.code == 0 {
		t.Error("the CD-ROM can be written")
	}
}

// tryAgent speaks with the real agent in web1, through both nodes.
func (f *flock) tryAgent(t *testing.T) {
	f.eventually(60*time.Second, "the agent answers", func() error {
		for _, h := range f.nodes {
			var g api.GuestAgent
			f.decode(h.run("vm", "agent", "web1", "-o", "json"), &g)
			if !g.Answering || g.Hostname != "web1" || !slices.Contains(g.Commands, "guest-exec") {
				return fmt.Errorf("at %s: %+v", h.name, g)
			}
		}
		return nil
	})
	f.eventually(60*time.Second, "the status has the agent", func() error {
		if a := f.nodes[1].vm("web1").Status.Agent; a == nil || a.Hostname != "web1" {
			return fmt.Errorf("%+v", a)
		}
		return nil
	})
	for i, h := range f.nodes {
		// Of the commands each has some seconds, which a guest on a busy machine may not keep.
		f.eventually(bootPatience, "the agent does what "+h.name+" asks for", func() error {
			if r := h.try("vm", "agent", "fs", "web1"); !strings.Contains(r.stdout, "/data") || !strings.Contains(r.stdout, "ext4") {
				return fmt.Errorf("file systems: %+v", r)
			}
			if r := h.try("vm", "exec", "web1", "--", "/bin/sh", "-c", "echo to-out; echo to-err >&2; exit 7"); r.code != 7 || r.stdout != "to-out\n" || r.stderr != "to-err\n" {
				return fmt.Errorf("exec: %+v", r)
			}
			return nil
		})
		// A password, and what the guest has stored of it.
		secret := fmt.Sprintf("pa:ss-%d word", i)
		f.eventually(bootPatience, "the password is set through "+h.name, func() error {
			r := h.tryWith(secret+"\n", "vm", "password", "web1", "--user", "root")
			if strings.Contains(r.stdout+r.stderr, secret) {
				t.Errorf("the password is shown: %+v", r)
			}
			if r.code != 0 {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
		check := `h=$(sed -n 's/^root:\([^:]*\):.*/\1/p' /etc/passwd); IFS='$' read -r _ _ salt _ <<E
$h
E
[ "$(mkpasswd -m sha512 -S "$salt" "$1")" = "$h" ]`
		h.run("vm", "exec", "web1", "--", "/bin/sh", "-c", check, "sh", secret)
		if r := h.tryWith(secret+"\n", "vm", "password", "web1", "--user", "nobody-here"); r.code != 4 || !strings.Contains(r.stderr, "was not changed") {
			t.Errorf("a password of nobody: %+v", r)
		}
	}
	f.nodes[1].refuse(1, "goes on in vm web1", "vm", "exec", "web1", "--seconds", "1", "--", "/bin/sleep", "3")

	at, other := f.nodes[0], f.nodes[1]
	at.run("vm", "freeze", "web1", "--seconds", "600")
	at.refuse(4, "frozen already", "vm", "freeze", "web1")
	other.refuse(4, "thaw them first", "vm", "exec", "web1", "--", "/bin/true")
	// It cannot write any more: what is under way from its console ends.
	c, since := -1, time.Now()
	f.eventually(60*time.Second, "the guest writes nothing while it is frozen", func() error {
		if _, now := at.counter(); now != c {
			c, since = now, time.Now()
		}
		if d := time.Since(since); d < 4*time.Second {
			return fmt.Errorf("counter %d, for %v", c, d)
		}
		return nil
	})
	// The daemon that knew of it dies: the next one thaws.
	owner := f.byName(at.vm("web1").Status.Node)
	owner.kill9()
	owner.start()
	f.counting(owner, bootPatience, 1, c+2)
	f.eventually(60*time.Second, "the agent answers again", func() error {
		if r := owner.try("vm", "exec", "web1", "--", "/bin/true"); r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	at.run("vm", "freeze", "web1", "--seconds", "2")
	_, c = at.counter()
	f.counting(at, bootPatience, 1, c+2) // thawed by itself

	for _, e := range at.events("audit.vm.exec") {
		if e.Spec.Details["command"] == "" || strings.Contains(fmt.Sprint(e.Spec), "secret") {
			t.Errorf("event %+v", e.Spec)
		}
	}
	for _, e := range at.events("audit.vm.password") {
		if strings.Contains(fmt.Sprint(e), "pa:ss") || e.Spec.Details["user"] != "root" {
			t.Errorf("event %+v", e)
		}
	}
	for _, h := range f.nodes {
		if strings.Contains(h.log(), "pa:ss") {
			t.Errorf("the log of %s has a password", h.name)
		}
	}
}

// tryWith is try with something on the standard input.
func (h *host) tryWith(input string, args ...string) result {
	h.f.t.Helper()
	file := h.f.write("stdin", []byte(input))
	in, err := os.Open(file)
	if err != nil {
		h.f.t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	return h.tryFrom(in, args...)
}
