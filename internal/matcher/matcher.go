// SPDX-License-Identifier: Apache-2.0

// Package matcher is the request matcher kubernetes, which matches requests by what they
// ask of a Kubernetes API server.
package matcher

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types/ref"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

func init() {
	caddy.RegisterModule(Matcher{})
}

// Matcher matches requests by what they ask of a Kubernetes API server. It parses them
// as the API server does, however the path is written.
//
// Every given option has to match, and an option matches if one of its values does. In
// the values of `group`, `resource`, `subresource`, `namespace` and `name`, `*` stands
// for any number of characters, including none, and an empty value matches only
// requests that have no group, resource and so on. These five options never match
// requests that are not for resources, such as those for `/version` or for API
// discovery.
//
// A request whose path can be understood in more than one way is answered with 400,
// whether it would match or not, unless the matcher has `class ambiguous`.
//
// After the matcher has decided about a request, `transport kubernetes` refuses to send
// one that asks for something else. `transport http` does not check that: with it, do not
// rewrite the method or the URI after the matcher.
//
// In expressions, the matcher takes the options as a map:
// `kubernetes({"verb": ["get", "list"], "resource": "pods"})`. The value of a
// placeholder in it is used as a pattern.
type Matcher struct {
	// Verbs, as in RBAC: `get`, `list`, `watch`, `create`, `update`, `patch`,
	// `delete` and `deletecollection`. The verb of a request that is not for a
	// resource is its method in lower case: `get`, `head`, `post`, `put`,
	// `patch`, `delete` or `options`.
	Verb []string `json:"verb,omitempty"`

	// Patterns of API groups. The core group, which has Pods and Secrets, is
	// empty: `""`, as in RBAC.
	Group []string `json:"group,omitempty"`

	// Patterns of resources, in the plural: `pods`. A pattern matches requests for
	// the resource's subresources as well.
	Resource []string `json:"resource,omitempty"`

	// Patterns of subresources: `log`. An empty one matches requests that are not
	// for a subresource.
	Subresource []string `json:"subresource,omitempty"`

	// Patterns of namespaces. An empty one matches requests for objects without a
	// namespace, and requests for all namespaces.
	Namespace []string `json:"namespace,omitempty"`

	// Patterns of names. An empty one matches requests that do not name a single
	// object in their path or field selector, such as most lists and creations.
	Name []string `json:"name,omitempty"`

	// Classes. Each request has exactly one:
	//
	// - `interactive` are requests that open a shell or a tunnel: `exec`,
	//   `attach`, `portforward` and `proxy` of any resource, writing
	//   `ephemeralcontainers`, and every request for an upgraded connection
	//   except for watches and logs.
	// - `ambiguous` are those whose path has empty segments, dot segments or
	//   encoded slashes, other than after a `proxy` subresource. Nothing else is
	//   certain about them, so it cannot be combined with other options.
	// - `ordinary` are all others.
	Class []string `json:"class,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Matcher) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.matchers.kubernetes",
		New: func() caddy.Module { return new(Matcher) },
	}
}

// option is an option of a Matcher.
type option struct {
	name   string
	values *[]string
	check  func(string) error
}

// options returns all of m's options.
func (m *Matcher) options() []option {
	return []option{
		{"verb", &m.Verb, oneOf("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "head", "post", "put", "options")},
		{"group", &m.Group, checkPattern},
		{"resource", &m.Resource, checkPattern},
		{"subresource", &m.Subresource, checkPattern},
		{"namespace", &m.Namespace, checkPattern},
		{"name", &m.Name, checkSegment},
		{"class", &m.Class, oneOf(string(requestinfo.Ordinary), string(requestinfo.Interactive), string(requestinfo.Ambiguous))},
	}
}

// Validate returns an error if m has no option, or a value that matches no request.
func (m Matcher) Validate() error {
	given := 0
	for _, o := range m.options() {
		if *o.values == nil {
			continue
		}
		given++
		if len(*o.values) == 0 {
			return fmt.Errorf("kubernetes: %s has no value", o.name)
		}
		for _, value := range *o.values {
			if err := o.check(value); err != nil {
				return fmt.Errorf("kubernetes: %s %q: %w", o.name, value, err)
			}
		}
	}
	switch {
	case given == 0:
		return errors.New("kubernetes: no option is given, so it matches everything")
	case given > 1 && m.wantsAmbiguous():
		return fmt.Errorf("kubernetes: class %s goes with no other option, as nothing else can be said of such requests", requestinfo.Ambiguous)
	}
	return nil
}

// oneOf returns a check that a value is one of values.
func oneOf(values ...string) func(string) error {
	return func(value string) error {
		if !slices.Contains(values, value) {
			return fmt.Errorf("must be one of %s", strings.Join(values, ", "))
		}
		return nil
	}
}

// checkPattern returns an error if p matches no name that the API server allows for
// groups, resources, subresources and namespaces.
func checkPattern(p string) error {
	if strings.ToLower(p) != p {
		return errors.New("is always in lower case, so it matches nothing")
	}
	return checkSegment(p)
}

// checkSegment returns an error if p matches no path segment.
func checkSegment(p string) error {
	if strings.Contains(p, "/") {
		return errors.New("holds no slash, so it matches nothing; resource and subresource are options of their own")
	}
	if !impersonate.PrintableASCII(p) || strings.Contains(p, " ") {
		return errors.New("holds a character that is not in any name, so it matches nothing")
	}
	return nil
}

// MatchWithError reports whether r matches. It returns an error for an ambiguous request,
// because a `not` would let one through that does not match.
func (m Matcher) MatchWithError(r *http.Request) (bool, error) {
	info := pin.On(r)
	if info.Ambiguous && !m.wantsAmbiguous() {
		return false, caddyhttp.Error(http.StatusBadRequest, pin.Refuse(r))
	}
	return m.matches(info), nil
}

func (m Matcher) wantsAmbiguous() bool {
	return slices.Contains(m.Class, string(requestinfo.Ambiguous))
}

func (m Matcher) matches(i requestinfo.Info) bool {
	if m.Class != nil && !slices.Contains(m.Class, string(i.Class())) {
		return false
	}
	if m.Verb != nil && !slices.Contains(m.Verb, i.Verb) {
		return false
	}
	for _, o := range [...]struct {
		patterns []string
		value    string
	}{
		{m.Group, i.APIGroup},
		{m.Resource, i.Resource},
		{m.Subresource, i.Subresource},
		{m.Namespace, i.Namespace},
		{m.Name, i.Name},
	} {
		if o.patterns != nil && (!i.IsResourceRequest || !glob.Any(o.patterns, o.value)) {
			return false
		}
	}
	return true
}

// CELLibrary makes the matcher available in CEL expressions.
//
// Example:
//
//	expression kubernetes({"verb": "delete"}) && {http.auth.user.id} != "alice@example.com"
func (Matcher) CELLibrary(caddy.Context) (cel.Library, error) {
	return caddyhttp.CELMatcherImpl("kubernetes", "kubernetes_request", []*cel.Type{caddyhttp.CELTypeJSON},
		func(data ref.Val) (caddyhttp.RequestMatcherWithError, error) {
			given, err := caddyhttp.CELValueToMapStrList(data)
			if err != nil {
				return nil, err
			}
			var m Matcher
			for _, o := range m.options() {
				if values, ok := given[o.name]; ok {
					*o.values = values
					delete(given, o.name)
				}
			}
			for name := range given {
				return nil, fmt.Errorf("kubernetes: unknown option %q", name)
			}
			return m, m.Validate()
		})
}

// Interface guards
var (
	_ caddy.Module                      = Matcher{}
	_ caddy.Validator                   = Matcher{}
	_ caddyhttp.RequestMatcherWithError = Matcher{}
	_ caddyhttp.CELLibraryProducer      = Matcher{}
)
