// SPDX-License-Identifier: Apache-2.0

// Package tailscaleimpersonate is a Caddy module that lets a tailnet's identities
// reach a Kubernetes API server: it finds out which tailnet peer sent a request,
// which Kubernetes user and groups that peer is, and makes sure that the request
// which reverse_proxy sends on carries exactly that identity, or is not sent.
//
// The way of a request can be read from top to bottom in [Handler.ServeHTTP].
// Each question on it is answered by a package of its own:
//
//	which node accepted the connection?  tailnet
//	was it asked a moment ago?           cache
//	who is the peer, which groups?       impersonate
//	what do operators say to that?       guard
//	which headers?                       impersonate
//	is it still so, in a long request?   recheck
//	is it a session to be recorded?      recording
//	is it an event to be recorded?       apievents
//	may it act as somebody else?         review
//	which credentials?                   transport
//	what if its client does not read?    upgrade
//	what does a refused client read?     refusal
//	what does it ask for?                apirequest, matcher
//	is that what is sent?                decided
//	what can be configured?              caddyfile, transport, matcher
//	what does a caller's page say?       whoami
//	what is counted?                     metrics
package tailscaleimpersonate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoiscache"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"

	// The command caddy tailscale-impersonate.
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/cli"
	// The matcher and the transport come with the handler: none is complete alone.
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/matcher"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/transport"
)

func init() {
	caddy.RegisterModule(new(Handler))
	httpcaddyfile.RegisterHandlerDirective("tailscale_impersonate", parseCaddyfile)
	// Before invoke, handle, handle_path and route, which Caddy sorts ahead of
	// reverse_proxy: placed any later, the handler would be skipped by every
	// request that a reverse_proxy inside one of them answers.
	httpcaddyfile.RegisterDirectiveOrder("tailscale_impersonate", httpcaddyfile.After, "request_header")
}

// Handler is an HTTP middleware that gives every request the Kubernetes identity
// of the tailnet peer that sent it, as impersonation headers, and answers every
// request for which there is none with a Kubernetes Status object. It works on
// the listeners of any plugin that ends in tsnet's, such as caddy-tailscale's.
//
// Who the peer is, is asked of the tailnet node whose listener accepted the
// connection. Grants of the tailnet's policy file for the capability
// `tailscale.com/cap/kubernetes` give it its groups; a device with tags and
// without such a grant has its tags as groups.
//
// Put it in front of `reverse_proxy` with `transport kubernetes`, which takes
// the identity from the handler and not from headers that something in between
// may have changed.
//
// The handler sets these placeholders, empty where a request was refused:
//
// Placeholder | Description
// ------------|------------
// `{http.auth.user.id}` | The Kubernetes user; Caddy's access log names it as `user_id`
// `{http.tailscale_impersonate.user}` | The Kubernetes user
// `{http.tailscale_impersonate.groups}` | The Kubernetes groups, separated by commas
// `{http.tailscale_impersonate.login}` | The login name of the user of the caller's device, without prefixes; empty for a tagged device
// `{http.tailscale_impersonate.node}` | The tailnet name of the caller's device
// `{http.tailscale_impersonate.source}` | Where the groups came from: `grants`, `tags` or `none`
type Handler struct {
	caddyfile.Config

	logger *zap.Logger

	// decisions are those of a moment ago.
	decisions *whoiscache.Cache[*decision]
	// drops is how often an operator has dropped a caller: what was noted with a
	// connection before the last time may be about one of those.
	drops atomic.Uint64
	// listeners are the addresses of the server, as they are configured.
	listeners []string
	// site is where open requests are recorded, sites all those of the config.
	site  *revocation.Site
	sites *revocation.Config
	// recorder records sessions.
	recorder *sessionrecording.Site
	// events records requests.
	events *apievents.Site

	// nodes are the tailnet nodes that the server listens on. They may be read
	// once ready is closed.
	nodes   tailnet.Nodes
	ready   chan struct{}
	readied sync.Once
}

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.tailscale_impersonate",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets up the handler. It starts nothing and asks nobody, as Caddy
// provisions a config also to validate it.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	h.ready = make(chan struct{})

	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return errors.New("tailscale_impersonate works only inside of an HTTP server")
	}
	server.RegisterConnContext(tailnet.ConnContext)
	warnOfBuffers(h.logger, server)
	if h.ClientImpersonation == caddyfile.Authorize {
		if err := checkTransports(server); err != nil {
			return err
		}
		h.noteDroppedFields(server)
	}
	metrics.Register(ctx.GetMetricsRegistry(), revocation.Streams{})
	app, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	if err := h.setUp(revocation.ConfigOf(app), server.Listen); err != nil {
		return err
	}
	return app.(*caddyevents.App).On("started", started{h, server})
}

