// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// errNotInPod is returned by inCluster outside of a pod with a service account.
var errNotInPod = errors.New("not in a pod with a service account")

// clusterConfig is a cluster configuration as client-go reads it, except for a bearer
// token's file, which this package reads: client-go goes on with the token in memory
// when the file is gone, and does not report that.
type clusterConfig struct {
	rest *rest.Config
	// tokenFile is the path of the bearer token's file, empty if there is none.
	tokenFile string
	// userErr says why the credentials cannot be used to impersonate callers. Nil if
	// they can.
	userErr error
}

// inCluster returns the configuration of the cluster that this pod runs in.
func inCluster() (clusterConfig, error) {
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) || errors.Is(err, os.ErrNotExist) {
		return clusterConfig{}, fmt.Errorf("%w (%w); outside of a pod, say kubeconfig <path>", errNotInPod, err)
	}
	if err != nil {
		return clusterConfig{}, fmt.Errorf("in_cluster: %w", err)
	}
	return ofServiceAccount(config)
}

// ofServiceAccount returns the configuration for config, which client-go found in a pod.
func ofServiceAccount(config *rest.Config) (clusterConfig, error) {
	if config.CAFile == "" {
		return clusterConfig{}, errors.New("in_cluster: the service account has no readable ca.crt, which is needed to verify the API server")
	}
	tokenFile := config.BearerTokenFile
	config.BearerToken, config.BearerTokenFile = "", ""
	return clusterConfig{rest: config, tokenFile: tokenFile}, nil
}

// fromKubeconfig returns the configuration of a context of the kubeconfig file at
// path, or of its current context if contextName is empty. The credentials must be of
// exactly one kind; see userErr.
func fromKubeconfig(path, contextName string) (clusterConfig, error) {
	fail := func(err error) (clusterConfig, error) {
		return clusterConfig{}, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: path}
	raw, err := rules.Load()
	if err != nil {
		return fail(err)
	}
	if contextName == "" {
		contextName = raw.CurrentContext
	}
	if contextName == "" {
		return fail(errors.New("it has no current context, and none is named"))
	}
	kubeContext, ok := raw.Contexts[contextName]
	if !ok {
		return fail(fmt.Errorf("it has no context %q", contextName))
	}
	user, ok := raw.AuthInfos[kubeContext.AuthInfo]
	if !ok {
		return fail(fmt.Errorf("it has no user %q, which context %q names", kubeContext.AuthInfo, contextName))
	}
	impersonates := user.Impersonate != "" || user.ImpersonateUID != "" || len(user.ImpersonateGroups) > 0 || len(user.ImpersonateUserExtra) > 0
	user.Impersonate, user.ImpersonateUID, user.ImpersonateGroups, user.ImpersonateUserExtra = "", "", nil, nil
	tokenFile := user.TokenFile
	user.TokenFile = ""
	config, err := clientcmd.NewNonInteractiveClientConfig(*raw, contextName, &clientcmd.ConfigOverrides{}, nil).ClientConfig()
	if err != nil {
		return fail(err)
	}
	config.BearerToken = strings.TrimSpace(config.BearerToken)
	out := clusterConfig{rest: config, tokenFile: tokenFile}
	if impersonates {
		out.userErr = errors.New("it impersonates (as:), and a request can impersonate only one identity: the caller's")
	} else {
		out.userErr = checkCredentials(config, tokenFile)
	}
	if out.userErr != nil {
		out.userErr = fmt.Errorf("kubeconfig %s: user %q: %w", path, kubeContext.AuthInfo, out.userErr)
	}
	return out, nil
}

// warnIfInsecure logs a warning if c does not verify the API server.
func (c clusterConfig) warnIfInsecure(logger *zap.Logger) {
	if c.rest.Insecure {
		logger.Warn("the cluster configuration has insecure-skip-tls-verify: the credentials go to whatever answers at the cluster's address", zap.String("cluster", c.rest.Host))
	}
}

