// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostfacts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/contain"
)

// Times of the question.
const (
	// AskDeadline bounds the whole of it: QEMU answers in some 0.3 s.
	AskDeadline = 30 * time.Second
	dialPause   = 10 * time.Millisecond
	// maxErrors bounds what is kept of what QEMU says on its way out.
	maxErrors = 2 << 10
)

// QEMU is what a QEMU offers on this host.
type QEMU struct {
	Machines      []string
	GuestFeatures []string
	CPUModels     []api.CPUModelFacts
}

// Ask starts a QEMU that runs nothing and asks it for machines and CPUs. dir is
// a directory for its socket.
func Ask(ctx context.Context, binary, dir string, accel api.Accelerator) (QEMU, error) {
	ctx, cancel := context.WithTimeout(ctx, AskDeadline)
	defer cancel()
	tmp, err := os.MkdirTemp(dir, "ask")
	if err != nil {
		return QEMU{}, fmt.Errorf("ask QEMU for its CPUs: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	socket := filepath.Join(tmp, "qmp")
	var said limited
	cmd := exec.CommandContext(ctx, binary,
		"-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", string(accel), "-cpu", widest(accel), "-m", "16M", "-S",
		"-chardev", "socket,id=qmp0,path="+strings.ReplaceAll(socket, ",", ",,")+",server=on,wait=off", "-mon", "chardev=qmp0,mode=control")
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return QEMU{}, fmt.Errorf("ask QEMU for its CPUs: %w", err)
	}
	group, ctx := contain.NewGroup(ctx)
	group.Go(func() {
		_ = cmd.Wait() // it is killed: its end says nothing
		group.Cancel()
	})
	q, err := ask(ctx, socket, widest(accel))
	_ = cmd.Process.Kill()
	err = errors.Join(err, group.Wait())
	if err != nil && len(said.b) > 0 {
		err = fmt.Errorf("%w (QEMU said: %s)", err, strings.Join(strings.Fields(string(said.b)), " "))
	}
	return q, err
}

// widest is the model that has everything that an accelerator can do.
func widest(accel api.Accelerator) string {
	if accel == api.AccelKVM {
		return "host"
	}
	return "max"
}

type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), maxErrors-len(l.b))]...)
	return len(p), nil
}

func ask(ctx context.Context, socket, model string) (QEMU, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return QEMU{}, fmt.Errorf("ask QEMU for its CPUs: %w", err)
	}
	defer func() { _ = conn.Disconnect() }()
	var q QEMU
	var machines []struct {
		Name string `json:"name"`
	}
	if err := conn.Execute(ctx, "query-machines", nil, &machines); err != nil {
		return q, err
	}
	for _, m := range machines {
		if strings.HasPrefix(m.Name, "pc-q35-") || strings.HasPrefix(m.Name, "pc-i440fx-") || m.Name == "microvm" {
			q.Machines = append(q.Machines, m.Name)
		}
	}
	slices.Sort(q.Machines)
	if q.GuestFeatures, err = features(ctx, conn, model); err != nil {
		return q, err
	}
	q.CPUModels, err = models(ctx, conn)
	return q, err
}

func dial(ctx context.Context, socket string) (*qmp.Conn, error) {
	for {
		conn, err := qmp.Dial(ctx, socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-time.After(dialPause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// models asks for all CPU models (QAPI query-cpu-definitions).
func models(ctx context.Context, conn *qmp.Conn) ([]api.CPUModelFacts, error) {
	var all []struct {
		Name    string   `json:"name"`
		Missing []string `json:"unavailable-features"`
	}
	if err := conn.Execute(ctx, "query-cpu-definitions", nil, &all); err != nil {
		return nil, err
	}
	var out []api.CPUModelFacts
	for _, m := range all {
		if m.Name == "host" || m.Name == "max" || m.Name == "base" {
			continue
		}
		f := api.CPUModelFacts{Name: m.Name, Missing: slices.Compact(slices.Sorted(slices.Values(m.Missing)))}
		if len(f.Missing) == 0 {
			have, err := features(ctx, conn, m.Name)
			var refused *qmp.CommandError
			if err != nil && !errors.As(err, &refused) {
				return nil, err
			}
			f.Features = len(have)
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b api.CPUModelFacts) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// features are the CPU features of a model (QAPI query-cpu-model-expansion). The
// static expansion names each once.
func features(ctx context.Context, conn *qmp.Conn, model string) ([]string, error) {
	var r struct {
		Model struct {
			Props map[string]any `json:"props"`
		} `json:"model"`
	}
	args := map[string]any{"type": "static", "model": map[string]string{"name": model}}
	if err := conn.Execute(ctx, "query-cpu-model-expansion", args, &r); err != nil {
		return nil, err
	}
	return sortedTrue(r.Model.Props), nil
}
