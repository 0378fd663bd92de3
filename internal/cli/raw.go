// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// maxRawValue is the largest value that the database takes.
const maxRawValue = 1 << 20

func (a *app) rawCmd() *cobra.Command {
	var stale, verbose bool
	get := &cobra.Command{
		Use: "get KEY", Short: "Print the bytes of a key exactly as they are", Args: args("KEY"),
		Long:              "Prints the bytes of a key exactly as they are; a newline is added only on a\nterminal. Reads what a majority agrees on, or with --stale the node's own copy.",
		Example:           "  muster raw get app/config\n  muster raw get app/config --stale -v",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, keys []string) error {
			return a.rawGet(cmd.Context(), keys[0], stale, verbose)
		},
	}
	get.Flags().BoolVar(&stale, "stale", false, "the asked node's own copy, without a word from the leader")
	get.Flags().BoolVarP(&verbose, "verbose", "v", false, "print the revision on stderr")
	var limit int
	ls := &cobra.Command{
		Use: "ls [PREFIX]", Short: "List keys", Args: between(0, 1, "PREFIX"),
		Example:           "  muster raw ls app/\n  muster raw ls app/ -o json",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, prefix []string) error {
			return a.rawList(cmd.Context(), first(append(prefix, "")...), limit)
		},
	}
	ls.Flags().IntVar(&limit, "limit", 0, "at most so many (default all)")
	return group("raw", "The configuration database by key, for administrators", get, a.rawPut(), a.rawRemove(), ls)
}

func (a *app) rawGet(ctx context.Context, key string, stale, verbose bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	item, reply, err := c.RawGet(ctx, key, stale)
	if err != nil {
		return err
	}
	if verbose {
		fmt.Fprintf(a.Err, "revision: %d\n", item.Revision)
		if reply.Stale {
			fmt.Fprintf(a.Err, "age: %s\n", took(reply.Age))
		}
	}
	if a.structured() {
		return a.printValue(item)
	}
	value := item.Value
	if a.OutTTY {
		value = append(value, '\n')
	}
	_, err = a.Out.Write(value)
	return err
}

func (a *app) rawPut() *cobra.Command {
	var file string
	var when client.RawCondition
	cmd := &cobra.Command{
		Use: "put KEY [VALUE]", Short: "Write the bytes of a key", Args: between(1, 2, "KEY", "VALUE"),
		Long: "Writes the bytes of a key: VALUE, or with -f those of a file (- for stdin). At\nmost 1 MiB. Keys below muster/ are the cluster's own and are refused.",
		Example: `  muster raw put app/config on
  muster raw put app/blob -f blob.bin --if-absent
  muster raw put app/config off --if-revision 17`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, words []string) error {
			if (len(words) == 2) == (file != "") {
				return usagef("raw put: give either VALUE or -f FILE")
			}
			if err := checkCondition(cmd, when); err != nil {
				return err
			}
			value := []byte(words[len(words)-1])
			if file != "" {
				var err error
				if value, err = a.readFile(file, maxRawValue); err != nil {
					return err
				}
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			r, err := c.RawPut(cmd.Context(), words[0], value, when)
			if when.Absent && api.CodeOf(err) == api.CodeConflict {
				return &hintedError{err, "the key exists; read it with muster raw get " + words[0]}
			}
			if err != nil {
				return err
			}
			if a.structured() {
				return a.printValue(r)
			}
			a.say("%s revision %d", r.Key, r.Revision)
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "take the bytes from this file, - for stdin")
	cmd.Flags().Uint64Var(&when.Revision, "if-revision", 0, "only if the key is at this revision")
	cmd.Flags().BoolVar(&when.Absent, "if-absent", false, "only if the key does not exist")
	return cmd
}

func checkCondition(cmd *cobra.Command, when client.RawCondition) error {
	switch {
	case cmd.Flags().Changed("if-revision") && when.Revision == 0:
		return usagef("--if-revision: give the revision, a number above zero; for a key that must not exist use --if-absent")
	case when.Absent && when.Revision > 0:
		return usagef("--if-revision and --if-absent contradict each other; give one")
	}
	return nil
}

func (a *app) rawRemove() *cobra.Command {
	var when client.RawCondition
	cmd := &cobra.Command{
		Use: "rm KEY", Short: "Remove a key", Args: args("KEY"),
		Example:           "  muster raw rm app/config\n  muster raw rm app/config --if-revision 17",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, keys []string) error {
			if err := checkCondition(cmd, when); err != nil {
				return err
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			if err := c.RawDelete(cmd.Context(), keys[0], when); err != nil {
				return err
			}
			if !a.structured() {
				a.say("%s removed", keys[0])
			}
			return nil
		},
	}
	cmd.Flags().Uint64Var(&when.Revision, "if-revision", 0, "only if the key is at this revision")
	return cmd
}

func (a *app) rawList(ctx context.Context, prefix string, limit int) error {
	if limit < 0 {
		return usagef("--limit: %d is negative", limit)
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	l, err := c.RawList(ctx, prefix, limit)
	if err != nil {
		return err
	}
	switch {
	case a.structured():
		return a.printValue(l)
	case a.flags.output == "name":
		for _, i := range l.Items {
			fmt.Fprintln(a.Out, clean(i.Key))
		}
		return nil
	}
	t := &table{head: []string{"KEY", "REVISION", "SIZE"}}
	for _, i := range l.Items {
		t.add(i.Key, strconv.FormatUint(i.Revision, 10), api.Size(len(i.Value)).String())
	}
	return a.printTable(t, "no keys found")
}

// readFile reads a file or stdin ("-") up to a limit.
func (a *app) readFile(path string, limit int64) ([]byte, error) {
	in := a.In
	if path != "-" {
		if err := a.noLocalFile("-f"); err != nil {
			return nil, err
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, usagef("%v", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, api.Errorf(api.CodeTooLarge, "%s is larger than %s", path, api.Size(limit))
	}
	return b, nil
}
