// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// lsCmd lists objects of a kind.
func (a *app) lsCmd(kind api.Kind) *cobra.Command {
	var o client.ListOptions
	k := mustView(kind)
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List " + kind.Plural(), Args: args(),
		Example: "  muster " + string(kind) + " ls\n  muster " + string(kind) + " ls --labels env=prod -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.list(cmd.Context(), k, o) },
	}
	listFlags(cmd, &o)
	return cmd
}

func listFlags(cmd *cobra.Command, o *client.ListOptions) {
	cmd.Flags().StringVarP(&o.Labels, "labels", "l", "", "only those with these labels: k=v,k2=v2")
	cmd.Flags().StringVar(&o.Fields, "fields", "", "only those with these fields, such as status.phase=running")
	cmd.Flags().IntVar(&o.Limit, "limit", 0, "at most so many (default all)")
	cmd.Flags().BoolVar(&o.Stale, "stale", false, "accept the asked node's own copy, without a word from the leader")
}

func (a *app) list(ctx context.Context, k *kindView, o client.ListOptions) error {
	if o.Limit < 0 {
		return usagef("--limit: %d is negative", o.Limit)
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	o.Project = a.project
	l, err := c.List(ctx, k.kind, o)
	if err != nil {
		return err
	}
	if k.kind == api.KindNode && a.flags.wide {
		k = a.withHints(ctx, c, k)
	}
	return a.printList(k, l)
}

// showCmd shows one object.
func (a *app) showCmd(kind api.Kind) *cobra.Command {
	k := mustView(kind)
	return &cobra.Command{
		Use: "show NAME", Short: "Show one " + string(kind) + " with its state and conditions", Args: args("NAME"),
		Example:           "  muster " + string(kind) + " show NAME\n  muster " + string(kind) + " show NAME -o yaml",
		ValidArgsFunction: a.completeNames(kind),
		RunE:              func(cmd *cobra.Command, names []string) error { return a.show(cmd.Context(), k, names[0]) },
	}
}

func (a *app) show(ctx context.Context, k *kindView, name string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	raw, reply, err := c.Get(ctx, k.kind, a.project, name)
	if err != nil {
		return err
	}
	a.warnStale(reply)
	if k.kind == api.KindVM && a.flags.output == "table" {
		raw = withDisks(ctx, c, raw)
	}
	if k.kind == api.KindNode && a.flags.output == "table" {
		k = a.withHints(ctx, c, k)
	}
	return a.printObject(k, raw)
}

// rmCmd removes objects.
func (a *app) rmCmd(kind api.Kind, long string) *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME...", Aliases: []string{"remove", "delete"}, Short: "Remove " + kind.Plural(), Long: long, Args: atLeastOne("NAME"),
		Example:           "  muster " + string(kind) + " rm NAME",
		ValidArgsFunction: a.completeNames(kind),
		RunE: func(cmd *cobra.Command, names []string) error {
			f := cmd.Flags().Lookup("force") // only some kinds have it
			force := f != nil && f.Value.String() == "true"
			return a.each(names, func(c *client.Client, name string) error {
				r, err := c.Delete(cmd.Context(), kind, a.project, name, force)
				if err != nil {
					return err
				}
				return a.finish(cmd.Context(), c, mustView(kind), name, "removed", r)
			})
		},
	}
}

// each does the same to every name. One failure does not keep the others from
// their turn; the first decides the exit code.
func (a *app) each(names []string, do func(c *client.Client, name string) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var failed []error
	for _, n := range names {
		err := do(c, n)
		if err == nil {
			continue
		}
		failed = append(failed, err)
		if errors.Is(err, context.Canceled) || exitCode(err) == ExitUnavailable {
			break // the others would end the same way
		}
	}
	if len(failed) == 0 {
		return nil
	}
	for _, err := range failed[1:] {
		a.report(err)
	}
	return failed[0]
}

// create posts a new object and sees it through.
func (a *app) create(ctx context.Context, kind api.Kind, name string, labels map[string]any, spec map[string]any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	meta, err := a.metaFor(kind, name, labels)
	if err != nil {
		return err
	}
	r, err := c.Create(ctx, kind, a.project, map[string]any{"meta": meta, "spec": spec})
	if err != nil {
		return err
	}
	a.settled(ctx, c, kind, name)
	return a.finish(ctx, c, mustView(kind), name, "created", r)
}

// patch changes fields of an object and says whether anything changed.
func (a *app) patch(ctx context.Context, kind api.Kind, name string, patch map[string]any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	before, _, err := c.Get(ctx, kind, a.project, name)
	if err != nil {
		return err
	}
	r, err := c.Patch(ctx, kind, a.project, name, 0, patch)
	if err != nil {
		return err
	}
	done := "changed"
	if client.MetaOf(before).Revision == client.MetaOf(r.Object).Revision {
		done = "unchanged"
	}
	return a.finishChange(ctx, c, kind, name, done, r)
}

// set puts a value into a map when it is not the zero value.
func set[T comparable](m map[string]any, key string, v T) {
	var zero T
	if v != zero {
		m[key] = v
	}
}
