// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// docsCmd writes the reference of the command line.
func (a *app) docsCmd() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "docs --dir DIR", Short: "Write the reference of the command line as Markdown", Args: args(), Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return usagef("docs: --dir is missing")
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("write reference: %w", err)
			}
			path := filepath.Join(dir, "cli.md")
			if err := os.WriteFile(path, []byte(Reference()), 0o644); err != nil {
				return fmt.Errorf("write reference: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory for cli.md")
	return cmd
}

// Reference returns the reference of the command line in Markdown. It depends
// on nothing but the program, so that a test can compare it with the file.
func Reference() string {
	a := &app{Streams: Streams{In: strings.NewReader(""), Out: &strings.Builder{}, Err: &strings.Builder{}, Getenv: func(string) string { return "" }}}
	root := a.root()
	var b strings.Builder
	b.WriteString("# Command line reference\n\n<!-- Made by: go run ./cmd/muster docs --dir docs/reference. Do not edit. -->\n\n")
	b.WriteString("```\n" + root.Long + "\n```\n\n## Global flags\n\n")
	flagTable(&b, root.PersistentFlags())
	b.WriteString("\n## Commands\n\n")
	var pages []*cobra.Command
	collect(root, &pages)
	for _, c := range pages {
		fmt.Fprintf(&b, "- [%s](#%s): %s\n", c.CommandPath(), strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
	}
	for _, c := range pages {
		page(&b, c)
	}
	return b.String()
}

func collect(cmd *cobra.Command, pages *[]*cobra.Command) {
	for _, c := range cmd.Commands() { // in alphabetical order
		if c.Hidden || c.Name() == "help" {
			continue
		}
		if _, own := c.Annotations[ownPage]; own || !c.HasSubCommands() {
			*pages = append(*pages, c)
		}
		collect(c, pages)
	}
}

func page(b *strings.Builder, c *cobra.Command) {
	fmt.Fprintf(b, "\n## %s\n\n%s.\n\n```\n%s\n```\n", c.CommandPath(), c.Short, c.UseLine())
	if c.Long != "" {
		fmt.Fprintf(b, "\n%s\n", strings.TrimSpace(c.Long))
	}
	if c.LocalNonPersistentFlags().HasAvailableFlags() {
		b.WriteString("\n")
		flagTable(b, c.LocalNonPersistentFlags())
	}
	if c.Example != "" {
		fmt.Fprintf(b, "\nExamples:\n\n```\n%s\n```\n", strings.TrimRight(c.Example, "\n"))
	}
}

func flagTable(b *strings.Builder, flags *pflag.FlagSet) {
	b.WriteString("| flag | meaning |\n|---|---|\n")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if t := f.Value.Type(); t != "bool" {
			name += " " + strings.ToUpper(strings.TrimSuffix(t, "Array"))
		}
		meaning := f.Usage
		if d := f.DefValue; d != "" && d != "0" && d != "0s" && d != "false" && d != "[]" && !strings.Contains(meaning, "default") {
			meaning += " (default " + d + ")"
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", name, strings.ReplaceAll(meaning, "|", "\\|"))
	})
}
