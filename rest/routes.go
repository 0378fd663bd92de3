// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/kvwire"
)

// base is the path below which the interface is.
const base = "/api/v1/"

// route is one method of one path. The table of routes decides who may call
// what, and openapi.json is made from it.
type route struct {
	method, path string
	need         access
	handle       func(*request) error
	summary      string
	operation    string   // ID in openapi.json, if the one of the path is taken
	verb         string   // in audit events, if not what method and path say
	params       []string // of the query, described in paramDocs
	in, out      reflect.Type
	consumes     string // of the body; application/json if in is set
	produces     string // of the answer; application/json if out is set
	status       int    // of the answer when all is well
	// stream: the answer has no deadline as a whole.
	stream bool
	// ticket is the kind of console whose tickets are a login here, too.
	ticket api.ConsoleKind
	// early: answered before the host is in a cluster, too.
	early bool
}

// muxPattern turns {key…} into a pattern for the rest of the path.
func muxPattern(path string) string { return strings.Replace(path, "{key}", "{key:.*}", 1) }

func allowed(methods map[string]*route) string {
	return strings.Join(slices.Sorted(maps.Keys(methods)), ", ")
}

func typeOf[T any]() reflect.Type { return reflect.TypeFor[T]() }

// Queries that many routes have.
var (
	readParams = []string{"consistency", "minRevision"}
	listParams = []string{"project", "labels", "fields", "limit", "continue", "consistency", "minRevision"}
	oneParams  = []string{"project", "consistency", "minRevision"}
	longParams = []string{"project", "wait", "minRevision"}
	saveParams = []string{"project", "minRevision"}
)

