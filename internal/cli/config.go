// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// Limits of these commands.
const (
	defaultConfigLog = 50
	maxConfigPage    = 1000 // as the server allows
)

// historyKinds are the kinds that have a history, in the order of the server's
// lists.
var historyKinds = []api.Kind{
	api.KindCluster, api.KindNode, api.KindPool, api.KindNetwork, api.KindIPPool, api.KindUplink,
	api.KindImage, api.KindVolume, api.KindVM, api.KindRule, api.KindReceiver, api.KindUser, api.KindPowerDevice,
}

func (a *app) configCmd() *cobra.Command {
	return group("config", "The history of the configuration: who changed what, what differs, and back again",
		a.configLogCmd(), a.configDiffCmd(), a.configRevertCmd(), a.configRetentionCmd())
}

const historyPage = "Docs: docs/history.md."

func (a *app) configLogCmd() *cobra.Command {
	var since, actor string
	var limit int
	cmd := &cobra.Command{
		Use: "log [KIND[/NAME]]", Short: "Show who changed what, when and from where, newest first", Args: between(0, 1, "KIND/NAME"),
		Long: `Shows the changes of the configuration, newest first: all, those of one kind, or
those of one object by its name or ID, also after it was deleted. The order is that
of the revisions; the time is the clock of the node that took the change.

` + historyPage,
		Example: `  muster config log
  muster config log vm/web1
  muster config log network --since 7d --actor user:ann
  muster config log --since 4711 -o json`,
		ValidArgsFunction: a.completeObjects(1),
		RunE: func(cmd *cobra.Command, words []string) error {
			if limit < 1 {
				return usagef("--limit: %d is too few; give 1 or more", limit)
			}
			return a.configLog(cmd.Context(), first(append(words, "")...), since, actor, limit)
		},
	}
	cmd.Flags().StringVar(&since, "since", "", "only changes after this revision, or not older than this: 2h, 7d")
	cmd.Flags().StringVar(&actor, "actor", "", "only changes of this actor, such as user:ann or the name of a token")
	cmd.Flags().IntVar(&limit, "limit", defaultConfigLog, "at most so many")
	return cmd
}

// historyQuery is what the calls have in common.
func (a *app) historyQuery(object string) url.Values {
	q := url.Values{}
	for k, v := range map[string]string{"object": object, "project": a.project} {
		if v != "" {
			q.Set(k, v)
		}
	}
	return q
}

func getInto(ctx context.Context, c *client.Client, path string, q url.Values, out any) (*client.Reply, error) {
	r, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: path, Query: q})
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(r.Body, out); err != nil {
		return nil, api.Errorf(api.CodeInternal, "decode the answer of %s: %w", path, err)
	}
	return r, nil
}

func (a *app) configLog(ctx context.Context, object, since, actor string, limit int) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	q := a.historyQuery(object)
	if since != "" {
		q.Set("since", since)
	}
	if actor != "" {
		q.Set("actor", actor)
	}
	all := api.ConfigLog{Items: []api.ConfigChange{}}
	for {
		q.Set("limit", strconv.Itoa(min(limit-len(all.Items), maxConfigPage)))
		var page api.ConfigLog
		r, err := getInto(ctx, c, "/config/log", q, &page)
		if err != nil {
			return err
		}
		if all.Kind == "" {
			a.warnStale(r)
			all.Kind, all.Horizon, all.Revision = page.Kind, page.Horizon, page.Revision
		}
		all.Items, all.Continue = append(all.Items, page.Items...), page.Continue
		if page.Continue == "" || len(all.Items) >= limit {
			break
		}
		q.Set("continue", page.Continue)
	}
	switch {
	case a.structured():
		return a.printValue(all)
	case a.flags.output == "name":
		for _, ch := range all.Items {
			fmt.Fprintln(a.Out, clean(string(ch.Kind)+"/"+first(ch.Name, ch.ID)))
		}
		return nil
	}
	t := &table{head: []string{"REVISION", "TIME", "ACTOR", "FROM", "NODE", "OPERATION", "OBJECT", "WHAT"}}
	for _, ch := range all.Items {
		t.add(strconv.FormatUint(ch.Revision, 10), ch.Time.UTC().Format("2006-01-02 15:04:05"), dash(ch.Actor), dash(ch.Source), dash(ch.Node),
			ch.Operation, objectName(ch.Kind, ch.Project, first(ch.Name, ch.ID)), whatChanged(&ch))
	}
	if all.Continue != "" {
		defer a.notice("there are more; raise --limit")
	} else if all.Horizon > 0 {
		defer a.notice("complete from revision %d on", all.Horizon)
	}
	return a.printTable(t, "no changes found")
}

// objectName is KIND/NAME, with the project if it is not the default one.
func objectName(kind api.Kind, project, name string) string {
	if project != "" && project != api.DefaultProject {
		return fmt.Sprintf("%s/%s (%s)", kind, name, project)
	}
	return string(kind) + "/" + name
}

func whatChanged(ch *api.ConfigChange) string {
	const most = 3
	fields := ch.Fields
	if len(fields) > most {
		fields = append(fields[:most:most], fmt.Sprintf("and %d more", len(ch.Fields)-most))
	}
	text := strings.Join(fields, ", ")
	if ch.Note != "" {
		text = strings.TrimPrefix(text+"; "+ch.Note, "; ")
	}
	return text
}