// setUp makes h ready for requests at the addresses listeners, but for the nodes
// that it has to ask.
func (h *Handler) setUp(sites *revocation.Config, listeners []string) (err error) {
	h.ready = make(chan struct{})
	if h.decisions, err = whoiscache.New(h.TTL(), h.decide); err != nil {
		return fmt.Errorf("making a cache: %w", err)
	}
	dir, err := caddy.NewReplacer().ReplaceOrErr(h.Record, true, true)
	if err != nil {
		return fmt.Errorf("record %q: %w", h.Record, err)
	}
	h.recorder = &sessionrecording.Site{Dir: dir, Logger: h.logger, Count: func(o sessionrecording.Outcome) {
		metrics.Recordings.WithLabelValues(string(o)).Inc()
	}}
	h.events = &apievents.Site{
		BodyLimit:    h.BodyLimit(),
		SecretBodies: h.EventSecretBodies,
		Logger:       h.logger,
		Count:        func(o apievents.Outcome) { metrics.Events.WithLabelValues(string(o)).Inc() },
	}
	if h.Events == caddyfile.LogEvents {
		h.events.Log = h.logger.Named("events")
	}
	h.sites, h.listeners = sites, listeners
	h.site = sites.NewSite(listeners, h.Config, revocation.Rules{
		Interval: h.Interval(),
		Grace:    h.Grace(),
		Identify: h.recheck,
		MayBe:    h.mayBe,
		Ended:    h.accessWithdrawn,
	})
	return nil
}

// started is what happens once all of the config has been started. Only then is
// the list of the server's listeners complete, and not before can it be read:
// the first of them may serve a request while Caddy still adds the next.
type started struct {
	handler *Handler
	server  *caddyhttp.Server
}

// Handle implements caddyevents.Handler.
func (s started) Handle(context.Context, caddy.Event) error {
	nodes := tailnet.FromListeners(s.server.Listeners())
	if s.handler.Tailscaled != "" {
		nodes = tailnet.Nodes{tailnet.FromDaemon(s.handler.DaemonSocket())}
	}
	s.handler.setReady(nodes)
	s.handler.sites.Run()
	running.add(s.handler)
	return nil
}

// setReady lets requests through to be judged by nodes. Only the first call
// counts.
func (h *Handler) setReady(nodes tailnet.Nodes) {
	h.readied.Do(func() {
		h.nodes = nodes
		close(h.ready)
	})
}

// Cleanup releases requests that wait for a config that never started. A handler
// that did start goes on answering: connections that its server has accepted
// outlive the config.
func (h *Handler) Cleanup() error {
	running.remove(h)
	h.setReady(nil)
	if h.events != nil { // Caddy cleans up as well what could not be provisioned
		h.events.Close()
	}
	return nil
}

// ServeHTTP sends r on with the identity of the peer that sent it, or refuses it.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	// First of all, so that whatever is decided below and whatever runs next,
	// nothing that the client says about itself is left to be believed.
	target, unclear := h.target(r)
	asked := h.stripClient(r)
	if h.Whoami != "" && r.URL.Path == h.Whoami {
		return h.serveWhoami(w, r)
	}

	conn, decided, err := h.identify(r, asked)
	if err == nil {
		err = unclear
	}
	if err != nil {
		return h.refuse(w, r, decided, err)
	}
	id := h.identityFor(r, decided, target)

	// Is it a session that has to be recorded?
	answer := w
	var session *sessionrecording.Session
	if h.recorder.Concerns(&id.Recording) {
		if r, session, err = h.recorder.Begin(r, decided.caller(conn)); err != nil {
			return h.refuse(w, r, decided, err)
		}
		if session != nil {
			defer session.Close()
			w = session.Wrap(w)
		}
	}

	// From here on the caller can lose what it had, and the request ends.
	kind, upgrades := revocation.KindOf(r)
	request := h.site.Open(r.Context(), conn, id, decided.asked, kind)
	defer request.Close()
	if upgrades && !id.Recording.Enforce {
		request.Unrecorded()
	}
	if upgrades && session == nil { // which sees to that itself
		w = upgrade.Client(w)
	}
	if id.ActAs != nil {
		id.ActAs.Granted = request.Require
	}

	// Is it an event that has to be recorded? That waits for the body, and for
	// recorders, while the caller can lose what it had.
	if h.events.Concerns(&id.Recording) {
		if err := h.events.Record(r, decided.source(conn, id)); err != nil {
			return h.refuse(w, r, decided, err)
		}
	}

	// Nothing stands against it.
	decided.allowed.Inc()
	h.logAllowed(r, decided)
	decided.setPlaceholders(r)

	// The identity travels in the context as well: transport kubernetes takes
	// it from there and writes the headers anew, so that no handler and no
	// header_up between here and there has a say in it.
	ctx := context.Context(request)
	if session != nil {
		ctx = session.Watch(ctx)
	}
	r = r.WithContext(ctx)
	id.SetHeaders(r.Header)
	// It must not remain on the request that handle_errors starts over with.
	defer id.RemoveHeaders(r.Header)
	// Trailers arrive behind the body, when headers have long been looked at.
	// The API server has no use for any.
	r.Trailer = nil
	// What is explained is no answer of the API server.
	return h.explain(answer, r, next.ServeHTTP(w, r))
}

