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
)

// The keys of the extra fields that say who acts as somebody else. ExtraNode is
// the third of them.
const (
	ExtraOriginalUser   = extraDomain + "original-user"
	ExtraOriginalUID    = extraDomain + "original-uid" // where audit is on
	ExtraOriginalGroups = extraDomain + "original-groups"
)

// Target is whom a client asks to act as, as `kubectl --as` does. That is what it
// wants, and nothing more: it is not an [Identity].
type Target struct {
	User   string
	UID    string // empty if not asked for
	Groups []string
	Extra  map[string][]string
}

// maxAttributes is how many values a target may consist of. Each of them costs the
// API server a question, and a client chooses how many there are.
const maxAttributes = 64

// ParseTarget returns whom the headers h, as the client sent them, ask to act as:
// nil if they ask for nobody.
//
// It reads them as the API server does, but for what the API server lets pass
// without a word: a second user where it takes the first, names that it would not
// know for its own (Impersonate_User), keys that cannot be decoded, and empty
// values are errors. So are the extra fields that are written here.
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
	slices.Sort(names) // for the same answer every time
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

// parse sets what one header asks for.
func (t *Target) parse(name string, values []string) error {
	if len(values) == 0 {
		return fmt.Errorf("header %s has no value", name)
	}
	for _, value := range values {
		if err := checkName("value of header "+name, value); err != nil {
			return err
		}
	}
	switch name {
	case transport.ImpersonateGroupHeader:
		t.Groups = values
		return nil
	case transport.ImpersonateUserHeader, transport.ImpersonateUIDHeader:
		if len(values) > 1 {
			return fmt.Errorf("header %s is given twice", name)
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
		return fmt.Errorf("header %s is none that the API server knows", name)
	}
	key, err := url.PathUnescape(strings.ToLower(encoded))
	if err != nil {
		return fmt.Errorf("header %s: %w", name, err)
	}
	if err := checkName("key of header "+name, key); err != nil {
		return err
	}
	if strings.HasPrefix(strings.ToLower(key), extraDomain) {
		return fmt.Errorf("header %s: extra fields that start with %s are the proxy's to write", name, extraDomain)
	}
	if _, ok := t.Extra[key]; ok {
		return fmt.Errorf("header %s: the extra field %s is given twice", name, key)
	}
	if t.Extra == nil {
		t.Extra = make(map[string][]string)
	}
	t.Extra[key] = values
	return nil
}

// attributes returns how many values t consists of.
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

// ServiceAccount returns which service account the target is, if it is one.
func (t *Target) ServiceAccount() (namespace, name string, ok bool) {
	namespace, name, err := serviceaccount.SplitUsername(t.User)
	return namespace, name, err == nil
}

// NodeName returns which node the target is, if it is one.
func (t *Target) NodeName() (name string, ok bool) {
	name, ok = strings.CutPrefix(t.User, "system:node:")
	if !ok || len(validation.NameIsDNSSubdomain(name, false)) > 0 {
		return "", false
	}
	return name, true
}

// OnlyUser reports whether the target is a user and nothing else.
func (t *Target) OnlyUser() bool { return t.UID == "" && len(t.Groups) == 0 && len(t.Extra) == 0 }

// OwnGroups returns the groups that a service account or a node is in by itself. The
// API server adds them if the target names none.
func (t *Target) OwnGroups() []string {
	if namespace, _, ok := t.ServiceAccount(); ok {
		return serviceaccount.MakeGroupNames(namespace)
	}
	if _, ok := t.NodeName(); ok {
		return []string{user.NodesGroup}
	}
	return nil
}

// ActAsRequest is a request to act as another user, as kubectl --as makes. Whoever sends the request on has to
// find out first whether it may.
type ActAsRequest struct {
	Target *Target
	// MaxAge is how old an answer to that may be.
	MaxAge time.Duration
	// Granted is called once it is known that the caller may, with how to find out
	// whether it still may.
	Granted func(StillAllowed)
}

// StillAllowed returns an error unless caller may act as it does, as found out at since
// or later. The error is forbidden (apierrors.IsForbidden) if it may not, and
// any other if nobody could tell.
type StillAllowed func(ctx context.Context, caller *Identity, since time.Time) error

// As returns the identity of target, as which the caller id may act, in groups. The
// caller is in its extra fields, together with all that was known about it.
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