func (a *app) configDiffCmd() *cobra.Command {
	var at, to uint64
	cmd := &cobra.Command{
		Use: "diff [KIND[/NAME]] --at REV [--to REV]", Short: "Show what differs between two revisions", Args: between(0, 1, "KIND/NAME"),
		Long: `Shows what differs between the configuration at one revision and at another, or now:
for each object the fields with their values before (-) and after (+). Secrets are
named, never shown.

` + historyPage,
		Example: `  muster config diff --at 4711
  muster config diff vm/web1 --at 4711 --to 4800
  muster config diff --at 4711 -o json`,
		ValidArgsFunction: a.completeObjects(1),
		RunE: func(cmd *cobra.Command, words []string) error {
			if !cmd.Flags().Changed("at") {
				u := usagef("config diff: --at is missing")
				u.hint = "muster config log shows the revisions"
				return u
			}
			return a.configDiff(cmd.Context(), first(append(words, "")...), at, to)
		},
	}
	cmd.Flags().Uint64Var(&at, "at", 0, "revision to compare from")
	cmd.Flags().Uint64Var(&to, "to", 0, "revision to compare with (default the newest)")
	return cmd
}

func (a *app) configDiff(ctx context.Context, object string, at, to uint64) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	q := a.historyQuery(object)
	q.Set("at", strconv.FormatUint(at, 10))
	if to != 0 {
		q.Set("to", strconv.FormatUint(to, 10))
	}
	q.Set("limit", strconv.Itoa(maxConfigPage))
	var all api.ConfigDiff
	for {
		var page api.ConfigDiff
		r, err := getInto(ctx, c, "/config/diff", q, &page)
		if err != nil {
			return err
		}
		if all.Kind == "" {
			a.warnStale(r)
			all = page
		} else {
			all.Items = append(all.Items, page.Items...)
		}
		if page.Continue == "" {
			break
		}
		q.Set("continue", page.Continue)
		q.Set("to", strconv.FormatUint(page.To, 10))
	}
	all.Continue = ""
	switch {
	case a.structured():
		return a.printValue(all)
	case a.flags.output == "name":
		for _, o := range all.Items {
			fmt.Fprintln(a.Out, clean(string(o.Kind)+"/"+o.Name))
		}
		return nil
	case len(all.Items) == 0:
		a.notice("no differences between revisions %d and %d", all.At, all.To)
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "--- revision %d\n+++ revision %d\n", all.At, all.To)
	for _, o := range all.Items {
		fmt.Fprintf(&b, "\n%s %s\n", o.Operation, clean(objectName(o.Kind, o.Project, o.Name)))
		a.writeChanges(&b, o.Kind, o.Changes)
	}
	_, err = fmt.Fprint(a.Out, b.String())
	return err
}

func (a *app) configRetentionCmd() *cobra.Command {
	var age string
	var most api.Size
	cmd := &cobra.Command{
		Use: "retention", Short: "Show or choose how long the history is kept", Args: args(),
		Long: `Shows how long the history is kept and what it takes, or with flags changes it. The
newest record of each object always stays, whatever its age; so does what is needed
to know how the objects were at the horizon.

` + historyPage,
		Example: `  muster config retention
  muster config retention --max-age 30d --max-bytes 64M`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			patch := map[string]any{}
			if age != "" {
				d, err := api.ParseAge(age)
				if err != nil {
					return usagef("--max-age: %v", err)
				}
				patch["maxAgeSeconds"] = int64(d.Seconds())
			}
			set(patch, "maxBytes", most)
			return a.configRetention(cmd.Context(), patch)
		},
	}
	cmd.Flags().StringVar(&age, "max-age", "", "oldest change that is kept, such as 90d or 36h: 1h to 10 years")
	cmd.Flags().Var(sizeFlag{&most}, "max-bytes", "largest size of the history, such as 32M: 1M to 256M")
	return cmd
}

func (a *app) configRetention(ctx context.Context, patch map[string]any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var r api.ConfigRetention
	var reply *client.Reply
	if len(patch) > 0 {
		reply, err = c.Call(ctx, http.MethodPatch, "/config/retention", patch, &r)
	} else {
		reply, err = c.Call(ctx, http.MethodGet, "/config/retention", nil, &r)
	}
	if err != nil {
		return err
	}
	a.warnStale(reply)
	if a.structured() {
		return a.printJSON(reply.Body)
	}
	now := a.Now()
	out := &sections{paint: a.colour()}
	out.field("Kept for", days(r.Settings.MaxAgeSeconds))
	out.field("Kept up to", r.Settings.MaxBytes.String())
	out.field("Takes", fmt.Sprintf("%s in %d records", r.Bytes, r.Records))
	out.field("Oldest", moment(r.Oldest, now))
	complete := "from the beginning"
	switch r.HorizonReason {
	case "":
		complete = "not begun: the leader does it within a minute"
	case "begun":
		if r.Horizon > 0 {
			complete = fmt.Sprintf("from revision %d on, where the history began, %s", r.Horizon, moment(r.HorizonSince, now))
		}
	default:
		complete = fmt.Sprintf("from revision %d on; older changes were removed for their %s, last %s", r.Horizon, r.HorizonReason, moment(r.HorizonSince, now))
	}
	out.field("Complete", complete)
	_, err = fmt.Fprint(a.Out, out.String())
	return err
}

// days returns an age in days, or in hours if it is less than two.
func days(seconds int64) string {
	const hour, day = 3600, 24 * 3600
	if seconds >= 2*day && seconds%day == 0 {
		return fmt.Sprintf("%d days", seconds/day)
	}
	if seconds%hour == 0 {
		return fmt.Sprintf("%d h", seconds/hour)
	}
	return fmt.Sprintf("%d s", seconds)
}

// completeObjects completes up to most words KIND/NAME.
func (a *app) completeObjects(most int) completer {
	return func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(given) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		kind, name, named := strings.Cut(word, "/")
		var out []string
		if !named {
			for _, k := range historyKinds {
				out = append(out, string(k), string(k)+"/")
			}
			return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		for _, n := range a.names(cmd.Context(), api.Kind(kind), nil, name) {
			out = append(out, kind+"/"+n)
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}
