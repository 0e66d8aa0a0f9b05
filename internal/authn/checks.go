// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"slices"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// checkProtocol refuses requests that would evade the checks that follow.
func checkProtocol(r *http.Request) error {
	// The server does not hand HTTP/3 connections to ConnContext, and an HTTP/3
	// CONNECT can turn into a WebSocket behind the handler's back. A 421 sends a
	// client back to HTTP/2 or HTTP/1.1.
	if r.ProtoMajor > 2 {
		return apistatus.Misdirected(apistatus.Protocol, "HTTP/3 is not supported; say `protocols h1 h2` in the servers option")
	}
	// HTTP/2's extended CONNECT can do so as well. The API server supports no CONNECT.
	if r.Method == http.MethodConnect {
		return apistatus.MethodNotAllowed(apistatus.Protocol, "method CONNECT is not supported")
	}
	if !requestinfo.IsPath(r.URL) {
		return apistatus.BadRequest(apistatus.Protocol, "the request is not for a path, but for %q", clip.String(r.RequestURI))
	}
	return nil
}

// checkHost refuses requests over plain HTTP whose Host is not node's.
//
// To a browser, a web page whose name is made to resolve to the node's address (DNS
// rebinding) has the same origin, so checkOrigin does not notice it. Over TLS the
// certificate does not match.
func (a *Authenticator) checkHost(r *http.Request, node *tailnet.Node) error {
	if r.TLS != nil || slices.Contains(a.AllowHosts, tailnet.Hostname(r.Host)) {
		return nil
	}
	owns, err := node.Owns(r.Context(), r.Host)
	if err != nil {
		return apistatus.Because(err, apistatus.TryAgain(apistatus.NoAnswer, "tailnet node %q does not tell whether host %q is this server; the proxy's log says why", node.Name, clip.String(r.Host)))
	}
	if !owns {
		return apistatus.Forbidden(apistatus.Host, "host %q is neither the name nor an address of tailnet node %q; if it is meant for this server, name it in allow_hosts or use https", clip.String(r.Host), node.Name)
	}
	return nil
}