// explain answers a request that a matcher could not decide about, or that
// reverse_proxy could not send, or got no answer to, and returns any other error as
// it is. Caddy would answer with an empty body, and kubectl report an error without
// a reason.
func (h *Handler) explain(w http.ResponseWriter, r *http.Request, err error) error {
	if err == nil {
		return nil // and failed stays off the heap
	}
	var refused *apierrors.StatusError
	if errors.As(err, &refused) {
		h.logRefusal(r, nil, refused)
		return apistatus.Write(w, refused)
	}
	var failed caddyhttp.HandlerError
	if !errors.As(err, &failed) {
		return err
	}
	switch failed.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
	default:
		return err
	}
	h.logger.Error("the API server cannot be reached", zap.Error(failed.Err), zap.String("uri", r.RequestURI))
	said := "the API server cannot be reached; the proxy's log says why"
	if id, ok := impersonate.FromContext(r.Context()); ok && id.ActAs != nil {
		said = "the API server cannot be reached, or not by transport kubernetes, which kubectl --as needs; the proxy's log says why"
	}
	return apistatus.Write(w, apistatus.Unavailable(apistatus.UpstreamAway, "%s", said))
}

// identify returns the connection that r came on and what was decided about the
// peer at its other end, or the reason to refuse r. asked is the impersonation
// header that the client sent, empty if none. What was decided about the peer of a
// refused request is for the log.
func (h *Handler) identify(r *http.Request, asked string) (_ *tailnet.Conn, _ *decision, refused *apierrors.StatusError) {
	// What kind of request?
	if refused = checkProtocol(r); refused != nil {
		return nil, nil, refused
	}
	if refused = h.checkOrigin(r); refused != nil {
		return nil, nil, refused
	}

	// Which node accepted the connection?
	conn, decided, key, refused := h.reached(r)
	if refused != nil {
		return nil, nil, refused
	}

	// Who is the peer, and which user and groups?
	if decided != nil {
		metrics.CacheHits.Inc()
	} else {
		if decided, refused = h.decisionOn(r.Context(), key, conn.Accepted); refused != nil {
			return nil, nil, refused
		}
		conn.Note.Store(decided)
	}
	if refused = h.checkAsked(r, asked, decided.identity.User); refused != nil {
		return nil, decided, apistatus.Because(apistatus.Impersonation, refused)
	}
	return conn, decided, nil
}

// reached returns the connection that r came on, what was decided about requests on
// it a moment ago, nil if nothing was, and whom to ask about its peer.
func (h *Handler) reached(r *http.Request) (conn *tailnet.Conn, decided *decision, key whoiscache.Key, refused *apierrors.StatusError) {
	select {
	case <-h.ready:
	default:
		select {
		case <-h.ready:
		case <-r.Context().Done():
			return nil, nil, key, apistatus.TryAgain(apistatus.Starting, "the server is starting")
		}
	}
	connFrom := tailnet.ConnFrom
	if h.Tailscaled != "" {
		connFrom = tailnet.HostConnFrom
	}
	conn, err := connFrom(r.Context())
	if err != nil {
		return nil, nil, key, apistatus.Forbidden(apistatus.NotFromTailnet, "%v", err)
	}
	decided = h.decidedOn(conn)
	key = whoiscache.Key{Remote: conn.Remote.Addr(), Local: conn.Local}
	if decided != nil {
		key.Node = decided.node
	} else if key.Node, refused = h.accepting(conn.Local); refused != nil {
		return nil, nil, key, refused
	}
	return conn, decided, key, h.checkHost(r, key.Node)
}

