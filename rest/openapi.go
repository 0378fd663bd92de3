// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// The description is made by reflection from the very types that the handlers
// decode and encode, and from the table of routes, so that it cannot drift.

// schema is a JSON Schema (2020-12), as OpenAPI 3.1 uses it.
type schema map[string]any

// paramDocs describes the parameters of queries.
var paramDocs = map[string]struct {
	typ, doc string
}{
	"project":           {"string", "project of the objects; * in lists for all"},
	"log":               {"integer", "how many of the last messages to show, 0 to 256"},
	"target":            {"string", "name of the node to move to; default the best other one"},
	"withStorage":       {"boolean", "with the disks that only the present node has"},
	"bandwidth":         {"string", "most bytes per second, such as 100M"},
	"maxDowntimeMillis": {"integer", "how long the guest may stand still, 10 to 60000; default 300"},
	"postCopy":          {"boolean", "let the guest run there before the last of its memory has come, if it changes more than can be sent"},
	"channels":          {"integer", "how many connections carry the memory, 1 to 16; default 1"},
	"node":              {"string", "name of the one node to ask"},
	"labels":            {"string", "k=v,k2=v2: objects with all these labels"},
	"fields":            {"string", "path=value,…: objects whose fields equal these, such as status.phase=running"},
	"limit":             {"integer", "most items, 1-1000; default 500"},
	"continue":          {"string", "what the page before gave"},
	"consistency":       {"string", "linearizable (an error without quorum) or stale (this node's replica at once)"},
	"minRevision":       {"integer", "wait until this node has applied this revision"},
	"wait":              {"string", "answer when the task has ended or after this duration, at most 300s"},
	"force":             {"boolean", "a VM: kill it first; a node: it is dead and will not come back"},
	"sha256":            {"string", "SHA-256 of the content, hexadecimal"},
	"kinds":             {"string", "kinds to follow, comma-separated; default all that the caller may see"},
	"since":             {"string", "watch: resume after this revision; metrics: how far back, such as 10m, at most 1h; log: after this revision, or so far back, such as 2h or 7d"},
	"object":            {"string", "KIND/NAME, KIND/ID or KIND: only these objects"},
	"actor":             {"string", "only changes of this actor"},
	"at":                {"integer", "revision to compare from"},
	"to":                {"integer", "revision to compare with; default the newest"},
	"full":              {"boolean", "with the objects after each change, without secrets"},
	"prefix":            {"string", "keys that begin with it"},
	"via":               {"string", "the node that asks the devices, by name; default: the leader, which would switch nodes off in an emergency"},
	"history":           {"integer", "bytes of past output to begin with, at most 262144; default 4096"},
	"ticket":            {"string", "a console ticket instead of a token; good once"},
	"last":              {"integer", "only the newest so many, 1-1000"},
	"name":              {"string", "name of the series; one that ends in * stands for all that begin so"},
	"bytes":             {"integer", "most bytes, at most 262144"},
}

// generator collects named schemas.
type generator struct{ schemas map[string]schema }

