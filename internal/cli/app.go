// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// Streams are what a command talks to; tests replace them.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	// InTTY, OutTTY and ErrTTY say whether a person sits there.
	InTTY, OutTTY, ErrTTY bool
	// Raw puts the terminal into raw mode and returns what undoes it; nil when
	// In and Out are no terminal.
	Raw func() (restore func(), err error)
	// Secret reads a line from the terminal without showing it; nil when In is no
	// terminal.
	Secret func() ([]byte, error)
	// Size returns the columns and rows of the terminal, 0 when not known. It
	// is nil where there is none, as in tests.
	Size    func() (columns, rows int)
	Getenv  func(string) string
	Now     func() time.Time
	Version string
	// Shell is set when the command runs inside a node's daemon.
	Shell *Shell
	// RaceDelay of the client, and how soon what a shell waits for must come; both longer in
	// tests: on a busy machine a server may be slow.
	RaceDelay, Soon time.Duration
}

// System returns the streams of the process.
func System(version string) Streams {
	s := Streams{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr,
		InTTY:  term.IsTerminal(int(os.Stdin.Fd())),
		OutTTY: term.IsTerminal(int(os.Stdout.Fd())),
		ErrTTY: term.IsTerminal(int(os.Stderr.Fd())),
		Size:   systemSize,
		Getenv: os.Getenv, Now: time.Now, Version: version,
	}
	if s.InTTY {
		s.Secret = func() ([]byte, error) { return term.ReadPassword(int(os.Stdin.Fd())) }
	}
	if s.InTTY && s.OutTTY {
		s.Raw = systemRaw
	}
	return s
}

func systemSize() (columns, rows int) {
	columns, rows, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil {
		return 0, 0
	}
	return columns, rows
}

func systemRaw() (restore func(), err error) {
	undoOutput, err := terminalOutput()
	if err != nil {
		return nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	in := int(os.Stdin.Fd())
	old, err := term.MakeRaw(in)
	if err != nil {
		undoOutput()
		return nil, fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	return func() {
		_ = term.Restore(in, old) // nothing else could be tried
		undoOutput()
	}, nil
}

// app is one run of the command line.
type app struct {
	Streams
	flags   globals
	client  *client.Client
	project string
	cancel  context.CancelFunc
	still   bool // one of many at work: no progress of its own
	entered bool // the command itself runs: its errors are no usage errors
	// flagValues completes the values of flags in a shell; see confine.
	flagValues map[*pflag.Flag]completer
}

// Run executes a command line and returns the exit code. Cancelling ctx ends
// it, as a signal does.
func Run(ctx context.Context, args []string, s Streams) int {
	a := &app{Streams: s}
	if s.Shell != nil {
		var err error
		if args, err = shellArgs(args); err != nil {
			a.report(err)
			return exitCode(err)
		}
	}
	root := a.root()
	root.SetArgs(append([]string{}, args...)) // nil would mean those of the process
	cmd, err := root.ExecuteContextC(ctx)
	if a.cancel != nil {
		a.cancel()
	}
	if a.client != nil {
		a.client.Close()
	}
	if err == nil {
		return ExitDone
	}
	var inGuest *guestExit
	if errors.As(err, &inGuest) {
		return inGuest.code
	}
	if !a.entered {
		err = a.asUsage(cmd, err)
	}
	a.report(err)
	return exitCode(err)
}

// asUsage turns what cobra found wrong with the command line into a usage
// error that points to the help.
func (a *app) asUsage(cmd *cobra.Command, err error) error {
	var u *usageError
	if errors.As(err, &u) {
		if u.hint == "" && cmd != nil {
			u.hint = "see " + cmd.CommandPath() + " --help"
		}
		return err
	}
	var known *api.Error
	if errors.As(err, &known) {
		return err
	}
	return &usageError{message: err.Error(), hint: "see " + cmd.CommandPath() + " --help"}
}

// report writes an error to stderr.
func (a *app) report(err error) {
	if a.flags.output == "json" {
		a.reportJSON(err)
		return
	}
	message := err.Error()
	if errors.Is(err, context.Canceled) {
		message = "interrupted"
	}
	fmt.Fprintf(a.Err, "muster: %s\n", clean(message))
	if hint := a.hintFor(err); hint != "" {
		fmt.Fprintf(a.Err, "muster: hint: %s\n", clean(hint))
	}
}

func (a *app) reportJSON(err error) {
	var p *client.Problem
	var u *usageError
	var t *taskError
	switch {
	case errors.As(err, &u):
		p = client.ProblemOf(api.Errorf(api.CodeInvalid, "%s", u.message))
	case errors.As(err, &t):
		code := t.code
		if code == "" {
			code = api.CodeInternal
		}
		p = client.ProblemOf(api.Errorf(code, "%s", t.message))
	default:
		p = client.ProblemOf(err)
	}
	b, encErr := json.Marshal(p)
	if encErr != nil {
		b = []byte(`{"code":"internal"}`)
	}
	fmt.Fprintf(a.Err, "%s\n", b)
}

// notice writes a line that is no result and no error.
func (a *app) notice(format string, args ...any) {
	if a.flags.quiet {
		return
	}
	fmt.Fprintf(a.Err, "muster: %s\n", clean(fmt.Sprintf(format, args...)))
}

// say writes a line of result for people.
func (a *app) say(format string, args ...any) {
	if a.flags.quiet {
		return
	}
	fmt.Fprintln(a.Out, clean(fmt.Sprintf(format, args...)))
}

// group makes a command that only holds others. Called with an unknown word
// it fails with suggestions instead of showing help as if all were well.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			u := usagef("unknown command %q for %q", args[0], cmd.CommandPath())
			u.hint = "see " + cmd.CommandPath() + " --help"
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				u.hint = "did you mean " + strings.Join(s, " or ") + "?"
			}
			return u
		},
	}
	cmd.SuggestionsMinimumDistance = suggestDistance
	cmd.AddCommand(subs...)
	return cmd
}

const suggestDistance = 2

// args checks the number of arguments and names them in the error.
func args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		switch {
		case len(given) < len(names):
			return usagef("%s: %s is missing", cmd.CommandPath(), names[len(given)])
		case len(given) > len(names):
			return usagef("%s: %q is one argument too many", cmd.CommandPath(), given[len(names)])
		}
		return nil
	}
}

// atMostOne allows one argument.
func atMostOne() cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if len(given) > 1 {
			return usagef("%s: %q is one argument too many", cmd.CommandPath(), given[1])
		}
		return nil
	}
}

// atLeastOne checks for one or more arguments of the same meaning.
func atLeastOne(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if len(given) == 0 {
			return usagef("%s: %s is missing", cmd.CommandPath(), name)
		}
		return nil
	}
}

// between checks for a number of arguments, the last of which may be left out.
func between(least, most int, names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if len(given) > most {
			return usagef("%s: %q is one argument too many", cmd.CommandPath(), given[most])
		}
		if len(given) < least {
			return usagef("%s: %s is missing", cmd.CommandPath(), names[len(given)])
		}
		return nil
	}
}
