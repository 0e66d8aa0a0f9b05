// SPDX-License-Identifier: Apache-2.0

// Package requestinfo determines what an HTTP request asks of a Kubernetes API server.
//
// A decision that depends on that has to see what the API server will see, and there are
// many ways to write one path: "%65xec" is exec, and "secrets%2Fname" is a Secret. So the
// parser is the API server's own, applied to the decoded path as the API server does.
// Some paths remain that programs on the way interpret differently. They are ambiguous:
// no client needs them, and anything that has to decide about one should refuse it.
//
// The package depends neither on Caddy, nor on the caller or on what is allowed.
package requestinfo

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Info is what a request asks for. Two requests with equal Infos ask for the same.
type Info struct {
	// Verb is what RBAC calls a verb: get, list, watch, create, update, patch,
	// delete, deletecollection, and proxy for a path that starts like
	// /api/v1/proxy/. For a request that is not for a resource, it is the HTTP
	// method in lower case. For a request for a resource with a method that the
	// API server does not know, it is empty.
	Verb string
	// APIGroup is empty for the core group.
	APIGroup    string
	APIVersion  string
	Resource    string
	Subresource string
	// Namespace is empty for objects without a namespace, and for requests for all
	// namespaces. A Namespace object counts as being in itself.
	Namespace string
	// Name is empty if the request names no single object. A list or watch with
	// a field selector for metadata.name names one.
	Name string
	// Path is the decoded path.
	Path string
	// IsResourceRequest reports whether the request is for a resource of the API,
	// rather than for something like /version or API discovery.
	IsResourceRequest bool

	// Interactive reports whether the request opens a shell or a tunnel, whose
	// traffic the API server does not authorize: exec, attach, portforward and
	// proxy of any resource, writing ephemeralcontainers, and every upgraded
	// connection except for watches and logs.
	//
	// An aggregated API server can open shells in other ways, which cannot be
	// recognized from the request.
	Interactive bool
	// Ambiguous reports whether the path has empty segments, dot segments or
	// encoded slashes, other than after a proxy subresource, or whether the API
	// server cannot parse it. Slashes at its end are ordinary. The other fields
	// are the API server's interpretation of the path, and are not to be relied
	// on.
	Ambiguous bool
}

// Class is the class of a request in the config of the matcher.
type Class string

// The classes. Each request has exactly one.
const (
	Ordinary    Class = "ordinary"
	Interactive Class = "interactive"
	Ambiguous   Class = "ambiguous" // even if it is interactive as well
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

// String returns the verb, the path and the class, for messages.
func (i Info) String() string {
	return fmt.Sprintf("%s %q (%s)", clip.String(i.Verb), clip.String(i.Path), i.Class())
}

// resolver is configured as every kube-apiserver's is.
var resolver = request.RequestInfoFactory{
	APIPrefixes:          sets.NewString("api", "apis"),
	GrouplessAPIPrefixes: sets.NewString("api"),
}

// Parse returns what r asks for. It looks at the method, the URL, and whether the
// headers ask for an upgrade of the connection.
func Parse(r *http.Request) Info {
	// The resolver returns an error if the path ends early.
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

// Detailed returns the whole result of the API server's parser, even if the path is
// ambiguous. Only events need that much.
func Detailed(r *http.Request) *request.RequestInfo {
	parsed, _ := resolver.NewRequestInfo(r)
	return parsed
}

// PassesOn reports whether the API server passes the request's body on to a process or
// an application. It does not depend on whether the request asks for an upgrade, as the
// API server may ignore that.
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

// IsApp reports whether the request is for an application behind a service or a pod, to
// which the API server passes it on. It is not if its path is ambiguous.
func (i Info) IsApp() bool {
	return !i.Ambiguous && i.APIGroup == "" && i.Subresource == "proxy" &&
		(i.Resource == "services" || i.Resource == "pods")
}

// isInteractive reports whether a request opens a shell or a tunnel. upgrades says whether
// it asks for an upgrade of the connection.
func isInteractive(i Info, upgrades bool) bool {
	if i.PassesOn() {
		return true
	}
	if i.IsResourceRequest {
		switch {
		case i.Subresource == "ephemeralcontainers" && i.Verb != "get":
			return true
		case i.Verb == "watch" && i.Subresource == "", i.isPod() && i.Subresource == "log":
			// These stream in one direction, to a browser over a WebSocket.
			return false
		}
	}
	// For example, the console of a virtual machine.
	return upgrades
}

// IsPath reports whether u is for a path, as every request to an API server is. A request
// line can contain other targets, which are forwarded unchanged: without the path prefix
// of a cluster, and unseen by anything that examines paths.
func IsPath(u *url.URL) bool {
	return u.Opaque == "" && (u.Path == "" || u.Path[0] == '/')
}

// HasDotSegments reports whether u's path has dot segments, encoded or not. A server that
// cleans paths would resolve them.
func HasDotSegments(u *url.URL) bool {
	for segment := range strings.SplitSeq(u.Path, "/") {
		if segment == "." || segment == ".." {
			return true
		}
	}
	return false
}

// isAmbiguous reports whether programs interpret u differently.
func isAmbiguous(u *url.URL) bool {
	// Opaque is sent instead of the path.
	if u.Opaque != "" || !strings.HasPrefix(u.Path, "/") {
		return true
	}
	if isPlain(u) {
		return false
	}
	// Segments of the path as it is sent, in which encoded slashes do not separate.
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

// isPlain reports whether u's path is unambiguous without a look at each segment. Nearly
// all paths are plain.
func isPlain(u *url.URL) bool {
	return u.RawPath == "" && !strings.Contains(u.Path, "//") && !strings.Contains(u.Path, "/.")
}

// isOdd reports whether a decoded segment of a path is empty, is a dot segment, or
// contains a slash.
func isOdd(segment string) bool {
	return segment == "" || segment == "." || segment == ".." || strings.Contains(segment, "/")
}

// isProxied reports whether the API server passes on everything after prefix, which has
// no odd segment, because prefix is the path of a proxy subresource.
func isProxied(prefix string) bool {
	path, err := url.PathUnescape(prefix)
	if err != nil {
		return false
	}
	parsed, err := resolver.NewRequestInfo(&http.Request{URL: &url.URL{Path: path}})
	return err == nil && parsed.Subresource == "proxy"
}
