// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// maxCompletions is how many names a shell is given.
const maxCompletions = 1000

type completer = func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective)

// completeNames offers the names of the objects of a kind, asked of the
// cluster with a short deadline: a shell must not hang on a dead server.
func (a *app) completeNames(kind api.Kind) completer {
	return func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(given) > 0 && !strings.HasSuffix(strings.Fields(cmd.Use)[1], "...") {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.names(cmd.Context(), kind, given, word), cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) names(ctx context.Context, kind api.Kind, given []string, word string) []string {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, a.soon())
	defer cancel()
	a.flags.quiet = true // a notice would break the line being edited
	c, err := a.connect()
	if err != nil {
		return nil
	}
	l, err := c.List(ctx, kind, client.ListOptions{Project: a.project, Limit: maxCompletions, Stale: true})
	if err != nil {
		return nil
	}
	taken := map[string]bool{}
	for _, g := range given {
		taken[g] = true
	}
	var out []string
	for _, raw := range l.Items {
		m := client.MetaOf(raw)
		name := first(m.Name, m.ID)
		if strings.HasPrefix(name, word) && !taken[name] && api.ValidName("name", name) == nil {
			out = append(out, name)
		}
	}
	return out
}

func kindWords() []string {
	var out []string
	for _, k := range kinds() {
		out = append(out, string(k.kind))
	}
	return out
}

func (a *app) completeKinds(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return kindWords(), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeKindName(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
	switch len(given) {
	case 0:
		return append(kindWords(), string(api.KindCluster)), cobra.ShellCompDirectiveNoFileComp
	case 1:
		if k, err := viewOf(given[0]); err == nil {
			return a.names(cmd.Context(), k.kind, nil, word), cobra.ShellCompDirectiveNoFileComp
		}
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeContexts(_ *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	a.flags.quiet = true
	f, err := a.loadContexts()
	if err != nil || len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, c := range f.Contexts {
		out = append(out, c.Name)
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// flagWords are the values of flags that have a fixed set of them.
var flagWords = map[string][]string{
	"output":          outputs,
	"ci-network":      {string(api.CloudInitDHCP), string(api.CloudInitStatic), string(api.CloudInitNone)},
	"ci-format":       {string(api.CloudInitNoCloud), string(api.CloudInitConfigDrive)},
	"display":         {string(api.DisplayVNC), string(api.DisplayNone)},
	"ha":              {string(api.HANone), string(api.HARestart)},
	"admission":       {string(api.AdmissionOff), string(api.AdmissionWarn), string(api.AdmissionRefuse)},
	"ha-priority":     {string(api.PriorityHighest), string(api.PriorityHigh), string(api.PriorityMedium), string(api.PriorityLow), string(api.PriorityLowest)},
	"failback":        {string(api.FailbackNone), string(api.FailbackReturn)},
	"after-condition": {string(api.AfterStarted), string(api.AfterHealthy)},
	"on-crash":        {string(api.EndRestart), string(api.EndStop)},
	"on-panic":        endWords, "on-watchdog": endWords, "on-agent-silence": endWords,
	"accelerator": {string(api.AccelAuto), string(api.AccelKVM), string(api.AccelTCG)},
	"type":        {string(api.PoolDir), string(api.PoolShared), string(api.PoolRBD)},
}

var endWords = []string{string(api.EndIgnore), string(api.EndRestart), string(api.EndStop), string(api.EndPause)}

// flagKinds are the flags that take the name of an object.
var flagKinds = map[string]api.Kind{"pool": api.KindPool, "image": api.KindImage, "volume": api.KindVolume, "node": api.KindNode, "network": api.KindNetwork, "after": api.KindVM}

// completeFlags gives every flag its completion: a set of words, live names,
// or nothing where a file name would be wrong.
func (a *app) completeFlags(cmd *cobra.Command) {
	roles := []string{string(api.RoleViewer), string(api.RoleOperator), string(api.RoleAdministrator)}
	if path := cmd.CommandPath(); path == "muster cluster token create" || path == "muster node set" {
		roles = []string{string(api.RoleVoter), string(api.RoleWitness), string(api.RoleReplica)}
	}
	register := func(name string, f completer) {
		if cmd.LocalFlags().Lookup(name) != nil {
			a.completeFlag(cmd, name, f)
		}
	}
	for name, words := range flagWords {
		if name == "type" && cmd.Parent() != nil && cmd.Parent().CommandPath() == "muster network" {
			words = []string{string(api.NetworkVLAN), string(api.NetworkVXLAN), string(api.NetworkIsolated)}
		}
		if name == "type" && cmd.Parent() != nil && cmd.Parent().CommandPath() == "muster receiver" {
			words = []string{string(api.ReceiverSMTP), string(api.ReceiverSNMP), string(api.ReceiverWebhook)}
		}
		register(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	}
	register("role", cobra.FixedCompletions(roles, cobra.ShellCompDirectiveNoFileComp))
	register("context", a.completeContexts)
	for name, kind := range flagKinds {
		register(name, func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			return a.names(cmd.Context(), kind, nil, word), cobra.ShellCompDirectiveNoFileComp
		})
	}
	for _, sub := range cmd.Commands() {
		a.completeFlags(sub)
	}
}