// anonymous returns the configuration of the same cluster without any credentials.
func (c clusterConfig) anonymous() clusterConfig {
	return clusterConfig{rest: rest.AnonymousClientConfig(c.rest)}
}

// checkCredentials returns an error unless config holds credentials of exactly one
// kind. Of several, the API server would use one (a client certificate before a token)
// and not say which.
func checkCredentials(config *rest.Config, tokenFile string) error {
	var kinds []string
	for _, c := range []struct {
		kind    string
		present bool
	}{
		{"a client certificate", config.CertFile != "" || len(config.CertData) > 0},
		{"a token", config.BearerToken != "" || tokenFile != ""},
		{"a user name and password", config.Username != ""},
		{"an exec plugin", config.ExecProvider != nil},
		{"an auth provider", config.AuthProvider != nil},
	} {
		if c.present {
			kinds = append(kinds, c.kind)
		}
	}
	switch len(kinds) {
	case 0:
		return errors.New("it has no credentials, which the proxy needs to impersonate callers")
	case 1:
		return nil
	}
	return fmt.Errorf("it has %s, of which the API server would pick one", strings.Join(kinds, " and "))
}

// cluster sends requests to the API servers of one cluster.
type cluster struct {
	// base is the URL of the cluster configuration.
	base *url.URL
	// token is the bearer token's file, nil if there is none. The pools attach
	// credentials other than bearer tokens.
	token *tokenFile
	// bearer is a bearer token that never changes, empty if there is none.
	bearer string
	// http2 speaks HTTP/2 if the server does, and streams does for what lasts. http1, for
	// upgrades, never does.
	http1, http2, streams http.RoundTripper
}

// The pools of connections.
const (
	// idleConns is how many idle connections to one API server are kept, so that as
	// many concurrent callers need not dial.
	idleConns = 512
	// idleTimeout is how long an idle connection is kept. It is below the 90 seconds
	// after which the API server closes it, which could otherwise happen while a
	// request is under way.
	idleTimeout = 60 * time.Second
)

// base returns the URL of the API server.
func (c clusterConfig) base() (*url.URL, error) {
	base, _, err := rest.DefaultServerUrlFor(c.rest)
	if err != nil {
		return nil, fmt.Errorf("cluster address %q: %w", c.rest.Host, err)
	}
	if base.Scheme != "https" {
		return nil, fmt.Errorf("cluster address %q: must be https, as credentials go there", c.rest.Host)
	}
	base.Path = strings.TrimSuffix(base.Path, "/")
	base.RawPath = ""
	return base, nil
}

// connect returns the cluster that c configures. It opens no connection.
func (c clusterConfig) connect(logger *zap.Logger) (*cluster, error) {
	base, err := c.base()
	if err != nil {
		return nil, err
	}
	out := &cluster{base: base, bearer: c.rest.BearerToken}
	if c.tokenFile != "" {
		out.token = &tokenFile{path: c.tokenFile, logger: logger}
	}
	config := rest.CopyConfig(c.rest)
	config.BearerToken = ""
	config.Dial = dial
	config.DisableCompression = true // responses are passed on unchanged
	if config.ServerName == "" {
		// Whichever of the cluster's addresses is dialled, the certificate has to be
		// for the cluster's name.
		config.ServerName = base.Hostname()
	}
	http1 := rest.CopyConfig(config)
	http1.NextProtos = []string{"http/1.1"}
	for _, pool := range []struct {
		of     *http.RoundTripper
		config *rest.Config
		buffer int
	}{{&out.http2, config, quota.AnswerBuffer}, {&out.streams, config, quota.StreamBuffer}, {&out.http1, http1, 0}} {
		if *pool.of, err = newPool(pool.config, pool.buffer); err != nil {
			return nil, fmt.Errorf("cluster %s: %w", base, err)
		}
	}
	return out, nil
}

