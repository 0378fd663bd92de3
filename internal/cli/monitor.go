// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// Limits of these commands.
const (
	defaultEvents = 50
	maxEvents     = 1000 // as the server allows
	maxSecretFile = 4096
)

func (a *app) eventCmd() *cobra.Command {
	var last int
	var fields string
	var follow bool
	ls := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the newest events, oldest first", Args: args(),
		Long: `Lists the newest events of the cluster: what nodes, VMs and alerts did, and who
changed what. With --follow it goes on with each new one until it is interrupted.`,
		Example: "  muster event ls\n  muster event ls --follow\n  muster event ls --last 1000 --fields spec.actor=ci -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if last < 1 || last > maxEvents {
				return usagef("--last: %d is out of range; give 1 to %d", last, maxEvents)
			}
			if follow && fields != "" {
				return usagef("--follow and --fields cannot be combined")
			}
			return a.listEvents(cmd.Context(), last, fields, follow)
		},
	}
	ls.Flags().IntVar(&last, "last", defaultEvents, "so many of the newest")
	ls.Flags().StringVar(&fields, "fields", "", "only those with these fields, such as spec.type=node.lost")
	ls.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new events")
	show := a.showCmd(api.KindEvent)
	show.Use, show.Args, show.Example = "show ID", args("ID"), "  muster event show ID"
	return group("event", "What happened, and who did what", ls, show)
}

func (a *app) listEvents(ctx context.Context, last int, fields string, follow bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	q := url.Values{"last": {strconv.Itoa(last)}}
	if fields != "" {
		q.Set("fields", fields)
	}
	r, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: "/" + api.KindEvent.Plural(), Query: q})
	if err != nil {
		return err
	}
	l := &client.List{Reply: r}
	if err := json.Unmarshal(r.Body, l); err != nil {
		return api.Errorf(api.CodeInternal, "decode the list of events: %w", err)
	}
	if !follow {
		return a.printList(mustView(api.KindEvent), l)
	}
	var tail eventTail
	for _, raw := range l.Items {
		tail.fresh(client.Event{Type: client.EventPut, Object: raw})
		if err := a.printEventLine(raw); err != nil {
			return err
		}
	}
	err = c.Watch(ctx, client.WatchOptions{Kinds: []api.Kind{api.KindEvent}, Since: l.Revision, MaxOutage: maxOutage}, func(e client.Event) error {
		if !tail.fresh(e) {
			return nil
		}
		return a.printEventLine(e.Object)
	})
	if ctx.Err() != nil {
		return nil // it has no other end than being told to stop
	}
	return err
}

// eventTail tells new events from those that a watch repeats when it had to
// begin anew: it then delivers all that are kept. IDs sort by time.
type eventTail struct{ newest, floor string }

// fresh reports whether a message of the watch is an event to be printed.
func (t *eventTail) fresh(e client.Event) bool {
	switch e.Type {
	case client.EventRelist:
		t.floor = t.newest
	case client.EventPut:
		id := client.MetaOf(e.Object).ID
		t.newest = max(t.newest, id)
		return id > t.floor
	}
	return false
}

// printEventLine prints one event while following: a table cannot be aligned
// on what is yet to come.
func (a *app) printEventLine(raw json.RawMessage) error {
	if a.structured() {
		return a.printJSON(raw)
	}
	e, err := client.As[api.EventSpec, struct{}](raw)
	if err != nil {
		return err
	}
	if a.flags.output == "name" {
		_, err = fmt.Fprintf(a.Out, "event/%s\n", clean(e.Meta.ID))
		return err
	}
	_, err = fmt.Fprintln(a.Out, clean(fmt.Sprintf("%s  %-8s  %-18s  %s", e.Meta.CreatedAt.UTC().Format(time.RFC3339), e.Spec.Severity, e.Spec.Type, e.Spec.Message)))
	return err
}

func (a *app) alertCmd() *cobra.Command {
	show := a.showCmd(api.KindAlert)
	show.Use, show.Args, show.Example = "show ID", args("ID"), "  muster alert show ID"
	ls := a.lsCmd(api.KindAlert)
	ls.Example = "  muster alert ls\n  muster alert ls --fields status.phase=firing"
	ack := &cobra.Command{
		Use: "ack ID...", Aliases: []string{"acknowledge"}, Short: "Say that you care about alerts", Args: atLeastOne("ID"),
		Long:              "Acknowledges alerts: others see who cares. It ends when the alert is resolved and\nbegins anew.",
		Example:           "  muster alert ack ID",
		ValidArgsFunction: a.completeNames(api.KindAlert),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.each(ids, func(c *client.Client, id string) error {
				r, err := c.Action(cmd.Context(), api.KindAlert, "", id, "acknowledge", nil)
				if err != nil {
					return err
				}
				return a.finished(mustView(api.KindAlert), id, "acknowledged", r.Object, "", 0)
			})
		},
	}
	return group("alert", "What is wrong now, and what was", ls, show, ack)
}

