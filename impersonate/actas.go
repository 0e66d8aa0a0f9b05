// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/transport"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
)

// The keys of the extra fields that name the caller who acts as another user, besides
// ExtraNode.
const (
	ExtraOriginalUser   = extraDomain + "original-user"
	ExtraOriginalUID    = extraDomain + "original-uid" // only with audit
	ExtraOriginalGroups = extraDomain + "original-groups"
)

// Target is the user that a client asks to act as, as with kubectl --as. It is only
// what the client asks for, and not an [Identity].
type Target struct {
	User   string
	UID    string // empty if not asked for
	Groups []string
	Extra  map[string][]string
}

// maxAttributes is the number of values that a target may have. The client chooses how
// many it sends, and the API server is asked about each of them.
const maxAttributes = 64

// maxLength is the length of the longest value, or key of an extra field, that a target may
// have, in bytes. The longest name of a service account has 338, and a name cannot be cut:
// it would be another one. Each value is sent to the API server several times.
const maxLength = 512

// ParseTarget returns the target that the headers h, as the client sent them, ask for.
// It returns nil if they ask for none.
//
// It reads h as the API server does, but stricter. These are errors although the API
// server ignores them: a second user, names in another spelling (Impersonate_User),
// keys that cannot be decoded, and empty values. Names and values that are too long or too
// many are errors as well, and so are the extra fields that only this package sets.
func ParseTarget(h http.Header) (*Target, error) {
	var names []string
	for name := range h {
		if foldedPrefix(name, "impersonate-") {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	slices.Sort(names) // so that the error is the same each time
	t := &Target{}
	for _, name := range names {
		if err := t.parse(name, h[name]); err != nil {
			return nil, err
		}
	}
	switch {
	case t.User == "":
		return nil, errors.New("the request asks to impersonate groups, a UID or extra fields without a user")
	case t.attributes() > maxAttributes:
		return nil, fmt.Errorf("the request asks to impersonate %d values; at most %d are allowed", t.attributes(), maxAttributes)
	}
	return t, nil
}

// parse sets what the header name asks for.
func (t *Target) parse(name string, values []string) error {
	shown := clip.String(name)
	if len(values) == 0 {
		return fmt.Errorf("header %s has no value", shown)
	}
	for _, value := range values {
		if n := max(len(name), len(value)); n > maxLength {
			return fmt.Errorf("header %s has %d bytes; at most %d are allowed", shown, n, maxLength)
		}
		if err := checkName("value of header "+shown, value); err != nil {
			return err
		}
	}
	switch name {
	case transport.ImpersonateGroupHeader:
		t.Groups = values
		return nil
	case transport.ImpersonateUserHeader, transport.ImpersonateUIDHeader:
		if len(values) > 1 {
			return fmt.Errorf("header %s is given twice", shown)
		}
		if name == transport.ImpersonateUserHeader {
			t.User = values[0]
		} else {
			t.UID = values[0]
		}
		return nil
	}
	encoded, ok := strings.CutPrefix(name, transport.ImpersonateUserExtraHeaderPrefix)
	if !ok {
		return fmt.Errorf("unknown impersonation header %s", shown)
	}
	key, err := url.PathUnescape(strings.ToLower(encoded))
	if err != nil {
		return fmt.Errorf("header %s: %w", shown, err)
	}
	if err := checkName("key of header "+shown, key); err != nil {
		return err
	}
	if strings.HasPrefix(strings.ToLower(key), extraDomain) {
		return fmt.Errorf("header %s: extra fields that start with %s are reserved for the proxy", shown, extraDomain)
	}
	if _, ok := t.Extra[key]; ok {
		return fmt.Errorf("header %s: the extra field %s is given twice", shown, clip.String(key))
	}
	if t.Extra == nil {
		t.Extra = make(map[string][]string)
	}
	t.Extra[key] = values
	return nil
}

// attributes returns the number of values that t has.
func (t *Target) attributes() int {
	n := 1 + len(t.Groups)
	if t.UID != "" {
		n++
	}
	for _, values := range t.Extra {
		n += len(values)
	}
	return n
}

// ServiceAccount returns the service account that t is, if it is one.
func (t *Target) ServiceAccount() (namespace, name string, ok bool) {
	namespace, name, err := serviceaccount.SplitUsername(t.User)
	return namespace, name, err == nil
}

// NodeName returns the name of the node that t is, if it is one.
func (t *Target) NodeName() (name string, ok bool) {
	name, ok = strings.CutPrefix(t.User, "system:node:")
	if !ok || len(validation.NameIsDNSSubdomain(name, false)) > 0 {
		return "", false
	}
	return name, true
}

// OnlyUser reports whether t has nothing but a user.
func (t *Target) OnlyUser() bool { return t.UID == "" && len(t.Groups) == 0 && len(t.Extra) == 0 }

// OwnGroups returns the groups that every service account or node is in. The API
// server adds them if the target names no groups.
func (t *Target) OwnGroups() []string {
	if namespace, _, ok := t.ServiceAccount(); ok {
		return serviceaccount.MakeGroupNames(namespace)
	}
	if _, ok := t.NodeName(); ok {
		return []string{user.NodesGroup}
	}
	return nil
}

// ActAsRequest is an unauthorized request to act as another user, as with kubectl --as.
// A transport has to ask the API server for authorization before it sends the request.
type ActAsRequest struct {
	Target *Target
	// MaxAge is the maximum age of a cached authorization.
	MaxAge time.Duration
	// Granted is called when the API server has authorized the request. Its argument
	// checks whether it still does.
	Granted func(StillAllowed)
}

// StillAllowed returns an error unless caller may act as the target of its request,
// according to an authorization that is not older than since. The error is forbidden
// (apierrors.IsForbidden) if it may not, and another one if that is unknown.
type StillAllowed func(ctx context.Context, caller *Identity, since time.Time) error

// As returns the identity of target in groups, for the caller id that may act as it.
// The extra fields name the caller, and keep those that the caller has.
func (id *Identity) As(target *Target, groups []string) *Identity {
	out := &Identity{
		User:      target.User,
		Groups:    groups,
		UID:       target.UID,
		Extra:     make(map[string][]string),
		RequestID: id.RequestID,
		Source:    id.Source,
		Node:      id.Node,
	}
	maps.Copy(out.Extra, target.Extra)
	maps.Copy(out.Extra, id.Extra)
	out.Extra[ExtraOriginalUser] = []string{id.User}
	if len(id.Groups) > 0 {
		out.Extra[ExtraOriginalGroups] = id.Groups
	}
	if id.UID != "" {
		out.Extra[ExtraOriginalUID] = []string{id.UID}
	}
	if id.Node != "" {
		out.Extra[ExtraNode] = []string{id.Node}
	}
	return out
}
