// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/nbd"
)

// programNBD of the package qemu-utils.
const programNBD = "qemu-nbd"

const (
	// dialPause is that between looks whether the server listens.
	dialPause = 10 * time.Millisecond
	// stopTime is how long a server has to end, once the connection did, and then by
	// SIGTERM, before SIGKILL.
	stopTime = time.Second
)

// noteServer is a qemu-nbd that has the image of notes open, with this process's
// connection to it. It ends when that does (it is not persistent), so that none is left
// behind by a daemon that dies, and by PDEATHSIG if it hangs then.
type noteServer struct {
	driver *rbdDriver
	cmd    *exec.Cmd
	said   clipped
	conn   *nbd.Conn
	once   sync.Once
	ended  chan struct{} // it has, and was waited for
}

// serveNotes starts one. errNoNotes is that the image is missing.
func (d *rbdDriver) serveNotes(ctx context.Context) (*noteServer, error) {
	path, err := exec.LookPath(programNBD)
	if err != nil {
		return nil, api.Errorf(api.CodeUnsupported, "the command %s is missing on this node; install the package qemu-utils", programNBD)
	}
	socket := d.notesSocket()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, err
	}
	key, err := d.cmd.keyFile()
	if err != nil {
		return nil, err
	}
	defer key.Close()
	p := &noteServer{driver: d, said: clipped{most: maxOutput}, ended: make(chan struct{})}
	argv := append(append([]string{}, d.cmd.wrap...), path, "--socket", socket, "--cache", "none",
		"--object", "secret,id="+secretID+",format=base64,file="+keyFD, "--image-opts", d.options(d.notesImage()))
	p.cmd = exec.Command(argv[0], argv[1:]...) //nolint:noctx // it lives until stop
	p.cmd.Stderr, p.cmd.ExtraFiles = &p.said, []*os.File{key}
	// /dev/null: a ceph.conf of the host may be of another cluster, or let reads be cached.
	p.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "CEPH_CONF=/dev/null"}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = stopTime
	if err := p.run(); err != nil {
		return nil, err
	}
	if err = p.connect(ctx, socket); err == nil {
		err = d.notesUsable(p.conn)
	}
	if err == nil {
		return p, nil
	}
	p.stop()
	switch text := strings.Join(strings.Fields(p.said.b.String()), " "); {
	case strings.Contains(text, noImage(d.notesImage())):
		return nil, errNoNotes
	case text != "":
		return nil, d.cannotOpen(text)
	}
	return nil, err
}

// run starts the process, and waits for its end in the background.
func (p *noteServer) run() error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // PDEATHSIG comes when the thread ends that has forked
		defer runtime.UnlockOSThread()
		_ = contain.Do(func() {
			err := p.cmd.Start()
			started <- err
			if err == nil {
				_ = p.cmd.Wait()
				close(p.ended)
			}
		})
	}()
	return <-started
}

// connect returns when the export is open. The socket is there before the image is.
func (p *noteServer) connect(ctx context.Context, socket string) error {
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			p.conn, err = nbd.Open(ctx, c, "")
			return err
		}
		select {
		case <-time.After(dialPause):
		case <-p.ended:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (p *noteServer) pid() int { return p.cmd.Process.Pid }

// runs reports that it has not ended.
func (p *noteServer) runs() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// stop returns when it has ended, which may never be if the kernel does not let it.
func (p *noteServer) stop() {
	p.once.Do(func() {
		if p.conn != nil {
			p.conn.Close()
			if p.endsWithin(stopTime) {
				return
			}
		}
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		if !p.endsWithin(stopTime) {
			_ = p.cmd.Process.Kill()
		}
		<-p.ended
	})
}

func (p *noteServer) endsWithin(d time.Duration) bool {
	select {
	case <-p.ended:
		return true
	case <-time.After(d):
		return false
	}
}
