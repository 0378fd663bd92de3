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
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/backupfile"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/pki"
)

// partSuffix is of a backup that is still being written.
const partSuffix = ".part"

// ownPage marks a command that has subcommands and a page of the reference.
const ownPage = "own-page"

// keyFlags say how a backup is opened.
type keyFlags struct{ clusterKey, passphrase string }

func (k *keyFlags) bind(cmd *cobra.Command) {
	cmd.Flags().StringVar(&k.clusterKey, "cluster-key-file", "", "the file cluster.key of any node of the cluster that the backup is of")
	cmd.Flags().StringVar(&k.passphrase, "passphrase-file", "", "file with the pass phrase that the backup was made with")
}

func (a *app) backupCmd() *cobra.Command {
	var passphrase string
	var stale, force bool
	cmd := &cobra.Command{
		Use: "backup FILE", Short: "Take a backup of the configuration database", Args: args("FILE"),
		Long: `Takes a backup of everything that the cluster knows, at one revision: nodes, VMs,
networks, users, settings; not the content of disks. Any node gives it. FILE is
written whole or not at all; - is stdout. It is sealed with the cluster key, the
file cluster.key in every node's data directory, and opens only with that key:
keep a copy of the key apart from the nodes, or give --passphrase-file, which puts
the key into the backup, sealed with the pass phrase.`,
		Example: `  muster cluster backup prod.backup
  muster cluster backup prod.backup --passphrase-file phrase.txt
  muster cluster backup - | ssh store 'cat > prod.backup'
  muster cluster backup survivor.backup --stale`,
		Annotations: map[string]string{ownPage: ""},
		RunE: func(cmd *cobra.Command, files []string) error {
			return a.takeBackup(cmd.Context(), files[0], passphrase, stale, force)
		},
	}
	cmd.Flags().StringVar(&passphrase, "passphrase-file", "", "put the cluster key into the backup, sealed with the pass phrase in this file (12 to 1024 bytes)")
	cmd.Flags().BoolVar(&stale, "stale", false, "take what the asked node has, without a word from the leader: for a cluster without quorum")
	cmd.Flags().BoolVar(&force, "force", false, "replace FILE if it exists")
	cmd.AddCommand(a.backupVerify(), a.backupLs())
	return cmd
}

// secretFile reads a pass phrase, without the end of its line.
func (a *app) secretFile(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	b, err := a.readFile(path, maxSecretFile)
	if err != nil {
		return "", fmt.Errorf("--passphrase-file: %w", err)
	}
	words := strings.TrimRight(string(b), "\r\n")
	if err := backupfile.CheckPassphrase(words); err != nil {
		return "", usagef("--passphrase-file: %s: %v", path, err)
	}
	return words, nil
}

// clusterKeyFile reads the file cluster.key of a node.
func (a *app) clusterKeyFile(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := a.readFile(path, maxSecretFile)
	if err != nil {
		return nil, fmt.Errorf("--cluster-key-file: %w", err)
	}
	if len(b) != pki.ClusterKeyBytes {
		return nil, usagef("--cluster-key-file: %s has %d bytes; a cluster key has %d: give the file cluster.key of a node's data directory", path, len(b), pki.ClusterKeyBytes)
	}
	return b, nil
}

