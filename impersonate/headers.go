// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
	"k8s.io/client-go/transport"
)

// bearerProtocolPrefix starts the entry of Sec-WebSocket-Protocol in which a
// browser, which cannot set Authorization on a WebSocket, sends a bearer token.
const bearerProtocolPrefix = "base64url.bearer.authorization.k8s.io."

// StripProtected removes from h every header that carries identity or
// credentials to the API server: Impersonate-*, X-Remote-* (front-proxy
// authentication), Authorization, and the bearer token of
// Sec-WebSocket-Protocol. It returns the name of an impersonation header that it
// removed, the first in alphabetical order, empty if there was none.
func StripProtected(h http.Header) (impersonation string) {
	for name := range h {
		impersonation = stripProtected(h, name, impersonation)
	}
	return impersonation
}

// stripProtected does what [StripProtected] does for one header. found is the name
// that it has to return so far.
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

// StripFrontProxy removes X-Remote-* from h, which name a caller to an API server
// that trusts the sender to have authenticated it.
func StripFrontProxy(h http.Header) {
	for name := range h {
		if foldedPrefix(name, "x-remote-") {
			delete(h, name)
		}
	}
}

// StripClient removes from h, the headers of a request as it was received, what
// the client may not say: all that [StripProtected] does, and what would end in
// the API server's audit log as if it were so: X-Real-Ip, Forwarded and
// X-Forwarded-*, which a proxy writes anew, and Audit-Id. It removes Incremental,
// with which a client has Caddy drop a body that has been recorded. It reduces
// Connection to what an upgrade needs: a proxy removes every header that Connection
// names, and a client may name ours.
//
// It returns the name of an impersonation header that the client sent, empty if
// there was none.
func StripClient(h http.Header) (impersonation string) {
	upgrade := false
	for name, values := range h { // once, as every request comes by here
		switch {
		case foldedEqual(name, "x-real-ip"), foldedPrefix(name, "x-forwarded-"),
			foldedEqual(name, "forwarded"), foldedEqual(name, "audit-id"), foldedEqual(name, "incremental"):
			delete(h, name)
		case foldedEqual(name, "connection"):
			upgrade = upgrade || asksForUpgrade(values)
			delete(h, name)
		default:
			impersonation = stripProtected(h, name, impersonation)
		}
	}
	setUpgrade(h, upgrade)
	return impersonation
}

// ReduceConnection leaves of h's Connection only what asks for an upgrade.
func ReduceConnection(h http.Header) {
	upgrade := false
	for name, values := range h {
		if foldedEqual(name, "connection") {
			upgrade = upgrade || asksForUpgrade(values)
			delete(h, name)
		}
	}
	setUpgrade(h, upgrade)
}

// asksForUpgrade reports whether the values of a Connection header ask for one.
func asksForUpgrade(values []string) bool {
	return httpguts.HeaderValuesContainsToken(values, "upgrade")
}

// setUpgrade writes the one thing that Connection may say.
func setUpgrade(h http.Header, upgrade bool) {
	if upgrade {
		h["Connection"] = []string{"Upgrade"}
	}
}

// unanswered is what a request has for a UID, and no user, that must not be sent
// before it is known whether its caller may act as somebody else. No header can
// hold it, so that Go's HTTP clients, which reverse_proxy sends with, refuse to send
// it. What would send it nevertheless is refused by the API server.
const unanswered = "kubectl --as needs transport kubernetes\x00"

// SetHeaders writes id into h. Other impersonation headers that h holds must have
// been removed.
//
// A caller that wants to act as somebody else must be sent neither as itself, who
// may have more rights than it wanted to use, nor as the other. With what is
// written then it cannot be sent at all.
func (id *Identity) SetHeaders(h http.Header) {
	if id.ActAs != nil {
		h[transport.ImpersonateUIDHeader] = []string{unanswered}
		return
	}
	// Values of its own, because header operations further on edit them in place.
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

// RemoveHeaders removes from h what SetHeaders writes.
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

// stripBearerProtocol removes bearer tokens from the list of subprotocols in
// h[name] and keeps the others in their order.
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

// foldedEqual reports whether the header name s is want, which is in lower case,
// when letter case is ignored and '_' and '.' stand for '-'.
func foldedEqual(s, want string) bool {
	return len(s) == len(want) && foldedPrefix(s, want)
}

// foldedPrefix is [foldedEqual] for the start of s.
func foldedPrefix(s, prefix string) bool {
	// Most names are told apart by their first letter, and this much of the
	// function is inlined.
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
