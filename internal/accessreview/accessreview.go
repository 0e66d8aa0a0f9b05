// SPDX-License-Identifier: Apache-2.0

// Package review finds out whether a caller may act as somebody else, as
// `kubectl --as` asks for, and as whom it is sent then.
//
// The right to that is the caller's, not the proxy's, whose credentials may
// impersonate anybody. So the API server is asked, by subject access reviews with
// the whole identity of the caller, for every permission that it would have asked
// for by itself had the caller come with credentials of its own. There are two
// forms of that, and servers that know one or both: the verb impersonate on each
// attribute of the target, and since Kubernetes 1.36 impersonate:<mode> on each
// together with impersonate-on:<mode>:<verb> on what the request is for. One of
// them has to be passed entirely.
//
// Whatever is not a plain yes is a no: a review that fails, takes too long, or
// contradicts itself.
package accessreview

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// Timeout is how long all reviews for one request may take together.
const Timeout = 5 * time.Second

// size is how many permissions are remembered.
const size = 4096

// Ask has the API server review whether somebody may do something.
type Ask func(context.Context, *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error)

// Question is whether Caller may act as Target in a request.
type Question struct {
	Caller  *impersonate.Identity
	Target  *impersonate.Target
	Request requestinfo.Info
	// Since is how old an answer may be that was given before.
	Since time.Time
}

// Reviewer answers questions. It remembers what was allowed, and when that was
// asked.
type Reviewer struct {
	allowed *lru.Cache[string, time.Time]
}

// NewReviewer returns a reviewer that knows nothing yet.
func NewReviewer() (*Reviewer, error) {
	allowed, err := lru.New[string, time.Time](size)
	if err != nil {
		return nil, err
	}
	return &Reviewer{allowed}, nil
}

// Authorize returns the identity that q's caller has when it acts as q's target, if
// it may. The reason is forbidden (403) if it may not, and unavailable (503) if
// that cannot be found out.
func (r *Reviewer) Authorize(ctx context.Context, ask Ask, q Question) (*impersonate.Identity, *apierrors.StatusError) {
	if q.Request.Ambiguous {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "a path that can be understood in more than one way is not for kubectl --as: %q", q.Request.Path)
	}
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	var missing []string
	for _, f := range forms(q.Target, q.Request) {
		lacks, err := r.lacks(ctx, ask, q, f)
		if err != nil {
			return nil, apistatus.Unavailable(apistatus.Impersonation, "cannot find out whether %s may act as %s: %v", q.Caller.User, q.Target.User, err)
		}
		if lacks == "" {
			return q.Caller.As(q.Target, f.groups), nil
		}
		missing = append(missing, lacks)
	}
	// The older form goes first: that is the right that most people give.
	if len(missing) > 1 {
		missing[0], missing[1] = missing[1], missing[0]
	}
	return nil, apistatus.Forbidden(apistatus.Impersonation, "%s", strings.Join(missing, "; nor is the newer form of that right given: "))
}

// lacks says which permission q's caller lacks for f, nothing if none.
func (r *Reviewer) lacks(ctx context.Context, ask Ask, q Question, f form) (string, error) {
	for _, s := range f.steps {
		if s.never != "" {
			return message(q.Caller, s.each[0], s.never), nil
		}
		if s.wildcard != nil {
			lacks, err := r.review(ctx, ask, q, *s.wildcard)
			if err != nil {
				return "", err
			}
			if lacks == "" {
				continue
			}
		}
		for _, p := range s.each {
			if lacks, err := r.review(ctx, ask, q, p); err != nil || lacks != "" {
				return lacks, err
			}
		}
	}
	return "", nil
}

// review says that q's caller lacks p, nothing if it has it.
func (r *Reviewer) review(ctx context.Context, ask Ask, q Question, p permission) (lacks string, err error) {
	spec := authorizationv1.SubjectAccessReviewSpec{
		ResourceAttributes:    p.resource,
		NonResourceAttributes: p.path,
		User:                  q.Caller.User,
		UID:                   q.Caller.UID,
		// The API server adds this group to everybody who comes by itself.
		Groups: append([]string{user.AllAuthenticated}, q.Caller.Groups...),
	}
	if len(q.Caller.Extra) > 0 {
		spec.Extra = make(map[string]authorizationv1.ExtraValue, len(q.Caller.Extra))
		for key, values := range q.Caller.Extra {
			spec.Extra[key] = values
		}
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("encoding a review: %w", err)
	}
	key := string(text)
	if asked, ok := r.allowed.Get(key); ok && !asked.Before(q.Since) {
		return "", nil
	}
	asked := time.Now()
	status, err := ask(ctx, &authorizationv1.SubjectAccessReview{Spec: spec})
	switch {
	case err != nil:
		return "", err
	case status.Allowed && status.Denied:
		return message(q.Caller, p, "the API server both allows and denies it"), nil
	case status.Allowed && status.EvaluationError != "":
		return message(q.Caller, p, "the API server allows it, and says that it failed to find out: "+status.EvaluationError), nil
	case !status.Allowed:
		return message(q.Caller, p, reason(status)), nil
	}
	r.allowed.Add(key, asked)
	return "", nil
}

// reason returns why something is not allowed, as the API server puts it.
func reason(status *authorizationv1.SubjectAccessReviewStatus) string {
	switch {
	case status.EvaluationError == "":
		return status.Reason
	case status.Reason == "":
		return status.EvaluationError
	}
	return status.EvaluationError + ": " + status.Reason
}

// message says that caller lacks p, in the API server's words.
func message(caller *impersonate.Identity, p permission, reason string) string {
	var what string
	var resource schema.GroupResource
	var name string
	if p.path != nil {
		what = fmt.Sprintf("User %q cannot %s path %q", caller.User, p.path.Verb, p.path.Path)
	} else {
		resource, name = schema.GroupResource{Group: p.resource.Group, Resource: p.resource.Resource}, p.resource.Name
		called := p.resource.Resource
		if p.resource.Subresource != "" {
			called += "/" + p.resource.Subresource
		}
		what = fmt.Sprintf("User %q cannot %s resource %q in API group %q", caller.User, p.resource.Verb, called, p.resource.Group)
		if p.resource.Namespace != "" {
			what += fmt.Sprintf(" in the namespace %q", p.resource.Namespace)
		} else {
			what += " at the cluster scope"
		}
	}
	if reason != "" {
		what += ": " + reason
	}
	return apierrors.NewForbidden(resource, name, errors.New(what)).Error()
}
