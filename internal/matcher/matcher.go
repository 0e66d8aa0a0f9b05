// SPDX-License-Identifier: Apache-2.0

// Package matcher is the request matcher kubernetes, which tells requests apart by
// what they ask of a Kubernetes API server.
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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
)

func init() {
	caddy.RegisterModule(Matcher{})
}

// Matcher matches requests by what they ask of a Kubernetes API server, which it
// finds out as the API server itself does, however the path is written.
//
// Every option that is given has to match; of an option's values, one. In values
// of `group`, `resource`, `subresource`, `namespace` and `name`, `*` stands for any
// characters, none included, and an empty value for having none. These five
// concern requests for resources only: with any of them, requests such as those
// for `/version` or for the description of the API do not match.
//
// A request whose path can be understood in more than one way is not one to decide
// about. It is answered with 400, unless `class ambiguous` asks for just that.
//
// `transport kubernetes` sends a request that was matched, or not, only if what it
// sends asks for the same. Behind a `transport http` nothing does that: do not
// rewrite the method or the URI there once the matcher has been asked.
//
// In expressions, the matcher takes the options as a map:
// `kubernetes({"verb": ["get", "list"], "resource": "pods"})`. What a placeholder
// in it stands for counts as a pattern.
type Matcher struct {
	// Verbs, as RBAC knows them: `get`, `list`, `watch`, `create`, `update`,
	// `patch`, `delete` and `deletecollection`. Requests that are not for a
	// resource have their method in lower case for a verb: `get`, `head`, `post`,
	// `put`, `patch`, `delete` or `options`.
	Verb []string `json:"verb,omitempty"`

	// Patterns of API groups. The core group, which has Pods and Secrets, is
	// empty: `""`, as in RBAC.
	Group []string `json:"group,omitempty"`

	// Patterns of resources, in the plural: `pods`. A resource's subresources are
	// among it.
	Resource []string `json:"resource,omitempty"`

	// Patterns of subresources: `log`. An empty one stands for requests that are
	// for no subresource.
	Subresource []string `json:"subresource,omitempty"`

	// Patterns of namespaces. An empty one stands for requests that are for what
	// is in no namespace, or for what is in all of them.
	Namespace []string `json:"namespace,omitempty"`

	// Patterns of names. An empty one stands for requests that do not name a single
	// object in their path or field selector, as lists and the creation of most
	// objects do not.
	Name []string `json:"name,omitempty"`

	// Classes, of which each request is in exactly one:
	//
	// - `interactive` are requests that end in a shell or a tunnel: `exec`,
	//   `attach`, `portforward` and `proxy` of any resource, writing
	//   `ephemeralcontainers`, and every request for an upgraded connection
	//   other than those of watches and logs.
	// - `ambiguous` are those whose path holds empty segments, dot segments or
	//   encoded slashes, other than behind a `proxy` subresource. Nothing else can
	//   be said of them, so other options cannot be given with it.
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

// option is one of a Matcher's.
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

// Validate returns an error if m can match no request, or says nothing.
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

// oneOf returns a check for values that must be one of those.
func oneOf(values ...string) func(string) error {
	return func(value string) error {
		if !slices.Contains(values, value) {
			return fmt.Errorf("must be one of %s", strings.Join(values, ", "))
		}
		return nil
	}
}

// checkPattern returns an error if p matches nothing of which the API server has
// the names under control.
func checkPattern(p string) error {
	if strings.ToLower(p) != p {
		return errors.New("is always in lower case, so it matches nothing")
	}
	return checkSegment(p)
}

// checkSegment returns an error if p matches no segment of a path.
func checkSegment(p string) error {
	if strings.Contains(p, "/") {
		return errors.New("holds no slash, so it matches nothing; resource and subresource are options of their own")
	}
	if !impersonate.PrintableASCII(p) || strings.Contains(p, " ") {
		return errors.New("holds a character that is not in any name, so it matches nothing")
	}
	return nil
}

// MatchWithError reports whether r matches. An error is the answer to a request
// about which nothing can be decided: one that does not match would be let through
// by a `not`.
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

// CELLibrary produces options that expose this matcher for use in CEL expressions.
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
