// SPDX-License-Identifier: Apache-2.0

// Package apirequest says what an HTTP request asks of a Kubernetes API server.
//
// Whoever decides by that has to see what the API server will see, and there are
// many ways to write one path: "%65xec" is exec, and "secrets%2Fname" is a Secret.
// So the parser is the API server's own, applied to the decoded path as the API
// server does. What is left are paths that programs on the way understand in
// different ways. They are ambiguous: nobody has a use for them, and whoever
// has to decide about one had better refuse it.
//
// The package knows nothing of Caddy, of the caller, or of what is allowed.
package requestinfo

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Info is what a request asks for. Two requests ask for the same if their Info is
// equal.
type Info struct {
	// Verb is what RBAC calls a verb: get, list, watch, create, update, patch,
	// delete, deletecollection, and proxy for a path that starts like
	// /api/v1/proxy/. Of a request that is not for a resource, it is the HTTP
	// method in lower case. Of a request for a resource with a method that the
	// API server does not know, it is empty.
	Verb string
	// APIGroup is empty for the core group.
	APIGroup    string
	APIVersion  string
	Resource    string
	Subresource string
	// Namespace is empty for what is in none, and for requests that are about
	// all of them. A namespace is in itself.
	Namespace string
	// Name is empty if the request names no single object. A list or watch with
	// a field selector for metadata.name does name one.
	Name string
	// Path is the decoded path.
	Path string
	// IsResourceRequest reports whether the request is for a resource of the API,
	// and not for something like /version or the description of the API.
	IsResourceRequest bool

	// Interactive reports whether the request ends in a shell or a tunnel, so
	// that the requests which matter are those that follow on the same
	// connection, or are made by whatever is at its other end: exec, attach,
	// portforward and proxy of any resource, writing ephemeralcontainers, and
	// every upgraded connection but that of a watch or a log.
	//
	// An API server that was added to the cluster (an aggregated API) can give
	// out shells in other ways, which nobody can tell from the request.
	Interactive bool
	// Ambiguous reports whether the path holds empty segments, dot segments or
	// encoded slashes, other than in what follows a proxy subresource, or is none
	// that the API server can make sense of. Slashes at its end are ordinary.
	// The other fields say what the API server would make of it, and are not to
	// be relied on.
	Ambiguous bool
}

// Class sorts requests by what can be said about them.
type Class string

// The classes. Each request is in exactly one.
const (
	Ordinary    Class = "ordinary"
	Interactive Class = "interactive"
	Ambiguous   Class = "ambiguous" // whatever else it may be
)

// Class returns the class of the request.
func (i Info) Class() Class {
	switch {
	case i.Ambiguous:
		return Ambiguous
	case i.Interactive:
		return Interactive
	}
	return Ordinary
}

// String describes the request in a few words.
func (i Info) String() string { return fmt.Sprintf("%s %q (%s)", i.Verb, i.Path, i.Class()) }

// resolver is configured as every kube-apiserver's is.
var resolver = request.RequestInfoFactory{
	APIPrefixes:          sets.NewString("api", "apis"),
	GrouplessAPIPrefixes: sets.NewString("api"),
}

// Parse returns what r asks for. It looks at the method, the URL, and whether the
// headers ask for an upgrade of the connection.
func Parse(r *http.Request) Info {
	// The resolver's errors are about paths that lack what they announce.
	parsed, err := resolver.NewRequestInfo(r)
	info := Info{
		Verb:              parsed.Verb,
		APIGroup:          parsed.APIGroup,
		APIVersion:        parsed.APIVersion,
		Resource:          parsed.Resource,
		Subresource:       parsed.Subresource,
		Namespace:         parsed.Namespace,
		Name:              parsed.Name,
		Path:              parsed.Path,
		IsResourceRequest: parsed.IsResourceRequest,
		Ambiguous:         err != nil || isAmbiguous(r.URL),
	}
	info.Interactive = isInteractive(info, upgrade.Requested(r.Header))
	return info
}

// Detailed returns what the API server's parser says about r, as it is, and even
// if the path is ambiguous. Only events need that much.
func Detailed(r *http.Request) *request.RequestInfo {
	parsed, _ := resolver.NewRequestInfo(r)
	return parsed
}

// PassesOn reports whether what the API server gets with the request, a body for one,
// is not for itself, but for a process or an application behind it. Whether an upgrade
// is asked for does not count: the API server may not care for it.
func (i Info) PassesOn() bool {
	if !i.IsResourceRequest {
		return false
	}
	switch i.Subresource {
	case "exec", "attach", "portforward", "proxy":
		return true
	}
	return i.Verb == "proxy"
}

// isInteractive reports whether a request ends in a shell or a tunnel. upgrades is
// whether it asks for an upgrade of the connection.
func isInteractive(i Info, upgrades bool) bool {
	if i.PassesOn() {
		return true
	}
	if i.IsResourceRequest {
		switch {
		case i.Subresource == "ephemeralcontainers" && i.Verb != "get":
			return true
		case i.Verb == "watch" && i.Subresource == "", i.isPod() && i.Subresource == "log":
			// These stream one way, over a WebSocket to a browser.
			return false
		}
	}
	// The consoles of virtual machines, for one.
	return upgrades
}

// IsPath reports whether u asks for a path, as every request to an API server does.
// A request line can hold other things, which are sent on as they are: past all that
// looks at paths, and without the prefix that a cluster has.
func IsPath(u *url.URL) bool {
	return u.Opaque == "" && (u.Path == "" || u.Path[0] == '/')
}

// HasDotSegments reports whether u's path has segments that lead elsewhere where
// paths are cleaned, however they are written.
func HasDotSegments(u *url.URL) bool {
	for segment := range strings.SplitSeq(u.Path, "/") {
		if segment == "." || segment == ".." {
			return true
		}
	}
	return false
}

// isAmbiguous reports whether u is a way of writing a path that is not understood
// in the same way by everybody.
func isAmbiguous(u *url.URL) bool {
	// Opaque is sent in place of a path.
	if u.Opaque != "" || !strings.HasPrefix(u.Path, "/") {
		return true
	}
	if isPlain(u) {
		return false
	}
	// As it is sent, cut where slashes are written as such.
	rest := strings.TrimRight(u.EscapedPath(), "/")
	end := 0
	for end < len(rest) {
		segment, _, _ := strings.Cut(rest[end+1:], "/")
		if name, err := url.PathUnescape(segment); err != nil || isOdd(name) {
			return !isProxied(rest[:end])
		}
		end += 1 + len(segment)
	}
	return false
}

// isPlain reports whether u's path holds nothing that isAmbiguous would have to
// look at more closely, as is the case for nearly all.
func isPlain(u *url.URL) bool {
	return u.RawPath == "" && !strings.Contains(u.Path, "//") && !strings.Contains(u.Path, "/.")
}

// isOdd reports whether a decoded segment of a path is empty, a dot segment, or
// holds a slash.
func isOdd(segment string) bool {
	return segment == "" || segment == "." || segment == ".." || strings.Contains(segment, "/")
}

// isProxied reports whether all that follows the path prefix, of which no segment
// is odd, is not the API server's to interpret, as it is passed on to what a proxy
// subresource stands for.
func isProxied(prefix string) bool {
	path, err := url.PathUnescape(prefix)
	if err != nil {
		return false
	}
	parsed, err := resolver.NewRequestInfo(&http.Request{URL: &url.URL{Path: path}})
	return err == nil && parsed.Subresource == "proxy"
}