func (s *Server) routes() []route {
	out := s.plainRoutes()
	out = append(out, s.clusterRoutes()...)
	out = append(out, s.authorityRoutes()...)
	out = append(out, s.configRoutes()...)
	out = append(out, s.backupRoutes()...)
	out = append(out, s.haRoutes()...)
	out = append(out, rollingRoutes()...)
	vms, images, volumes := newVMs(), newImages(), newVolumes()
	pools, nodes, tasks, tokens := newPools(), newNodes(), newTasks(), newTokens()
	networks, ippools, uplinks := newNetworks(), newIPPools(), newUplinks()
	for kind, rs := range map[api.Kind]kindReader{
		api.KindVM: vms, api.KindImage: images, api.KindVolume: volumes, api.KindPool: pools,
		api.KindNode: nodes, api.KindTask: tasks, api.KindToken: tokens,
		api.KindNetwork: networks, api.KindIPPool: ippools, api.KindUplink: uplinks,
	} {
		s.kinds[kind] = rs
	}
	out = append(out, reads(&vms.resource)...)
	out = append(out, writes(&vms.resource, needOperator)...)
	out = append(out, vms.routes()...)
	snapshots := newSnapshots(vms)
	s.kinds[api.KindSnapshot] = snapshots
	out = append(out, snapshots.routes()...)

	out = append(out, reads(&images.resource)...)
	out = append(out, writes(&images.resource, needOperator)...)
	out = append(out,
		makes(&images.resource, needOperator, images.create),
		removesLong(&images.resource, needOperator, func(q *request) error { return images.remove(q, api.ActionImageDelete) }),
		route{
			method: http.MethodPut, path: base + "images/{name}/content", need: needOperator, handle: images.upload,
			summary: "Upload the content of an image", params: []string{"project", "sha256"},
			consumes: "application/octet-stream", out: typeOf[api.Image](), status: http.StatusOK, stream: true, verb: "upload",
		})

	out = append(out, reads(&volumes.resource)...)
	out = append(out, writes(&volumes.resource, needOperator)...)
	out = append(out,
		makes(&volumes.resource, needOperator, volumes.create), volumes.moveRoute(),
		removesLong(&volumes.resource, needOperator, func(q *request) error { return volumes.remove(q, api.ActionVolumeDelete) }))

	out = append(out, reads(&pools.resource)...)
	out = append(out, writes(&pools.resource, needAdministrator)...)
	pool := makes(&pools.resource, needAdministrator, pools.create)
	pool.out, pool.status, pool.params = typeOf[api.Pool](), http.StatusCreated, saveParams
	out = append(out, pool, removes(&pools.resource, pools.delete))

	out = append(out, networks.routes()...)
	out = append(out, ippools.routes()...)
	out = append(out, uplinks.routes()...)

	out = append(out, reads(&nodes.resource)...)
	out = append(out, writes(&nodes.resource, needAdministrator)...)
	node := removes(&nodes.resource, nodes.delete)
	node.params = append(slices.Clone(node.params), "force")
	out = append(out, node, nodes.evacuateRoute(), nodes.rebootRoute(api.RebootHost), nodes.rebootRoute(api.ShutdownHost), nodes.rebootPlanRoute(api.RebootHost), nodes.rebootPlanRoute(api.ShutdownHost), route{method: http.MethodGet, path: base + "nodes/{name}/facts", need: needViewer, handle: nodes.facts,
		summary: "What a node can give its VMs: CPU, NUMA, memory, devices, QEMU", params: oneParams, out: typeOf[api.NodeFacts](), status: http.StatusOK})

	task := reads(&tasks.resource)
	task[1].handle, task[1].params = tasks.get, append(slices.Clone(oneParams), "wait")
	out = append(out, task...)
	out = append(out, tasks.cancelRoute())

	out = append(out, reads(&tokens.resource)...)
	token := makes(&tokens.resource, needAdministrator, tokens.create)
	token.out, token.status, token.params = typeOf[TokenReply](), http.StatusCreated, saveParams
	out = append(out, token, removes(&tokens.resource, tokens.delete))

	events, alerts, rules, receivers := newEvents(), newAlerts(), newRules(), s.newReceivers()
	s.kinds[api.KindEvent], s.kinds[api.KindAlert], s.kinds[api.KindRule], s.kinds[api.KindReceiver] = events, alerts, rules, receivers
	out = append(out, events.routes()...)
	out = append(out, alerts.routes()...)
	out = append(out, rules.routes()...)
	out = append(out, s.receiverRoutes(receivers)...)
	out = append(out, s.metricsRoute())
	out = append(out, s.powerRoutes(nodes)...)
	out = append(out, s.failoverRoutes()...)
	out = append(out, s.drillRoutes()...)

	users := newUsers()
	s.kinds[api.KindUser] = users
	return append(out, userRoutes(users)...)
}

// plainRoutes are those of no kind.
func (s *Server) plainRoutes() []route {
	raw := base + "raw/{key}"
	return []route{
		{method: http.MethodGet, path: "/healthz", need: needLoopback, early: true, handle: healthz, produces: "text/plain",
			summary: "Whether the daemon answers", status: http.StatusOK},
		{method: http.MethodGet, path: "/readyz", need: needLoopback, handle: readyz, produces: "text/plain",
			summary: "Whether this node can take any call", status: http.StatusOK},
		{method: http.MethodGet, path: "/metrics", need: needLoopback, handle: s.serveMetrics, produces: "text/plain",
			summary: "Metrics for Prometheus", status: http.StatusOK},
		{method: http.MethodGet, path: base + "services", need: needViewer, handle: serveServices, params: []string{"node"},
			summary: "How the supervised parts of the daemons fare, on every node", out: typeOf[ServiceList](), status: http.StatusOK},
		{method: http.MethodGet, path: base + "openapi.json", need: needViewer, handle: s.serveOpenAPI, produces: "application/json",
			summary: "This description", status: http.StatusOK},
		{method: http.MethodGet, path: base + "watch", need: needViewer, handle: watch, stream: true,
			summary: "Follow changes, as a WebSocket or server-sent events", params: []string{"kinds", "since", "minRevision"},
			out: typeOf[Event](), produces: "text/event-stream", status: http.StatusOK},
		{method: http.MethodGet, path: raw, need: needAdministrator, handle: rawGet, produces: "application/octet-stream",
			summary: "Read a key; with an empty key, list keys", params: []string{"prefix", "limit", "continue", "consistency", "minRevision"}, status: http.StatusOK},
		{method: http.MethodGet, path: base + "kv", need: needAdministrator, handle: kv, stream: true, produces: "application/octet-stream",
			summary: "Read and write many keys over one WebSocket, in binary frames (subprotocol " + kvwire.Protocol + ")", status: http.StatusSwitchingProtocols},
		{method: http.MethodPut, path: raw, need: needAdministrator, handle: rawPut, consumes: "application/octet-stream",
			summary: "Write a key", out: typeOf[RawReply](), status: http.StatusOK},
		{method: http.MethodDelete, path: raw, need: needAdministrator, handle: rawDelete,
			summary: "Remove a key", status: http.StatusNoContent},
	}
}