func (a *app) takeBackup(ctx context.Context, file, passphraseFile string, stale, force bool) error {
	words, err := a.secretFile(passphraseFile)
	if err != nil {
		return err
	}
	req := client.Request{Method: http.MethodGet, Path: "/cluster/backup", Query: url.Values{}}
	if stale {
		req.Query.Set("consistency", "stale")
	}
	if words != "" {
		req.Method, req.Header = http.MethodPost, http.Header{"Content-Type": {"application/json"}}
		if req.Body, err = json.Marshal(api.BackupRequest{Passphrase: words}); err != nil {
			return err
		}
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	var h *backupfile.Header
	var size int64
	receive := func(out io.Writer) error {
		err := c.Download(ctx, req, func(body io.Reader) (err error) {
			h, size, err = backupfile.Verify(io.TeeReader(body, out))
			return err
		})
		if api.CodeOf(err) == api.CodeNoQuorum {
			return &hintedError{err, "--stale takes what the asked node has; after a start without a quorum no token is known there, so run it on that host with --data-dir DIR"}
		}
		return err
	}
	if file == "-" {
		if a.OutTTY {
			return usagef("cluster backup: a backup is no text; send it to a file or a pipe")
		}
		return receive(a.Out)
	}
	if err := a.noLocalFile("FILE"); err != nil {
		return err
	}
	if err := writeWhole(file, force, receive); err != nil {
		return err
	}
	if a.structured() {
		return a.printValue(verified{h, size, nil})
	}
	a.say("%s: cluster %s at revision %d, %s, %d objects", file, h.Cluster, h.Revision, api.Size(size), total(h.Objects))
	if h.Slot == nil {
		a.notice("it opens only with the cluster key %s (cluster.key in every node's data directory); keep a copy of that file apart from the nodes", h.KeyID)
	}
	if h.Stale {
		a.notice("no leader confirmed that this is the newest state")
	}
	return nil
}

func total(objects map[api.Kind]int) (n int) {
	for _, k := range objects {
		n += k
	}
	return n
}

// writeWhole makes a file that has what write writes, or does not exist: it is
// named and readable by nobody else only when it is on disk.
func writeWhole(path string, force bool, write func(io.Writer) error) (err error) {
	refuse := func() error {
		if _, err := os.Lstat(path); err == nil && !force {
			return api.Errorf(api.CodeExists, "%s exists; choose another name, or replace it with --force", path)
		}
		return nil
	}
	if err := refuse(); err != nil {
		return err
	}
	part := path + partSuffix
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what an earlier try left: %w", err)
	}
	f, err := os.OpenFile(part, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(part)
		}
	}()
	out := bufio.NewWriter(f)
	if err = write(out); err == nil {
		err = out.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = refuse(); err != nil {
		return err
	}
	if err = os.Rename(part, path); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes the name of a new file survive a power cut.
func syncFolder(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // a directory cannot be opened there
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// verified is what is known of a file.
type verified struct {
	*backupfile.Header
	Size int64 `json:"size"`
	// Opens is whether it opens with the key that was given, if one was.
	Opens *bool `json:"opens,omitempty"`
}

func (a *app) backupVerify() *cobra.Command {
	var k keyFlags
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "Check a backup and show what is in it", Args: args("FILE"),
		Long: `Checks the checksum of a backup and shows what it says of itself: needs neither a
cluster nor a key. With the cluster key or the pass phrase it is also opened, which
finds what was changed on purpose.`,
		Example: `  muster cluster backup verify prod.backup
  muster cluster backup verify prod.backup --cluster-key-file /safe/cluster.key`,
		RunE: func(_ *cobra.Command, files []string) error { return a.verifyBackup(files[0], &k) },
	}
	k.bind(cmd)
	return cmd
}

func (a *app) verifyBackup(file string, k *keyFlags) error {
	if err := a.noLocalFile("FILE"); err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return usagef("FILE: %v", err)
	}
	defer f.Close()
	var v verified
	if v.Header, v.Size, err = backupfile.Verify(bufio.NewReader(f)); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if k.clusterKey != "" || k.passphrase != "" {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := a.openBackup(f, k); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		yes := true
		v.Opens = &yes
	}
	if a.structured() {
		return a.printValue(v)
	}
	return a.printBackup(&v)
}

// openBackup opens every part with the key.
func (a *app) openBackup(f io.Reader, k *keyFlags) error {
	key, err := a.clusterKeyFile(k.clusterKey)
	if err != nil {
		return err
	}
	words, err := a.secretFile(k.passphrase)
	if err != nil {
		return err
	}
	if key != nil && words != "" {
		return usagef("give either --cluster-key-file or --passphrase-file")
	}
	r, err := backupfile.NewReader(bufio.NewReader(f), func(h *backupfile.Header) ([]byte, error) {
		if key != nil {
			return key, nil
		}
		return h.Slot.Open(words)
	})
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

func (a *app) printBackup(v *verified) error {
	out := &sections{paint: a.colour()}
	out.field("Cluster", v.Cluster)
	out.field("ID", v.ClusterID)
	out.field("Life", strconv.FormatUint(v.Life, 10))
	out.field("Taken", fmt.Sprintf("%s by node %s, muster %s", moment(v.Time, a.Now()), v.Node, v.Version))
	newest := "confirmed by a majority"
	if v.Stale {
		newest = fmt.Sprintf("not confirmed: the node's own copy, up to %s old", took(time.Duration(v.StaleSeconds*float64(time.Second))))
	}
	out.field("Newest", newest)
	out.field("Revision", strconv.FormatUint(v.Revision, 10))
	out.field("Size", fmt.Sprintf("%s, %d keys", api.Size(v.Size), v.Keys))
	out.field("Nodes", dash(strings.Join(v.Nodes, ", ")))
	key := v.KeyID + "; not in the backup: give --cluster-key-file to restore"
	if v.Slot != nil {
		key = v.KeyID + "; in the backup, sealed with a pass phrase"
	}
	out.field("Cluster key", key)
	out.field("Checksum", "right")
	opens := "not tried"
	if v.Opens != nil {
		opens = "yes"
	}
	out.field("Opens", opens)
	out.title("Objects")
	t := &table{head: []string{"KIND", "NUMBER"}}
	for _, kind := range slices.Sorted(maps.Keys(v.Objects)) {
		t.add(string(kind), strconv.Itoa(v.Objects[kind]))
	}
	out.table(t)
	_, err := fmt.Fprint(a.Out, out.String())
	return err
}

func (a *app) backupLs() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use: "ls", Short: "List the backups that the nodes keep by themselves", Args: args(),
		Long: `Lists the backups that every node makes by itself and keeps in its data directory,
in the folder backups. How often and how many: muster cluster set.`,
		Example: "  muster cluster backup ls\n  muster cluster backup ls --node m2 -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.listBackups(cmd.Context(), node) },
	}
	cmd.Flags().StringVar(&node, "node", "", "only this node")
	return cmd
}

