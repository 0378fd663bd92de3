// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

const (
	jsonType       = "application/json"
	mergePatchType = "application/merge-patch+json"
	// maxPages bounds how many pages of one list are followed.
	maxPages = 10_000
)

// Scoped reports whether objects of a kind belong to a project. The project
// is not sent for the others.
func Scoped(k api.Kind) bool {
	switch k {
	case api.KindNode, api.KindPool, api.KindToken, api.KindUser, api.KindCluster, api.KindNetwork, api.KindIPPool, api.KindUplink,
		api.KindEvent, api.KindAlert, api.KindRule, api.KindReceiver,
		api.KindPowerDevice, api.KindPowerAction, api.KindFailover:
		return false
	}
	return true
}

// Result is the answer to a change: the object, and for long work its task.
type Result struct {
	// Object as the server sent it; empty after a deletion that is complete.
	Object json.RawMessage
	// Task to follow, nil when the change is complete.
	Task *api.Task
	// TaskID is the task of a change whose answer is the object itself.
	TaskID string
	// Warning is what the caller should know of a change that was made all the
	// same; empty if there is nothing.
	Warning string
	// Body is the whole answer.
	Body []byte
	// Created is set when the object is new.
	Created bool
}

// ListOptions select objects.
type ListOptions struct {
	Project string // empty: the default project; "*": all
	Labels  string // k=v,k2=v2
	Fields  string // status.phase=running,spec.ha=restart
	Limit   int    // the most objects returned, 0 for all
	Stale   bool   // answer from the node's replica at once
}

// List is the answer to a list request, all pages in one.
type List struct {
	Kind     string            `json:"kind"`
	Items    []json.RawMessage `json:"items"`
	Continue string            `json:"continue,omitempty"`
	Revision uint64            `json:"revision"`
	Reply    *Reply            `json:"-"` // of the last page
}

// As decodes an object of a known kind.
func As[S, T any](raw json.RawMessage) (api.Object[S, T], error) {
	var o api.Object[S, T]
	if err := json.Unmarshal(raw, &o); err != nil {
		return o, api.Errorf(api.CodeInternal, "decode the server's object: %w", err)
	}
	return o, nil
}

// MetaOf decodes the metadata of an object of any kind.
func MetaOf(raw json.RawMessage) api.Meta {
	var o struct {
		Meta api.Meta `json:"meta"`
	}
	_ = json.Unmarshal(raw, &o) // an object without readable metadata has none to show
	return o.Meta
}

// List returns all objects of a kind that the options select.
func (c *Client) List(ctx context.Context, kind api.Kind, o ListOptions) (*List, error) {
	q := projectQuery(kind, o.Project)
	for k, v := range map[string]string{"labels": o.Labels, "fields": o.Fields} {
		if v != "" {
			q.Set(k, v)
		}
	}
	if o.Stale {
		q.Set("consistency", "stale")
	}
	out := &List{Kind: string(kind) + "List", Items: []json.RawMessage{}}
	for range maxPages {
		if o.Limit > 0 {
			q.Set("limit", strconv.Itoa(min(o.Limit-len(out.Items), 1000)))
		}
		reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: "/" + kind.Plural(), Query: q})
		if err != nil {
			return nil, err
		}
		var page List
		if err := json.Unmarshal(reply.Body, &page); err != nil {
			return nil, api.Errorf(api.CodeInternal, "decode the list of %s: %w", kind.Plural(), err)
		}
		out.Items = append(out.Items, page.Items...)
		out.Revision, out.Reply, out.Continue = page.Revision, reply, page.Continue
		if page.Continue == "" || o.Limit > 0 && len(out.Items) >= o.Limit {
			return out, nil
		}
		q.Set("continue", page.Continue)
	}
	return nil, api.Errorf(api.CodeTooLarge, "the list of %s has more than %d pages; select with --labels", kind.Plural(), maxPages)
}

// Get returns one object by name or ID.
func (c *Client) Get(ctx context.Context, kind api.Kind, project, name string) (json.RawMessage, *Reply, error) {
	path, err := objectPath(kind, name)
	if err != nil {
		return nil, nil, err
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path, Query: projectQuery(kind, project)})
	if err != nil {
		return nil, nil, err
	}
	if !json.Valid(reply.Body) {
		return nil, nil, api.Errorf(api.CodeInternal, "get %s %s: the answer of node %s is not JSON", kind, name, reply.Node)
	}
	return reply.Body, reply, nil
}

// AwaitTask is Get of a task that is answered when the task has ended, or after
// the given time.
func (c *Client) AwaitTask(ctx context.Context, project, id string, wait time.Duration) (json.RawMessage, error) {
	path, err := objectPath(api.KindTask, id)
	if err != nil {
		return nil, err
	}
	query := projectQuery(api.KindTask, project)
	query.Set("wait", wait.String())
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path, Query: query})
	if err != nil {
		return nil, err
	}
	if !json.Valid(reply.Body) {
		return nil, api.Errorf(api.CodeInternal, "get task %s: the answer of node %s is not JSON", id, reply.Node)
	}
	return reply.Body, nil
}

// Create posts a new object.
func (c *Client) Create(ctx context.Context, kind api.Kind, project string, body any) (*Result, error) {
	r, err := c.post(ctx, "/"+kind.Plural(), projectQuery(kind, project), body)
	if r != nil {
		r.Created = true
	}
	return r, err
}