// decidedOn returns what was decided about requests on conn a moment ago, nil if
// nothing was.
func (h *Handler) decidedOn(conn *tailnet.Conn) *decision {
	d, _ := conn.Note.Load().(*decision)
	if d == nil || d.by != h || d.drops != h.drops.Load() || time.Since(d.asked) >= h.TTL() {
		return nil
	}
	return d
}

// accepting returns the node that owns the address local.
func (h *Handler) accepting(local netip.Addr) (*tailnet.Node, *apierrors.StatusError) {
	node, err := h.nodes.Accepting(local)
	switch {
	case errors.Is(err, tailnet.ErrNotConnected):
		return nil, apistatus.TryAgain(apistatus.Starting, "%v", err)
	case err != nil:
		return nil, apistatus.Forbidden(apistatus.AmbiguousNode, "%v", err)
	}
	return node, nil
}

// decisionOn returns what is decided about the peer of key, as found out at since
// or later.
func (h *Handler) decisionOn(ctx context.Context, key whoiscache.Key, since time.Time) (*decision, *apierrors.StatusError) {
	decided, err := h.decisions.Get(ctx, key, since)
	if err == nil {
		return decided, nil
	}
	var refused *apierrors.StatusError
	if !errors.As(err, &refused) {
		refused = unanswered(key, err)
	}
	return nil, refused
}

// unanswered refuses what key's node has not answered for.
func unanswered(key whoiscache.Key, err error) *apierrors.StatusError {
	return apistatus.TryAgain(apistatus.NoAnswer, "tailnet node %q does not say who %v is: %v", key.Node.Name, key.Remote, err)
}

// decide finds out who the peer of key is, and decides which user and groups.
func (h *Handler) decide(ctx context.Context, key whoiscache.Key) (*decision, error) {
	return h.judge(ctx, key, nil)
}

// judge is decide, and writes what it finds on the way into found, if that is not
// nil.
func (h *Handler) judge(ctx context.Context, key whoiscache.Key, found *findings) (*decision, error) {
	// Both before the question: the answer may be about what has changed since.
	asked, drops := time.Now(), h.drops.Load()
	who, err := key.Node.WhoIs(ctx, key.Remote, key.Local)
	countQuestion(asked, err)
	switch {
	case errors.Is(err, tailnet.ErrPeerNotFound):
		return nil, apistatus.Forbidden(apistatus.UnknownPeer, "tailnet node %q knows no peer with the address %v: the device is not on the tailnet, or its traffic comes through a subnet router", key.Node.Name, key.Remote)
	case errors.Is(err, tailnet.ErrSelf):
		return nil, apistatus.Forbidden(apistatus.Self, "the request comes from tailnet node %q itself, which is no caller", key.Node.Name)
	case err != nil:
		return nil, err
	}
	peer, err := impersonate.PeerFrom(who)
	if err != nil {
		return nil, apistatus.Forbidden(apistatus.NoIdentity, "no identity for %v: %v", key.Remote, err)
	}
	id, err := peer.Explain(h.Capabilities(), found.of(peer))
	if err != nil {
		return nil, about(peer, apistatus.Forbidden(apistatus.NoIdentity, "no identity for %s: %v", peer.Describe(), err))
	}
	// What do the operators say to that?
	if err := h.CheckPeer(peer); err != nil {
		return nil, about(peer, apistatus.Forbidden(apistatus.Guard, "%s may not use this server: %v", peer.Describe(), err))
	}
	id, cut, err := h.Limits.Apply(id)
	found.limited(id, cut)
	if len(cut) > 0 {
		h.logger.Warn("granted groups are left out, as allow_groups and deny_groups say",
			zap.Stringer("peer", peer), zap.Strings("groups", cut))
	}
	switch {
	case errors.Is(err, impersonate.ErrNoGroup):
		return nil, about(peer, apistatus.Forbidden(apistatus.NoGroups, "%s may not use this server: %v: the tailnet policy file has no grant that gives it groups under %q", peer.Describe(), err, h.Capabilities()[0]))
	case err != nil:
		return nil, about(peer, apistatus.Forbidden(apistatus.Guard, "%s may not use this server: %v", peer.Describe(), err))
	}
	if h.Audit {
		if id, err = peer.Audited(id, key.Remote); err != nil {
			return nil, about(peer, apistatus.Forbidden(apistatus.NoIdentity, "no identity for %s: %v", peer.Describe(), err))
		}
	}
	return newDecision(h, key.Node, peer, id, asked, drops), nil
}

