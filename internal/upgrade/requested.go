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

// Protocols returns every protocol that the headers h of a request offer for an upgrade of
// the connection, and whether h asks for an upgrade. Unlike [Requested], it accepts header
// names in any letter case, and an upgrade to no protocol, for callers that must not miss
// one: other handlers can put header names into h that net/http would spell otherwise.
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
