// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The network of the hosts, which exists in their namespaces only.
const (
	bridge = "tbr0"
	subnet = "10.77.0"
	port   = 7600
	veth   = "tv"
	nsName = "mt"
	filler = "torture-filler"
)

// Hosts are the machines: namespaces joined by a bridge, and their disks.
type Hosts struct {
	n    int
	work string
	Drop [][]bool // Drop[from][to]: what from sends to to is lost
	// NoStorage are the hosts that hear nothing from Storage.
	NoStorage []bool
}

// Storage is the address at which what all hosts share may serve.
const Storage = subnet + ".2"

func (h *Hosts) Name(i int) string      { return fmt.Sprintf("n%d", i+1) }
func (h *Hosts) Namespace(i int) string { return fmt.Sprintf("%s%d", nsName, i+1) }
func (h *Hosts) Address(i int) string   { return fmt.Sprintf("%s.%d", subnet, 11+i) }
func (h *Hosts) Listen(i int) string    { return fmt.Sprintf("%s:%d", h.Address(i), port) }
func (h *Hosts) URL(i int) string       { return "https://" + h.Listen(i) }
func (h *Hosts) Disk(i int) string      { return filepath.Join(h.work, "disk", h.Name(i)) }
func (h *Hosts) Data(i int) string      { return filepath.Join(h.Disk(i), "data") }

// Command runs a program and reports what it printed if it fails.
func Command(stdin string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()+out.String()))
	}
	return out.String(), nil
}

func InHost(namespace string, args ...string) []string {
	return append([]string{"netns", "exec", namespace}, args...)
}

// MakeHosts joins the namespaces of the hosts, which the script has made, with
// the campaign's own.
func MakeHosts(n int, work string, diskMiB int) (*Hosts, error) {
	h := &Hosts{n: n, work: work, NoStorage: make([]bool, n)}
	for range n {
		h.Drop = append(h.Drop, make([]bool, n))
	}
	steps := [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", bridge, "type", "bridge"},
		{"address", "add", subnet + ".1/24", "dev", bridge},
		{"address", "add", Storage + "/24", "dev", bridge},
		{"link", "set", "dev", bridge, "up"},
	}
	for i := range n {
		ns, link := h.Namespace(i), fmt.Sprint(veth, i+1)
		steps = append(steps,
			[]string{"link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", ns},
			[]string{"link", "set", "dev", link, "master", bridge, "up"},
			[]string{"-n", ns, "link", "set", "lo", "up"},
			[]string{"-n", ns, "address", "add", h.Address(i) + "/24", "dev", "eth0"},
			[]string{"-n", ns, "link", "set", "dev", "eth0", "up"})
	}
	for _, s := range steps {
		if _, err := Command("", "ip", s...); err != nil {
			return nil, err
		}
	}
	for i := range n {
		if err := h.makeDisk(i, diskMiB); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// makeDisk mounts a small file system of its own for a host. The mount is seen
// in this process's mount namespace only and goes with it.
func (h *Hosts) makeDisk(i, mib int) error {
	image := h.Disk(i) + ".img"
	if err := os.MkdirAll(h.Disk(i), 0o700); err != nil {
		return err
	}
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(int64(mib)<<20), f.Close()); err != nil {
		return fmt.Errorf("disk of %s: %w", h.Name(i), err)
	}
	if _, err := Command("", "mkfs.ext4", "-q", "-F", "-m", "0", image); err != nil {
		return err
	}
	if _, err := Command("", "mount", "-o", "loop", image, h.Disk(i)); err != nil {
		return fmt.Errorf("%w; the campaign needs loop devices", err)
	}
	return nil
}

// ApplyDrops tells the hosts what they do not receive. Only hosts drop, at
// their entrance, so that the sender notices nothing.
func (h *Hosts) ApplyDrops() error {
	for to := range h.n {
		var lost []string
		for from := range h.n {
			if h.Drop[from][to] {
				lost = append(lost, h.Address(from))
			}
		}
		if h.NoStorage[to] {
			lost = append(lost, Storage)
		}
		rules := "add table ip torture\ndelete table ip torture\n"
		if len(lost) > 0 {
			rules += "table ip torture {\n chain input {\n  type filter hook input priority 0; policy accept;\n  ip saddr { " +
				strings.Join(lost, ", ") + " } drop\n }\n}\n"
		}
		if _, err := Command(rules, "ip", InHost(h.Namespace(to), "nft", "-f", "-")...); err != nil {
			return err
		}
	}
	return nil
}

// Fill takes all the room on a host's disk.
func (h *Hosts) Fill(i int) error {
	f, err := os.OpenFile(filepath.Join(h.Disk(i), filler), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			return nil
		}
		return err
	}
	defer func() { _ = f.Close() }()
	for _, size := range []int{1 << 20, 1 << 16, 1 << 12} {
		block := make([]byte, size)
		for {
			_, err := f.Write(block)
			if err == nil {
				err = f.Sync()
			}
			if errors.Is(err, syscall.ENOSPC) {
				break
			}
			if err != nil {
				return fmt.Errorf("fill the disk of %s: %w", h.Name(i), err)
			}
		}
	}
	return nil
}

// DogTimeout is that of the hosts' watchdogs, where they have one: their guards go
// by it, and the campaign resets a host by it.
const DogTimeout = 5 * time.Second

// refill is the pause between two fillings of a disk that is kept full.
const refill = 300 * time.Millisecond

// KeepFull fills a host's disk, and takes what its node frees, too, until stop is
// called.
func (h *Hosts) KeepFull(i int, say func(string, ...any)) (stop func(), err error) {
	if err := h.Fill(i); err != nil {
		return nil, err
	}
	return Repeat(refill, func(int) error { return h.Fill(i) }, say), nil
}

// Repeat does something at once and again and again until the returned function is
// called, which waits for it.
func Repeat(every time.Duration, do func(n int) error, say func(string, ...any)) (stop func()) {
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			if err := do(n); err != nil {
				say("%v", err)
			}
			select {
			case <-time.After(every):
			case <-quit:
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(quit)
		<-ended
	})
}

// MakeRoom gives the room back.
func (h *Hosts) MakeRoom(i int) error {
	if err := os.Remove(filepath.Join(h.Disk(i), filler)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
