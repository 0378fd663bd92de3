// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

const (
	// maxKeyFile is the largest file of keys that is read.
	maxKeyFile = 1 << 20
	// keyAttempts is how often a change of keys is tried when others change
	// the same user.
	keyAttempts = 3
)

// userFlags say what a user shall be.
type userFlags struct {
	role, fullName string
	keys, files    []string
	removed        []string
	disabled       bool
}

func (f *userFlags) bind(cmd *cobra.Command, role string) {
	cmd.Flags().StringVar(&f.role, "role", role, "viewer, operator or administrator")
	cmd.Flags().StringArrayVar(&f.keys, "ssh-key", nil, "public key as in a .pub file: \"TYPE KEY COMMENT\" (repeatable)")
	cmd.Flags().StringArrayVar(&f.files, "ssh-key-file", nil, "file with public keys, one in a line, - for stdin (repeatable)")
	cmd.Flags().StringVar(&f.fullName, "full-name", "", "name of the person")
	cmd.Flags().BoolVar(&f.disabled, "disabled", false, "may not log in")
}

func (a *app) userCmd() *cobra.Command {
	return group("user", "Users of the console shell (ssh USER@NODE)", a.userCreate(), a.userSet(),
		a.lsCmd(api.KindUser), a.showCmd(api.KindUser),
		a.rmCmd(api.KindUser, "Removes users; who is logged in is out within 20 s."))
}

func (a *app) userCreate() *cobra.Command {
	var f userFlags
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Let a person log in to the console shell with a key", Args: args("NAME"),
		Long: `Makes a user who logs in with "ssh NAME@NODE" on the port of any node, with one of
the given public keys; there are no passwords. A viewer reads, an operator also
changes VMs, images and volumes, an administrator does everything.`,
		Example: `  muster user create ann --role operator --ssh-key-file ~/.ssh/id_ed25519.pub
  muster user create bob --ssh-key "ssh-ed25519 AAAA... bob@laptop"`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			keys, err := a.sshKeys(&f)
			if err != nil {
				return err
			}
			spec := map[string]any{"role": f.role, "sshKeys": keys}
			set(spec, "fullName", f.fullName)
			set(spec, "disabled", f.disabled)
			if err := a.create(cmd.Context(), api.KindUser, names[0], nil, spec); err != nil {
				return err
			}
			if len(keys) == 0 {
				a.notice("user %s has no key yet and cannot log in: muster user set %s --ssh-key-file FILE", names[0], names[0])
			}
			return nil
		},
	}
	f.bind(cmd, string(api.RoleViewer))
	return cmd
}

func (a *app) userSet() *cobra.Command {
	var f userFlags
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change role, keys or name of a user, or disable them", Args: args("NAME"),
		Long: `Changes what the flags name. --ssh-key and --ssh-key-file add keys;
--remove-ssh-key takes one away, named by its fingerprint, its comment or its
number in "user show". Sessions of a user who is disabled, whose role changes or
whose key is removed end within 20 s.`,
		Example: `  muster user set ann --role administrator
  muster user set ann --ssh-key-file new.pub --remove-ssh-key ann@old-laptop
  muster user set bob --disabled`,
		ValidArgsFunction: a.completeNames(api.KindUser),
		RunE:              func(cmd *cobra.Command, names []string) error { return a.userChange(cmd, names[0], &f) },
	}
	f.bind(cmd, "")
	cmd.Flags().StringArrayVar(&f.removed, "remove-ssh-key", nil, "fingerprint, comment or number of a key to take away (repeatable)")
	return cmd
}

func (a *app) userChange(cmd *cobra.Command, name string, f *userFlags) error {
	spec := map[string]any{}
	for flag, v := range map[string]any{"role": f.role, "full-name": f.fullName, "disabled": f.disabled} {
		if cmd.Flags().Changed(flag) {
			spec[map[string]string{"role": "role", "full-name": "fullName", "disabled": "disabled"}[flag]] = v
		}
	}
	added, err := a.sshKeys(f)
	if err != nil {
		return err
	}
	if len(added) == 0 && len(f.removed) == 0 {
		if len(spec) == 0 {
			return usagef("user set: nothing to change; give --role, --ssh-key, --remove-ssh-key, --full-name or --disabled")
		}
		return a.patch(cmd.Context(), api.KindUser, name, map[string]any{"spec": spec})
	}
	return a.userKeys(cmd.Context(), name, spec, added, f.removed)
}

