// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/emersion/go-smtp"
)

func main() {
	listen := flag.String("listen", "", "TCP address, host:port")
	dir := flag.String("dir", "", "directory for the mails; must exist")
	flag.Parse()
	if *listen == "" || *dir == "" || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "mailsink: give --listen HOST:PORT and --dir DIR and nothing else")
		os.Exit(2)
	}
	if err := run(*listen, *dir); err != nil {
		fmt.Fprintln(os.Stderr, "mailsink:", err)
		os.Exit(1)
	}
}

func run(listen, dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	return serve(ctx, ln, dir, os.Stdout)
}

// serve takes mails until the context ends, which closes the listener.
func serve(ctx context.Context, ln net.Listener, dir string, out io.Writer) error {
	srv := smtp.NewServer(&sink{dir: dir, out: out})
	srv.Domain = "mailsink"
	srv.MaxMessageBytes, srv.MaxRecipients = maxBytes, maxRecipients
	srv.ReadTimeout, srv.WriteTimeout = ioTimeout, ioTimeout
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	if err := srv.Serve(ln); err != nil && !(ctx.Err() != nil && errors.Is(err, smtp.ErrServerClosed)) {
		return err
	}
	return nil
}