// ruleFlags say what a rule shall be.
type ruleFlags struct {
	check, severity, metric string
	threshold               float64
	below, disabled         bool
	wait                    time.Duration
}

func (f *ruleFlags) bind(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.severity, "severity", "", "info, warning or critical")
	cmd.Flags().Float64Var(&f.threshold, "threshold", 0, "percent for pool-full, seconds for clock-skew, days for certificate, the metric's own unit for metric")
	cmd.Flags().StringVar(&f.metric, "metric", "", "name of the series, for the check metric")
	cmd.Flags().BoolVar(&f.below, "below", false, "values below the threshold are bad, for the check metric")
	cmd.Flags().DurationVar(&f.wait, "for", 0, "how long it must be so before the alert fires")
	cmd.Flags().BoolVar(&f.disabled, "disabled", false, "do not evaluate the rule")
}

// spec returns the fields whose flags were given.
func (f *ruleFlags) spec(cmd *cobra.Command) map[string]any {
	out := map[string]any{}
	givenInto(cmd, out, map[string]flagField{
		"severity": {"severity", f.severity}, "threshold": {"threshold", f.threshold}, "metric": {"metric", f.metric},
		"below": {"below", f.below}, "for": {"forSeconds", int(f.wait / time.Second)}, "disabled": {"disabled", f.disabled},
	})
	return out
}

func (a *app) ruleCmd() *cobra.Command {
	var made, changed ruleFlags
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a rule", Args: args("NAME"),
		Long: `Creates a rule, which says when an alert fires. The checks are node-lost,
quorum-margin, quorum-lost, vm-failed, vm-recovered, pool-full, clock-skew,
certificate, drill, backup and metric; of all but metric each cluster has a rule from the beginning.`,
		Example: `  muster rule create busy --check metric --metric muster_node_cpu_percent --threshold 95 --for 10m
  muster rule create nearly-full --check pool-full --threshold 75 --severity info`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			spec := made.spec(cmd)
			if made.check == "" {
				return usagef("rule create: --check is missing")
			}
			spec["check"] = made.check
			return a.create(cmd.Context(), api.KindRule, names[0], nil, spec)
		},
	}
	create.Flags().StringVar(&made.check, "check", "", "what it looks at")
	made.bind(create)
	change := &cobra.Command{
		Use: "set NAME", Short: "Change a rule", Args: args("NAME"),
		Example:           "  muster rule set pool-full --threshold 80\n  muster rule set clock-skew --disabled",
		ValidArgsFunction: a.completeNames(api.KindRule),
		RunE: func(cmd *cobra.Command, names []string) error {
			spec := changed.spec(cmd)
			if len(spec) == 0 {
				return usagef("rule set: nothing to change; give a flag")
			}
			return a.patch(cmd.Context(), api.KindRule, names[0], patchOf(spec, nil))
		},
	}
	changed.bind(change)
	return group("rule", "When alerts fire", a.lsCmd(api.KindRule), a.showCmd(api.KindRule), create, change,
		a.rmCmd(api.KindRule, "Removes rules; their alerts are resolved. Built-in rules do not come back."))
}

// receiverFlags say what a receiver shall be.
type receiverFlags struct {
	typ, address, from, tls, user, version, severity string
	secret, secretFile                               string
	to                                               []string
	disabled                                         bool
}

func (f *receiverFlags) bind(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.address, "address", "", "HOST:PORT for smtp and snmp, a URL for webhook")
	cmd.Flags().StringVar(&f.severity, "min-severity", "", "info, warning or critical (default warning)")
	cmd.Flags().StringVar(&f.from, "from", "", "sender of mails")
	cmd.Flags().StringSliceVar(&f.to, "to", nil, "recipients of mails, separated by commas")
	cmd.Flags().StringVar(&f.tls, "tls", "", "starttls, tls or none, for smtp (default starttls)")
	cmd.Flags().StringVar(&f.version, "snmp-version", "", "2c or 3 (default 2c)")
	cmd.Flags().StringVar(&f.user, "user", "", "user of smtp or of SNMP v3")
	cmd.Flags().StringVar(&f.secret, "secret", "", "password, SNMP community or pass phrase, or key of the webhook; others on this host may see it, --secret-file hides it")
	cmd.Flags().StringVar(&f.secretFile, "secret-file", "", "file that holds the secret, - for stdin")
	cmd.Flags().BoolVar(&f.disabled, "disabled", false, "send nothing")
}

