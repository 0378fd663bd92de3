// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) tokenCmd() *cobra.Command {
	var role string
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create NAME", Short: "Make a token for the API", Args: args("NAME"),
		Long: `Makes a token for the API and prints it once. A viewer reads, an operator also
changes VMs, images and volumes, an administrator does everything.`,
		Example: `  muster token create ci --role operator --ttl 720h
  muster token create dashboard`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if ttl < 0 {
				return usagef("--ttl: %s is negative", ttl)
			}
			return a.createToken(cmd.Context(), names[0], role, ttl)
		},
	}
	create.Flags().StringVar(&role, "role", string(api.RoleViewer), "viewer, operator or administrator")
	create.Flags().DurationVar(&ttl, "ttl", 0, "time until it expires (default never)")
	return group("token", "Tokens for the API", create, a.lsCmd(api.KindToken), a.showCmd(api.KindToken),
		a.rmCmd(api.KindToken, "Removes tokens; who holds them is locked out at once."))
}

func (a *app) createToken(ctx context.Context, name, role string, ttl time.Duration) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	meta, err := a.metaFor(api.KindToken, name, nil)
	if err != nil {
		return err
	}
	spec := map[string]any{"use": api.TokenAPI, "role": role}
	if ttl > 0 {
		spec["expiresAt"] = a.Now().Add(ttl).UTC().Truncate(time.Second)
	}
	r, err := c.Create(ctx, api.KindToken, "", map[string]any{"meta": meta, "spec": spec})
	if err != nil {
		return err
	}
	if a.structured() {
		return a.printJSON(r.Body)
	}
	var made struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(r.Body, &made); err != nil || made.Token == "" {
		return api.Errorf(api.CodeInternal, "create token %s: the answer has no token; remove it and make another", name)
	}
	fmt.Fprintln(a.Out, clean(made.Token))
	a.notice("the token is shown only once; keep it")
	return nil
}
