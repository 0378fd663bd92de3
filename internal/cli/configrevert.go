// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// maxAnswer is how much of the answer to a question is read.
const maxAnswer = 256

// revertFlags say how.
type revertFlags struct {
	dryRun, yes, skip, parts bool
}

func (a *app) configRevertCmd() *cobra.Command {
	var to uint64
	var f revertFlags
	cmd := &cobra.Command{
		Use: "revert [KIND[/NAME]...] --to REV", Short: "Bring objects back to what they were at a revision", Args: cobra.ArbitraryArgs,
		Long: `Brings objects back to what they were at a revision: those that are named, all of a
kind, or all that differ. It shows what will be done and asks before it does it, as
a new change that is checked like any other; the history keeps what is reverted.

No VM is started, stopped or moved, and no data is removed: what a VM does now, the
addresses of nodes and the like stay, and VMs, volumes and images that were not there
yet stay, too. What cannot be reverted is listed with the reason; then nothing is
changed, unless with --skip-refused the others are.

` + historyPage,
		Example: `  muster config revert vm/web1 --to 4711 --dry-run
  muster config revert network ippool --to 4711
  muster config revert --to 4711 --skip-refused --yes`,
		ValidArgsFunction: a.completeObjects(0),
		RunE: func(cmd *cobra.Command, words []string) error {
			if !cmd.Flags().Changed("to") {
				u := usagef("config revert: --to is missing")
				u.hint = "muster config log shows the revisions"
				return u
			}
			if f.dryRun && f.yes {
				return usagef("--dry-run and --yes contradict each other; give one")
			}
			return a.configRevert(cmd.Context(), api.RevertRequest{To: to, Objects: words, SkipRefused: f.skip, Partial: f.parts}, f)
		},
	}
	cmd.Flags().Uint64Var(&to, "to", 0, "the revision")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would be done")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&f.skip, "skip-refused", false, "revert the others although some cannot be")
	cmd.Flags().BoolVar(&f.parts, "in-parts", false, "use several transactions if one does not do")
	return cmd
}

func (a *app) configRevert(ctx context.Context, in api.RevertRequest, f revertFlags) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	in.Project = a.project
	plan, err := a.callRevert(ctx, c, in, true)
	if err != nil {
		return err
	}
	if f.dryRun && a.structured() {
		return a.printValue(plan)
	}
	if !a.structured() {
		if err := a.printRevert(plan); err != nil {
			return err
		}
	}
	if f.dryRun {
		return nil
	}
	if err := a.agree(plan, f); err != nil {
		return err
	}
	in.Plan = plan.Plan
	return a.carryOut(ctx, c, in, plan)
}

func (a *app) callRevert(ctx context.Context, c *client.Client, in api.RevertRequest, dry bool) (*api.RevertResult, error) {
	in.DryRun = dry
	var r api.RevertResult
	_, err := c.Call(ctx, http.MethodPost, "/config/revert", in, &r)
	return &r, err
}

// toDo counts the objects that a plan changes.
func toDo(r *api.RevertResult) (n int) {
	for _, item := range r.Items {
		if item.Refused == "" && len(item.Changes) > 0 {
			n++
		}
	}
	return n
}

