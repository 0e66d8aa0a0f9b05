// SPDX-License-Identifier: Apache-2.0

// Package tailscaleimpersonate is a Caddy module that lets the identities of a tailnet
// reach a Kubernetes API server. It finds out which tailnet peer sent a request and
// which Kubernetes user and groups that peer is, and makes sure that the request which
// reverse_proxy forwards carries exactly that identity, or is not forwarded.
//
// [Handler.ServeHTTP] shows the way of a request from top to bottom. A package of its
// own answers each question on it:
//
//	how much may it make the proxy hold?   internal/quota
//	which node accepted the connection?    internal/tailnet
//	who sent it, and may they?             internal/authn
//	which user, groups and headers?        impersonate
//	is it a session to be recorded?        internal/sessionrecording
//	where do recordings go afterwards?     internal/outbox, recordings
//	does the caller still have access?     internal/revocation
//	is it an event to be recorded?         internal/apievents
//	what does it ask of the API server?    internal/requestinfo, internal/matcher
//	is what was decided about what leaves? internal/pin
//	which credentials?                     internal/transport
//	may the caller act as another user?    internal/accessreview
//	what does a refused client read?       internal/apistatus
//	what does a caller's page say?         internal/whoami
//	which CA do the site's clients need?   internal/siteca
//	which other sites may a caller use?    internal/sites
//	which path does the site have?         internal/sitepath
//	what can be configured?                caddyfile
//	what outlives a config?                internal/app
//	how do streams end when Caddy exits?   internal/app, internal/revocation
package tailscaleimpersonate

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordings"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sitepath"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sites"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	storage "github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"

	// The rest of the module: the admin API, the command, the storage of recordings in
	// a directory, the matcher, the network for Tailscale Services and the transport.
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/admin"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/cli"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/directory"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/matcher"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/service"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/transport"
)

func init() {
	caddy.RegisterModule(new(Handler))
	httpcaddyfile.RegisterHandlerDirective("tailscale_impersonate", parseCaddyfile)
	// Before invoke, handle, handle_path and route, which Caddy sorts ahead of
	// reverse_proxy: any later, and a request that a reverse_proxy inside one of them
	// answers would skip the handler.
	httpcaddyfile.RegisterDirectiveOrder("tailscale_impersonate", httpcaddyfile.After, "request_header")
}

// Handler is an HTTP middleware that gives every request the Kubernetes identity
// of the tailnet peer that sent it, as impersonation headers, and refuses every
// request without one, with a Kubernetes Status object. It works on the listeners of
// any plugin that are tsnet listeners underneath, such as those of caddy-tailscale.
//
// The handler asks the tailnet node whose listener accepted the connection who the
// peer is. Grants in the tailnet's policy file for the capability
// `tailscale.com/cap/kubernetes` give the peer its groups; a tagged device without
// such a grant has its tags as groups.
//
// Put it in front of `reverse_proxy` with `transport kubernetes`, which takes
// the identity from the handler rather than from headers that something in between
// may have changed.
//
// The handler sets these placeholders, empty if a request is refused:
//
// Placeholder | Description
// ------------|------------
// `{http.auth.user.id}` | The Kubernetes user; Caddy's access log calls it `user_id`
// `{http.tailscale_impersonate.user}` | The Kubernetes user
// `{http.tailscale_impersonate.groups}` | The Kubernetes groups, separated by commas, for people to read: a group can contain a comma. To decide by groups, match the request header `Impersonate-Group`
// `{http.tailscale_impersonate.login}` | The login name of the user of the caller's device, without prefixes; empty for a tagged device
// `{http.tailscale_impersonate.node}` | The tailnet name of the caller's device
// `{http.tailscale_impersonate.source}` | Where the groups came from: `grants`, `tags` or `none`
type Handler struct {
	caddyfile.Config

	logger     *zap.Logger
	refusals   *apistatus.Log
	memory     *quota.Budget
	auth       *authn.Authenticator
	sessions   *sessionrecording.Recorder
	revocation *revocation.Tracker
	events     *apievents.Recorder
	recorders  *recorder.Client
	site       *siteca.Site
	sites      *sites.Directory       // of the config
	recordings *sessionrecording.Dirs // of the process
	reading    *recordings.Site       // nil without the option
	// release ends the use of the index of recordings. It is set when h has started.
	release func()
}

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.tailscale_impersonate",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets up the handler. It starts nothing and connects to nothing, as Caddy
// also provisions a config to validate it.
func (h *Handler) Provision(ctx caddy.Context) error {
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return errors.New("tailscale_impersonate works only inside of an HTTP server")
	}
	server.RegisterConnContext(tailnet.ConnContext)
	h.site = siteca.Of(ctx, server)
	if err := h.CheckRoutes(ctx.Logger(), server); err != nil {
		return err
	}
	a, err := app.Of(ctx)
	if err != nil {
		return err
	}
	server.RegisterConnContext(a.Serves)
	h.recordings = a.Recordings()
	h.memory = a.Memory()
	server.RegisterConnContext(h.memory.ConnContext)
	server.RegisterConnState(h.memory.ConnState)
	if err := h.setUp(a.Generation(), ctx.Logger(), server.Listen); err != nil {
		return err
	}
	if err := h.keep(ctx, a); err != nil {
		return err
	}
	if h.Whoami != "" {
		h.sites = a.Sites()
		h.sites.Add(sites.Site{Handler: h, Server: server, Whoami: h.Whoami, Auth: h.auth, CA: h.site, Logger: ctx.Logger()})
	}
	a.OnStarted(h.auth, func() {
		h.readFrom(a)
		go h.sessions.Maintain(ctx)
		if h.Tailscaled != "" {
			h.auth.Start(tailnet.Nodes{tailnet.FromDaemon(h.DaemonSocket())})
			return
		}
		h.auth.Start(tailnet.FromListeners(server.Listeners()))
	})
	return nil
}

