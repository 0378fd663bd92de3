// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/gorilla/mux"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Config is what a Server needs. All fields but Log and Now must be set.
type Config struct {
	// Version of the daemon, for openapi.json and metrics.
	Version string
	// Node returns the name of this node.
	Node func() string
	// DB returns the database, and false until this host is in a cluster.
	DB func() (configdb.DB, bool)

	Bootstrap Bootstrap
	Cluster   Cluster
	Authority Authority
	Placer    Placer
	Images    Images
	Consoles  Consoles
	Machines  Machines
	Peers     Peers
	Backups   Backups
	Disaster  Disaster
	HA        HA
	// Forecaster says what reboots would do.
	Forecaster Forecaster
	// Monitor may be nil: then there are no metrics but the server's own.
	Monitor Monitor
	// Power may be nil: then no device switches nodes.
	Power Power
	// PoolKeys may be nil: then there are no pools of type rbd.
	PoolKeys PoolKeys
	// PeerName returns the name of the node whose verified certificate came
	// with a request.
	PeerName func(*http.Request) (node string, ok bool)
	// NoQuorum returns what is known while this node reaches no majority, else nil;
	// may be nil itself.
	NoQuorum func() *api.QuorumLoss
	// Services returns how the supervised parts of this daemon fare.
	Services func() []api.ServiceStatus

	Log *slog.Logger
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

func (c *Config) check() error {
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"Node", c.Node != nil}, {"DB", c.DB != nil}, {"Bootstrap", c.Bootstrap != nil}, {"Cluster", c.Cluster != nil}, {"Authority", c.Authority != nil},
		{"Placer", c.Placer != nil}, {"Images", c.Images != nil}, {"Consoles", c.Consoles != nil}, {"Machines", c.Machines != nil}, {"Peers", c.Peers != nil},
		{"Backups", c.Backups != nil}, {"Disaster", c.Disaster != nil}, {"HA", c.HA != nil},
		{"PeerName", c.PeerName != nil}, {"Services", c.Services != nil},
	} {
		if !f.set {
			return fmt.Errorf("rest: Config.%s is not set", f.name)
		}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

// Server answers REST calls. It owns no goroutine besides those of requests.
type Server struct {
	cfg     Config
	log     *slog.Logger
	router  *mux.Router
	kinds   map[api.Kind]kindReader
	openAPI []byte
	metrics *metrics
	tokens  tokenCache
	tickets tickets

	watches, consoles, uploads, lane, backups semaphore
	// pingEvery is pingInterval, shorter in tests.
	pingEvery time.Duration
	// sendWithin is streamWrite, for watches; shorter in tests.
	sendWithin time.Duration
}

// New returns a server.
func New(cfg Config) (*Server, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, metrics: newMetrics(), kinds: map[api.Kind]kindReader{},
		watches: make(semaphore, maxWatches), consoles: make(semaphore, maxConsoles),
		uploads: make(semaphore, maxUploads), lane: make(semaphore, laneCapacity),
		backups:   make(semaphore, maxBackups),
		pingEvery: pingInterval, sendWithin: streamWrite,
	}
	routes := s.routes()
	doc, err := openAPIDocument(cfg.Version, routes)
	if err != nil {
		return nil, fmt.Errorf("rest: build openapi.json: %w", err)
	}
	s.openAPI = doc
	s.router = s.newRouter(routes)
	return s, nil
}

// Handler serves the cluster's TLS port: login by token, or a peer's
// certificate for calls that another node sent on.
func (s *Server) Handler() http.Handler { return s.from(false) }

// LocalHandler serves the unix socket, whose permissions are the login: the
// caller is the administrator "local:root".
func (s *Server) LocalHandler() http.Handler { return s.from(true) }

// HTTPServer returns a server for one of the handlers with limits that leave
// streams alone: bodies and replies have deadlines of their own. Its Shutdown
// also ends the streams, which else would never be over.
func (s *Server) HTTPServer(h http.Handler) *http.Server {
	stop, cancel := context.WithCancelCause(context.Background())
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return context.WithValue(context.Background(), stopKey{}, stop) },
	}
	srv.RegisterOnShutdown(func() { cancel(errShutdown) })
	return srv
}

type stopKey struct{}

var errShutdown = errors.New("this node is shutting down; use another one")

// stop returns a context that ends when the server does.
func (q *request) stop() (context.Context, bool) {
	stop, ok := q.ctx().Value(stopKey{}).(context.Context)
	return stop, ok
}

// endOnShutdown gives a stream a context that ends with its server.
func (q *request) endOnShutdown() (done func()) {
	stop, ok := q.stop()
	if !ok || !q.route.stream {
		return func() {}
	}
	ctx, cancel := context.WithCancelCause(q.ctx())
	q.r = q.r.WithContext(ctx)
	detach := context.AfterFunc(stop, func() { cancel(errShutdown) })
	return func() {
		detach()
		cancel(nil)
	}
}

// SessionHandler serves calls made inside this process for somebody who has
// logged in by other means, such as a key in the console shell. It checks the
// role like any other call.
func (s *Server) SessionHandler(actor string, role api.Role) http.Handler {
	return s.as(caller{actor: actor, role: role, scope: "session:" + actor, session: true})
}