func (s *Server) clusterRoutes() []route {
	path := base + "cluster"
	return []route{
		{method: http.MethodGet, path: path, need: needViewer, handle: s.clusterStatus, summary: "The cluster as this node sees it",
			out: typeOf[api.ClusterStatus](), status: http.StatusOK, params: readParams[1:]},
		{method: http.MethodPost, path: path + "/tokens", need: needAdministrator, handle: s.joinToken, summary: "Create a token that lets one node join",
			in: typeOf[api.JoinTokenRequest](), out: typeOf[api.JoinToken](), status: http.StatusCreated},
		{method: http.MethodPost, path: path + "/transfer", need: needAdministrator, handle: s.clusterTransfer, summary: "Let another voter lead the configuration database",
			in: typeOf[api.TransferRequest](), out: typeOf[api.TransferResult](), status: http.StatusOK},
		{method: http.MethodPost, path: path + "/init", need: needLocal, early: true, handle: s.clusterInit, summary: "Found a cluster on this host (unix socket only)",
			in: typeOf[api.InitRequest](), out: typeOf[api.InitResult](), status: http.StatusOK, verb: "init"},
		{method: http.MethodPost, path: path + "/join", need: needLocal, early: true, handle: s.clusterJoin, summary: "Join a cluster with this host (unix socket only)",
			in: typeOf[api.JoinRequest](), out: typeOf[api.JoinResult](), status: http.StatusOK},
		{method: http.MethodPost, path: path + "/admit", need: needNothing, handle: s.clusterAdmit, summary: "Ask to be taken in, with a join token (between nodes)",
			in: typeOf[api.AdmitRequest](), out: typeOf[api.AdmitResult](), status: http.StatusOK, verb: "join"},
	}
}

