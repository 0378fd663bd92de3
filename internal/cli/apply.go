// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

const (
	// maxApplyFile is the largest file that apply reads, maxApplyDocs the most
	// documents in it.
	maxApplyFile = 16 << 20
	maxApplyDocs = 10_000
)

func (a *app) applyCmd() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use: "apply -f FILE", Short: "Create objects from a file, or change them to what it says", Args: args(),
		Long: `Reads objects from YAML or JSON, several in one file divided by "---". An object
that does not exist is created; one that does is changed in the fields that the
file gives (RFC 7396). A list as "get vms -o yaml" prints it counts as its
objects. What the cluster itself writes (IDs, revisions, status) is passed over,
so that the output of "get -o yaml" can be applied. Prints created, updated or
unchanged for each.`,
		Example: `  muster apply -f web.yaml
  muster get vm web1 -o yaml | muster apply -f -

  # web.yaml
  meta: {kind: vm, name: web1}
  spec: {cpus: 1, memory: 512M, disks: [{image: tiny}], ha: restart, power: running}`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usagef("apply: -f FILE is missing")
			}
			for _, f := range files {
				if err := a.applyFile(cmd.Context(), f); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "file to apply, - for stdin (repeatable)")
	return cmd
}

// document is one object of a file.
type document struct {
	kind api.Kind
	name string
	body map[string]any
	at   string // where it is, for errors
}

func (a *app) applyFile(ctx context.Context, file string) error {
	b, err := a.readFile(file, maxApplyFile)
	if err != nil {
		return err
	}
	docs, err := parseDocuments(file, b)
	if err != nil {
		return err
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	for _, d := range docs {
		if err := a.applyOne(ctx, c, d); err != nil {
			return fmt.Errorf("%s: %w", d.at, err)
		}
	}
	return nil
}

// parseDocuments reads the whole file before anything is changed, so that a
// mistake at its end leaves nothing half done.
func parseDocuments(file string, b []byte) ([]document, error) {
	var out []document
	for i, part := range splitYAML(b) {
		if len(out) >= maxApplyDocs {
			return nil, usagef("%s: more than %d documents", file, maxApplyDocs)
		}
		at := fmt.Sprintf("%s, document %d", file, i+1)
		j, err := yaml.YAMLToJSONStrict(part)
		if err != nil {
			return nil, usagef("%s: %v", at, err)
		}
		if bytes.Equal(bytes.TrimSpace(j), []byte("null")) {
			continue // only comments
		}
		items := listItems(j)
		if len(out)+len(items) > maxApplyDocs {
			return nil, usagef("%s: more than %d objects", file, maxApplyDocs)
		}
		for n, item := range items {
			d, err := parseDocument(item)
			if err != nil {
				if len(items) > 1 {
					at = fmt.Sprintf("%s, item %d", at, n+1)
				}
				return nil, fmt.Errorf("%s: %w", at, err)
			}
			d.at = fmt.Sprintf("%s, %s %s", file, d.kind, d.name)
			out = append(out, d)
		}
	}
	if len(out) == 0 {
		return nil, usagef("%s: holds no object", file)
	}
	return out, nil
}

// listItems returns the objects of a list as "get KINDS -o yaml" prints it, or
// the document itself when it is no list.
func listItems(j []byte) []json.RawMessage {
	var list struct {
		Kind  string            `json:"kind"`
		Items []json.RawMessage `json:"items"`
	}
	if json.Unmarshal(j, &list) != nil || list.Items == nil || !strings.HasSuffix(list.Kind, "List") {
		return []json.RawMessage{j}
	}
	return list.Items
}

// splitYAML divides at lines "---", which YAML allows nowhere else.
func splitYAML(b []byte) [][]byte {
	var parts [][]byte
	var part []byte
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("---")); ok && (len(rest) == 0 || bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0]))) {
			parts = append(parts, part)
			part = append([]byte(nil), rest...)
			continue
		}
		part = append(part, line...)
	}
	return append(parts, part)
}

func parseDocument(j []byte) (document, error) {
	var d document
	dec := json.NewDecoder(bytes.NewReader(j))
	dec.UseNumber() // a number must not lose digits on its way
	if err := dec.Decode(&d.body); err != nil {
		return d, usagef("is not an object: %v", err)
	}
	meta, ok := d.body["meta"].(map[string]any)
	if !ok {
		return d, usagef("has no meta; give meta: {kind: vm, name: web1}")
	}
	word, _ := meta["kind"].(string)
	if top, ok := d.body["kind"].(string); ok && word == "" {
		word = top
		delete(d.body, "kind")
	}
	if word == "" {
		return d, usagef("has no meta.kind; give one such as vm")
	}
	k, err := viewOf(word)
	if err != nil {
		return d, err
	}
	d.kind = k.kind
	d.name, _ = meta["name"].(string)
	if err := api.ValidName("meta.name", d.name); err != nil {
		return d, err
	}
	// What the cluster writes is no wish of the user.
	for _, f := range []string{"id", "kind", "owner", "revision", "statusRevision", "generation", "createdAt", "deletingAt", "finalizers"} {
		delete(meta, f)
	}
	delete(d.body, "status")
	return d, nil
}