// recheck returns who the peer at remote is that dialled local, as found out at
// since or later.
func (h *Handler) recheck(ctx context.Context, remote, local netip.Addr, since time.Time) (*impersonate.Identity, error) {
	<-h.ready
	node, refused := h.accepting(local)
	if refused != nil {
		return nil, refused
	}
	decided, refused := h.decisionOn(ctx, whoiscache.Key{Node: node, Remote: remote, Local: local}, since)
	if refused != nil {
		return nil, refused
	}
	return &decided.identity, nil
}

// accessWithdrawn reports that a caller's requests were ended.
func (h *Handler) accessWithdrawn(e *revocation.Ended) {
	metrics.Revocations.WithLabelValues(string(e.Reason)).Add(float64(e.Requests))
	h.logger.Warn("open requests ended",
		zap.String("reason", e.Detail),
		zap.String("user", e.User),
		zap.Stringer("remote_addr", e.Remote),
		zap.Int("requests", e.Requests))
}

// checkProtocol refuses what would hide from the checks that follow.
func checkProtocol(r *http.Request) *apierrors.StatusError {
	// HTTP/3's connections are not among those that the server hands to
	// ConnContext, and its CONNECT can turn into a WebSocket behind the
	// handler's back. 421 sends a client back to HTTP/2 or HTTP/1.1.
	if r.ProtoMajor > 2 {
		return apistatus.Misdirected(apistatus.Protocol, "HTTP/3 is not supported; say `protocols h1 h2` in the servers option")
	}
	// The same goes for HTTP/2's extended CONNECT. The API server has no use
	// for CONNECT in any form.
	if r.Method == http.MethodConnect {
		return apistatus.MethodNotAllowed(apistatus.Protocol, "method CONNECT is not supported")
	}
	if !requestinfo.IsPath(r.URL) {
		return apistatus.BadRequest(apistatus.Protocol, "the request is not for a path, but for %q", r.RequestURI)
	}
	return nil
}

// checkOrigin refuses requests that a browser sends on behalf of another site.
//
// A tailnet identity works like a cookie that can neither be withheld nor
// expires: without this check, any web page that the user of a granted device
// opens could create objects with a form post, or read Secrets through a
// WebSocket. The API server does not look at Origin.
func (h *Handler) checkOrigin(r *http.Request) *apierrors.StatusError {
	origins, ok := r.Header["Origin"]
	for _, origin := range origins {
		if !slices.Contains(h.AllowOrigins, origin) {
			return apistatus.Forbidden(apistatus.WebPage, "a web page of origin %q sent the request; if it may act as whoever opens it, name the origin in allow_origins", origin)
		}
	}
	if ok {
		return nil
	}
	// A browser leaves Origin out of some requests, such as an image's.
	for _, site := range r.Header["Sec-Fetch-Site"] {
		if site != "none" && site != "same-origin" {
			return apistatus.Forbidden(apistatus.WebPage, "a web page of another site sent the request (Sec-Fetch-Site: %s)", site)
		}
	}
	return nil
}

// checkHost refuses requests over plain HTTP for a name that is not node's.
//
// A web page whose name is made to resolve to the node's address (DNS rebinding)
// counts as the same origin in a browser, so that checkOrigin does not see it.
// With TLS the certificate does not match.
func (h *Handler) checkHost(r *http.Request, node *tailnet.Node) *apierrors.StatusError {
	if r.TLS != nil || slices.Contains(h.AllowHosts, tailnet.Hostname(r.Host)) {
		return nil
	}
	owns, err := node.Owns(r.Context(), r.Host)
	if err != nil {
		return apistatus.TryAgain(apistatus.NoAnswer, "cannot tell whether host %q is this server: %v", r.Host, err)
	}
	if !owns {
		return apistatus.Forbidden(apistatus.Host, "host %q is neither the name nor an address of tailnet node %q; if it is meant for this server, name it in allow_hosts or use https", r.Host, node.Name)
	}
	return nil
}

func parseCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h := new(Handler)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	return h, nil
}

// Interface guards
var (
	_ caddy.Module                = (*Handler)(nil)
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
	_ caddyevents.Handler         = started{}
)
