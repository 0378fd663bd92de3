// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb/quorum"
	"github.com/muster-vm/muster/internal/freeport"
	"github.com/muster-vm/muster/internal/guard"
)

// The tests of this file run the real programs: daemons on loopback addresses,
// guards, QEMU, and the command line.
//
// A test with a flock waits most of its time, for leases, elections and guests that boot.
// So such tests run in parallel, as many as there are processors; but not those that bound
// how long something takes, or depend on it: they have no t.Parallel, and run before the others.

var binDir string // of the programs under test

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "muster-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	cmd := exec.Command("go", "build", "-o", dir+"/", "./cmd/muster", "./cmd/musterd", "./cmd/muster-guard")
	cmd.Dir = ".."
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	binDir = dir
	return m.Run()
}

// flock is a cluster of daemons under test.
type flock struct {
	t     *testing.T
	dir   string
	nodes []*host
	token string
	ca    string
}

// host is one daemon with its directory.
type host struct {
	f       *flock
	name    string
	addr    string
	dataDir string
	runDir  string
	conf    map[string]string // more of the configuration file
	bin     string            // directory of its programs; binDir if empty
	wrap    []string          // what runs the daemon, such as ip netns exec NAME
	cmd     *exec.Cmd
	exited  chan struct{}
}

// newFlock prepares n hosts; nothing runs yet.
func newFlock(t *testing.T, n int) *flock {
	t.Helper()
	dir, err := os.MkdirTemp("", "mst") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	f := &flock{t: t, dir: dir}
	t.Cleanup(func() {
		for _, h := range f.nodes {
			h.end()
		}
		for _, h := range f.nodes {
			h.dropGroups()
		}
		if t.Failed() {
			f.showLogs()
		}
		_ = os.RemoveAll(dir)
	})
	for i := range n {
		f.add(fmt.Sprintf("n%d", i+1))
	}
	return f
}

func (f *flock) add(name string) *host {
	h := &host{f: f, name: name, addr: freeport.Loopback(f.t), dataDir: filepath.Join(f.dir, name), runDir: filepath.Join(f.dir, "r-"+name), conf: map[string]string{}}
	f.nodes = append(f.nodes, h)
	return h
}

func (f *flock) showLogs() {
	for _, h := range f.nodes {
		for _, name := range []string{h.name + ".log", h.name + "/guard.log"} {
			b, _ := os.ReadFile(filepath.Join(f.dir, name))
			if len(b) > 6000 {
				b = b[len(b)-6000:]
			}
			f.t.Logf("---- %s\n%s", name, b)
		}
	}
}

// start runs the daemon until it answers on its socket.
func (h *host) start() {
	h.f.t.Helper()
	h.spawn()
	h.f.eventually(60*time.Second, h.name+" is ready", func() error {
		select {
		case <-h.exited:
			h.f.t.Fatalf("%s ended at start:\n%s", h.name, h.log())
		default:
		}
		c, err := net.Dial("unix", filepath.Join(h.dataDir, "muster.sock"))
		if err != nil {
			return err
		}
		return c.Close()
	})
}

func (h *host) spawn() {
	t := h.f.t
	t.Helper()
	conf := filepath.Join(h.f.dir, h.name+".yaml")
	text := ""
	for k, v := range h.conf {
		text += fmt.Sprintf("%s: %q\n", k, v)
	}
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(h.f.dir, h.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	argv := append(slices.Clone(h.wrap), filepath.Join(cmp.Or(h.bin, binDir), "musterd"), "--config", conf, "--data-dir", h.dataDir, "--run-dir", h.runDir, "--listen", h.addr, "--node-name", h.name)
	h.cmd = exec.Command(argv[0], argv[1:]...)
	h.cmd.Stdout, h.cmd.Stderr = log, log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait()
		close(exited)
	}(h.cmd, h.exited)
}

func (h *host) log() string {
	b, _ := os.ReadFile(filepath.Join(h.f.dir, h.name+".log"))
	return string(b)
}

// signal sends a signal to the daemon alone.
func (h *host) signal(s syscall.Signal) {
	h.f.t.Helper()
	if err := h.cmd.Process.Signal(s); err != nil {
		h.f.t.Fatalf("signal %v to %s: %v", s, h.name, err)
	}
}

// kill9 ends the daemon alone, as a crash would.
func (h *host) kill9() {
	h.signal(syscall.SIGKILL)
	<-h.exited
}

// stop ends the daemon as an administrator would.
func (h *host) stop() {
	h.signal(syscall.SIGTERM)
	select {
	case <-h.exited:
	case <-time.After(60 * time.Second):
		h.f.t.Errorf("%s does not end at SIGTERM", h.name)
		h.kill9()
	}
}