// spec returns the fields whose flags were given.
func (a *app) receiverSpec(cmd *cobra.Command, f *receiverFlags) (map[string]any, error) {
	out := map[string]any{}
	givenInto(cmd, out, map[string]flagField{
		"address": {"address", f.address}, "min-severity": {"minSeverity", f.severity}, "from": {"from", f.from}, "to": {"to", f.to},
		"tls": {"tls", f.tls}, "snmp-version": {"version", f.version}, "user": {"user", f.user}, "secret": {"secret", f.secret},
		"disabled": {"disabled", f.disabled},
	})
	return out, a.secretInto(out, "secret", f.secret, f.secretFile)
}

// flagField is the field that a flag sets, and to what.
type flagField struct {
	field string
	value any
}

// givenInto sets the fields whose flags were given.
func givenInto(cmd *cobra.Command, spec map[string]any, flags map[string]flagField) {
	for flag, v := range flags {
		if cmd.Flags().Changed(flag) {
			spec[v.field] = v.value
		}
	}
}

// secretInto sets a field to what its file says, if one is given: the flags are
// --FIELD and --FIELD-file.
func (a *app) secretInto(spec map[string]any, field, text, file string) error {
	if file == "" {
		return nil
	}
	if text != "" {
		return usagef("--%s and --%s-file contradict each other; give one", field, field)
	}
	b, err := a.readFile(file, maxSecretFile)
	if err != nil {
		return err
	}
	spec[field] = strings.TrimRight(string(b), "\r\n")
	return nil
}

func (a *app) receiverCmd() *cobra.Command {
	var made, changed receiverFlags
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a receiver of alerts", Args: args("NAME"),
		Long: `Creates a receiver: where alerts are sent to, as mail (smtp), as SNMP
notifications (snmp) or to a URL (webhook). Secrets are stored encrypted and are
never shown.`,
		Example: `  muster receiver create ops --type smtp --address mail.example.org:587 --from muster@example.org --to ops@example.org --user muster --secret-file pw
  muster receiver create nms --type snmp --address 10.0.0.9:162 --secret public
  muster receiver create chat --type webhook --address https://chat.example.org/hook --secret-file key`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if made.typ == "" || made.address == "" {
				return usagef("receiver create: --type and --address are needed")
			}
			spec, err := a.receiverSpec(cmd, &made)
			if err != nil {
				return err
			}
			spec["type"] = made.typ
			return a.create(cmd.Context(), api.KindReceiver, names[0], nil, spec)
		},
	}
	create.Flags().StringVar(&made.typ, "type", "", "smtp, snmp or webhook")
	made.bind(create)
	change := &cobra.Command{
		Use: "set NAME", Short: "Change a receiver", Args: args("NAME"),
		Example:           "  muster receiver set ops --min-severity critical\n  muster receiver set ops --secret-file pw",
		ValidArgsFunction: a.completeNames(api.KindReceiver),
		RunE: func(cmd *cobra.Command, names []string) error {
			spec, err := a.receiverSpec(cmd, &changed)
			if err != nil {
				return err
			}
			if len(spec) == 0 {
				return usagef("receiver set: nothing to change; give a flag")
			}
			return a.patch(cmd.Context(), api.KindReceiver, names[0], patchOf(spec, nil))
		},
	}
	changed.bind(change)
	test := &cobra.Command{
		Use: "test NAME...", Short: "Send a test message", Args: atLeastOne("NAME"),
		Example:           "  muster receiver test ops",
		ValidArgsFunction: a.completeNames(api.KindReceiver),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(names, func(c *client.Client, name string) error {
				if _, err := c.Action(cmd.Context(), api.KindReceiver, "", name, "test", nil); err != nil {
					return err
				}
				a.say("receiver %s: a test message was sent", name)
				return nil
			})
		},
	}
	return group("receiver", "Where alerts are sent to", a.lsCmd(api.KindReceiver), a.showCmd(api.KindReceiver), create, change,
		a.rmCmd(api.KindReceiver, "Removes receivers; what they were not yet told is not sent."), test)
}

func eventRow(o *api.Event, now time.Time) []string {
	return []string{age(o.Meta.CreatedAt, now), string(o.Spec.Severity), o.Spec.Type, dash(o.Spec.Node), dash(o.Spec.Actor), o.Spec.Message}
}