// agree refuses what must not be done and asks about the rest.
func (a *app) agree(plan *api.RevertResult, f revertFlags) error {
	n := toDo(plan)
	switch {
	case plan.Refused > 0 && !f.skip:
		return &hintedError{api.Errorf(api.CodeRefused, "%d of %d objects cannot be reverted; nothing was changed", plan.Refused, len(plan.Items)),
			"revert the others with --skip-refused, or name the objects"}
	case plan.Parts > 1 && !f.parts:
		return &hintedError{api.Errorf(api.CodeRefused, "it takes %d transactions; nothing was changed", plan.Parts),
			"allow them with --in-parts, or name the objects; between two of them others see half of it"}
	case n == 0 || f.yes:
		return nil
	case !a.InTTY:
		return &hintedError{api.Errorf(api.CodeRefused, "a revert needs a person's word"), "run it at a terminal, or say --yes"}
	}
	fmt.Fprintf(a.Err, "\nRevert %s to revision %d? Type yes to go on: ", plural(n, "object"), plan.To)
	line, err := bufio.NewReader(io.LimitReader(a.In, maxAnswer)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != "yes" {
		return api.Errorf(api.CodeRefused, "not confirmed; nothing was changed")
	}
	return nil
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

// carryOut does what was agreed to: the plan itself, then its later parts, which
// are planned anew because the first has changed the ground for them.
func (a *app) carryOut(ctx context.Context, c *client.Client, in api.RevertRequest, plan *api.RevertResult) error {
	n := toDo(plan)
	if n == 0 {
		if a.structured() {
			return a.printValue(plan)
		}
		a.say("nothing to revert")
		return nil
	}
	var last *api.RevertResult
	for part := 1; ; part++ {
		r, err := a.callRevert(ctx, c, in, false)
		if err != nil && part > 1 {
			return fmt.Errorf("part %d of %d, after %d were done: %w", part, plan.Parts, part-1, err)
		}
		if err != nil {
			return err
		}
		last, in.Plan = r, ""
		if r.Parts <= 1 || !r.Done {
			break
		}
		a.notice("part %d of %d done at revision %d", part, plan.Parts, r.Revision)
	}
	plan.Done, plan.Revision = true, last.Revision
	for i := range plan.Items {
		for _, item := range last.Items {
			if item.ID == plan.Items[i].ID {
				plan.Items[i].Task = first(item.Task, plan.Items[i].Task)
			}
		}
	}
	if a.structured() {
		return a.printValue(plan)
	}
	a.say("%s reverted to revision %d at revision %d", plural(n, "object"), plan.To, plan.Revision)
	for _, item := range plan.Items {
		if item.Task != "" {
			a.notice("%s/%s is being made: muster task show %s", item.Kind, item.Name, item.Task)
		}
	}
	return nil
}

// printRevert shows a plan.
func (a *app) printRevert(plan *api.RevertResult) error {
	if a.flags.output == "name" {
		for _, item := range plan.Items {
			fmt.Fprintln(a.Out, clean(string(item.Kind)+"/"+item.Name))
		}
		return nil
	}
	var b strings.Builder
	for _, item := range plan.Items {
		word := item.Operation
		if item.Refused != "" {
			word = "refused: " + word
		}
		if item.Part > 1 {
			word += fmt.Sprintf(" in part %d", item.Part)
		}
		fmt.Fprintf(&b, "%s %s\n", word, clean(objectName(item.Kind, item.Project, item.Name)))
		if item.Refused != "" {
			fmt.Fprintf(&b, "! %s\n", clean(item.Refused))
		}
		a.writeChanges(&b, item.Kind, item.Changes)
		if len(item.Kept) > 0 {
			fmt.Fprintf(&b, "= stays as it is: %s\n", clean(strings.Join(item.Kept, ", ")))
		}
		b.WriteByte('\n')
	}
	if len(plan.Items) == 0 {
		a.notice("nothing differs from revision %d", plan.To)
	}
	_, err := fmt.Fprint(a.Out, strings.TrimSuffix(b.String(), "\n"))
	return err
}

// writeChanges writes the fields of an object that differ.
func (a *app) writeChanges(b *strings.Builder, kind api.Kind, changes []api.FieldChange) {
	line := func(sign, colour, path, value string) {
		text := fmt.Sprintf("%s %s: %s", sign, clean(path), clean(value))
		if a.colour() {
			text = colour + text + plain
		}
		b.WriteString(text + "\n")
	}
	for _, c := range changes {
		if c.Secret {
			line("~", yellow, c.Path, "(secret)")
			continue
		}
		if c.Before != nil {
			line("-", red, c.Path, valueText(kind, c.Path, c.Before))
		}
		if c.After != nil {
			line("+", green, c.Path, valueText(kind, c.Path, c.After))
		}
	}
}

// valueText is a value for people: words without quotes, sizes with their unit.
func valueText(kind api.Kind, path string, value json.RawMessage) string {
	var s string
	if json.Unmarshal(value, &s) == nil && s != "" {
		return s
	}
	if isSize(kind, path) {
		if n, err := strconv.ParseInt(string(value), 10, 64); err == nil && n > 0 {
			return api.Size(n).String()
		}
	}
	return string(value)
}

// isSize reports whether a path leads to a number of bytes, by the type of the
// kind's spec.
func isSize(kind api.Kind, path string) bool {
	t := map[api.Kind]reflect.Type{
		api.KindCluster: reflect.TypeFor[api.ClusterSpec](), api.KindNode: reflect.TypeFor[api.NodeSpec](), api.KindVM: reflect.TypeFor[api.VMSpec](),
		api.KindVolume: reflect.TypeFor[api.VolumeSpec](),
	}[kind]
	words := strings.Split(path, ".")
	if t == nil || words[0] != "spec" {
		return false
	}
	for _, word := range words[1:] {
		name, _, _ := strings.Cut(word, "[")
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return false
		}
		found := false
		for i := range t.NumField() {
			tag, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			if found = tag == name; found {
				t = t.Field(i).Type
				break
			}
		}
		if !found {
			return false
		}
	}
	return t == reflect.TypeFor[api.Size]()
}
