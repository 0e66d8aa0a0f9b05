// SPDX-License-Identifier: Apache-2.0

// Package transport is the last step of a request: transport kubernetes of
// reverse_proxy, which knows the cluster, holds the credentials, and attaches
// both credentials and identity as the request leaves.
//
// The credentials may impersonate any user, so no request may carry them without an
// identity to impersonate. That is why they are attached last, and are available to
// nothing else. The identity comes from the request's context, where
// tailscale_impersonate put it. Identity headers that the request has at this point are
// discarded, and a request without an identity in its context is refused. So a config
// that lacks the handler, or edits those headers, cannot act as the proxy itself.
package transport

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

func init() {
	caddy.RegisterModule(new(Transport))
}

// The values of Transport.Credentials: whose credentials go with a request.
const (
	Proxy  = "proxy"
	Client = "client"
)

// Transport is a transport of `reverse_proxy` that sends requests to a Kubernetes
// API server as the identity that the `tailscale_impersonate` handler determined. It
// refuses requests that did not pass the handler.
//
// Certificate authority, TLS server name and credentials come from the cluster
// configuration and always belong together: the address that `reverse_proxy`
// dials has to present the certificate of that cluster.
//
// An active health check of `reverse_proxy` may GET `/livez`, `/readyz` and
// `/healthz`. It has no caller, so it is sent without credentials. The cluster must
// allow unauthenticated requests to these paths, as clusters do by default
// (anonymous authentication and the ClusterRole `system:public-info-viewer`).
type Transport struct {
	Source

	// Whose credentials go with a request:
	//
	// - `proxy` (the default): those of the cluster configuration, together with
	//   the identity of the caller that they impersonate.
	// - `client`: those that the client sends, if any. The cluster configuration
	//   provides only the address and the certificate authority of the cluster.
	//   `tailscale_impersonate` removes a client's credentials, so it must not
	//   handle these requests.
	Credentials string `json:"credentials,omitempty"`

	logger   *zap.Logger
	refusals *apistatus.Log
	// cluster is for requests with the proxy's credentials, anonymous for those
	// without.
	cluster, anonymous *cluster
	// reviewer decides whether callers may act as another user, and what the proxy's own
	// account lacks.
	reviewer *accessreview.Reviewer
	// unusable says why there is no cluster. Nil if there is one.
	unusable error
}

// CaddyModule returns the Caddy module information.
func (*Transport) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.transport.kubernetes",
		New: func() caddy.Module { return new(Transport) },
	}
}

// Provision reads the cluster configuration. It does not connect.
func (t *Transport) Provision(ctx caddy.Context) error {
	t.logger = ctx.Logger()
	t.refusals = apistatus.NewLog(t.logger)
	if err := t.Validate(); err != nil {
		return err
	}
	config, unusable, err := t.load(t.logger)
	if err != nil || unusable != nil {
		t.unusable = unusable
		return err
	}
	config.warnIfInsecure(t.logger)
	if t.anonymous, err = config.anonymous().connect(t.logger); err != nil {
		return err
	}
	if t.Credentials == Client {
		return nil
	}
	if config.userErr != nil {
		return config.userErr
	}
	if t.reviewer, err = accessreview.NewReviewer(); err != nil {
		return err
	}
	if t.cluster, err = config.connect(t.logger); err != nil {
		return err
	}
	if err := t.checkWhenStarted(ctx); err != nil {
		return err
	}
	if t.cluster.token == nil {
		return nil
	}
	metrics.Register(ctx.GetMetricsRegistry())
	return reportAge(ctx.GetMetricsRegistry(), t.cluster)
}

// Validate returns an error if the options cannot be used.
func (t *Transport) Validate() error {
	switch t.Credentials {
	case "", Proxy, Client:
	default:
		return fmt.Errorf("credentials %q: must be %s or %s", t.Credentials, Proxy, Client)
	}
	return t.Source.Validate()
}

// Cleanup closes idle connections, and those that become idle shortly afterwards: net/http
// goes on opening a connection for a request that has been cancelled meanwhile.
func (t *Transport) Cleanup() error {
	t.refusals.Flush()
	t.closeIdle()
	time.AfterFunc(idleLater, t.closeIdle)
	return nil
}

// idleLater is how long a connection may take to become idle after a config has gone.
const idleLater = 2 * time.Second

func (t *Transport) closeIdle() {
	for _, c := range []*cluster{t.cluster, t.anonymous} {
		if c != nil {
			c.close()
		}
	}
}

// RoundTrip sends r to the API server as the identity in r's context. It answers
// requests that it does not send with a Kubernetes Status object.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.send(r)
	if err != nil {
		if stopping := revocation.StoppingError(r.Context()); stopping != nil {
			return t.refuse(r, stopping)
		}
		return nil, err
	}
	revocation.EndWhenStopping(r, resp)
	return resp, nil
}