// setUp makes everything that a request passes on its way through h, which is part of
// generation, and whose server listens on the addresses listen.
func (h *Handler) setUp(generation *revocation.Generation, logger *zap.Logger, listen []string) (err error) {
	h.logger, h.refusals = logger, apistatus.NewLog(logger)
	h.auth, err = authn.New(authn.Options{
		Capabilities:  h.Capabilities(),
		Limits:        h.Limits,
		CacheTTL:      h.TTL(),
		MaxConnAge:    h.ConnectionAge(),
		Audit:         h.Audit,
		ActAs:         authn.ActAs(h.ClientImpersonation),
		AllowOrigins:  h.AllowOrigins,
		AllowHosts:    h.AllowHosts,
		HostSockets:   h.Tailscaled != "",
		ReadOnlyGroup: h.ReadOnlyGroup,
		Listen:        listen,
		RecordsFiles:  h.Record != "",
		LogsEvents:    h.Events != "",
		Logger:        logger,
	})
	if err != nil {
		return fmt.Errorf("making an authenticator: %w", err)
	}
	dir, err := caddy.NewReplacer().ReplaceOrErr(h.Record, true, true)
	if err != nil {
		return fmt.Errorf("record %q: %w", h.Record, err)
	}
	h.recorders = new(recorder.Client)
	h.sessions = &sessionrecording.Recorder{
		Required:  h.RecordRequired,
		MaxSize:   h.MaxRecordSize(),
		Retention: h.Retention(),
		Input:     h.RecordInput == caddyfile.AllInput,
		Allowed:   h.EnforcedSessions,
		Hold:      h.memory.Hold,
		Client:    h.recorders,
		Logger:    logger,
	}
	if dir != "" {
		h.sessions.Dir = h.recordings.At(dir)
	}
	policy := revocation.Policy{
		Interval:    h.Interval(),
		Grace:       h.Grace(),
		Identify:    h.auth.Identify,
		MustRecord:  h.auth.MustRecord,
		CheckTarget: h.auth.CheckTarget,
		Revoked:     h.logRevoked,
	}
	if h.Recordings != "" {
		h.reading = recordings.NewSite(h.Recordings, h.RecordingsReaders, h.memory, logger)
		policy.MayRead = h.reading.MayRead
	}
	h.events = &apievents.Recorder{
		Client:       h.recorders,
		BodyLimit:    h.BodyLimit(),
		RefuseCut:    h.EventBodyRefuse,
		SecretBodies: h.EventSecretBodies,
		Logger:       logger,
	}
	if h.Events == caddyfile.LogEvents {
		h.events.Log = logger.Named("events")
	}
	h.revocation = generation.NewTracker(listen, h.Config, policy)
	return nil
}

// readFrom makes h's page of recordings read those of its directory.
func (h *Handler) readFrom(a *app.App) {
	if h.reading == nil {
		return
	}
	dir := h.sessions.Dir.Path()
	from := recstore.Dir(dir)
	if to := a.StorageOf(h.sessions.Dir); to != nil { // maybe that of another handler
		from = recstore.Union(from, recstore.Storage(to))
	}
	h.reading.Index, h.release = a.Indexes().Use(dir, from, h.logger)
}

