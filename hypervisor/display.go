// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/contain"
)

// Limits of screens.
const (
	// MaxViewers is how many may look at one screen at once.
	MaxViewers = 16
	// ViewerDial bounds connecting to QEMU's VNC server.
	ViewerDial = 3 * time.Second
	// ScreenshotDeadline bounds one screenshot, its wait for others included.
	ScreenshotDeadline = 15 * time.Second
	// MaxScreenshotBytes is the largest picture that is read back.
	MaxScreenshotBytes = 32 << 20
	viewerChunk        = 32 << 10 // bytes that are read from QEMU at once
	viewerQueue        = 4        // such chunks that wait for the viewer
	maxScreenSide      = 16384    // pixels
)

// Display is one connection to the screen of a VM, which speaks RFB (RFC 6143)
// from QEMU's greeting on. A viewer that reads slowly slows QEMU's own sending,
// nothing else. The goroutine that reads is owned by the Display; Close waits
// for it.
type Display struct {
	conn net.Conn
	out  chan []byte
	quit chan struct{}
	done chan struct{}
	once sync.Once
	left func()
}

// running returns the instance of a VM whose QEMU answers, and the VM's name.
func (h *Hypervisor) runningInstance(vmID, what string) (*instance, string, error) {
	h.mu.Lock()
	in := h.instances[vmID]
	h.mu.Unlock()
	name := vmID
	if vm, err := configdb.VMs.Get(h.cfg.DB.Local(), vmID); err == nil {
		name = vm.Meta.Name
	}
	if in == nil || in.openConn() == nil {
		return nil, name, api.Errorf(api.CodeRefused, "vm %s does not run on node %s now, so it has no %s; see muster vm show %s", name, h.cfg.NodeName, what, name)
	}
	return in, name, nil
}

func noScreen(name string) error {
	return api.Errorf(api.CodeRefused, "vm %s has no screen: it was started with spec.display none, or by an earlier version; set display to vnc and start it anew", name)
}

// Display connects to the screen of a VM that runs on this node.
func (h *Hypervisor) Display(ctx context.Context, vmID string) (*Display, error) {
	in, name, err := h.runningInstance(vmID, "screen")
	if err != nil {
		return nil, err
	}
	if !in.enter() {
		return nil, api.Errorf(api.CodeRefused, "the screen of vm %s has %d viewers, which is the limit; close one", name, MaxViewers)
	}
	ctx, cancel := context.WithTimeout(ctx, ViewerDial)
	defer cancel()
	conn, err := access.Dial(ctx, h.pathsOf(vmID).vnc, in.ownPID())
	if err != nil {
		in.leave()
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, noScreen(name)
		}
		return nil, api.Errorf(api.CodeTimeout, "connect to the screen of vm %s: %w", name, err)
	}
	s := &Display{conn: conn, out: make(chan []byte, viewerQueue), quit: make(chan struct{}), done: make(chan struct{}), left: in.leave}
	go func() {
		_ = contain.Do(s.read) // a bug here ends this viewer alone
	}()
	return s, nil
}

func (in *instance) enter() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.viewers >= MaxViewers {
		return false
	}
	in.viewers++
	return true
}

func (in *instance) leave() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.viewers--
}

func (d *Display) read() {
	defer close(d.done)
	defer close(d.out)
	for {
		b := make([]byte, viewerChunk)
		n, err := d.conn.Read(b)
		if n > 0 {
			select {
			case d.out <- b[:n]:
			case <-d.quit:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// Output is what QEMU sends. It is closed when QEMU ends the connection.
func (d *Display) Output() <-chan []byte { return d.out }

// Write sends what the viewer says. Only one goroutine may call it.
func (d *Display) Write(ctx context.Context, p []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = d.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := d.conn.Write(p); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return api.Errorf(api.CodeRefused, "the screen has ended: %w", err)
	}
	return nil
}

// Close ends the connection. It may be called more than once.
func (d *Display) Close() {
	d.once.Do(func() {
		close(d.quit)
		_ = d.conn.Close()
		<-d.done
		d.left()
	})
}

// Screenshot returns what is on the screen of a VM that runs on this node, as
// PNG (QAPI screendump). QEMU before 7.1 writes PPM, which is converted.
func (h *Hypervisor) Screenshot(ctx context.Context, vmID string) ([]byte, error) {
	in, name, err := h.runningInstance(vmID, "screen")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, ScreenshotDeadline)
	defer cancel()
	select { // one file, so one at a time
	case in.shot <- struct{}{}:
		defer func() { <-in.shot }()
	case <-ctx.Done():
		return nil, api.Errorf(api.CodeTimeout, "others take screenshots of vm %s: %w", name, ctx.Err())
	}
	path := h.pathsOf(vmID).shot
	defer func() { _ = os.Remove(path) }()
	conn := in.openConn()
	if conn == nil {
		return nil, api.Errorf(api.CodeRefused, "vm %s has stopped", name)
	}
	err = conn.Execute(ctx, "screendump", map[string]any{"filename": path, "format": "png"}, nil)
	var refused *qmp.CommandError
	ppm := errors.As(err, &refused)
	if ppm {
		err = conn.Execute(ctx, "screendump", map[string]any{"filename": path}, nil)
	}
	switch {
	case errors.As(err, &refused) && !h.hasScreen(vmID):
		return nil, noScreen(name)
	case err != nil:
		return nil, fmt.Errorf("take a screenshot of vm %s: %w", name, err)
	}
	b, err := readBounded(path, MaxScreenshotBytes)
	if err != nil {
		return nil, fmt.Errorf("read the screenshot of vm %s: %w", name, err)
	}
	if !ppm {
		return b, nil
	}
	return pngOf(b)
}

func (h *Hypervisor) hasScreen(vmID string) bool {
	_, err := os.Lstat(h.pathsOf(vmID).vnc)
	return err == nil
}

// readBounded reads a file that a process wrote which is not trusted with more
// than most bytes.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > most {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, most)
	}
	return io.ReadAll(io.LimitReader(f, most))
}

// pngOf converts a binary PPM picture of 8 bits per colour.
func pngOf(ppm []byte) ([]byte, error) {
	r := bufio.NewReader(bytes.NewReader(ppm))
	var w, h, most int
	if _, err := fmt.Fscanf(r, "P6\n%d %d\n%d", &w, &h, &most); err != nil {
		return nil, fmt.Errorf("read the picture that QEMU wrote: %w", err)
	}
	if _, err := r.Discard(1); err != nil || most != 255 || w < 1 || h < 1 || w > maxScreenSide || h > maxScreenSide {
		return nil, fmt.Errorf("the picture that QEMU wrote has %d x %d pixels of %d shades", w, h, most)
	}
	pixels, err := io.ReadAll(r)
	if err != nil || len(pixels) < 3*w*h {
		return nil, fmt.Errorf("the picture that QEMU wrote is incomplete: %d bytes for %d x %d pixels", len(pixels), w, h)
	}
	img := image.NewNRGBA(image.Rect(0, 0, w, h))
	for i := range w * h {
		img.SetNRGBA(i%w, i/w, color.NRGBA{R: pixels[3*i], G: pixels[3*i+1], B: pixels[3*i+2], A: 255})
	}
	var out bytes.Buffer
	err = png.Encode(&out, img)
	return out.Bytes(), err
}