type callerKey struct{}

func (s *Server) from(local bool) http.Handler {
	if local {
		return s.as(caller{actor: localActor, role: api.RoleAdministrator, scope: localActor, local: true})
	}
	return s.as(caller{})
}

// as serves calls of a caller who is known; the zero caller has to log in.
func (s *Server) as(who caller) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{ResponseWriter: w, s: s, route: "unknown", began: s.cfg.Now()}
		defer rec.done(r)
		defer s.recovered(rec, r)
		r = r.WithContext(context.WithValue(r.Context(), callerKey{}, who))
		s.router.ServeHTTP(rec, r)
	})
}

// recovered turns a panic into a 500, so that one bad request ends alone.
func (s *Server) recovered(w *recorder, r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(p)
	}
	s.log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.status == 0 {
		s.problem(w, r, api.Errorf(api.CodeInternal, "the request met a bug; the log of node %s has it", s.cfg.Node()))
	}
}

// request is one call with what its handler needs.
type request struct {
	s     *Server
	w     http.ResponseWriter
	r     *http.Request
	ctl   *http.ResponseController
	db    configdb.DB
	who   caller
	route *route
}

func (q *request) ctx() context.Context { return q.r.Context() }

func (q *request) param(name string) string { return q.r.URL.Query().Get(name) }

// name returns the {name} of the path.
func (q *request) name() string { return mux.Vars(q.r)["name"] }

// newRouter registers the routes, one mux route per path.
func (s *Server) newRouter(routes []route) *mux.Router {
	// Keys of the raw interface may contain "//" and "..": the path is taken
	// as it comes. No handler uses it as the name of a file.
	m := mux.NewRouter().SkipClean(true)
	byPath := map[string]map[string]*route{}
	var order []string
	for i := range routes {
		rt := &routes[i]
		if byPath[rt.path] == nil {
			byPath[rt.path] = map[string]*route{}
			order = append(order, rt.path)
		}
		byPath[rt.path][rt.method] = rt
	}
	for _, path := range order {
		m.Handle(muxPattern(path), s.dispatch(byPath[path]))
	}
	m.NotFoundHandler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.problem(w, r, api.Errorf(api.CodeNotFound, "no such path; %sopenapi.json lists them", base))
	})
	return m
}

func (s *Server) dispatch(methods map[string]*route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		method := r.Method
		if method == http.MethodHead {
			method = http.MethodGet
		}
		rt := methods[method]
		if rt == nil {
			allow := allowed(methods)
			w.Header().Set("Allow", allow)
			s.problem(w, r, &httpError{http.StatusMethodNotAllowed,
				api.Errorf(api.CodeUnsupported, "%s is not possible here; %s is", r.Method, allow)})
			return
		}
		if rec, ok := w.(*recorder); ok {
			rec.route = rt.path
		}
		q := &request{s: s, w: w, r: r, ctl: http.NewResponseController(w), route: rt}
		if err := q.run(); err != nil { //nolint:contextcheck // the request carries it
			s.problem(w, r, err)
		}
	})
}

// run checks what all routes have in common, then calls the handler.
func (q *request) run() error {
	q.deadline()
	db, ok := q.s.cfg.DB()
	if ok {
		q.db = db
	} else if !q.route.early {
		return api.Errorf(api.CodeNotMember, "this host belongs to no cluster yet; run muster cluster init or join")
	}
	if err := q.login(); err != nil {
		return err
	}
	q.sayNoQuorum()
	q.r = q.r.WithContext(configdb.WithSource(q.ctx(), q.origin()))
	// Before anything is changed, whether the route waits or not.
	if _, err := q.wait(); err != nil {
		return err
	}
	if err := q.minRevision(); err != nil {
		return err
	}
	defer q.endOnShutdown()()
	return q.route.handle(q)
}

// deadline bounds the reply, except for streams, which bound each message. It
// is set for every request because the one before on the same connection may
// have left another.
func (q *request) deadline() {
	var t time.Time
	if !q.route.stream {
		t = time.Now().Add(replyTimeout)
	}
	// Not every writer has deadlines (tests, the fake of a proxy): then the
	// server's own limits are all there is.
	_ = q.ctl.SetWriteDeadline(t)
}

// minRevision makes the request wait until this node has applied a revision
// that the client saw elsewhere.
func (q *request) minRevision() error {
	text := q.param("minRevision")
	if text == "" || q.db == nil {
		return nil
	}
	rev, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return api.Invalid("minRevision", "%q is not a revision", clip(text))
	}
	ctx, cancel := context.WithTimeout(q.ctx(), minRevisionTimeout)
	defer cancel()
	if _, err := q.db.WaitRevision(ctx, rev); err != nil {
		if ctx.Err() != nil && q.ctx().Err() == nil {
			return api.Errorf(api.CodeTimeout, "node %s has applied revision %d and did not reach %d within %s",
				q.s.cfg.Node(), q.db.Local().Revision(), rev, minRevisionTimeout)
		}
		return err
	}
	return nil
}

// semaphore bounds how many of something run at once.
type semaphore chan struct{}

// tryAcquire takes a place if one is free.
func (s semaphore) tryAcquire() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

// acquire waits for a place.
func (s semaphore) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s semaphore) release() { <-s }
