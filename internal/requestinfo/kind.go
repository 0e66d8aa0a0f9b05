// SPDX-License-Identifier: Apache-2.0

package requestinfo

import (
	"net/http"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Kind says in a word, for people, what a request does while it is open.
type Kind uint8

// The kinds.
const (
	Short Kind = iota // ends by itself, soon
	Watch
	Log // a log that is followed
	Exec
	Attach
	PortForward
	Upgrade // any other tunnel, such as through a service's proxy
	Reading // recordings that are listed, downloaded or played

	Kinds // how many there are
)

var kindNames = [Kinds]string{"short", "watch", "log", "exec", "attach", "portforward", "upgrade", "reading"}

func (k Kind) String() string { return kindNames[k] }

// KindOf guesses the kind of r from the way kubectl and client-go spell it. It is for
// display only: [Parse] would cost too much for every request, as few are ever displayed.
func KindOf(r *http.Request) Kind {
	query := r.URL.RawQuery
	if query != "" && (strings.Contains(query, "watch=true") || strings.Contains(query, "watch=1")) {
		return Watch
	}
	if !upgrade.Requested(r.Header) {
		if query != "" && strings.Contains(query, "follow=true") {
			return Log
		}
		return Short
	}
	switch path := r.URL.Path; path[strings.LastIndexByte(path, '/')+1:] {
	case "exec":
		return Exec
	case "attach":
		return Attach
	case "portforward":
		return PortForward
	case "log":
		return Log
	}
	return Upgrade
}

// Kind returns the kind of the request, however it is spelled. An interactive request is
// Exec, Attach or PortForward if it is for a pod, and otherwise Upgrade, except for one
// that adds an ephemeral container: that is Short, as the session in the container is a
// request of its own. A Log need not be followed. The kind of an ambiguous request is not
// to be relied on.
func (i Info) Kind() Kind {
	switch {
	case i.Interactive && i.isPod():
		switch i.Subresource {
		case "exec":
			return Exec
		case "attach":
			return Attach
		case "portforward":
			return PortForward
		case "ephemeralcontainers":
			if i.Verb == "patch" || i.Verb == "update" {
				return Short
			}
		}
		return Upgrade
	case i.Interactive:
		return Upgrade
	case i.IsResourceRequest && i.Verb == "watch":
		return Watch
	case i.isPod() && i.Subresource == "log":
		return Log
	}
	return Short
}

// isPod reports whether the request is for pods or something below one.
func (i Info) isPod() bool {
	return i.IsResourceRequest && i.APIGroup == "" && i.Resource == "pods"
}
