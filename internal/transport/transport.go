// SPDX-License-Identifier: Apache-2.0

// Package transport is the last step of a request: transport kubernetes of
// reverse_proxy, which knows the cluster, holds the credentials, and attaches
// both credentials and identity as the request leaves.
//
// The credentials are allowed to impersonate anybody. They must not be found on
// any request that does not say whom, so they are not given out earlier, and not
// given to anything else: the identity is the one that tailscale_impersonate left
// in the request's context, everything that stands in the headers by then is
// discarded, and a request without such an identity is refused. A config that
// forgot the handler, or edits those headers, cannot speak as the proxy itself.
package transport

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
)

func init() {
	caddy.RegisterModule(new(Transport))
}

// Whose credentials go with a request: what Transport.Credentials can be.
const (
	Proxy  = "proxy"
	Client = "client"
)

// Transport is a transport of `reverse_proxy` that sends requests to a Kubernetes
// API server as the identity that the `tailscale_impersonate` handler found. It
// refuses requests that the handler did not see.
//
// Certificate authority, TLS server name and credentials come from the cluster
// configuration and always belong together: the address that `reverse_proxy`
// dials has to present the certificate of that cluster.
//
// An active health check of `reverse_proxy` may GET `/livez`, `/readyz` and
// `/healthz`. As it has no caller it is sent without any credentials, which needs
// a cluster that lets anybody read these paths, as clusters do by default
// (anonymous authentication and the ClusterRole `system:public-info-viewer`).
type Transport struct {
	Source

	// Whose credentials go with a request:
	//
	// - `proxy` (the default): those of the cluster configuration, together with
	//   the identity of the caller that they impersonate.
	// - `client`: those that the client sends, if any. The cluster configuration
	//   provides the way to the cluster and nothing else, and
	//   `tailscale_impersonate`, which removes a client's credentials, must not
	//   stand in front.
	Credentials string `json:"credentials,omitempty"`

	logger *zap.Logger
	// cluster is where requests with the proxy's credentials go, anonymous where
	// those without go.
	cluster, anonymous *cluster
	// reviewer finds out whether callers may act as somebody else.
	reviewer *accessreview.Reviewer
	// unusable is why there is no cluster, if there is none.
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
	if err := config.checkUser(); err != nil {
		return err
	}
	if t.reviewer, err = accessreview.NewReviewer(); err != nil {
		return err
	}
	if t.cluster, err = config.connect(t.logger); err != nil {
		return err
	}
	if t.cluster.token != nil {
		tokenAges.add(t.cluster)
		metrics.Register(ctx.GetMetricsRegistry(), tokenAges)
	}
	return nil
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

// Cleanup closes connections that nothing uses any more.
func (t *Transport) Cleanup() error {
	tokenAges.remove(t.cluster)
	for _, c := range []*cluster{t.cluster, t.anonymous} {
		if c != nil {
			c.close()
		}
	}
	return nil
}

// RoundTrip sends r to the API server as the identity in r's context. It answers
// requests that it does not send with a Kubernetes Status object.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	id, identified := impersonate.FromContext(r.Context())
	check := isHealthCheck(r)
	switch {
	case check:
	case t.Credentials == Client && identified:
		return t.refuse(r, apistatus.Forbidden(apistatus.NoHandler, "credentials client takes the caller's own credentials, which tailscale_impersonate in front of it has removed"))
	case t.Credentials != Client && !identified:
		return t.refuse(r, apistatus.Forbidden(apistatus.NoHandler, "the request has no identity: it reached transport kubernetes without passing tailscale_impersonate"))
	}
	// What a matcher was asked about has to be what is sent.
	if refused := pin.Check(r); refused != nil {
		return t.refuse(r, refused)
	}
	if t.unusable != nil {
		return t.refuse(r, apistatus.Unavailable(apistatus.NoCredentials, "no cluster: %v", t.unusable))
	}
	// It is sent on as it is, below the cluster's own path.
	if !requestinfo.IsPath(r.URL) || t.anonymous.base.Path != "" && requestinfo.HasDotSegments(r.URL) {
		return t.refuse(r, apistatus.BadRequest(apistatus.AmbiguousPath, "%q is no path below that of the cluster", r.URL))
	}
	if err := sessionrecording.Confirm(r); err != nil {
		return t.refuse(r, err)
	}
	protocols, ok := upgradeAllowed(r.Header)
	if !ok {
		return t.refuse(r, apistatus.BadRequest(apistatus.Protocol, "cannot upgrade the connection to %q: the API server speaks SPDY/3.1 and websocket", protocols))
	}
	// The API server answers when it has all of the body, and acts before that.
	if len(protocols) > 0 && r.ContentLength != 0 {
		return t.refuse(r, apistatus.BadRequest(apistatus.Protocol, "a request to upgrade the connection has no body"))
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

// impersonate sends r with the proxy's credentials, as id, or as whom id wants to
// act as and may.
func (t *Transport) impersonate(r *http.Request, id *impersonate.Identity) (*http.Response, error) {
	authorization, stale, err := t.cluster.authorization()
	if err != nil {
		return t.refuse(r, apistatus.Unavailable(apistatus.NoCredentials, "no credentials for the cluster: %v", err))
	}
	if id.ActAs != nil {
		var refused *apierrors.StatusError
		if id, refused = t.actAs(r, id); refused != nil {
			return t.refuse(r, refused)
		}
	}
	out := t.cluster.request(r)
	// From here to the wire nothing else touches the headers.
	impersonate.StripProtected(out.Header)
	id.SetHeaders(out.Header)
	if authorization != "" {
		out.Header["Authorization"] = []string{authorization}
	}
	resp, err := t.cluster.send(out)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusUnauthorized {
		return resp, nil
	}
	// The token may have been renewed since it was read.
	t.cluster.renew()
	if stale != nil {
		// Passed on, a 401 would tell the caller to log in, who is not the one
		// that has to.
		_ = resp.Body.Close()
		return t.refuse(r, apistatus.Unavailable(apistatus.NoCredentials, "the API server no longer accepts the proxy's credentials, and they cannot be renewed: %v", stale))
	}
	return resp, nil
}

// refuse answers r with err, and says so in the log.
func (t *Transport) refuse(r *http.Request, err *apierrors.StatusError) (*http.Response, error) {
	var who []zap.Field
	if id, ok := impersonate.FromContext(r.Context()); ok {
		who = id.Fields()
		if id.ActAs != nil {
			who = append(who, zap.String("as", id.ActAs.Target.User))
		}
	}
	apistatus.Log(t.logger, r, err, who...)
	return apistatus.Response(r, err)
}

// isHealthCheck reports whether r is one of reverse_proxy's own active health
// checks, which have no caller: a request that no server has received, for a path
// that says nothing but whether the API server is well.
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

// upgradeAllowed returns the protocols to which a request with the headers h asks
// to upgrade its connection, and whether it may: to none, or to one that the API
// server streams over. Any other would turn the connection, which is authenticated
// as the proxy, into something that nobody looks at.
func upgradeAllowed(h http.Header) (protocols []string, ok bool) {
	asks := false
	for name, values := range h {
		switch {
		case strings.EqualFold(name, "Connection"):
			asks = asks || httpguts.HeaderValuesContainsToken(values, "upgrade")
		case strings.EqualFold(name, "Upgrade"):
			protocols = append(protocols, values...)
		}
	}
	if !asks {
		return nil, true
	}
	return protocols, len(protocols) == 1 && (strings.EqualFold(protocols[0], "SPDY/3.1") || strings.EqualFold(protocols[0], "websocket"))
}

// TLSEnabled implements reverseproxy.TLSTransport: a cluster that is not spoken
// to over TLS is refused when its configuration is read.
func (*Transport) TLSEnabled() bool { return true }

// EnableTLS implements reverseproxy.TLSTransport. All about TLS comes from the
// cluster configuration.
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
