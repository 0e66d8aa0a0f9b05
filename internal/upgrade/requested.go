// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"net/http"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Requested reports whether the headers h of a request ask for an upgrade of the
// connection that reverse_proxy passes on: it goes by the first value of Upgrade, and
// passes on nothing if that is empty.
func Requested(h http.Header) bool {
	protocols := h["Upgrade"]
	return len(protocols) > 0 && protocols[0] != "" && InConnection(h["Connection"])
}

// Protocols returns every protocol that the headers h of a request offer to upgrade
// the connection to, and whether they ask for an upgrade. It accepts header names in
// any letter case, for callers that must not miss an upgrade: config can set headers
// that net/http would spell otherwise. requested with no protocols is possible, and a
// malformed request.
func Protocols(h http.Header) (protocols []string, requested bool) {
	for name, values := range h {
		switch {
		case strings.EqualFold(name, "Connection"):
			requested = requested || InConnection(values)
		case strings.EqualFold(name, "Upgrade"):
			protocols = append(protocols, values...)
		}
	}
	if !requested {
		return nil, false
	}
	return protocols, true
}

// InConnection reports whether values, those of a Connection header, have the token
// Upgrade.
func InConnection(values []string) bool {
	return httpguts.HeaderValuesContainsToken(values, "Upgrade")
}
