// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Complete returns what the last of the words may become: commands, flags, or
// values and names that the cluster is asked for, sorted. It never fails: what
// cannot be found out is left out.
//
// It is for shells inside a daemon. There cobra's own completion will not do:
// it keeps the functions of flags in a table of the process for ever, writes
// to the process's stderr and obeys its environment.
func Complete(ctx context.Context, words []string, s Streams) []string {
	a := &app{Streams: s, flagValues: map[*pflag.Flag]completer{}}
	defer func() {
		if a.client != nil {
			a.client.Close()
		}
	}()
	if len(words) > 1 && words[0] == "muster" {
		words = words[1:]
	}
	if len(words) == 0 {
		words = []string{""}
	}
	root := a.root()
	done, word := words[:len(words)-1], words[len(words)-1]
	cmd, rest, err := root.Find(done)
	if err != nil || cmd.DisableFlagParsing {
		return nil
	}
	cmd.SetContext(ctx)
	cmd.InitDefaultHelpFlag()
	out := a.candidates(cmd, rest, word)
	slices.Sort(out)
	return slices.Compact(out)
}

// candidates completes word after the words of cmd.
func (a *app) candidates(cmd *cobra.Command, rest []string, word string) []string {
	ended := slices.Contains(rest, "--")
	if !ended && len(rest) > 0 {
		if f := valueFlag(cmd, rest[len(rest)-1]); f != nil {
			_ = cmd.ParseFlags(rest[:len(rest)-1]) // what is wrong is told when the line is run
			return a.flagCandidates(cmd, f, "", word)
		}
	}
	_ = cmd.ParseFlags(rest)
	if !ended && strings.HasPrefix(word, "-") {
		if name, value, ok := strings.Cut(word, "="); ok {
			if f := lookFlag(cmd, name); f != nil {
				return a.flagCandidates(cmd, f, name+"=", value)
			}
			return nil
		}
		return flagNames(cmd, word)
	}
	given := cmd.Flags().Args()
	var out []string
	if len(given) == 0 {
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && strings.HasPrefix(sub.Name(), word) {
				out = append(out, sub.Name())
			}
		}
	}
	if cmd.Name() == "help" {
		return append(out, helpTopics(cmd.Root(), given, word)...)
	}
	switch {
	case cmd.ValidArgsFunction != nil:
		found, _ := cmd.ValidArgsFunction(cmd, given, word)
		out = append(out, plainWords(found, word)...)
	case len(cmd.ValidArgs) > 0:
		out = append(out, plainWords(cmd.ValidArgs, word)...)
	}
	return out
}

// helpTopics completes the command that help is asked for.
func helpTopics(root *cobra.Command, given []string, word string) []string {
	cmd, rest, err := root.Find(given)
	if err != nil || len(rest) > 0 {
		return nil
	}
	var out []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && strings.HasPrefix(sub.Name(), word) {
			out = append(out, sub.Name())
		}
	}
	return out
}

// plainWords keeps candidates that begin with word, without descriptions.
func plainWords(list []string, word string) []string {
	var out []string
	for _, c := range list {
		c, _, _ = strings.Cut(c, "\t")
		if c != "" && strings.HasPrefix(c, word) {
			out = append(out, c)
		}
	}
	return out
}

func lookFlag(cmd *cobra.Command, given string) *pflag.Flag {
	if name, ok := strings.CutPrefix(given, "--"); ok {
		return cmd.Flag(name)
	}
	short := strings.TrimPrefix(given, "-")
	if len(short) != 1 {
		return nil
	}
	if f := cmd.Flags().ShorthandLookup(short); f != nil {
		return f
	}
	return cmd.InheritedFlags().ShorthandLookup(short)
}

// valueFlag returns the flag that takes the next word as its value.
func valueFlag(cmd *cobra.Command, given string) *pflag.Flag {
	if !strings.HasPrefix(given, "-") || strings.Contains(given, "=") || given == "-" || given == "--" {
		return nil
	}
	f := lookFlag(cmd, given)
	if f == nil || f.NoOptDefVal != "" {
		return nil
	}
	return f
}

func (a *app) flagCandidates(cmd *cobra.Command, f *pflag.Flag, prefix, word string) []string {
	complete := a.flagValues[f]
	if complete == nil {
		return nil
	}
	found, _ := complete(cmd, cmd.Flags().Args(), word)
	out := plainWords(found, word)
	for i := range out {
		out[i] = prefix + out[i]
	}
	return out
}

func flagNames(cmd *cobra.Command, word string) []string {
	var out []string
	add := func(f *pflag.Flag) {
		repeatable := strings.HasSuffix(f.Value.Type(), "Array") || strings.HasSuffix(f.Value.Type(), "Slice")
		if name := "--" + f.Name; !f.Hidden && (!f.Changed || repeatable) && strings.HasPrefix(name, word) {
			out = append(out, name)
		}
	}
	cmd.NonInheritedFlags().VisitAll(add)
	cmd.InheritedFlags().VisitAll(add)
	return out
}

// completeFlag registers what completes the values of a flag.
func (a *app) completeFlag(cmd *cobra.Command, name string, f completer) {
	if a.Shell == nil {
		_ = cmd.RegisterFlagCompletionFunc(name, f) // fails only if registered before
		return
	}
	if a.flagValues != nil {
		a.flagValues[cmd.LocalFlags().Lookup(name)] = f
	}
}