// userKeys changes the list of keys, on the revision that it was read at.
func (a *app) userKeys(ctx context.Context, name string, spec map[string]any, added, removed []string) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	for attempt := 1; ; attempt++ {
		raw, _, err := c.Get(ctx, api.KindUser, "", name)
		if err != nil {
			return err
		}
		u, err := client.As[api.UserSpec, api.UserStatus](raw)
		if err != nil {
			return err
		}
		keys, err := changedKeys(u.Spec.SSHKeys, added, removed)
		if err != nil {
			return err
		}
		spec["sshKeys"] = keys
		r, err := c.Patch(ctx, api.KindUser, "", name, u.Meta.Revision, map[string]any{"spec": spec})
		if err != nil && api.CodeOf(err) == api.CodeConflict && attempt < keyAttempts {
			continue
		}
		if err != nil {
			return err
		}
		done := "changed"
		if client.MetaOf(r.Object).Revision == u.Meta.Revision {
			done = "unchanged"
		}
		return a.finished(mustView(api.KindUser), name, done, r.Object, "", 0)
	}
}

// changedKeys takes keys out of a list and adds others; a key that is there
// already is not added again.
func changedKeys(now, added, removed []string) ([]string, error) {
	drop := map[int]bool{}
	for _, r := range removed {
		found := false
		for i, k := range now {
			key := readKey(k)
			if r == key.fingerprint || r == key.comment || r == strconv.Itoa(i+1) || r == k {
				drop[i], found = true, true
			}
		}
		if !found {
			return nil, api.Errorf(api.CodeNotFound, "--remove-ssh-key: the user has no key %q; see muster user show", r)
		}
	}
	out := []string{}
	for i, k := range now {
		if !drop[i] {
			out = append(out, k)
		}
	}
	for _, k := range added {
		same := func(o string) bool { return readKey(o).fingerprint == readKey(k).fingerprint }
		if readKey(k).fingerprint == "" || !slices.ContainsFunc(out, same) {
			out = append(out, k)
		}
	}
	return out, nil
}

// sshKeys gathers the keys of the flags. Whether they are good is for the
// cluster to say; what is plainly no key is not sent.
func (a *app) sshKeys(f *userFlags) ([]string, error) {
	keys := []string{}
	for i, k := range f.keys {
		if strings.Contains(k, "PRIVATE KEY") {
			return nil, errPrivateKey(fmt.Sprintf("--ssh-key %d", i+1))
		}
		keys = append(keys, strings.TrimSpace(k))
	}
	for _, file := range f.files {
		b, err := a.readFile(file, maxKeyFile)
		if err != nil {
			return nil, err
		}
		if bytes.Contains(b, []byte("PRIVATE KEY")) {
			return nil, errPrivateKey("--ssh-key-file " + file)
		}
		before := len(keys)
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				keys = append(keys, line)
			}
		}
		if len(keys) == before {
			return nil, usagef("--ssh-key-file: %s holds no key", file)
		}
	}
	return keys, nil
}

func errPrivateKey(where string) error {
	return usagef("%s: this is a private key, which must not leave your computer; give the .pub file", where)
}

// sshKey is what is shown of a public key.
type sshKey struct{ kind, fingerprint, comment string }

// readKey takes a key apart as ssh-keygen -l shows it.
func readKey(line string) sshKey {
	kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	blob, comment, _ := strings.Cut(strings.TrimSpace(rest), " ")
	k := sshKey{kind: strings.TrimPrefix(kind, "ssh-"), comment: strings.TrimSpace(comment)}
	if b, err := base64.StdEncoding.DecodeString(blob); err == nil && len(b) > 0 {
		sum := sha256.Sum256(b)
		k.fingerprint = "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
	}
	return k
}

func userRow(o *api.User, now time.Time) []string {
	state := "active"
	switch {
	case o.Spec.Disabled:
		state = "disabled"
	case len(o.Spec.SSHKeys) == 0:
		state = "no key"
	}
	return []string{o.Meta.Name, status(&o.Meta, state), string(o.Spec.Role), strconv.Itoa(len(o.Spec.SSHKeys)), dash(o.Spec.FullName), age(o.Meta.CreatedAt, now)}
}

func userShow(s *sections, o *api.User, now time.Time) {
	row := userRow(o, now)
	s.field("Status", row[1])
	s.field("Role", row[2])
	s.field("Full name", o.Spec.FullName)
	if len(o.Spec.SSHKeys) == 0 {
		return
	}
	s.title("SSH keys")
	t := &table{head: []string{"NUMBER", "TYPE", "FINGERPRINT", "COMMENT"}}
	for i, line := range o.Spec.SSHKeys {
		k := readKey(line)
		t.add(strconv.Itoa(i+1), k.kind, dash(k.fingerprint), k.comment)
	}
	s.table(t)
}