// newPool returns a pool of connections for config. Over HTTP/2, it buffers at most buffer
// bytes of an answer that is not read. Go's default is 4 MiB, which a client that does not
// read makes the process hold for each of its requests.
func newPool(config *rest.Config, buffer int) (http.RoundTripper, error) {
	pool, err := rest.TransportFor(config)
	if err != nil {
		return nil, err
	}
	// client-go has no options for these, so they are set on the http.Transport
	// that it wraps, before the first request. Nothing else uses it: client-go
	// shares transports between equal configurations, but not those with a Dial.
	for layer := pool; ; {
		switch l := layer.(type) {
		case *http.Transport:
			l.MaxIdleConnsPerHost = idleConns
			l.IdleConnTimeout = idleTimeout
			// Not for the connection as a whole: all callers share it, and one that
			// does not read would stop the others.
			l.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: buffer}
			return pool, nil
		case utilnet.RoundTripperWrapper:
			layer = l.WrappedRoundTripper()
		default:
			return nil, fmt.Errorf("[unexpected] no http.Transport below a %T", layer)
		}
	}
}

// request returns the request to the cluster for r, which reverse_proxy has directed at
// an upstream. Its headers can be changed without changing r's.
func (c *cluster) request(r *http.Request) *http.Request {
	out := r.WithContext(r.Context())
	u := *r.URL
	u.Scheme = c.base.Scheme
	if c.base.Path != "" {
		if u.RawPath != "" {
			u.RawPath = c.base.EscapedPath() + u.RawPath
		}
		u.Path = c.base.Path + u.Path
	}
	out.URL = &u
	out.Host = c.base.Host
	out.Trailer = nil
	out.Header = r.Header.Clone()
	// A config can set Connection as well. Proxies between here and the API server
	// remove the headers that it names.
	impersonate.ReduceConnection(out.Header)
	return out
}

// send sends r over a connection of the pool that suits it.
//
// Nearly all requests share a few HTTP/2 connections. A thousand watches would otherwise
// hold a thousand connections, and requests that are sent at the same time share
// packets. What lasts has a smaller buffer, as there may be a thousand of them, and connections
// of its own. Upgrades need HTTP/1.1: neither SPDY nor WebSocket runs over HTTP/2.
func (c *cluster) send(r *http.Request) (*http.Response, error) {
	if !upgrade.Requested(r.Header) {
		to := c.http2
		if requestinfo.KindOf(r) != requestinfo.Short {
			to = c.streams
		}
		if r.Body == nil || r.Body == http.NoBody {
			return to.RoundTrip(r)
		}
		r.Body = &requestBody{body: r.Body}
		resp, err := to.RoundTrip(r)
		if err == nil {
			resp.Body = closedLater{resp.Body}
		}
		return resp, err
	}
	resp, err := c.http1.RoundTrip(r)
	if err == nil {
		upgrade.Server(resp)
	}
	return resp, err
}

// dial connects to an upstream that reverse_proxy has chosen. Its errors tell
// reverse_proxy that nothing has been sent, so that it may try another upstream.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext(ctx, network, address)
	if err != nil {
		return nil, reverseproxy.NewDialError(err)
	}
	return conn, nil
}

// authorization returns the value of the Authorization header, empty if the proxy has
// no bearer token. stale says why the token could not be renewed, nil if it could. err
// says why there is no token although there should be one.
func (c *cluster) authorization() (value string, stale, err error) {
	token := c.bearer
	if c.token != nil {
		token, stale, err = c.token.get()
		if err != nil {
			return "", nil, err
		}
	}
	if token == "" {
		return "", nil, nil
	}
	return "Bearer " + token, stale, nil
}

// renew makes the next request read the token's file, if there is one.
func (c *cluster) renew() {
	if c.token != nil {
		c.token.expire()
	}
}

// close closes idle connections.
func (c *cluster) close() {
	utilnet.CloseIdleConnectionsFor(c.http1)
	utilnet.CloseIdleConnectionsFor(c.http2)
	utilnet.CloseIdleConnectionsFor(c.streams)
}
