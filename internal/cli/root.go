// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// root builds the whole tree of commands.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "muster",
		Short: "Command line of a muster cluster",
		Long: `muster talks to any node of a cluster: give it one server or several, and it
tries the next when one is down.

Environment:
  MUSTER_SERVER   servers, separated by commas (--server)
  MUSTER_TOKEN    token (--token)
  MUSTER_CACERT   file with the cluster's CA certificate (--cacert)
  MUSTER_CONTEXT  context of ~/.config/muster/config.yaml (--context)
  NO_COLOR        no colours

Exit codes:
  0  done
  1  failed
  2  the command line or a value in it is wrong
  3  no such object
  4  conflict or refused: already exists, in use, no node fits, not allowed
  5  no quorum, no cluster, or no server answers`,
		Example: `  muster cluster init --name prod --data-dir /var/lib/muster
  muster image create tiny --file tiny.qcow2
  muster vm create web1 --cpu 1 --memory 512M --image tiny --ha restart --start
  muster vm console web1`,
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: suggestDistance,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkShell(cmd); err != nil {
				return err
			}
			if err := a.flags.check(cmd); err != nil {
				return err
			}
			a.entered = true
			return a.limitTime(cmd)
		},
	}
	words := group("", "")
	root.Args, root.RunE = words.Args, words.RunE
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	a.flags.bind(root.PersistentFlags())
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(a.vmCmd(), a.imageCmd(), a.volumeCmd(), a.poolCmd(), a.networkCmd(), a.ippoolCmd(), a.uplinkCmd(), a.nodeCmd(), a.haCmd(),
		a.taskCmd(), a.tokenCmd(), a.userCmd(), a.clusterCmd(), a.serviceCmd(), a.topCmd(), a.eventCmd(), a.alertCmd(), a.ruleCmd(), a.receiverCmd(), a.configCmd(), a.getCmd(), a.applyCmd(), a.watchCmd(),
		a.rawCmd(), a.contextCmd(), a.versionCmd(), a.docsCmd())
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.SuggestionsMinimumDistance = suggestDistance
			c.Args, c.RunE = words.Args, words.RunE
		}
	}
	a.completeFlags(root)
	a.confine(root)
	return root
}

// limitTime applies --timeout to the command as a whole; the console uses it
// for its reconnects instead.
func (a *app) limitTime(cmd *cobra.Command) error {
	if a.flags.timeout <= 0 || cmd.Annotations[ownTimeout] != "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), a.flags.timeout)
	a.cancel = cancel
	cmd.SetContext(ctx)
	return nil
}

// ownTimeout marks the commands that apply --timeout in their own way.
const ownTimeout = "own-timeout"

// flagError names the nearest flag when one is unknown.
func flagError(cmd *cobra.Command, err error) error {
	u := usagef("%v", err)
	u.hint = "see " + cmd.CommandPath() + " --help"
	var missing *pflag.NotExistError
	if !errors.As(err, &missing) {
		return u
	}
	best, distance := "", suggestDistance+1
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		d := editDistance(missing.GetSpecifiedName(), f.Name)
		if strings.HasPrefix(f.Name, missing.GetSpecifiedName()) && len(missing.GetSpecifiedName()) > 1 {
			d = min(d, 1)
		}
		if d < distance {
			best, distance = f.Name, d
		}
	})
	if best != "" {
		u.hint = fmt.Sprintf("did you mean --%s? %s", best, u.hint)
	}
	return u
}

// editDistance is the Levenshtein distance of two words.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