// Patch changes the given fields of an object (RFC 7396). With ifMatch above
// zero it fails with code conflict unless the object is at that revision.
func (c *Client) Patch(ctx context.Context, kind api.Kind, project, name string, ifMatch uint64, patch any) (*Result, error) {
	path, err := objectPath(kind, name)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(patch)
	if err != nil {
		return nil, fmt.Errorf("encode patch of %s %s: %w", kind, name, err)
	}
	h := http.Header{"Content-Type": {mergePatchType}}
	if ifMatch > 0 {
		h.Set("If-Match", etag(ifMatch))
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodPatch, Path: path, Query: projectQuery(kind, project), Header: h, Body: b})
	if err != nil {
		return nil, err
	}
	return resultOf(reply), nil
}

// Delete removes an object. force is for a running VM and for a node that will
// not come back.
func (c *Client) Delete(ctx context.Context, kind api.Kind, project, name string, force bool) (*Result, error) {
	path, err := objectPath(kind, name)
	if err != nil {
		return nil, err
	}
	q := projectQuery(kind, project)
	if force {
		q.Set("force", "true")
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodDelete, Path: path, Query: q})
	if err != nil {
		return nil, err
	}
	return resultOf(reply), nil
}

// Action posts a verb, such as start, to an object. body may be nil.
func (c *Client) Action(ctx context.Context, kind api.Kind, project, name, verb string, body any) (*Result, error) {
	path, err := objectPath(kind, name)
	if err != nil {
		return nil, err
	}
	return c.post(ctx, path+"/"+verb, projectQuery(kind, project), body)
}

// ClusterAction does something that is about no object, such as "reboot".
func (c *Client) ClusterAction(ctx context.Context, verb string, body any) (*Result, error) {
	return c.post(ctx, "/cluster/"+verb, nil, body)
}

// Upload delivers the content of an image and returns the image when it is
// ready. sha256 may be empty.
func (c *Client) Upload(ctx context.Context, project, image, sha256 string, s *Stream) (json.RawMessage, error) {
	path, err := objectPath(api.KindImage, image)
	if err != nil {
		return nil, err
	}
	q := projectQuery(api.KindImage, project)
	if sha256 != "" {
		q.Set("sha256", sha256)
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodPut, Path: path + "/content", Query: q, Stream: s})
	if err != nil {
		return nil, err
	}
	return reply.Body, nil
}

// Call sends a JSON body (or none) and decodes the answer into out, if that is
// not nil. It serves what is not an object of a kind, such as /cluster.
func (c *Client) Call(ctx context.Context, method, path string, body, out any) (*Reply, error) {
	r := Request{Method: method, Path: path}
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode body for %s: %w", path, err)
		}
		r.Body, r.Header = b, http.Header{"Content-Type": {jsonType}}
	}
	reply, err := c.Do(ctx, r)
	if err != nil {
		return nil, err
	}
	if out != nil {
		if err := json.Unmarshal(reply.Body, out); err != nil {
			return nil, api.Errorf(api.CodeInternal, "decode the answer of %s: %w", path, err)
		}
	}
	return reply, nil
}

func (c *Client) post(ctx context.Context, path string, q url.Values, body any) (*Result, error) {
	r := Request{Method: http.MethodPost, Path: path, Query: q}
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode body for %s: %w", path, err)
		}
		r.Body, r.Header = b, http.Header{"Content-Type": {jsonType}}
	}
	reply, err := c.Do(ctx, r)
	if err != nil {
		return nil, err
	}
	return resultOf(reply), nil
}

// resultOf tells an answer with a task from one that is the object itself.
// headerTask names the task that carries out a change.
const headerTask = "Muster-Task"

func resultOf(reply *Reply) *Result {
	r := &Result{Body: reply.Body, TaskID: reply.Header.Get(headerTask), Warning: warningOf(reply.Header)}
	var accepted struct {
		Task   *api.Task       `json:"task"`
		Object json.RawMessage `json:"object"`
	}
	err := json.Unmarshal(reply.Body, &accepted)
	if err == nil && accepted.Task != nil && accepted.Task.Meta.ID != "" {
		r.Task, r.Object = accepted.Task, accepted.Object
		return r
	}
	if json.Valid(reply.Body) {
		r.Object = reply.Body
	}
	return r
}

// warningOf returns the text of a Warning header (RFC 7234, section 5.5).
func warningOf(h http.Header) string {
	const before = "299 muster "
	text, ok := strings.CutPrefix(h.Get("Warning"), before)
	if !ok {
		return ""
	}
	if plain, err := strconv.Unquote(text); err == nil {
		return plain
	}
	return text
}

func projectQuery(kind api.Kind, project string) url.Values {
	q := url.Values{}
	if project != "" && Scoped(kind) {
		q.Set("project", project)
	}
	return q
}

// objectPath checks the name here: "../x" must not reach another path.
func objectPath(kind api.Kind, name string) (string, error) {
	if err := api.ValidName("name", name); err != nil {
		return "", err
	}
	return "/" + kind.Plural() + "/" + url.PathEscape(name), nil
}

func etag(rev uint64) string { return strconv.Quote(strconv.FormatUint(rev, 10)) }
