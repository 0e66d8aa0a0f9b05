// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"net/http"
	"slices"
	"strings"

	"k8s.io/client-go/transport"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// bearerProtocolPrefix is the prefix of the entry of Sec-WebSocket-Protocol in which a
// browser sends a bearer token, as it cannot set Authorization on a WebSocket.
const bearerProtocolPrefix = "base64url.bearer.authorization.k8s.io."

// StripProtected removes from h all headers that carry identity or credentials to the
// API server: Impersonate-*, X-Remote-* (front-proxy authentication), Authorization, and
// the bearer token in Sec-WebSocket-Protocol. It returns the name of the impersonation
// header that it removed, the first in alphabetical order, or "" if there was none.
func StripProtected(h http.Header) (impersonation string) {
	for name := range h {
		impersonation = stripProtected(h, name, impersonation)
	}
	return impersonation
}

// stripProtected does what [StripProtected] does, for one header. found is the first
// impersonation header removed so far; it returns the new one.
func stripProtected(h http.Header, name, found string) (impersonation string) {
	switch {
	case foldedPrefix(name, "impersonate-"):
		delete(h, name)
		if found == "" || name < found {
			return name
		}
	case foldedPrefix(name, "x-remote-"), foldedEqual(name, "authorization"):
		delete(h, name)
	case foldedEqual(name, "sec-websocket-protocol"):
		stripBearerProtocol(h, name)
	}
	return found
}

// StripFrontProxy removes X-Remote-* from h. An API server that trusts the sender's
// certificate takes the caller's identity from them.
func StripFrontProxy(h http.Header) {
	for name := range h {
		if foldedPrefix(name, "x-remote-") {
			delete(h, name)
		}
	}
}

// StripClient removes from h, the headers of a received request, what a client may not
// set:
//
//   - All that [StripProtected] removes.
//   - X-Real-Ip, Forwarded, X-Forwarded-* and Audit-Id, as the API server writes them to
//     its audit log. Proxies set the first three kinds themselves.
//   - Incremental, which makes Caddy drop a body that was recorded already.
//   - Connection, except for an upgrade: a proxy removes every header that Connection
//     names, and a client could name ours.
//
// It returns the name of an impersonation header that the client sent, or "" if there
// was none.
func StripClient(h http.Header) (impersonation string) {
	requested := false
	for name, values := range h { // a single loop, as it runs for every request
		switch {
		case foldedEqual(name, "x-real-ip"), foldedPrefix(name, "x-forwarded-"),
			foldedEqual(name, "forwarded"), foldedEqual(name, "audit-id"), foldedEqual(name, "incremental"):
			delete(h, name)
		case foldedEqual(name, "connection"):
			requested = requested || upgrade.InConnection(values)
			delete(h, name)
		default:
			impersonation = stripProtected(h, name, impersonation)
		}
	}
	setUpgrade(h, requested)
	return impersonation
}

// ReduceConnection removes everything from h's Connection except for an upgrade.
func ReduceConnection(h http.Header) {
	requested := false
	for name, values := range h {
		if foldedEqual(name, "connection") {
			requested = requested || upgrade.InConnection(values)
			delete(h, name)
		}
	}
	setUpgrade(h, requested)
}

// setUpgrade sets h's Connection to Upgrade if an upgrade was requested. Other tokens
// would remove headers.
func setUpgrade(h http.Header, requested bool) {
	if requested {
		h["Connection"] = []string{"Upgrade"}
	}
}

// unauthorized is the UID, without a user, of a request to act as another user that the
// API server has not authorized. No header can hold it, so Go's HTTP clients, which
// reverse_proxy uses, refuse to send the request. The API server would refuse it too.
const unauthorized = "kubectl --as needs transport kubernetes\x00"

// SetHeaders writes id into h. Other impersonation headers must have been removed from h.
//
// A request to act as another user must not be sent as the caller, who may have more
// rights than it wants to use, nor as the other user. The headers for it cannot be sent.
func (id *Identity) SetHeaders(h http.Header) {
	if id.ActAs != nil {
		h[transport.ImpersonateUIDHeader] = []string{unauthorized}
		return
	}
	// A copy, as header operations of the config edit values in place.
	values := make([]string, 1+len(id.Groups))
	values[0] = id.User
	copy(values[1:], id.Groups)
	h[transport.ImpersonateUserHeader] = values[:1:1]
	if len(id.Groups) > 0 {
		h[transport.ImpersonateGroupHeader] = values[1:]
	} else {
		delete(h, transport.ImpersonateGroupHeader)
	}
	if id.UID != "" {
		h[transport.ImpersonateUIDHeader] = []string{id.UID}
	}
	for key, values := range id.Extra {
		h[extraHeader(key)] = slices.Clone(values)
	}
	if id.RequestID != "" {
		h[auditIDHeader] = []string{id.RequestID}
		h[extraHeader(ExtraRequestID)] = []string{id.RequestID}
	}
}

// RemoveHeaders removes from h what [Identity.SetHeaders] writes.
func (id *Identity) RemoveHeaders(h http.Header) {
	delete(h, transport.ImpersonateUserHeader)
	delete(h, transport.ImpersonateGroupHeader)
	if id.UID != "" || id.ActAs != nil {
		delete(h, transport.ImpersonateUIDHeader)
	}
	for key := range id.Extra {
		delete(h, extraHeader(key))
	}
	if id.RequestID != "" {
		delete(h, auditIDHeader)
		delete(h, extraHeader(ExtraRequestID))
	}
}

// stripBearerProtocol removes bearer tokens from the subprotocols in h[name] and keeps
// the others in their order.
func stripBearerProtocol(h http.Header, name string) {
	var kept []string
	found := false
	for _, value := range h[name] {
		for protocol := range strings.SplitSeq(value, ",") {
			protocol = strings.TrimSpace(protocol)
			if foldedPrefix(protocol, bearerProtocolPrefix) {
				found = true
				continue
			}
			kept = append(kept, protocol)
		}
	}
	switch {
	case !found:
	case len(kept) == 0:
		delete(h, name)
	default:
		h[name] = []string{strings.Join(kept, ", ")}
	}
}

// foldedEqual reports whether the header name s equals want, which is in lower case.
// It ignores letter case and treats '_' and '.' like '-'.
func foldedEqual(s, want string) bool {
	return len(s) == len(want) && foldedPrefix(s, want)
}

// foldedPrefix is like [foldedEqual], but for the start of s.
func foldedPrefix(s, prefix string) bool {
	// The first letter tells most names apart, and the compiler inlines this part.
	return len(s) >= len(prefix) && s[0]|0x20 == prefix[0] && foldedRest(s, prefix)
}

func foldedRest(s, prefix string) bool {
	for i := range len(prefix) {
		if fold(s[i]) != fold(prefix[i]) {
			return false
		}
	}
	return true
}

func fold(b byte) byte {
	switch {
	case 'A' <= b && b <= 'Z':
		return b + ('a' - 'A')
	case b == '_', b == '.':
		return '-'
	}
	return b
}
