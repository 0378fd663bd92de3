// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// colour reports whether stdout takes colours.
func (a *app) colour() bool { return a.OutTTY && a.Getenv("NO_COLOR") == "" }

// printTable writes a table, or the line empty on stderr when it has no row.
func (a *app) printTable(t *table, empty string) error {
	if len(t.rows) == 0 {
		a.notice("%s", empty)
		return nil
	}
	return t.write(a.Out, a.colour())
}

// printJSON writes a document as the server sent it, indented or as YAML.
func (a *app) printJSON(raw []byte) error {
	if a.flags.output == "yaml" {
		b, err := yaml.JSONToYAML(raw)
		if err != nil {
			return fmt.Errorf("convert the answer to YAML: %w", err)
		}
		_, err = a.Out.Write(b)
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, bytes.TrimSpace(raw), "", "  "); err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	b.WriteByte('\n')
	_, err := a.Out.Write(b.Bytes())
	return err
}

// printValue is printJSON for what this program composes itself.
func (a *app) printValue(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the result: %w", err)
	}
	return a.printJSON(b)
}

// structured reports whether the output is a document.
func (a *app) structured() bool { return a.flags.output == "json" || a.flags.output == "yaml" }

// printList writes a list of objects of one kind.
func (a *app) printList(k *kindView, l *client.List) error {
	a.warnStale(l.Reply)
	switch a.flags.output {
	case "json", "yaml":
		return a.printValue(l)
	case "name":
		for _, raw := range l.Items {
			fmt.Fprintln(a.Out, nameOf(k.kind, raw))
		}
		return nil
	}
	all := a.project == "*" && client.Scoped(k.kind)
	t := &table{head: k.columns}
	if all {
		t.head = append([]string{"PROJECT"}, t.head...)
	}
	for _, raw := range l.Items {
		row, err := k.row(raw, a.Now())
		if err != nil {
			return err
		}
		if all {
			row = append([]string{client.MetaOf(raw).Project}, row...)
		}
		t.rows = append(t.rows, row)
	}
	if l.Continue != "" {
		defer a.notice("there are more; raise --limit")
	}
	return a.printTable(t, "no "+k.kind.Plural()+" found")
}

// printObject writes one object: sections for people.
func (a *app) printObject(k *kindView, raw json.RawMessage) error {
	switch a.flags.output {
	case "json", "yaml":
		return a.printJSON(raw)
	case "name":
		fmt.Fprintln(a.Out, nameOf(k.kind, raw))
		return nil
	}
	s := &sections{paint: a.colour()}
	if err := k.show(s, raw, a.Now()); err != nil {
		return err
	}
	_, err := io.WriteString(a.Out, s.String())
	return err
}

// nameOf is the form of -o name.
func nameOf(kind api.Kind, raw json.RawMessage) string {
	m := client.MetaOf(raw)
	return string(kind) + "/" + clean(first(m.Name, m.ID))
}

// warnStale says that what follows may be out of date, unless the user asked
// for it with --stale.
func (a *app) warnStale(r *client.Reply) {
	if r != nil && r.Stale && !r.Asked && !(a.client != nil && a.client.QuorumLost()) {
		a.notice("warning: no quorum; this is node %s's own copy, %s old", dash(r.Node), took(r.Age))
	}
}
