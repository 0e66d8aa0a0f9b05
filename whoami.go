// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// serveWhoami answers a caller that asks who it is taken for. It passes the checks
// that every request does, but who is known and refused is told why.
func (h *Handler) serveWhoami(w http.ResponseWriter, r *http.Request) error {
	facts, err := h.whois(r)
	if err != nil {
		return h.refuse(w, r, nil, err)
	}
	scheme := "https"
	if r.TLS == nil {
		scheme = "http"
	}
	facts.Server = scheme + "://" + r.Host
	return whoami.Serve(w, r, facts)
}

// whois returns what there is to say about the peer that sent r.
func (h *Handler) whois(r *http.Request) (*whoami.Facts, *apierrors.StatusError) {
	if refused := checkProtocol(r); refused != nil {
		return nil, refused
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return nil, apistatus.MethodNotAllowed(apistatus.Method, "method %s is not supported for %s", r.Method, h.Whoami)
	}
	// A link on another site's page leads here as it should: what opens is a page
	// of this site, which that site can neither read nor frame.
	if !isNavigation(r) {
		if refused := h.checkOrigin(r); refused != nil {
			return nil, refused
		}
	}
	_, _, key, refused := h.reached(r)
	if refused != nil {
		return nil, refused
	}
	return h.facts(r.Context(), key)
}

// isNavigation reports whether a browser sent r to open a page of its own.
func isNavigation(r *http.Request) bool {
	return r.Header["Origin"] == nil &&
		r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document"
}