// end ends daemon, guard and QEMUs, which die with their guard.
func (h *host) end() {
	if h.cmd != nil {
		select {
		case <-h.exited:
		default:
			_ = h.cmd.Process.Kill()
			<-h.exited
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if c, err := guard.Dial(ctx, h.runDir); err == nil {
		if hello, err := c.Hello(ctx); err == nil {
			_ = syscall.Kill(hello.PID, syscall.SIGKILL)
		}
		_ = c.Close()
	}
}

var groupOfGuard = regexp.MustCompile(`cgroup="ok: (/[^"]+)"`)

// dropGroups removes the control groups of the guards that end killed, which name them in
// their log. One that still has a process stays, after a moment.
func (h *host) dropGroups() {
	log, _ := os.ReadFile(filepath.Join(h.dataDir, "guard.log"))
	for _, m := range groupOfGuard.FindAllSubmatch(log, -1) {
		base := string(m[1])
		for range 20 {
			vms, _ := filepath.Glob(filepath.Join(base, "*", "cgroup.procs"))
			for _, procs := range vms {
				_ = os.Remove(filepath.Dir(procs))
			}
			if err := os.Remove(base); err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// result is what a command of the command line left.
type result struct {
	stdout, stderr string
	code           int
}

// try runs the command line against one host.
func (h *host) try(args ...string) result {
	h.f.t.Helper()
	return h.tryFrom(nil, args...)
}

// tryFrom is try with a standard input.
func (h *host) tryFrom(in io.Reader, args ...string) result {
	h.f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "muster"), args...)
	cmd.Env = append(os.Environ(), "MUSTER_SERVER=https://"+h.addr, "MUSTER_TOKEN="+h.f.token, "MUSTER_CACERT="+h.f.ca, "NO_PROXY=127.0.0.1,10.99.0.0/16", "HOME="+h.f.dir)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errb
	err := cmd.Run()
	r := result{stdout: out.String(), stderr: errb.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		h.f.t.Fatalf("muster %s: %v", strings.Join(args, " "), err)
	}
	return r
}

// run is try that must succeed; it returns the standard output.
func (h *host) run(args ...string) string {
	h.f.t.Helper()
	r := h.try(args...)
	if r.code != 0 {
		h.f.t.Fatalf("muster %s at %s: exit %d\n%s%s", strings.Join(args, " "), h.name, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// refuse is try that must fail with an exit code and say certain words.
func (h *host) refuse(code int, words string, args ...string) {
	h.f.t.Helper()
	r := h.try(args...)
	if r.code != code || !strings.Contains(r.stderr, words) {
		h.f.t.Errorf("muster %s: exit %d, %q; want exit %d and %q", strings.Join(args, " "), r.code, r.stderr, code, words)
	}
}

// found makes the first host a cluster.
func (f *flock) found() {
	f.t.Helper()
	h := f.nodes[0]
	h.start()
	var r api.InitResult
	f.decode(h.run("cluster", "init", "--name", "test", "--data-dir", h.dataDir, "-o", "json"), &r)
	f.token = r.Token
	f.ca = filepath.Join(f.dir, "ca.crt")
	if err := os.WriteFile(f.ca, []byte(r.CACert), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *flock) joinToken(at *host) string {
	f.t.Helper()
	return strings.TrimSpace(at.run("cluster", "token", "create"))
}

// up starts all hosts as one cluster and waits until all are ready.
func (f *flock) up() {
	f.t.Helper()
	f.found()
	for _, h := range f.nodes[1:] {
		h.start()
		h.run("cluster", "join", f.joinToken(f.nodes[0]), "--data-dir", h.dataDir)
	}
	f.eventually(60*time.Second, "all nodes are ready", func() error {
		for _, h := range f.nodes {
			if p := f.nodes[0].node(h.name).Status.Phase; p != api.NodeReady {
				return fmt.Errorf("%s is %q", h.name, p)
			}
		}
		return nil
	})
	f.voting(60*time.Second, f.nodes[0], quorum.Desired(len(f.nodes)))
}

// members returns the membership as a host sees it.
func (h *host) members() (s api.ClusterStatus) {
	h.f.t.Helper()
	h.f.decode(h.run("cluster", "status", "-o", "json"), &s)
	return s
}

// votes reports whether a host's node votes.
func votes(s api.ClusterStatus, name string) bool {
	for _, m := range s.Members {
		if m.Node == name {
			return m.Voter
		}
	}
	return false
}

// voting waits until so many nodes vote, says a host.
func (f *flock) voting(within time.Duration, at *host, want int) (s api.ClusterStatus) {
	f.t.Helper()
	f.eventually(within, fmt.Sprintf("%d nodes vote", want), func() error {
		s = at.members()
		n := 0
		for _, m := range s.Members {
			if m.Voter {
				n++
			}
		}
		if n != want {
			return fmt.Errorf("%d do", n)
		}
		return nil
	})
	return s
}

func (f *flock) decode(text string, v any) {
	f.t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		f.t.Fatalf("not JSON: %v\n%s", err, text)
	}
}

func (h *host) node(name string) (n api.Node) {
	h.f.t.Helper()
	h.f.decode(h.run("node", "show", name, "-o", "json"), &n)
	return n
}

func (h *host) vm(name string) (vm api.VM) {
	h.f.t.Helper()
	h.f.decode(h.run("vm", "show", name, "-o", "json"), &vm)
	return vm
}

func (f *flock) byName(name string) *host {
	f.t.Helper()
	for _, h := range f.nodes {
		if h.name == name {
			return h
		}
	}
	f.t.Fatalf("there is no host %q", name)
	return nil
}

// others returns the hosts but one.
func (f *flock) others(than *host) (out []*host) {
	for _, h := range f.nodes {
		if h != than {
			out = append(out, h)
		}
	}
	return out
}

func (f *flock) eventually(within time.Duration, what string, try func() error) {
	f.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// qemus returns the PIDs of the QEMU processes of a VM on this machine, by
// /proc, whoever started them.
func qemus(t *testing.T, vmID string) (pids []string) { return processes(t, "qemu-system", vmID) }

// processes are the living ones that have these words in their arguments.
func processes(t *testing.T, words ...string) (pids []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		cmdline, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || slices.ContainsFunc(words, func(w string) bool { return !bytes.Contains(cmdline, []byte(w)) }) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(d, "stat"))
		if err != nil {
			continue
		}
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		if len(rest) > 0 && rest[0] != 'Z' && rest[0] != 'X' {
			pids = append(pids, filepath.Base(d))
		}
	}
	return pids
}
