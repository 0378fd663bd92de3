// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// contextFile is the configuration of a person.
type contextFile struct {
	Current  string         `json:"current,omitempty"`
	Contexts []contextEntry `json:"contexts,omitempty"`
}

// contextEntry is one cluster with the access to it. The CA certificate is
// kept inside, so that the entry survives the file that it came from.
type contextEntry struct {
	Name    string   `json:"name"`
	Servers []string `json:"servers"`
	Token   string   `json:"token,omitempty"`
	CACert  string   `json:"caCert,omitempty"`
	Project string   `json:"project,omitempty"`
}

func (f *contextFile) find(name string) (contextEntry, bool) {
	i := slices.IndexFunc(f.Contexts, func(c contextEntry) bool { return c.Name == name })
	if i < 0 {
		return contextEntry{}, false
	}
	return f.Contexts[i], true
}

// contextPath is $XDG_CONFIG_HOME/muster/config.yaml, by default below
// ~/.config on every system.
func (a *app) contextPath() string {
	if dir := a.Getenv("XDG_CONFIG_HOME"); dir != "" {
		return filepath.Join(dir, "muster", "config.yaml")
	}
	home := first(a.Getenv("HOME"), a.Getenv("USERPROFILE"))
	return filepath.Join(home, ".config", "muster", "config.yaml")
}

func (a *app) loadContexts() (*contextFile, error) {
	path := a.contextPath()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &contextFile{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read contexts: %w", err)
	}
	if info, err := os.Stat(path); err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		a.notice("warning: %s holds tokens and can be read by others; run: chmod 600 %s", path, path)
	}
	var f contextFile
	if err := yaml.UnmarshalStrict(b, &f); err != nil {
		return nil, usagef("%s: %v", path, err)
	}
	return &f, nil
}

// saveContexts replaces the file as a whole, so that it is never half written.
func (a *app) saveContexts(f *contextFile) error {
	path := a.contextPath()
	b, err := yaml.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode contexts: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("save contexts: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".config-*") // mode 0600
	if err != nil {
		return fmt.Errorf("save contexts: %w", err)
	}
	_, err = tmp.Write(b)
	if err == nil {
		err = tmp.Sync()
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("save contexts: %w", err)
	}
	return nil
}

func (a *app) contextCmd() *cobra.Command {
	ls := &cobra.Command{
		Use: "ls", Short: "List the stored contexts", Args: args(),
		Example: "  muster context ls",
		RunE:    func(*cobra.Command, []string) error { return a.contextList() },
	}
	use := &cobra.Command{
		Use: "use NAME", Short: "Choose the context used when none is named", Args: args("NAME"),
		Example:           "  muster context use prod",
		ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, names []string) error {
			return a.changeContexts(func(f *contextFile) error {
				if _, ok := f.find(names[0]); !ok {
					return api.Errorf(api.CodeNotFound, "context %q does not exist", names[0])
				}
				f.Current = names[0]
				return nil
			})
		},
	}
	set := &cobra.Command{
		Use: "set NAME", Short: "Store or change a context", Args: args("NAME"),
		Long: "Stores the global flags --server, --token, --cacert and --project under a name.\nFlags that are not given keep their stored value; the first context becomes the\nchosen one. The CA certificate is copied into the file, which has mode 0600.",
		Example: `  muster context set prod --server https://10.0.0.1,https://10.0.0.2 --token muster_... --cacert ca.crt
  muster context set prod --project web`,
		ValidArgsFunction: a.completeContexts,
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.changeContexts(func(f *contextFile) error { return a.setContext(f, names[0]) })
		},
	}
	rm := &cobra.Command{
		Use: "rm NAME...", Short: "Forget contexts", Args: atLeastOne("NAME"),
		Example:           "  muster context rm prod",
		ValidArgsFunction: a.completeContexts,
		RunE: func(_ *cobra.Command, names []string) error {
			return a.changeContexts(func(f *contextFile) error {
				for _, n := range names {
					if _, ok := f.find(n); !ok {
						return api.Errorf(api.CodeNotFound, "context %q does not exist", n)
					}
					f.Contexts = slices.DeleteFunc(f.Contexts, func(c contextEntry) bool { return c.Name == n })
					if f.Current == n {
						f.Current = ""
					}
				}
				return nil
			})
		},
	}
	return group("context", "Clusters that this person works with", ls, use, set, rm)
}

func (a *app) changeContexts(change func(*contextFile) error) error {
	f, err := a.loadContexts()
	if err != nil {
		return err
	}
	if err := change(f); err != nil {
		return err
	}
	return a.saveContexts(f)
}

func (a *app) setContext(f *contextFile, name string) error {
	if err := api.ValidName("context", name); err != nil {
		return err
	}
	c, existed := f.find(name)
	c.Name = name
	g := &a.flags
	if g.server != "" {
		list, err := client.ParseServers(g.server)
		if err != nil {
			return err
		}
		c.Servers = list
	}
	if len(c.Servers) == 0 {
		return usagef("context set: --server is missing")
	}
	if g.cacert != "" {
		b, err := os.ReadFile(g.cacert)
		if err != nil {
			return usagef("--cacert: %v", err)
		}
		if _, err := client.New(client.Config{Servers: c.Servers, CACert: b}); err != nil {
			return err
		}
		c.CACert = string(b)
	}
	c.Token, c.Project = first(g.token, c.Token), first(g.project, c.Project)
	if !existed {
		f.Contexts = append(f.Contexts, c)
		if len(f.Contexts) == 1 {
			f.Current = name
		}
		return nil
	}
	i := slices.IndexFunc(f.Contexts, func(c contextEntry) bool { return c.Name == name })
	f.Contexts[i] = c
	return nil
}

func (a *app) contextList() error {
	f, err := a.loadContexts()
	if err != nil {
		return err
	}
	for i := range f.Contexts {
		if f.Contexts[i].Token != "" {
			f.Contexts[i].Token = "(stored)" // a list on a screen is no place for secrets
		}
	}
	switch a.flags.output {
	case "json", "yaml":
		return a.printValue(f)
	case "name":
		for _, c := range f.Contexts {
			fmt.Fprintln(a.Out, c.Name)
		}
		return nil
	}
	t := &table{head: []string{"CURRENT", "NAME", "SERVERS", "TOKEN", "PROJECT"}}
	for _, c := range f.Contexts {
		mark := ""
		if c.Name == f.Current {
			mark = "*"
		}
		t.add(mark, c.Name, strings.Join(c.Servers, ","), first(c.Token, "-"), first(c.Project, "default"))
	}
	return a.printTable(t, "no contexts; store one with: muster context set NAME --server ...")
}