// openAPIDocument renders openapi.json.
func openAPIDocument(version string, routes []route) ([]byte, error) {
	g := &generator{schemas: map[string]schema{}}
	paths := map[string]map[string]any{}
	for _, rt := range routes {
		op, err := g.operation(rt)
		if err != nil {
			return nil, err
		}
		if paths[rt.path] == nil {
			paths[rt.path] = map[string]any{}
		}
		paths[rt.path][strings.ToLower(rt.method)] = op
	}
	return json.Marshal(map[string]any{
		"openapi": "3.1.0",
		"info": map[string]any{
			"title": "Muster", "version": version,
			"description": "Every node answers every call. Errors are problem documents (RFC 9457) with a stable code.",
			"license":     map[string]any{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"paths":    paths,
		"security": []any{map[string]any{"token": []any{}}},
		"components": map[string]any{
			"schemas":         g.schemas,
			"securitySchemes": map[string]any{"token": map[string]any{"type": "http", "scheme": "bearer"}},
		},
	})
}

func (g *generator) operation(rt route) (map[string]any, error) {
	op := map[string]any{"operationId": operationID(rt), "summary": rt.summary}
	var params []any
	for part := range strings.SplitSeq(rt.path, "/") {
		if strings.HasPrefix(part, "{") {
			params = append(params, map[string]any{"name": strings.Trim(part, "{}"), "in": "path", "required": true, "schema": schema{"type": "string"}})
		}
	}
	for _, name := range rt.params {
		d, ok := paramDocs[name]
		if !ok {
			return nil, fmt.Errorf("parameter %s of %s is not described", name, rt.path)
		}
		params = append(params, map[string]any{"name": name, "in": "query", "description": d.doc, "schema": schema{"type": d.typ}})
	}
	if rt.method == http.MethodPost {
		params = append(params, map[string]any{"name": headerIdemKey, "in": "header", "description": "1-128 characters: the same key within 24 h acts once", "schema": schema{"type": "string", "maxLength": maxIdemKey}})
	}
	if slices.Contains([]string{http.MethodPut, http.MethodPatch, http.MethodDelete}, rt.method) {
		params = append(params, map[string]any{"name": "If-Match", "in": "header", "description": "ETag that the object must still have", "schema": schema{"type": "string"}})
	}
	if params != nil {
		op["parameters"] = params
	}
	if rt.in != nil || rt.consumes != "" {
		op["requestBody"] = map[string]any{"content": g.content(rt.consumes, rt.in)}
	}
	answer := map[string]any{"description": http.StatusText(rt.status)}
	if rt.out != nil || rt.produces != "" {
		answer["content"] = g.content(rt.produces, rt.out)
	}
	op["responses"] = map[string]any{
		strconv.Itoa(rt.status): answer,
		"default":               map[string]any{"description": "Problem", "content": g.content("application/problem+json", typeOf[Problem]())},
	}
	if rt.need == needNothing || rt.need == needLocal {
		op["security"] = []any{}
	}
	return op, nil
}

// operationID is "post-vms-start" for POST /api/v1/vms/{name}/start; of two
// paths that differ in {name} only, the longer one ends in "-one".
func operationID(rt route) string {
	if rt.operation != "" {
		return rt.operation
	}
	words := []string{strings.ToLower(rt.method)}
	for part := range strings.SplitSeq(strings.TrimPrefix(rt.path, base), "/") {
		if part != "" && !strings.HasPrefix(part, "{") {
			words = append(words, strings.TrimSuffix(part, ".json"))
		}
	}
	if strings.HasSuffix(rt.path, "{name}") {
		words = append(words, "one")
	}
	return strings.Join(words, "-")
}

func (g *generator) content(mediaType string, t reflect.Type) map[string]any {
	if mediaType == "" {
		mediaType = "application/json"
	}
	var s schema
	switch {
	case t != nil:
		s = g.ref(t)
	case strings.HasSuffix(mediaType, "json"):
		s = schema{"type": "object"}
	default:
		s = schema{"type": "string"}
	}
	return map[string]any{mediaType: map[string]any{"schema": s}}
}

var (
	sizeType = typeOf[api.Size]()
	timeType = typeOf[time.Time]()
)

// ref returns the schema of a type, by reference if it is a named struct.
func (g *generator) ref(t reflect.Type) schema {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t {
	case sizeType:
		return schema{"type": []string{"integer", "string"}, "description": "bytes, or a number with K, M, G or T such as 512M"}
	case timeType:
		return schema{"type": "string", "format": "date-time"}
	}
	switch t.Kind() {
	case reflect.Struct:
		if t.Name() == "" { // such as the status of kinds that have none
			return g.object(t)
		}
		name := schemaName(t)
		if _, known := g.schemas[name]; !known {
			g.schemas[name] = nil // it may contain itself
			g.schemas[name] = g.object(t)
		}
		return schema{"$ref": "#/components/schemas/" + name}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return schema{"type": "string", "contentEncoding": "base64"}
		}
		return schema{"type": "array", "items": g.ref(t.Elem())}
	case reflect.Map:
		return schema{"type": "object", "additionalProperties": g.ref(t.Elem())}
	case reflect.Interface:
		return schema{"type": "object"}
	}
	return schema{"type": jsonName(t)}
}

// object describes a struct from the tags of its fields.
func (g *generator) object(t reflect.Type) schema {
	props := schema{}
	var required []string
	defaulted := strings.HasSuffix(t.Name(), "Spec") // SetDefaults fills what is left out
	for f := range fieldsOf(t) {
		p := g.ref(f.Type)
		described(p, f.Tag)
		props[jsonField(f)] = p
		tag := f.Tag.Get("json")
		if !defaulted && !strings.Contains(tag, "omitempty") && !strings.Contains(tag, "omitzero") && f.Tag.Get("readOnly") == "" && jsonField(f) != "status" && jsonField(f) != "spec" {
			required = append(required, jsonField(f))
		}
	}
	s := schema{"type": "object", "properties": props, "additionalProperties": false}
	if required != nil {
		s["required"] = required
	}
	return s
}

func described(p schema, tag reflect.StructTag) {
	if doc := tag.Get("doc"); doc != "" {
		p["description"] = doc
	}
	if list := tag.Get("enum"); list != "" {
		p["enum"] = strings.Split(list, ",")
	}
	if tag.Get("readOnly") == "true" {
		p["readOnly"] = true
	}
	for _, key := range []string{"minimum", "maximum", "maxLength", "maxItems"} {
		if n, err := strconv.ParseInt(tag.Get(key), 10, 64); err == nil {
			p[key] = n
		}
	}
}

// schemaName names the generic types after what they hold: Object[VMSpec,…]
// is VM, a list of it VMList.
func schemaName(t reflect.Type) string {
	name, args, isGeneric := strings.Cut(t.Name(), "[")
	switch {
	case !isGeneric:
		return strings.ToUpper(name[:1]) + name[1:]
	case name == "Object":
		spec, _ := t.FieldByName("Spec")
		return strings.TrimSuffix(spec.Type.Name(), "Spec")
	case name == "List":
		items, _ := t.FieldByName("Items")
		return schemaName(items.Type.Elem()) + "List"
	}
	return name + args
}

func (s *Server) serveOpenAPI(q *request) error {
	q.w.Header().Set("Content-Type", "application/json")
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write(s.openAPI) // a failure means that the client is gone
	return nil
}