func (r *vmResource) routes() []route {
	one := base + "vms/{name}"
	del := removesLong(&r.resource, needOperator, r.delete)
	del.params = append(slices.Clone(del.params), "force")
	out := []route{makes(&r.resource, needOperator, r.create), del}
	for _, a := range []struct {
		verb, summary string
		action        api.Action
	}{
		{"start", "Start a VM", api.ActionVMStart}, {"stop", "Stop a VM", api.ActionVMStop}, {"reboot", "Reset a running VM", api.ActionVMReboot},
		{"pause", "Halt the CPUs of a running VM", api.ActionVMPause}, {"resume", "Let a paused VM go on", api.ActionVMResume},
	} {
		out = append(out, route{method: http.MethodPost, path: one + "/" + a.verb, need: needOperator, handle: r.action(a.action),
			summary: a.summary, params: longParams, in: typeOf[vmRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted})
	}
	out = append(out, r.consoleRoutes()...)
	out = append(out, r.agentRoutes()...)
	out = append(out, r.migrationRoutes()...)
	out = append(out, r.moveRoute())
	return append(out,
		route{method: http.MethodPost, path: one + "/clone", need: needOperator, handle: r.clone, summary: "Make a new VM with copies of the disks of a VM",
			params: longParams, in: typeOf[CloneRequest](), out: typeOf[TaskReply](), status: http.StatusAccepted},
		route{method: http.MethodPost, path: one + "/drill", need: needOperator, handle: r.drill, summary: "End the VM as a power cut would, to see it restart on another node",
			params: longParams, out: typeOf[TaskReply](), status: http.StatusAccepted, verb: "drill"},
		route{method: http.MethodPost, path: one + "/suspend", need: needOperator, handle: r.suspend, summary: "Save the memory of a VM to disk and end it",
			params: longParams, out: typeOf[TaskReply](), status: http.StatusAccepted},
		// Typing into a guest changes it: more than a viewer may do.
		route{method: http.MethodGet, path: one + "/console", need: needOperator, handle: r.console, stream: true, ticket: api.ConsoleSerial, verb: "console",
			summary: "The serial console as a WebSocket of binary frames", params: append(slices.Clone(oneParams), "history", "ticket"),
			produces: "application/octet-stream", status: http.StatusSwitchingProtocols},
		route{method: http.MethodGet, path: one + "/qemu", need: needOperator, handle: r.qemu,
			summary: "The arguments of a running VM's QEMU and the last messages on its monitor", params: append(slices.Clone(oneParams), "log"),
			out: typeOf[api.VMQEMU](), status: http.StatusOK},
		route{method: http.MethodGet, path: one + "/console/log", need: needViewer, handle: r.consoleLog,
			summary: "The last output of the serial console", params: append(slices.Clone(oneParams), "bytes"),
			produces: "text/plain", status: http.StatusOK})
}

func (rs *resource[S, T]) plural() string { return base + rs.table.Kind.Plural() }

// reads returns list and get.
func reads[S, T any](rs *resource[S, T]) []route {
	kind := string(rs.table.Kind)
	return []route{
		{method: http.MethodGet, path: rs.plural(), need: rs.need, handle: rs.list, summary: "List " + rs.table.Kind.Plural(),
			params: listParams, out: typeOf[List[api.Object[S, T]]](), status: http.StatusOK},
		{method: http.MethodGet, path: rs.plural() + "/{name}", need: rs.need, handle: rs.get, summary: "Show one " + kind,
			params: oneParams, out: typeOf[api.Object[S, T]](), status: http.StatusOK},
	}
}

// writes returns put and patch.
func writes[S, T any](rs *resource[S, T], need access) []route {
	t, kind := typeOf[api.Object[S, T]](), string(rs.table.Kind)
	return []route{
		{method: http.MethodPut, path: rs.plural() + "/{name}", need: need, handle: rs.put, summary: "Replace labels and spec of a " + kind,
			params: saveParams, in: t, out: t, status: http.StatusOK},
		{method: http.MethodPatch, path: rs.plural() + "/{name}", need: need, handle: rs.patch, summary: "Change labels and spec of a " + kind,
			params: saveParams, consumes: "application/merge-patch+json", out: t, status: http.StatusOK},
	}
}

func makes[S, T any](rs *resource[S, T], need access, handle func(*request) error) route {
	return route{method: http.MethodPost, path: rs.plural(), need: need, handle: handle, summary: "Create a " + string(rs.table.Kind),
		params: longParams, in: typeOf[api.Object[S, T]](), out: typeOf[TaskReply](), status: http.StatusAccepted}
}

func removes[S, T any](rs *resource[S, T], handle func(*request) error) route {
	return route{method: http.MethodDelete, path: rs.plural() + "/{name}", need: needAdministrator, handle: handle,
		summary: "Delete a " + string(rs.table.Kind), params: saveParams, status: http.StatusNoContent}
}

func removesLong[S, T any](rs *resource[S, T], need access, handle func(*request) error) route {
	rt := removes(rs, handle)
	rt.need, rt.params, rt.out, rt.status = need, longParams, typeOf[TaskReply](), http.StatusAccepted
	return rt
}