// keep sets up where recordings are kept.
func (h *Handler) keep(ctx caddy.Context, a *app.App) error {
	if h.sessions.Dir == nil {
		return nil
	}
	to, err := h.loadStorage(ctx)
	if err != nil {
		return fmt.Errorf("record_to: %w", err)
	}
	err = a.KeepRecordings(app.Kept{
		Dir:     h.sessions.Dir,
		Store:   outbox.Settings{Storage: to, Config: string(h.RecordToRaw), Remove: h.RecordRemoveStored, Logger: h.logger},
		Readers: h.RecordingsReaders,
		Page:    h.Recordings != "",
	})
	if err != nil {
		return err
	}
	if to != nil {
		h.sessions.Waits, h.sessions.StoreWithin = a.Outbox(h.sessions.Dir).Oldest, h.StoreWithin()
	}
	return nil
}

// loadStorage returns the storage of recordings, nil without record_to.
func (h *Handler) loadStorage(ctx caddy.Context) (storage.Storage, error) {
	if h.RecordToRaw == nil {
		return nil, nil
	}
	raw := h.RecordToRaw
	module, err := ctx.LoadModule(h, "RecordToRaw")
	if err != nil {
		return nil, err
	}
	h.RecordToRaw = raw // which Caddy clears, and Validate looks at
	to, ok := module.(storage.Storage)
	if !ok {
		return nil, fmt.Errorf("%T is not a storage of recordings", module)
	}
	return to, nil
}

// Cleanup leaves new connections to the config that replaces h's. A handler that has
// started goes on answering on those that its server accepted before.
func (h *Handler) Cleanup() error {
	if h.auth != nil { // Caddy also cleans up what failed to provision
		h.auth.Retire()
		h.recorders.Close()
		h.refusals.Flush()
	}
	if h.release != nil {
		h.release()
	}
	return nil
}

// ServeHTTP forwards r with the identity of the peer that sent it, or refuses it.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	// What the client says about itself reaches nothing below.
	claims := h.auth.Strip(r)
	if h.auth.IsLast(r) {
		w = upgrade.Last(w)
	}
	// How much may r make the proxy hold?
	w, charge, err := h.memory.Admit(w, r)
	defer charge.Close()
	if err != nil {
		return h.refuse(w, r, authn.Caller{}, err)
	}
	if h.Whoami != "" && r.URL.Path == h.Whoami {
		return h.serveWhoami(w, r)
	}
	if h.reading.Serves(r.URL.Path) {
		return h.serveRecordings(w, r, claims)
	}
	// Which node accepted r, who sent it, and which identity is that?
	caller, err := h.auth.Authenticate(r, claims)
	if err != nil {
		return h.refuse(w, r, caller, err)
	}
	// Is r a session to be recorded?
	session, err := h.sessions.Begin(r, caller)
	if err != nil {
		return h.refuse(w, r, caller, err)
	}
	if session != nil {
		defer session.Close()
	}
	// From here on r ends when the caller loses access.
	open := h.revocation.Track(r, caller)
	defer open.Close()
	if err := revocation.StoppingError(open); err != nil {
		w.Header().Set("Connection", "close") // for a retry over another connection
		return h.refuse(w, r, caller, err)
	}
	// Is r an event to be recorded? That waits for recorders.
	if err := h.events.Record(r, caller); err != nil {
		return h.refuse(w, r, caller, err)
	}
	h.allow(r, caller)

	ctx, client := context.Context(open), w
	switch {
	case session != nil:
		ctx, client = session.Watch(ctx), session.Wrap(w)
	case upgrade.Requested(r.Header):
		client = sessionrecording.WrapUnrecorded(ctx, w, r, caller.Conn)
	}
	client = sitepath.KeepInRedirects(client, r)
	// transport kubernetes takes the identity from the context and writes the headers
	// again as the request leaves, so that nothing in between can change it.
	r = r.WithContext(ctx)
	caller.Identity.SetHeaders(r.Header)
	// handle_errors handles r again, and must not find the identity on it.
	defer caller.Identity.RemoveHeaders(r.Header)
	// Trailers arrive long after the headers were stripped. The API server needs none.
	r.Trailer = nil
	return h.explain(w, r, next.ServeHTTP(client, r))
}

// The outcomes of decisions about requests.
const (
	allowed = "allowed" // it was forwarded as its caller
	refused = "refused" // it was not forwarded
)

var (
	decisions = metrics.NewCounterVec("decisions_total",
		"Requests by what was decided about them and by where the caller's groups came from.",
		"outcome", "source")
	// Looked up once, rather than for every request.
	allowedFrom = map[impersonate.Source]prometheus.Counter{
		impersonate.SourceGrants: decisions.WithLabelValues(allowed, string(impersonate.SourceGrants)),
		impersonate.SourceTags:   decisions.WithLabelValues(allowed, string(impersonate.SourceTags)),
		impersonate.SourceNone:   decisions.WithLabelValues(allowed, string(impersonate.SourceNone)),
	}
	refusedAny = decisions.WithLabelValues(refused, "")
)

