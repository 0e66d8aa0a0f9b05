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
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/refusal"
)

func init() {
	caddy.RegisterModule(new(Transport))
}

// Transport is a transport of `reverse_proxy` that sends requests to a Kubernetes
// API server as the identity that the `tailscale_impersonate` handler found. It
// refuses requests that the handler did not see.
//
// Certificate authority, TLS server name and credentials come from the cluster
// configuration and always belong together: the address that `reverse_proxy`
// dials has to present the certificate of that cluster. If neither `in_cluster`
// nor `kubeconfig` is given, the pod's service account is used; outside of a pod
// that is an error.
type Transport struct {
	// Use the service account of the pod that Caddy runs in. Outside of a pod
	// such a config can be validated, but answers every request with 503.
	//
	// Default: true where `kubeconfig` is not given and a service account is
	// present.
	InCluster bool `json:"in_cluster,omitempty"`

	// The path of a kubeconfig file. Placeholders such as `{env.HOME}` are
	// expanded when the config is loaded. Its user needs credentials (a token,
	// a token file, a client certificate or an exec plugin) that may
	// impersonate users and groups, and must not impersonate by itself.
	//
	// Default: none.
	Kubeconfig string `json:"kubeconfig,omitempty"`

	// The context of the kubeconfig file to use.
	//
	// Default: the file's current context.
	Context string `json:"context,omitempty"`

	logger  *zap.Logger
	cluster *cluster
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
	if err := t.validate(); err != nil {
		return err
	}
	config, err := t.load()
	switch {
	case errors.Is(err, errNotInPod) && t.InCluster:
		// A config that is meant for a pod is often validated outside of one.
		t.logger.Error("every request will be refused", zap.Error(err))
		t.unusable = err
		return nil
	case err != nil:
		return err
	}
	t.cluster, err = config.connect(t.logger)
	return err
}

// validate returns an error if the options contradict each other.
func (t *Transport) validate() error {
	if t.InCluster && t.Kubeconfig != "" {
		return errors.New("in_cluster and kubeconfig exclude each other")
	}
	if t.Context != "" && t.Kubeconfig == "" {
		return fmt.Errorf("context %q: only a kubeconfig has contexts", t.Context)
	}
	return nil
}

// load reads the configuration of the cluster that t names.
func (t *Transport) load() (clusterConfig, error) {
	if t.Kubeconfig == "" {
		return inCluster()
	}
	path, err := caddy.NewReplacer().ReplaceOrErr(t.Kubeconfig, true, true)
	if err != nil {
		return clusterConfig{}, fmt.Errorf("kubeconfig %q: %w", t.Kubeconfig, err)
	}
	return fromKubeconfig(path, t.Context)
}

// Cleanup closes connections that nothing uses any more.
func (t *Transport) Cleanup() error {
	if t.cluster != nil {
		t.cluster.close()
	}
	return nil
}

// RoundTrip sends r to the API server as the identity in r's context. It answers
// requests that it does not send with a Kubernetes Status object.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	id, ok := impersonate.FromContext(r.Context())
	if !ok {
		return refusal.Response(r, refusal.Forbidden("the request has no identity: it reached transport kubernetes without passing tailscale_impersonate"))
	}
	upgrade, ok := upgradable(r.Header)
	if !ok {
		return refusal.Response(r, refusal.BadRequest("cannot upgrade the connection to %q: the API server speaks SPDY/3.1 and websocket", r.Header["Upgrade"]))
	}
	if t.unusable != nil {
		return refusal.Response(r, refusal.Unavailable("no cluster: %v", t.unusable))
	}
	authorization, stale, err := t.cluster.authorization()
	if err != nil {
		return refusal.Response(r, refusal.Unavailable("no credentials for the cluster: %v", err))
	}

	out := r.WithContext(r.Context())
	out.URL = t.cluster.url(r.URL)
	out.Host = t.cluster.base.Host
	out.Trailer = nil
	// From here to the wire nothing else touches the headers.
	out.Header = r.Header.Clone()
	impersonate.StripProtected(out.Header)
	id.SetHeaders(out.Header)
	if authorization != "" {
		out.Header["Authorization"] = []string{authorization}
	}

	resp, err := t.cluster.pool(upgrade).RoundTrip(out)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusUnauthorized && stale != nil {
		// Passed on, a 401 would tell the caller to log in, who is not the one
		// that has to.
		_ = resp.Body.Close()
		return refusal.Response(r, refusal.Unavailable("the API server no longer accepts the proxy's credentials, and they cannot be renewed: %v", stale))
	}
	return resp, nil
}

// upgradable reports whether a request with the headers h asks to upgrade its
// connection, and whether it may: to a protocol that the API server streams
// over. Any other would turn the connection, which is authenticated as the
// proxy, into something that nobody looks at.
func upgradable(h http.Header) (upgrade, ok bool) {
	if !httpguts.HeaderValuesContainsToken(h["Connection"], "upgrade") {
		return false, true
	}
	protocols := h["Upgrade"]
	return true, len(protocols) == 1 && (strings.EqualFold(protocols[0], "SPDY/3.1") || strings.EqualFold(protocols[0], "websocket"))
}

// TLSEnabled implements reverseproxy.TLSTransport: a cluster that is not spoken
// to over TLS is refused when its configuration is read.
func (*Transport) TLSEnabled() bool { return true }

// EnableTLS implements reverseproxy.TLSTransport. All about TLS comes from the
// cluster configuration.
func (*Transport) EnableTLS(*reverseproxy.TLSConfig) error { return nil }

// url returns where to send a request for u, whose host reverse_proxy has set to
// the upstream to dial.
func (c *cluster) url(u *url.URL) *url.URL {
	out := *u
	out.Scheme = c.base.Scheme
	if c.base.Path != "" {
		if out.RawPath != "" {
			out.RawPath = c.base.EscapedPath() + out.RawPath
		}
		out.Path = c.base.Path + out.Path
	}
	return &out
}

// Interface guards
var (
	_ caddy.Module              = (*Transport)(nil)
	_ caddy.Provisioner         = (*Transport)(nil)
	_ caddy.CleanerUpper        = (*Transport)(nil)
	_ http.RoundTripper         = (*Transport)(nil)
	_ reverseproxy.TLSTransport = (*Transport)(nil)
)
