// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"slices"
	"strconv"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

const (
	// maxVNCFrame is the largest message of a viewer: a long clipboard.
	maxVNCFrame = 1 << 20
	// vncProtocol is what noVNC and websockify call a stream of binary frames.
	vncProtocol = "binary"
)

// consoleRoutes are the screen and the tickets.
func (r *vmResource) consoleRoutes() []route {
	one := base + "vms/{name}"
	withTicket := append(slices.Clone(oneParams), "ticket")
	ticket := typeOf[api.ConsoleTicket]()
	return []route{
		{method: http.MethodGet, path: one + "/vnc", need: needOperator, handle: r.vnc, stream: true, ticket: api.ConsoleVNC, verb: "vnc",
			summary: "The screen as a WebSocket of binary frames that carry RFB (subprotocol " + vncProtocol + ")", params: withTicket,
			produces: "application/octet-stream", status: http.StatusSwitchingProtocols},
		{method: http.MethodPost, path: one + "/vnc", need: needOperator, handle: r.ticket(api.ConsoleVNC, "/vnc"),
			summary: "Take a ticket that opens the screen once", params: saveParams, out: ticket, status: http.StatusCreated},
		{method: http.MethodPost, path: one + "/console", need: needOperator, handle: r.ticket(api.ConsoleSerial, "/console"),
			summary: "Take a ticket that opens the serial console once", params: saveParams, out: ticket, status: http.StatusCreated},
		{method: http.MethodGet, path: one + "/screenshot", need: needViewer, handle: r.screenshot,
			summary: "What is on the screen, as PNG", params: oneParams, produces: "image/png", status: http.StatusOK},
	}
}

// hasConsole refuses unless the VM may have a process to show.
func hasConsole(vm *api.VM) error {
	switch vm.Status.Phase {
	case api.VMCreating, api.VMStopped, api.VMFailed, api.VMDeleting:
		return api.Errorf(api.CodeRefused, "vm %s is not running, it is %s", vm.Meta.Name, phaseText(vm))
	}
	return nil
}

func noDisplay(vm *api.VM) error {
	return api.Errorf(api.CodeRefused, "vm %s has no screen: its spec.display is none; stop it and set display to vnc", vm.Meta.Name)
}

// screenOwner returns the VM of a call about its screen and its node.
func (r *vmResource) screenOwner(q *request) (api.VM, string, error) {
	vm, node, err := r.consoleOwner(q)
	if err == nil {
		err = hasConsole(&vm)
	}
	if err == nil && !screenOf(&vm).Shown() {
		err = noDisplay(&vm)
	}
	if err != nil && q.who.ticket {
		err = errWrongTicket // a stranger learns nothing about VMs
	}
	return vm, node, err
}

// vnc answers GET /vms/{name}/vnc.
func (r *vmResource) vnc(q *request) error {
	if !wantsWebSocket(q.r) {
		return api.Invalid("Upgrade", "the screen is a WebSocket; see /screenshot for a picture")
	}
	vm, node, err := r.screenOwner(q)
	if err != nil {
		return err
	}
	return q.serveConsole(vm, node, maxVNCFrame, []string{vncProtocol}, func() (Console, error) {
		return q.s.cfg.Consoles.Display(q.ctx(), vm.Meta.ID)
	})
}

// serveConsole carries a console to whoever may have it: from here, or through
// the node that runs the VM.
func (q *request) serveConsole(vm api.VM, node string, frame int64, protocols []string, open func() (Console, error)) error {
	if node != q.s.cfg.Node() {
		return q.proxy(node)
	}
	if !q.s.consoles.tryAcquire() {
		return api.Errorf(api.CodeRefused, "%d consoles are open on node %s; close one", maxConsoles, node)
	}
	defer q.s.consoles.release()
	if err := q.enter(vm.Meta.ID); err != nil {
		return err
	}
	con, err := open()
	if err != nil {
		return err
	}
	defer con.Close()
	ws, err := websocket.Accept(q.w, q.r, &websocket.AcceptOptions{Subprotocols: protocols})
	if err != nil {
		return nil // Accept has answered
	}
	defer func() { _ = ws.CloseNow() }()
	ws.SetReadLimit(frame)
	// Who opens a console is recorded, but without a quorum it opens all the same.
	written := make(chan struct{})
	go func() {
		defer close(written)
		if err := contain.Do(func() { q.auditAlone(api.KindVM, vm.Meta) }); err != nil {
			q.s.log.Error("audit event not written", "vm", vm.Meta.ID, "err", err)
		}
	}()
	q.carry(ws, con)
	<-written
	return nil
}

// screenshot answers GET /vms/{name}/screenshot.
func (r *vmResource) screenshot(q *request) error {
	vm, node, err := r.screenOwner(q)
	if err != nil {
		return err
	}
	if node != q.s.cfg.Node() {
		return q.proxy(node)
	}
	b, err := q.s.cfg.Consoles.Screenshot(q.ctx(), vm.Meta.ID)
	if err != nil {
		return err
	}
	q.w.Header().Set("Content-Type", "image/png")
	q.w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write(b) // a failure means that the client is gone
	return nil
}