// allow records that r is forwarded.
func (h *Handler) allow(r *http.Request, caller authn.Caller) {
	allowedFrom[caller.Identity.Source].Inc()
	caller.SetPlaceholders(r)
	if entry := h.logger.Check(zapcore.DebugLevel, "request allowed"); entry != nil {
		entry.Write(append(caller.Identity.Fields(),
			zap.String("remote_addr", r.RemoteAddr),
			zap.String("method", clip.String(r.Method)),
			zap.String("uri", clip.String(r.RequestURI)),
			zap.String("request_id", apistatus.RequestID(r)))...)
	}
}

// refuse answers r with err. The caller's identity is nil if it is unknown.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, caller authn.Caller, err error) error {
	refusedAny.Inc()
	var who []zap.Field
	if caller.Identity != nil {
		who = caller.Identity.Fields()
	}
	h.refusals.Refused(r, err, who...)
	return apistatus.Write(w, r, err)
}

// explain answers a request that a matcher refused or that reverse_proxy could not
// forward, and returns any other error as it is. Caddy would answer with an empty
// body, and kubectl would report an error without a reason.
func (h *Handler) explain(w http.ResponseWriter, r *http.Request, err error) error {
	if err == nil {
		return nil // and keep failed off the heap
	}
	if _, ok := apistatus.From(err); ok {
		h.refusals.Refused(r, err)
		return apistatus.Write(w, r, err)
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
	if h.refusals.Allows(r) {
		h.logger.Error("the API server cannot be reached", zap.Error(failed.Err), zap.String("uri", clip.String(r.RequestURI)))
	}
	message := "the API server cannot be reached; the proxy's log says why"
	if id, ok := impersonate.FromContext(r.Context()); ok && id.ActAs != nil {
		message = "the API server cannot be reached, or not by transport kubernetes, which kubectl --as needs; the proxy's log says why"
	}
	return apistatus.Write(w, r, apistatus.Unavailable(apistatus.UpstreamAway, "%s", message))
}

// serveWhoami answers a caller who asks which identity it has. Callers who are known
// and refused are told why.
func (h *Handler) serveWhoami(w http.ResponseWriter, r *http.Request) error {
	facts, visitor, err := h.auth.Explain(r)
	if err != nil {
		return h.refuse(w, r, authn.Caller{}, err)
	}
	scheme := "https"
	if r.TLS == nil {
		scheme = "http"
	}
	facts.Server = scheme + "://" + r.Host + sitepath.Of(r)
	facts.Sites, facts.SitesIncomplete = h.sites.For(r.Context(), visitor, h, facts.Server)
	if facts.CA, err = h.site.CA(r); err != nil {
		h.logger.Error("cannot find out who issued the site's certificate, and the kubeconfig of the whoami page names no CA", zap.Error(err))
	}
	return h.explain(w, r, whoami.Serve(w, r, facts))
}

// serveRecordings answers a caller who reads recordings.
func (h *Handler) serveRecordings(w http.ResponseWriter, r *http.Request, claims authn.Claims) error {
	caller, err := h.auth.AuthenticateReader(r, claims, h.reading.IsFromPage)
	if err == nil && caller.Identity.ActAs != nil {
		err = apistatus.Forbidden(apistatus.Impersonation, "recordings are read as oneself, not as another user")
	}
	if err == nil {
		err = h.reading.MayRead(caller.Identity)
	}
	if err != nil {
		return h.refuse(w, r, caller, err)
	}
	// From here on r ends when the caller loses access, or may no longer read.
	open := h.revocation.TrackReader(r, caller)
	defer open.Close()
	if err := revocation.StoppingError(open); err != nil {
		w.Header().Set("Connection", "close") // for a retry over another connection
		return h.refuse(w, r, caller, err)
	}
	if err := h.events.Record(r, caller); err != nil {
		return h.refuse(w, r, caller, err)
	}
	h.allow(r, caller)
	if err := h.reading.Serve(w, r.WithContext(open), caller, sitepath.Of(r)); err != nil {
		return h.refuse(w, r, caller, err)
	}
	return nil
}

// logRevoked logs that a caller's requests were ended.
func (h *Handler) logRevoked(e *revocation.Revoked) {
	h.logger.Warn("open requests ended",
		zap.String("reason", e.Detail),
		zap.String("user", e.User),
		zap.Stringer("remote_addr", e.Remote),
		zap.Int("requests", e.Requests))
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
)