func eventShow(s *sections, o *api.Event, _ time.Time) {
	s.field("Type", o.Spec.Type)
	s.field("Severity", string(o.Spec.Severity))
	s.field("About", strings.TrimSpace(string(o.Spec.TargetKind)+" "+first(o.Spec.Target, o.Spec.TargetID)))
	s.field("Node", o.Spec.Node)
	s.field("Actor", o.Spec.Actor)
	s.field("From", o.Spec.Source)
	s.field("Message", o.Spec.Message)
	s.field("Details", labelText(o.Spec.Details))
}

// alertSince is when an alert entered its phase.
func alertSince(o *api.Alert) *time.Time {
	switch o.Status.Phase {
	case api.AlertFiring:
		return o.Status.FiringAt
	case api.AlertResolved:
		return o.Status.ResolvedAt
	}
	return o.Status.PendingAt
}

func alertRow(o *api.Alert, now time.Time) []string {
	since := "-"
	if t := alertSince(o); t != nil {
		since = age(*t, now)
	}
	return []string{o.Meta.ID, dash(string(o.Status.Phase)), string(o.Spec.Severity), o.Spec.Rule, dash(o.Spec.Target), since, dash(o.Spec.AcknowledgedBy), o.Status.Message}
}

func alertShow(s *sections, o *api.Alert, now time.Time) {
	s.title("State")
	s.field("Status", string(o.Status.Phase))
	s.field("Message", o.Status.Message)
	s.field("Rule", o.Spec.Rule)
	s.field("Severity", string(o.Spec.Severity))
	s.field("Target", strings.TrimSpace(string(o.Spec.TargetKind)+" "+o.Spec.Target))
	for _, t := range []struct {
		name string
		at   *time.Time
	}{{"Pending since", o.Status.PendingAt}, {"Fired", o.Status.FiringAt}, {"Resolved", o.Status.ResolvedAt}} {
		if t.at != nil {
			s.field(t.name, moment(*t.at, now))
		}
	}
	s.field("Acknowledged by", o.Spec.AcknowledgedBy)
	s.field("Sent", strings.Join(sentTo(o.Status.Sent), ", "))
}

func ruleRow(o *api.Rule, now time.Time) []string {
	state, threshold := "active", "-"
	if o.Spec.Disabled {
		state = "disabled"
	}
	if o.Spec.Threshold != 0 || o.Spec.Check == api.CheckMetric {
		threshold = strconv.FormatFloat(o.Spec.Threshold, 'g', -1, 64)
		if o.Spec.Below {
			threshold = "below " + threshold
		}
	}
	return []string{o.Meta.Name, state, string(o.Spec.Check), string(o.Spec.Severity), threshold, (time.Duration(o.Spec.ForSeconds) * time.Second).String(),
		dash(o.Spec.Metric), age(o.Meta.CreatedAt, now)}
}

func ruleShow(s *sections, o *api.Rule, now time.Time) {
	row := ruleRow(o, now)
	s.field("Status", row[1])
	s.field("Check", row[2])
	s.field("Severity", row[3])
	s.field("Threshold", row[4])
	s.field("Fires after", row[5])
	s.field("Metric", o.Spec.Metric)
}

func receiverRow(o *api.Receiver, now time.Time) []string {
	state := dash(o.Status.Phase)
	if o.Spec.Disabled {
		state = "disabled"
	}
	sent := "-"
	if o.Status.LastSent != nil {
		sent = age(*o.Status.LastSent, now)
	}
	return []string{o.Meta.Name, state, string(o.Spec.Type), o.Spec.Address, string(o.Spec.MinSeverity), strconv.Itoa(o.Status.Queued), sent, o.Status.LastError}
}

func receiverShow(s *sections, o *api.Receiver, now time.Time) {
	row := receiverRow(o, now)
	s.field("Status", row[1])
	s.field("Message", o.Status.Message)
	s.field("Last error", o.Status.LastError)
	s.field("Queued", number(uint64(max(0, o.Status.Queued))))
	s.field("Last sent", row[6])
	s.field("Type", row[2])
	s.field("Address", row[3])
	s.field("Least severity", row[4])
	s.field("From", o.Spec.From)
	s.field("To", strings.Join(o.Spec.To, ", "))
	s.field("TLS", o.Spec.TLS)
	s.field("SNMP version", o.Spec.Version)
	s.field("User", o.Spec.User)
}

// sentTo shows who was told of an alert, as name and phase.
func sentTo(marks []string) []string {
	var out []string
	for _, m := range marks {
		name, rest, _ := strings.Cut(m, "/")
		phase, _, _ := strings.Cut(rest, "/")
		out = append(out, name+"/"+phase)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
