// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/contain"
)

const (
	// vncListen is where viewers connect by default: this computer alone.
	vncListen = "127.0.0.1:0"
	// maxVNCViewers is how many are served at once.
	maxVNCViewers = 16
	// vncChunk is how many bytes of a viewer are sent in one message.
	vncChunk = 32 << 10
)

// viewers are programs that show a vnc:// address, the best first; those of
// host, port pairs take HOST::PORT.
var viewers = []struct {
	program string
	pair    bool
}{{"remote-viewer", false}, {"xtigervncviewer", true}, {"vncviewer", true}, {"gvncviewer", true}, {"vinagre", false}}

func (a *app) vncCmd() *cobra.Command {
	var listen string
	var view bool
	cmd := &cobra.Command{
		Use: "vnc NAME", Short: "Open the screen of a VM on a local port for a VNC viewer", Args: args("NAME"),
		Long: `Opens a port on this computer, prints its address and connects every viewer that
comes to it with the screen of the VM, until the command is interrupted. Each
connection takes a ticket of its own. The port has no password: whoever reaches it
has the screen, so it listens on 127.0.0.1 unless told otherwise.

With --view it starts a viewer that is installed here and ends with it.`,
		Example:           "  muster vm vnc web1\n  muster vm vnc web1 --listen 127.0.0.1:5901 --view",
		Annotations:       map[string]string{ownTimeout: "none"},
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.vnc(cmd.Context(), names[0], listen, view)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", vncListen, "address and port to listen on; port 0 is any that is free")
	cmd.Flags().BoolVar(&view, "view", false, "start a VNC viewer")
	return cmd
}

func (a *app) vnc(ctx context.Context, name, listen string, view bool) error {
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return usagef("--listen: %q is not ADDRESS:PORT", listen)
	}
	viewer, pair := "", false
	if view {
		var err error
		if viewer, pair, err = findViewer(); err != nil {
			return err
		}
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	// What is wrong with the VM is said now, not to the first viewer.
	first, err := c.VNC(ctx, a.project, name)
	if err != nil {
		return err
	}
	first.Close()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("listen for viewers: %w", err)
	}
	fmt.Fprintf(a.Out, "vnc://%s\n", ln.Addr())
	group, ctx := contain.NewGroup(ctx)
	quit := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer quit()
	if view {
		group.Go(func() {
			defer group.Cancel() // the viewer's end is ours
			if err := a.runViewer(ctx, viewer, pair, ln.Addr()); err != nil && ctx.Err() == nil {
				a.notice("%s: %v", viewer, err)
			}
		})
	}
	group.Go(func() {
		defer group.Cancel()
		a.serveViewers(ctx, group, c, name, ln)
	})
	return group.Wait()
}

// serveViewers connects who comes until the listener ends.
func (a *app) serveViewers(ctx context.Context, group *contain.Group, c *client.Client, name string, ln net.Listener) {
	places := make(chan struct{}, maxVNCViewers)
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil {
				a.notice("no more viewers are taken: %v", err)
			}
			return
		}
		select {
		case places <- struct{}{}:
		default:
			a.notice("%d viewers are connected, which is the limit", maxVNCViewers)
			_ = conn.Close()
			continue
		}
		group.Go(func() {
			defer func() { <-places }()
			defer func() { _ = conn.Close() }()
			if err := serveViewer(ctx, c, a.project, name, conn); err != nil && ctx.Err() == nil {
				a.notice("a viewer of %s was cut off: %v", name, err)
			}
		})
	}
}

// serveViewer carries one viewer's connection. The end of either side is no
// error.
func serveViewer(ctx context.Context, c *client.Client, project, name string, conn net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	screen, err := c.VNC(ctx, project, name)
	if err != nil {
		return err
	}
	gone := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer gone()
	sent := make(chan error, 1)
	go func() {
		defer cancel()
		sent <- contain.Call(func() error { return fromViewer(ctx, screen, conn) })
	}()
	err = toViewer(ctx, screen, conn)
	left := ctx.Err() != nil
	cancel()
	screen.Close()
	if said := <-sent; said != nil {
		err = said
	}
	if left || errors.Is(err, client.ErrConsoleEnded) {
		return nil
	}
	return err
}

func fromViewer(ctx context.Context, screen *client.Console, conn net.Conn) error {
	b := make([]byte, vncChunk)
	for {
		n, err := conn.Read(b)
		if n > 0 {
			if err := screen.Write(ctx, b[:n]); err != nil {
				return nil //nolint:nilerr // the reader finds the connection lost as well
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the viewer has left
		}
	}
}

func toViewer(ctx context.Context, screen *client.Console, conn io.Writer) error {
	for {
		b, err := screen.Read(ctx)
		if err != nil {
			return err
		}
		if _, err := conn.Write(b); err != nil {
			return nil //nolint:nilerr // the viewer has left
		}
	}
}

func findViewer() (program string, pair bool, err error) {
	if runtime.GOOS == "darwin" {
		return "open", false, nil
	}
	for _, v := range viewers {
		if path, err := exec.LookPath(v.program); err == nil {
			return path, v.pair, nil
		}
	}
	return "", false, api.Errorf(api.CodeUnsupported, "--view: no VNC viewer is installed here (looked for remote-viewer, vncviewer and others); install one, or leave --view out and open the printed address")
}

func (a *app) runViewer(ctx context.Context, program string, pair bool, addr net.Addr) error {
	target := "vnc://" + addr.String()
	if host, port, err := net.SplitHostPort(addr.String()); pair && err == nil {
		target = host + "::" + port
	}
	words := []string{target}
	if program == "open" {
		words = []string{"-W", target}
	}
	cmd := exec.CommandContext(ctx, program, words...)
	cmd.Stdout, cmd.Stderr = a.Err, a.Err
	return cmd.Run()
}

func (a *app) screenshotCmd() *cobra.Command {
	return &cobra.Command{
		Use: "screenshot NAME FILE", Short: "Write what is on the screen of a VM to a PNG file", Args: args("NAME", "FILE"),
		Long:    "Writes a picture of the screen of a running VM, as PNG; - is stdout.",
		Example: "  muster vm screenshot web1 web1.png",
		ValidArgsFunction: func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(given) == 1 {
				return []string{"png"}, cobra.ShellCompDirectiveFilterFileExt
			}
			return a.completeNames(api.KindVM)(cmd, given, word)
		},
		RunE: func(cmd *cobra.Command, names []string) error {
			file := names[1]
			if file != "-" {
				if a.Shell != nil {
					return api.Errorf(api.CodeRefused, "screenshot: the shell writes no files of the node; give -, as in: ssh USER@NODE 'vm screenshot %s -' > %s", names[0], file)
				}
			} else if a.OutTTY {
				return usagef("screenshot: a picture is not for a terminal; give a file or redirect stdout")
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			b, err := c.Screenshot(cmd.Context(), a.project, names[0])
			if err != nil {
				return err
			}
			if file == "-" {
				_, err = a.Out.Write(b)
				return err
			}
			if err := os.WriteFile(file, b, 0o600); err != nil {
				return fmt.Errorf("write the picture: %w", err)
			}
			a.say("%s: %d bytes", file, len(b))
			return nil
		},
	}
}
