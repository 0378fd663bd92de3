// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
)

// RawItem is one key of the configuration database.
type RawItem struct {
	Key      string `json:"key"`
	Value    []byte `json:"value"`
	Revision uint64 `json:"revision"`
}

// RawList is the answer to a list of keys, all pages in one.
type RawList struct {
	Items    []RawItem `json:"items"`
	Continue string    `json:"continue,omitempty"`
	Revision uint64    `json:"revision"`
}

// RawResult is the answer to a write.
type RawResult struct {
	Key      string `json:"key"`
	Revision uint64 `json:"revision"`
	Created  bool   `json:"-"`
}

// RawCondition is what must hold for a write; the zero value is no condition.
type RawCondition struct {
	Revision uint64 // the key is at this revision
	Absent   bool   // the key does not exist
}

func (w RawCondition) header() http.Header {
	h := http.Header{}
	if w.Absent {
		h.Set("If-None-Match", "*")
	} else if w.Revision > 0 {
		h.Set("If-Match", etag(w.Revision))
	}
	return h
}

// RawGet returns the bytes of a key and their revision. stale asks for the
// node's own copy, without a word from the leader.
func (c *Client) RawGet(ctx context.Context, key string, stale bool) (RawItem, *Reply, error) {
	q := url.Values{}
	if stale {
		q.Set("consistency", "stale")
	}
	path, err := rawPath(key)
	if err != nil {
		return RawItem{}, nil, err
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path, Query: q, Header: http.Header{"Accept": {"*/*"}}})
	if err != nil {
		return RawItem{}, nil, err
	}
	rev, err := strconv.ParseUint(strings.Trim(reply.Header.Get("ETag"), `"`), 10, 64)
	if err != nil {
		return RawItem{}, nil, api.Errorf(api.CodeInternal, "get raw key %q: the answer has no ETag", key)
	}
	return RawItem{Key: key, Value: reply.Body, Revision: rev}, reply, nil
}

// RawPut writes the bytes of a key.
func (c *Client) RawPut(ctx context.Context, key string, value []byte, when RawCondition) (RawResult, error) {
	path, err := rawPath(key)
	if err != nil {
		return RawResult{}, err
	}
	h := when.header()
	h.Set("Content-Type", "application/octet-stream")
	if value == nil {
		value = []byte{}
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodPut, Path: path, Header: h, Body: value})
	if err != nil {
		return RawResult{}, err
	}
	out := RawResult{Created: reply.Status == http.StatusCreated}
	if err := json.Unmarshal(reply.Body, &out); err != nil {
		return out, api.Errorf(api.CodeInternal, "decode the answer to a raw write: %w", err)
	}
	return out, nil
}

// RawDelete removes a key.
func (c *Client) RawDelete(ctx context.Context, key string, when RawCondition) error {
	path, err := rawPath(key)
	if err != nil {
		return err
	}
	_, err = c.Do(ctx, Request{Method: http.MethodDelete, Path: path, Header: when.header()})
	return err
}

// RawList returns all keys below a prefix in order.
func (c *Client) RawList(ctx context.Context, prefix string, limit int) (RawList, error) {
	out := RawList{Items: []RawItem{}}
	q := url.Values{"prefix": {prefix}}
	for range maxPages {
		if limit > 0 {
			q.Set("limit", strconv.Itoa(min(limit-len(out.Items), 1000)))
		}
		reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: "/raw/", Query: q})
		if err != nil {
			return RawList{}, err
		}
		var page RawList
		if err := json.Unmarshal(reply.Body, &page); err != nil {
			return RawList{}, api.Errorf(api.CodeInternal, "decode the list of raw keys: %w", err)
		}
		out.Items = append(out.Items, page.Items...)
		out.Revision, out.Continue = page.Revision, page.Continue
		if page.Continue == "" || limit > 0 && len(out.Items) >= limit {
			return out, nil
		}
		q.Set("continue", page.Continue)
	}
	return RawList{}, api.Errorf(api.CodeTooLarge, "there are more than %d pages of keys; give a longer prefix", maxPages)
}

// rawPath keeps slashes as they are, unless the key has parts that routers
// clean away ("a//b", "../c"): then they are escaped as well.
func rawPath(key string) (string, error) {
	if key == "" {
		return "", api.Invalid("key", "is missing; give the key to read or write")
	}
	parts := strings.Split(key, "/")
	sep := "/"
	for i, p := range parts {
		if p == "" || p == "." || p == ".." {
			sep = "%2F"
		}
		parts[i] = url.PathEscape(p)
	}
	path := strings.Join(parts, sep)
	if sep == "%2F" {
		path = strings.ReplaceAll(path, ".", "%2E")
	}
	return "/raw/" + path, nil
}
