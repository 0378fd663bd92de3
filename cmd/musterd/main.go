// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Command musterd is the daemon of one node of a Muster cluster.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/muster-vm/muster/internal/version"
	"github.com/muster-vm/muster/node"
)

// Exit codes: 0 ended as asked, 1 failed, 2 usage.
const (
	exitFailed = 1
	exitUsage  = 2
)

const usage = `musterd runs one node of a Muster cluster.

  musterd [flags]           run the daemon
  musterd config [flags]    print the configuration that would be used, without secrets
  musterd forget --cluster NAME [flags]
                            clear the data directory of a node that is no member
                            any more, so that it can join again; VM disks stay
  musterd version           print the version and the feature levels that it supports

A new daemon belongs to no cluster; run on the same host
  muster cluster init --data-dir DIR            to found one, or
  muster cluster join TOKEN --data-dir DIR      to join one.

Flags:
`

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	verb := ""
	if len(args) > 0 && slices.Contains([]string{"config", "version", "forget"}, args[0]) {
		verb, args = args[0], args[1:]
	}
	if verb == "version" {
		fmt.Printf("musterd %s, feature levels %d to %d\n", version.Version, version.MinFeatureLevel, version.FeatureLevel)
		return 0
	}
	cfg, cluster, err := parse(args, verb)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "musterd:", err)
		return exitUsage
	}
	switch verb {
	case "config":
		var shown string
		shown, err = cfg.Show()
		fmt.Print(shown)
	case "forget":
		err = node.Forget(context.Background(), cfg, cluster, os.Stdout)
	default:
		err = serve(cfg)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "musterd:", err)
		return exitFailed
	}
	return 0
}

// parse reads the file, then lets the flags override it.
func parse(args []string, verb string) (_ *node.Config, cluster string, err error) {
	var cfg node.Config
	fs := flag.NewFlagSet("musterd", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
	}
	if verb == "forget" {
		fs.StringVar(&cluster, "cluster", "", "name of the cluster whose node the data directory is")
	}
	file := fs.String("config", "", "configuration file (YAML); flags override it")
	set := map[string]*string{
		"data-dir": &cfg.DataDir, "run-dir": &cfg.RunDir, "listen": &cfg.Listen, "advertise": &cfg.Advertise,
		"node-name": &cfg.NodeName, "log-level": &cfg.LogLevel,
	}
	given := map[string]*string{
		"data-dir":  fs.String("data-dir", "", "replica, keys and local pool of this node (default "+node.DefaultDataDir+")"),
		"run-dir":   fs.String("run-dir", "", "sockets of guard and VMs, a short path (default "+node.DefaultRunDir+")"),
		"listen":    fs.String("listen", "", "the one port, TCP and UDP, ADDR:PORT (default "+node.DefaultListen+")"),
		"advertise": fs.String("advertise", "", "ADDR:PORT that other nodes use (default: as --listen, or this host's first address)"),
		"node-name": fs.String("node-name", "", "name of the node, a DNS label (default: the host name)"),
		"log-level": fs.String("log-level", "", "debug, info, warn or error (default info)"),
	}
	if err := fs.Parse(args); err != nil {
		return nil, "", err
	}
	if fs.NArg() > 0 {
		return nil, "", fmt.Errorf("unexpected argument %q; see musterd --help", fs.Arg(0))
	}
	if *file != "" {
		if err := cfg.LoadFile(*file); err != nil {
			return nil, "", err
		}
	}
	for name, v := range given {
		if *v != "" {
			*set[name] = *v
		}
	}
	return &cfg, cluster, cfg.Complete()
}

func serve(cfg *node.Config) error {
	level, err := cfg.Level()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	signal.Ignore(syscall.SIGHUP) // a terminal that closes must not end a node
	return node.Serve(ctx, cfg, log)
}
