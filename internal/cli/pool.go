// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

// cephFlags are how a pool of type rbd is reached.
type cephFlags struct {
	pool, namespace, user, keyFile string
	monitors                       []string
}

func (f *cephFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.pool, "ceph-pool", "", "rbd: pool in the Ceph cluster")
	flags.StringVar(&f.namespace, "ceph-namespace", "", "rbd: namespace in that pool")
	flags.StringArrayVar(&f.monitors, "monitor", nil, "rbd: monitor of the Ceph cluster, HOST or HOST:PORT (repeatable)")
	flags.StringVar(&f.user, "ceph-user", "", "rbd: cephx user, without client.")
	flags.StringVar(&f.keyFile, "key-file", "", "rbd: file with the user's key or keyring, - for standard input")
}

// spec is what was given.
func (f *cephFlags) spec(a *app) (map[string]any, error) {
	out := map[string]any{}
	set(out, "pool", f.pool)
	set(out, "namespace", f.namespace)
	set(out, "user", f.user)
	if len(f.monitors) > 0 {
		out["monitors"] = f.monitors
	}
	if f.keyFile != "" {
		text, err := a.readFile(f.keyFile, maxSecretFile)
		if err != nil {
			return nil, err
		}
		if out["key"], err = cephKey(text); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// cephKey finds the key in a keyring, or takes a text that is one.
func cephKey(text []byte) (string, error) {
	if !bytes.Contains(text, []byte("[")) {
		return strings.TrimSpace(string(text)), nil
	}
	var keys []string
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, "="); ok && strings.TrimSpace(name) == "key" {
			keys = append(keys, strings.TrimSpace(value))
		}
	}
	if len(keys) != 1 {
		return "", api.Invalid("--key-file", "has %d keys; give the keyring of one user", len(keys))
	}
	return keys[0], nil
}

func (a *app) poolCmd() *cobra.Command {
	var typ, path string
	var ceph cephFlags
	create := &cobra.Command{
		Use: "create NAME", Short: "Create a pool", Args: args("NAME"),
		Long: `Creates a pool: a place for images and volumes. In a pool of type dir each
node has its own content below the same path; a pool of type shared is one
directory that every node sees, which the nodes check; a pool of type rbd is in a
Ceph cluster that every node reaches. Its key is stored encrypted and never shown.`,
		Example: `  muster pool create fast --type dir --path /srv/fast
  muster pool create nfs --type shared --path /mnt/nfs/muster
  muster pool create ceph --type rbd --ceph-pool vms --ceph-user muster \
      --monitor 10.0.0.1 --monitor 10.0.0.2 --key-file ceph.client.muster.keyring`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			spec := map[string]any{"type": typ}
			set(spec, "path", path)
			c, err := ceph.spec(a)
			if err != nil {
				return err
			}
			if len(c) > 0 {
				spec["ceph"] = c
			}
			return a.create(cmd.Context(), api.KindPool, names[0], nil, spec)
		},
	}
	create.Flags().StringVar(&typ, "type", string(api.PoolDir), "dir, shared or rbd")
	create.Flags().StringVar(&path, "path", "", "dir, shared: absolute path of the directory, the same on every node")
	ceph.add(create)
	return group("pool", "Places for images and volumes", create, a.lsCmd(api.KindPool), a.showCmd(api.KindPool),
		a.rmCmd(api.KindPool, "Removes pools that hold no image and no volume. The directory itself stays."))
}

// poolPlace says where a pool is.
func poolPlace(s *api.PoolSpec) string {
	if c := s.Ceph; c != nil {
		return fmt.Sprintf("ceph:%s", strings.Trim(c.Pool+"/"+c.Namespace, "/"))
	}
	return first(s.Path, "(data directory)")
}