func (a *app) listBackups(ctx context.Context, node string) error {
	var list struct {
		Settings    api.BackupSettings `json:"settings"`
		Nodes       []api.LocalBackups `json:"nodes"`
		Unreachable map[string]string  `json:"unreachable"`
	}
	if done, err := a.askNodes(ctx, "/cluster/backups", node, &list); done || err != nil {
		return err
	}
	t := &table{head: []string{"NODE", "FILE", "TAKEN", "REVISION", "SIZE", "LIFE", "NOTE"}}
	for _, n := range list.Nodes {
		for _, b := range slices.Backward(n.Items) {
			t.add(n.Node, b.File, age(b.Time, a.Now())+" ago", dash(number(b.Revision)), fmt.Sprint(api.Size(b.Size)), dash(number(b.Life)), dash(b.Error))
		}
		switch {
		case n.LastError != "":
			t.add(n.Node, "-", "-", "-", "-", "-", "the last one failed: "+n.LastError)
		case len(n.Items) == 0:
			t.add(n.Node, "-", "-", "-", "-", "-", "none yet")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(list.Unreachable)) {
		t.add(name, "-", "-", "-", "-", "-", list.Unreachable[name])
	}
	if err := a.printTable(t, "no backups"); err != nil {
		return err
	}
	if list.Settings.Disabled {
		a.notice("the nodes make no backups by themselves; to change that: muster cluster set --backup-every 24h")
	} else {
		a.notice("every %s, %d on each node", list.Settings.Every(), list.Settings.Keep)
	}
	return nil
}

func (a *app) clusterSet() *cobra.Command {
	var every string
	var keep int
	var hold bool
	cmd := &cobra.Command{
		Use: "set", Short: "Change settings of the cluster", Args: args(),
		Long: `Changes settings of the cluster as a whole. --backup-every and --backup-keep say
how often every node makes a backup of the configuration database in its own data
directory, and how many it keeps. A node writes none while nothing changes.
--feature-level-hold keeps the feature level as it is when all nodes have newer
software, so that they can still go back; --feature-level-hold=false lets it rise.`,
		Example: "  muster cluster set --backup-every 24h --backup-keep 7\n  muster cluster set --backup-every off\n  muster cluster set --feature-level-hold",
		RunE: func(cmd *cobra.Command, _ []string) error {
			patch := map[string]any{}
			switch {
			case every == "off":
				patch["disabled"] = true
			case every != "":
				d, err := time.ParseDuration(every)
				if err != nil || d%time.Minute != 0 || d < time.Minute || d > api.MaxBackupMinutes*time.Minute {
					return usagef("--backup-every: %q; give whole minutes, 1m to 744h, or off", every)
				}
				patch["disabled"], patch["everyMinutes"] = false, int(d/time.Minute)
			}
			if cmd.Flags().Changed("backup-keep") {
				patch["keep"] = keep
			}
			all := map[string]any{}
			if len(patch) > 0 {
				all["backup"] = patch
			}
			if cmd.Flags().Changed("feature-level-hold") {
				all["featureLevelHold"] = hold
			}
			if len(all) == 0 {
				return usagef("cluster set: nothing to change; give --backup-every, --backup-keep or --feature-level-hold")
			}
			return a.changeSettings(cmd.Context(), all)
		},
	}
	cmd.Flags().StringVar(&every, "backup-every", "", "time between two backups of each node, 1m to 744h, or off (24h in a new cluster)")
	cmd.Flags().BoolVar(&hold, "feature-level-hold", false, "keep the feature level as it is (=false: let it rise)")
	cmd.Flags().IntVar(&keep, "backup-keep", 0, "backups that each node keeps, 1 to 1000 (7 in a new cluster)")
	return cmd
}

func (a *app) changeSettings(ctx context.Context, patch map[string]any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	var s api.ClusterSettings
	if _, err := c.Call(ctx, http.MethodPatch, "/cluster/settings", patch, &s); err != nil {
		return err
	}
	if a.structured() {
		return a.printValue(s)
	}
	if s.Backup.Disabled {
		a.say("backups: none by themselves")
	} else {
		a.say("backups: every %s, %d on each node", s.Backup.Every(), s.Backup.Keep)
	}
	if s.FeatureLevelHold {
		a.say("feature level: held as it is")
	}
	return nil
}
