// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// ready bounds the begin of a server, step everything else.
const (
	ready = 30 * time.Second
	step  = 2 * time.Minute
	look  = time.Millisecond
)

// ours is one node of Muster.
type ours struct {
	programs, data, run string
	daemon              *exec.Cmd
	guard               int // its pid
	log                 *os.File
	url                 string
	env                 []string
	http                *http.Client
	token               string
}

// spawnDaemon starts a daemon that is in no cluster yet.
func spawnDaemon(ctx context.Context, programs, data, name string) (*ours, error) {
	run, err := os.MkdirTemp("/run", "mb") // sockets have short names
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	o := &ours{programs: programs, data: filepath.Join(data, name), run: run, url: "https://" + port}
	if o.log, err = os.Create(filepath.Join(data, name+".log")); err != nil {
		return nil, err
	}
	o.daemon = exec.Command(filepath.Join(programs, "musterd"), "--data-dir", o.data, "--run-dir", run, "--listen", port, "--node-name", name)
	o.daemon.Stdout, o.daemon.Stderr = o.log, o.log
	o.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a signal for the bench is not for it
	if err := o.daemon.Start(); err != nil {
		return nil, err
	}
	return o, until(ctx, ready, "musterd is ready", func() bool { _, err := os.Stat(filepath.Join(o.data, "muster.sock")); return err == nil })
}

// beginOurs is one daemon, its cluster and the guest's image.
func beginOurs(ctx context.Context, programs, data, guest string) (*ours, error) {
	o, err := spawnDaemon(ctx, programs, data, "muster")
	if err != nil {
		return o, err
	}
	if err := o.found(ctx); err != nil {
		return o, err
	}
	if err := until(ctx, ready, "the pool is ready", func() bool {
		_, err := o.command(ctx, "image", "create", "guest", "--file", guest)
		return err == nil
	}); err != nil {
		return o, err
	}
	return o, o.settle(ctx)
}

// found makes a cluster of the daemon.
func (o *ours) found(ctx context.Context) error {
	out, err := o.command(ctx, "cluster", "init", "--data-dir", o.data)
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(out, "token: ")
	o.token, _, _ = strings.Cut(rest, "\n")
	ca := filepath.Join(o.data, "ca.crt")
	o.env = []string{"MUSTER_SERVER=" + o.url, "MUSTER_TOKEN=" + o.token, "MUSTER_CACERT=" + ca}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s has no certificate", ca)
	}
	o.http = &http.Client{Timeout: step, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}}}
	return nil
}

// findGuard waits for the guard of the daemon.
func (o *ours) findGuard(ctx context.Context) error {
	return until(ctx, ready, "the guard runs", func() bool {
		pid, err := childNamed(o.daemon.Process.Pid, "muster-guard")
		o.guard = pid
		return err == nil
	})
}

// settle waits until all nodes can start VMs.
func (o *ours) settle(ctx context.Context) error {
	if err := o.findGuard(ctx); err != nil {
		return err
	}
	return until(ctx, ready, "the accelerators are known", func() bool {
		out, err := o.command(ctx, "node", "ls", "-o", "json")
		return err == nil && strings.Count(out, `"accelerator":`) >= strings.Count(out, `"phase":`)
	})
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// command runs the command line as a user would.
func (o *ours) command(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, step)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(o.programs, "muster"), args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}, o.env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("muster %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// vm is what the bench looks at.
type vm struct {
	Meta struct {
		ID string `json:"id"`
	} `json:"meta"`
	Status struct {
		Phase string `json:"phase"`
		PID   int    `json:"pid"`
	} `json:"status"`
}

func (o *ours) request(ctx context.Context, method, path string, want int, into any) error {
	return o.send(ctx, method, path, "", want, into)
}

// send is request with a body, JSON.
func (o *ours) send(ctx context.Context, method, path, body string, want int, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, o.url+"/api/v1"+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Authorization", "Bearer "+o.token)
	resp, err := o.http.Do(req)
	if err != nil {
		return err
	}
	answer, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != want {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return json.Unmarshal(answer, into)
}

func (o *ours) get(ctx context.Context, name string) (v vm, err error) {
	return v, o.request(ctx, http.MethodGet, "/vms/"+name, http.StatusOK, &v)
}

// start starts a VM and returns when it runs.
func (o *ours) start(ctx context.Context, name string) error {
	var r struct {
		Object vm `json:"object"`
	}
	if err := o.request(ctx, http.MethodPost, "/vms/"+name+"/start?wait=60s", http.StatusOK, &r); err != nil {
		return err
	}
	if p := r.Object.Status.Phase; p != "running" {
		return fmt.Errorf("vm %s is %q after its start", name, p)
	}
	return nil
}

// stop ends VMs at once and waits until that is seen.
func (o *ours) stop(ctx context.Context, names ...string) error {
	_, err := o.command(ctx, append([]string{"vm", "stop", "--force"}, names...)...)
	return err
}

// arguments is the command line of a VM's QEMU.
func (o *ours) arguments(ctx context.Context, name string) (args []string, dir string, err error) {
	v, err := o.get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", v.Status.PID))
	if err != nil {
		return nil, "", err
	}
	dir, err = os.Readlink(fmt.Sprintf("/proc/%d/cwd", v.Status.PID))
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), dir, err
}

// pids of the daemon and its guard.
func (o *ours) pids() []int { return []int{o.daemon.Process.Pid, o.guard} }

func (o *ours) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), step)
	defer cancel()
	var errs []error
	if o.env != nil { // else its VMs are another one's, too
		if out, err := o.command(ctx, "vm", "ls", "-o", "name"); err == nil {
			if names := strings.Fields(strings.ReplaceAll(out, "vm/", "")); len(names) > 0 {
				_, err = o.command(ctx, append([]string{"vm", "rm", "--force"}, names...)...)
				errs = append(errs, err)
			}
		}
	}
	errs = append(errs, o.daemon.Process.Signal(syscall.SIGTERM))
	_ = o.daemon.Wait() // how it ends after SIGTERM says nothing
	if o.guard != 0 {
		errs = append(errs, endProcess(o.guard)) // it takes along what is left
	}
	return errors.Join(append(errs, o.log.Close(), os.RemoveAll(o.run), os.RemoveAll(o.data))...)
}