func (d *document) meta() map[string]any { return d.body["meta"].(map[string]any) }

func (a *app) applyOne(ctx context.Context, c *client.Client, d document) error {
	project, _ := d.meta()["project"].(string)
	project = first(project, a.project)
	if project == "*" {
		return usagef("--project: * is for lists; name one project")
	}
	if project != "" && client.Scoped(d.kind) {
		d.meta()["project"] = project
	}
	current, _, err := c.Get(ctx, d.kind, project, d.name)
	if api.CodeOf(err) == api.CodeNotFound && err != nil {
		r, err := c.Create(ctx, d.kind, project, d.body)
		if err == nil {
			return a.applied(ctx, c, &d, r, "created")
		}
		if api.CodeOf(err) != api.CodeExists {
			return err
		}
		// Somebody made it in between: change theirs.
		current, _, err = c.Get(ctx, d.kind, project, d.name)
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if d.kind == api.KindVM {
		keepDisks(d.body, current)
	}
	r, err := c.Patch(ctx, d.kind, project, d.name, 0, d.body)
	if err != nil {
		return err
	}
	done := "updated"
	if client.MetaOf(current).Revision == client.MetaOf(r.Object).Revision {
		done = "unchanged"
	}
	return a.applied(ctx, c, &d, r, done)
}

// applied waits for the work and prints the outcome.
func (a *app) applied(ctx context.Context, c *client.Client, d *document, r *client.Result, done string) error {
	if r.Task != nil && a.flags.wait && !awaitsUpload(d, r) {
		if _, err := a.follow(ctx, c, r.Task, a.newProgress(fmt.Sprintf("%s %s", r.Task.Spec.Action, d.name))); err != nil {
			return err
		}
	}
	switch {
	case a.structured():
		raw, _, err := c.Get(ctx, d.kind, first(client.MetaOf(r.Object).Project, a.project), d.name)
		if err != nil {
			return err
		}
		if a.flags.output == "yaml" {
			fmt.Fprintln(a.Out, "---")
		}
		return a.printJSON(raw)
	case a.flags.output == "name":
		fmt.Fprintf(a.Out, "%s/%s\n", d.kind, d.name)
		return nil
	}
	a.say("%s %s %s", d.kind, d.name, done)
	if awaitsUpload(d, r) {
		a.notice("image %s has no content yet: muster image upload %s --file FILE", d.name, d.name)
	}
	return nil
}

// awaitsUpload reports an image whose task runs until its content comes.
func awaitsUpload(d *document, r *client.Result) bool {
	if d.kind != api.KindImage || r.Task == nil {
		return false
	}
	spec, _ := d.body["spec"].(map[string]any)
	path, _ := spec["path"].(string)
	return path == ""
}

// keepDisks lets the disks of a file stand for those that were made from it:
// a disk without the name of a volume means the volume at the same place. What
// the file says differently stays, for the cluster to accept or refuse.
func keepDisks(body map[string]any, current json.RawMessage) {
	spec, _ := body["spec"].(map[string]any)
	wished, _ := spec["disks"].([]any)
	var now struct {
		Spec struct {
			Disks []map[string]any `json:"disks"`
		} `json:"spec"`
	}
	dec := json.NewDecoder(bytes.NewReader(current))
	dec.UseNumber()
	if dec.Decode(&now) != nil {
		return
	}
	for i := range wished {
		d, ok := wished[i].(map[string]any)
		if !ok || i >= len(now.Spec.Disks) {
			continue
		}
		if _, named := d["volume"]; named || now.Spec.Disks[i]["volume"] == nil {
			continue
		}
		kept := map[string]any{}
		for k, v := range now.Spec.Disks[i] {
			kept[k] = v
			if w, given := d[k]; given && !sameValue(k, v, w) {
				kept[k] = w
			}
		}
		wished[i] = kept
	}
}

// sameValue compares as the cluster does: a size may be a number or "10G".
func sameValue(field string, a, b any) bool {
	x, y := fmt.Sprint(a), fmt.Sprint(b)
	if field != "size" || x == y {
		return x == y
	}
	m, errM := api.ParseSize(x)
	n, errN := api.ParseSize(y)
	return errors.Join(errM, errN) == nil && m == n
}