func (t *Transport) send(r *http.Request) (*http.Response, error) {
	id, identified := impersonate.FromContext(r.Context())
	check := isHealthCheck(r)
	switch {
	case check:
	case t.Credentials == Client && identified:
		return t.refuse(r, apistatus.Forbidden(apistatus.NoHandler, "credentials client sends the caller's own credentials, which tailscale_impersonate has removed"))
	case t.Credentials != Client && !identified:
		return t.refuse(r, apistatus.Forbidden(apistatus.NoHandler, "the request has no identity: it reached transport kubernetes without passing tailscale_impersonate"))
	}
	// Matchers and recorders have decided about a request that must be this one.
	if err := pin.Check(r); err != nil {
		return t.refuse(r, err)
	}
	if t.unusable != nil {
		return t.refuse(r, apistatus.Because(t.unusable, apistatus.Unavailable(apistatus.NoCredentials, "the proxy has no configuration of the cluster; its log says why")))
	}
	// The path is appended to the cluster's own, unchanged, and must not lead out of it.
	if !requestinfo.IsPath(r.URL) || t.anonymous.base.Path != "" && requestinfo.HasDotSegments(r.URL) {
		return t.refuse(r, apistatus.BadRequest(apistatus.AmbiguousPath, "%q is not a path below that of the cluster", clip.String(r.URL.String())))
	}
	protocols, upgrades := upgrade.Protocols(r.Header)
	if upgrades && (!upgrade.Requested(r.Header) || !streams(protocols)) {
		return t.refuse(r, apistatus.BadRequest(apistatus.Protocol, "cannot upgrade the connection to %q: the API server speaks SPDY/3.1 and websocket", clip.String(strings.Join(protocols, ", "))))
	}
	// The API server acts on such a request before it has received the body, and
	// answers only after that.
	if upgrades && r.ContentLength != 0 {
		return t.refuse(r, apistatus.BadRequest(apistatus.Protocol, "a request to upgrade the connection must not have a body"))
	}

	switch {
	case check:
		out := t.anonymous.request(r)
		impersonate.StripProtected(out.Header)
		return t.anonymous.send(out)
	case t.Credentials == Client:
		out := t.anonymous.request(r)
		impersonate.StripFrontProxy(out.Header)
		return t.anonymous.send(out)
	default:
		return t.impersonate(r, id)
	}
}

// impersonate sends r with the proxy's credentials as id, or as the user that id asks
// to act as if it may.
func (t *Transport) impersonate(r *http.Request, id *impersonate.Identity) (*http.Response, error) {
	authorization, stale, err := t.cluster.authorization()
	if err != nil {
		return t.refuse(r, apistatus.Because(err, apistatus.Unavailable(apistatus.NoCredentials, "the proxy has no credentials for the cluster; its log says why")))
	}
	if id.ActAs != nil {
		if id, err = t.actAs(r, id); err != nil {
			return t.refuse(r, err)
		}
	}
	out := t.cluster.request(r)
	// Nothing else changes the headers from here to the wire.
	impersonate.StripProtected(out.Header)
	id.SetHeaders(out.Header)
	if authorization != "" {
		out.Header["Authorization"] = []string{authorization}
	}
	resp, err := t.cluster.send(out)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusForbidden:
		return t.explainForbidden(r, resp, id)
	case http.StatusUnauthorized:
	default:
		return resp, nil
	}
	// The token's file may have changed since it was read.
	t.cluster.renew()
	if stale != nil {
		// A 401 would tell the caller to log in, but it is the proxy's credentials
		// that are not accepted.
		_ = resp.Body.Close()
		return t.refuse(r, apistatus.Because(stale, apistatus.Unavailable(apistatus.NoCredentials, "the API server no longer accepts the proxy's credentials, and they cannot be renewed; the proxy's log says why")))
	}
	return resp, nil
}

// refuse answers r with err, and logs that.
func (t *Transport) refuse(r *http.Request, err error) (*http.Response, error) {
	var who []zap.Field
	if id, ok := impersonate.FromContext(r.Context()); ok {
		who = id.Fields()
		if id.ActAs != nil {
			who = append(who, zap.String("as", clip.String(id.ActAs.Target.User)))
		}
	}
	t.refusals.Refused(r, err, who...)
	return apistatus.Response(r, err)
}

// isHealthCheck reports whether r is one of reverse_proxy's own active health
// checks, which have no caller: a request that no server has received, for a path
// that reports nothing but the health of the API server.
func isHealthCheck(r *http.Request) bool {
	if r.Context().Value(http.ServerContextKey) != nil || r.Context().Value(caddyhttp.VarsCtxKey) != nil {
		return false
	}
	switch r.URL.Path {
	case "/livez", "/readyz", "/healthz":
		return r.Method == http.MethodGet && (r.URL.RawPath == "" || r.URL.RawPath == r.URL.Path)
	}
	return false
}

// streams reports whether the API server streams over the protocols of an upgrade: it
// is one, SPDY or WebSocket. Any other would turn the connection, which is authenticated
// as the proxy, into something that the proxy does not check.
func streams(protocols []string) bool {
	return len(protocols) == 1 && (strings.EqualFold(protocols[0], "SPDY/3.1") || strings.EqualFold(protocols[0], "websocket"))
}

// TLSEnabled implements [reverseproxy.TLSTransport]. A cluster configuration without
// TLS is an error.
func (*Transport) TLSEnabled() bool { return true }

// EnableTLS implements [reverseproxy.TLSTransport]. It ignores its argument: everything
// about TLS comes from the cluster configuration.
func (*Transport) EnableTLS(*reverseproxy.TLSConfig) error { return nil }

// Interface guards
var (
	_ caddy.Module              = (*Transport)(nil)
	_ caddy.Provisioner         = (*Transport)(nil)
	_ caddy.Validator           = (*Transport)(nil)
	_ caddy.CleanerUpper        = (*Transport)(nil)
	_ http.RoundTripper         = (*Transport)(nil)
	_ reverseproxy.TLSTransport = (*Transport)(nil)
)
