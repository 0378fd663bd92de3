// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/muster-vm/muster/api"
)

const (
	// maxScreenshot is the largest picture that is taken.
	maxScreenshot = 32 << 20
	// vncProtocol is the WebSocket subprotocol of a screen.
	vncProtocol = "binary"
)

// VMCall makes a call below a VM, such as /agent. in and out may be nil. A call
// with a body is sent once: what it does in a guest is not done again because an
// answer was lost.
func (c *Client) VMCall(ctx context.Context, method, project, vm, sub string, q url.Values, in, out any) error {
	path, err := objectPath(api.KindVM, vm)
	if err != nil {
		return err
	}
	r := Request{Method: method, Path: path + sub, Query: projectQuery(api.KindVM, project), Once: in != nil}
	for k, v := range q {
		r.Query[k] = v
	}
	if in != nil {
		if r.Body, err = json.Marshal(in); err != nil {
			return err
		}
		r.Header = http.Header{"Content-Type": {jsonType}}
	}
	reply, err := c.Do(ctx, r)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(reply.Body, out); err != nil {
		return api.Errorf(api.CodeInternal, "%s %s: the answer cannot be read: %w", method, path+sub, err)
	}
	return nil
}

// VNC opens the screen of a VM with a ticket that it takes first. What is read
// and written is RFB.
func (c *Client) VNC(ctx context.Context, project, vm string) (*Console, error) {
	var t api.ConsoleTicket
	if err := c.VMCall(ctx, http.MethodPost, project, vm, "/vnc", nil, nil, &t); err != nil {
		return nil, err
	}
	path, err := objectPath(api.KindVM, vm)
	if err != nil {
		return nil, err
	}
	q := projectQuery(api.KindVM, project)
	q.Set("ticket", t.Ticket)
	s, err := c.dial(ctx, path+"/vnc", q, consoleFrame, vncProtocol)
	if err != nil {
		return nil, err
	}
	return &Console{s: s}, nil
}

// Screenshot returns what is on the screen of a VM, as PNG.
func (c *Client) Screenshot(ctx context.Context, project, vm string) (b []byte, err error) {
	path, err := objectPath(api.KindVM, vm)
	if err != nil {
		return nil, err
	}
	r := Request{Method: http.MethodGet, Path: path + "/screenshot", Query: projectQuery(api.KindVM, project)}
	err = c.Download(ctx, r, func(in io.Reader) error {
		b, err = io.ReadAll(io.LimitReader(in, maxScreenshot+1))
		if err == nil && len(b) > maxScreenshot {
			err = fmt.Errorf("the picture is larger than %d bytes", maxScreenshot)
		}
		return err
	})
	return b, err
}
