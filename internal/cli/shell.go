// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

// Shell makes commands run inside a node's daemon, for a user who has logged
// in there. Such a command uses the given transport and nothing else: it opens
// no file of the node, reads no environment but that of its streams, and what
// belongs to a person's own computer (contexts, servers, tokens) is refused.
type Shell struct {
	// Transport answers REST calls as the user.
	Transport http.RoundTripper
	// Node is the name of the node, for messages.
	Node string
	// Tells is set when the shell itself tells its user that there is no quorum.
	Tells bool
	// Guest, if set, wraps the writer of what guests printed, to take out what
	// a terminal must not be told by them.
	Guest func(io.Writer) io.Writer
}

// notInShell are the commands that make sense only on a person's own computer
// or on the host itself, with the reason.
var notInShell = map[string]string{
	"context":         "contexts belong to the muster command on your own computer",
	"docs":            "it writes files; use the muster command on your own computer",
	"completion":      "it is for the muster command on your own computer; here, press TAB",
	"vm vnc":          "it opens a port on your own computer; use the muster command there",
	"cluster init":    "it is run on the host itself, with --data-dir",
	"cluster join":    "it is run on the host itself, with --data-dir",
	"cluster restore": "it is run on the host itself, with --data-dir",
	"cluster recover": "it is run on the host itself, with --data-dir",
}

// notInShellFlags are global flags that say how to reach a cluster.
var notInShellFlags = []string{"server", "token", "cacert", "data-dir", "context"}

// confine takes out of the tree what a shell does not offer. The names stay,
// so that whoever types one is told why.
func (a *app) confine(root *cobra.Command) {
	if a.Shell == nil {
		return
	}
	for _, f := range notInShellFlags {
		root.PersistentFlags().Lookup(f).Hidden = true
	}
	for path, why := range notInShell {
		cmd, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 {
			continue
		}
		cmd.RemoveCommand(cmd.Commands()...)
		cmd.Hidden, cmd.DisableFlagParsing = true, true
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(*cobra.Command, []string) error {
			return api.Errorf(api.CodeRefused, "%s is not available in the shell: %s", path, why)
		}
	}
}

// checkShell refuses global flags that a shell has no use for.
func (a *app) checkShell(cmd *cobra.Command) error {
	if a.Shell == nil {
		return nil
	}
	for _, f := range notInShellFlags {
		if cmd.Flags().Changed(f) {
			return api.Errorf(api.CodeRefused, "--%s is not available in the shell: it talks to node %s as the user who logged in", f, a.Shell.Node)
		}
	}
	return nil
}

// noLocalFile refuses to open a file where the files are not the user's.
func (a *app) noLocalFile(flag string) error {
	if a.Shell == nil {
		return nil
	}
	return api.Errorf(api.CodeRefused, "%s: the shell opens no files of the node; give - and send the content to stdin, as in: ssh USER@NODE '... %s -' < FILE", flag, flag)
}

func (a *app) transport() http.RoundTripper {
	if a.Shell == nil {
		return nil
	}
	return a.Shell.Transport
}

// guestOut is where the output of guests goes.
func (a *app) guestOut() io.Writer {
	if a.Shell == nil || a.Shell.Guest == nil {
		return a.Out
	}
	return a.Shell.Guest(a.Out)
}

// internalCommands are cobra's own hidden words. They write to the stderr of
// the process and follow its environment.
var internalCommands = []string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}

// shellArgs prepares the words of a line in a shell: the word muster may be
// given or left out.
func shellArgs(args []string) ([]string, error) {
	if len(args) > 0 && args[0] == "muster" {
		args = args[1:]
	}
	for _, w := range args {
		if slices.Contains(internalCommands, w) {
			return nil, usagef("unknown command %q", w)
		}
	}
	return args, nil
}
