// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// consoleOwner returns the VM of a console call and the node it is bound to.
func (r *vmResource) consoleOwner(q *request) (api.VM, string, error) {
	v := q.db.Local() // a stranger's ticket is worth no round through the cluster
	if !q.who.ticket {
		var err error
		if v, err = q.view(fresh); err != nil {
			return api.VM{}, "", err
		}
	}
	vm, err := r.find(q, v)
	if err != nil {
		return vm, "", err
	}
	b, err := configdb.Bindings.Get(v, vm.Meta.ID)
	if err != nil {
		return vm, "", err
	}
	return vm, b.Spec.Node, nil
}

// consoleLog answers GET /vms/{name}/console/log.
func (r *vmResource) consoleLog(q *request) error {
	n, err := q.intParam("bytes", maxHistory, 1, maxHistory)
	if err != nil {
		return err
	}
	vm, node, err := r.consoleOwner(q)
	if err != nil {
		return err
	}
	if node != q.s.cfg.Node() {
		return q.proxy(node)
	}
	b, err := q.s.cfg.Consoles.History(vm.Meta.ID, n)
	if err != nil {
		return err
	}
	q.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write(b) // a failure means that the client is gone
	return nil
}

// console answers GET /vms/{name}/console.
func (r *vmResource) console(q *request) error {
	history, err := q.intParam("history", defaultHistory, 0, maxHistory)
	if err != nil {
		return err
	}
	if !wantsWebSocket(q.r) {
		return api.Invalid("Upgrade", "the console is a WebSocket; see /console/log for its past as text")
	}
	vm, node, err := r.consoleOwner(q)
	if err == nil {
		err = hasConsole(&vm)
	}
	if err != nil && q.who.ticket {
		return errWrongTicket // a stranger learns nothing about VMs
	}
	if err != nil {
		return err
	}
	return q.serveConsole(vm, node, maxConsoleFrame, nil, func() (Console, error) {
		return q.s.cfg.Consoles.Attach(q.ctx(), vm.Meta.ID, history)
	})
}

var (
	errConsoleEnded = errors.New("the console has ended")
	errClientGone   = errors.New("the client has left")
)

// carry copies both ways until one side ends. The reading goroutine ends with
// the context or the connection, and carry waits for it.
func (q *request) carry(ws *websocket.Conn, con Console) {
	ctx, cancel := context.WithCancelCause(q.ctx())
	read := make(chan struct{})
	go func() {
		defer close(read)
		cancel(contain.Call(func() error {
			for {
				_, p, err := ws.Read(ctx)
				if err != nil {
					return errClientGone
				}
				if err := con.Write(ctx, p); err != nil {
					return err
				}
			}
		}))
	}()
	err := q.output(ctx, ws, con)
	code, reason := websocket.StatusNormalClosure, errConsoleEnded.Error()
	switch {
	case errors.Is(err, errNotWelcome):
		code, reason = websocket.StatusPolicyViolation, err.Error()
	case !errors.Is(err, errConsoleEnded):
		code, reason = websocket.StatusGoingAway, "the connection to the console was lost"
	}
	_ = ws.Close(code, reason) // the client may be gone, which is as well
	cancel(err)
	<-read
	q.s.log.Debug("console ended", "err", err)
}

func (q *request) output(ctx context.Context, ws *websocket.Conn, con Console) error {
	tick := time.NewTicker(q.s.pingEvery)
	defer tick.Stop()
	for {
		select {
		case p, ok := <-con.Output():
			if !ok {
				return errConsoleEnded
			}
			if err := within(ctx, func(ctx context.Context) error { return ws.Write(ctx, websocket.MessageBinary, p) }); err != nil {
				return err
			}
		case <-tick.C:
			if !q.stillWelcome() {
				return errNotWelcome
			}
			if err := within(ctx, ws.Ping); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// within bounds one message to a client.
func within(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, streamWrite)
	defer cancel()
	return f(ctx)
}
