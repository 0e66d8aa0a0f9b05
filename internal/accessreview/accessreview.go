// SPDX-License-Identifier: Apache-2.0

// Package accessreview decides whether a caller may act as another user, which
// `kubectl --as` asks for.
//
// The caller needs permission for that. The proxy's own credentials may impersonate any
// user, so the API server would not check the caller. This package asks the API server
// with SubjectAccessReviews, which contain the whole identity of the caller, for every
// permission that it would have checked if the caller had used credentials of its own.
// These have two forms, and an API server supports one or both: the verb impersonate on
// each attribute of the target, and since Kubernetes 1.36 impersonate:<mode> on each
// attribute together with impersonate-on:<mode>:<verb> on what the request is for. The
// caller needs every permission of one form.
//
// The same questions, asked by the proxy about itself in SelfSubjectAccessReviews, say
// which permission its own account lacks.
//
// Only an unambiguous yes counts. A review that fails, times out or contradicts itself
// is a refusal.
package accessreview

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/once"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// Timeout limits the time that all reviews for one request take together.
const Timeout = 5 * time.Second

const (
	// size is how many reviews are cached that were allowed, and how many that were not.
	size = 4096
	// maxReason is how much of the API server's reason is kept, in bytes.
	maxReason = 1024
	// noticeable is the age from which on a refusal says how old it is.
	noticeable = 5 * time.Second
)

// Ask sends a review to the API server and returns the result. The review's kind is
// SubjectAccessReview, or SelfSubjectAccessReview if the review has no user.
type Ask func(context.Context, *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error)

// Question asks whether Caller may act as Target in a request.
type Question struct {
	Caller  *impersonate.Identity // nil for the proxy's own account
	Target  *impersonate.Target
	Request requestinfo.Info
	// Since is when the oldest cached review may have been sent.
	Since time.Time
}

// Reviewer answers questions. It caches the results of reviews, and sends each review
// once for all who wait for its result.
type Reviewer struct {
	// Two caches, so that callers who try what they may not do do not displace the
	// others.
	allowed, denied *lru.Cache[key, result]
	asking          once.Group[key, result]
}

// key is the hash of a whole review: one that left out a part of the caller would give
// its permissions to other callers. Callers choose how long a review is.
type key [sha256.Size]byte

// result is the API server's answer to a review.
type result struct {
	sent    time.Time
	allowed bool
	reason  string
}

// NewReviewer returns a Reviewer with empty caches.
func NewReviewer() (*Reviewer, error) {
	allowed, err := lru.New[key, result](size)
	if err != nil {
		return nil, err
	}
	denied, err := lru.New[key, result](size)
	if err != nil {
		return nil, err
	}
	return &Reviewer{allowed: allowed, denied: denied}, nil
}

// cached returns the result of a review that was sent at since or later.
func (r *Reviewer) cached(review key, since time.Time) (result, bool) {
	for _, cache := range []*lru.Cache[key, result]{r.allowed, r.denied} {
		if res, ok := cache.Get(review); ok && !res.sent.Before(since) {
			return res, true
		}
	}
	return result{}, false
}

// remember caches res in place of what was known before.
func (r *Reviewer) remember(review key, res result) {
	in, out := r.denied, r.allowed
	if res.allowed {
		in, out = out, in
	}
	in.Add(review, res)
	out.Remove(review)
}

// Authorize returns the identity that q's caller has when it acts as q's target. The
// error is a 403 if the caller may not, and a 503 if it is unknown whether it may.
func (r *Reviewer) Authorize(ctx context.Context, ask Ask, q Question) (*impersonate.Identity, error) {
	if q.Request.Ambiguous {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "kubectl --as cannot be used with a path that can be understood in more than one way: %q", clip.String(q.Request.Path))
	}
	missing, groups, err := r.missing(ctx, ask, q)
	switch {
	case errors.Is(err, errTooLong):
		return nil, apistatus.BadRequest(apistatus.Impersonation, "kubectl --as cannot be used with a path that has a name of more than %d bytes", maxAttribute)
	case err != nil:
		return nil, apistatus.Because(err, apistatus.Unavailable(apistatus.Impersonation, "cannot find out whether %s may act as %s; the proxy's log says why", q.Caller.User, clip.String(q.Target.User)))
	case missing != "":
		return nil, apistatus.Forbidden(apistatus.Impersonation, "%s", missing)
	}
	return q.Caller.As(q.Target, groups), nil
}

// Missing describes the permissions that q's caller lacks to act as q's target, empty if it
// lacks none.
func (r *Reviewer) Missing(ctx context.Context, ask Ask, q Question) (string, error) {
	missing, _, err := r.missing(ctx, ask, q)
	return missing, err
}

// MissingForUsers describes the permissions that the proxy's own account lacks to
// impersonate whatever user, in requests of any kind, empty if it lacks none.
func (r *Reviewer) MissingForUsers(ctx context.Context, ask Ask) (string, error) {
	var missing []string
	for _, a := range []attributes{legacy, constrained} {
		lacks, err := r.review(ctx, ask, Question{Since: time.Now()}, a.user(&impersonate.Target{User: "*"}))
		if err != nil || lacks == "" {
			return "", err
		}
		missing = append(missing, lacks)
	}
	return join(missing), nil
}

// missing describes the permissions that q's caller lacks, empty if it has all of one
// form, under which the target has groups.
func (r *Reviewer) missing(ctx context.Context, ask Ask, q Question) (missing string, groups []string, err error) {
	if tooLong(q.Request) {
		return "", nil, errTooLong
	}
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	var all []string
	for _, f := range forms(q.Target, q.Request) {
		lacks, err := r.lacks(ctx, ask, q, f)
		if err != nil {
			return "", nil, err
		}
		if lacks == "" {
			return "", f.groups, nil
		}
		all = append(all, lacks)
	}
	// The older form goes first, because most operators grant that one.
	slices.Reverse(all)
	return join(all), nil, nil
}

// join joins what is missing of each form, the older one first.
func join(missing []string) string {
	return strings.Join(missing, "; the newer form of this permission is missing as well: ")
}

// lacks describes the first permission of f that q's caller lacks, empty if it has all.
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

// review returns why q's caller lacks p, empty if it has it.
func (r *Reviewer) review(ctx context.Context, ask Ask, q Question, p permission) (lacks string, err error) {
	spec := authorizationv1.SubjectAccessReviewSpec{
		ResourceAttributes:    p.resource,
		NonResourceAttributes: p.path,
	}
	kind := "SelfSubjectAccessReview"
	if q.Caller != nil {
		kind = "SubjectAccessReview"
		spec.User, spec.UID = q.Caller.User, q.Caller.UID
		// The API server adds this group to every user that it authenticates.
		spec.Groups = append([]string{user.AllAuthenticated}, q.Caller.Groups...)
		if len(q.Caller.Extra) > 0 {
			spec.Extra = make(map[string]authorizationv1.ExtraValue, len(q.Caller.Extra))
			for key, values := range q.Caller.Extra {
				spec.Extra[key] = values
			}
		}
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("encoding a review: %w", err)
	}
	review := key(sha256.Sum256(text))
	res, ok := r.cached(review, q.Since)
	if !ok {
		// The permission may be withdrawn after it was sent and before the result arrives.
		res, err = r.asking.Ask(ctx, review, q.Since, func(ctx context.Context, sent time.Time) (result, error) {
			ctx, cancel := context.WithTimeout(ctx, Timeout)
			defer cancel()
			status, err := ask(ctx, &authorizationv1.SubjectAccessReview{
				TypeMeta: metav1.TypeMeta{APIVersion: authorizationv1.SchemeGroupVersion.String(), Kind: kind},
				Spec:     spec,
			})
			if err != nil {
				return result{}, err
			}
			res := result{sent: sent}
			res.allowed, res.reason = decide(status)
			r.remember(review, res)
			return res, nil
		})
		if err != nil {
			return "", err
		}
	}
	if res.allowed {
		return "", nil
	}
	lacks = message(q.Caller, p, res.reason)
	if age := time.Since(res.sent); age >= noticeable {
		lacks += fmt.Sprintf("; that was the answer %v ago, and it counts for %v (cache_ttl)", age.Round(time.Second), time.Since(q.Since).Round(time.Second))
	}
	return lacks, nil
}

// decide returns whether status allows what was asked, or the reason why it does not.
func decide(status *authorizationv1.SubjectAccessReviewStatus) (allowed bool, why string) {
	switch {
	case status.Allowed && status.Denied:
		return false, "the API server both allows and denies it"
	case status.Allowed && status.EvaluationError != "":
		why = "the API server allows it, but reports that it failed to evaluate it: " + status.EvaluationError
	case !status.Allowed:
		why = reason(status)
	default:
		return true, ""
	}
	return false, strings.ToValidUTF8(why[:min(len(why), maxReason)], "")
}

// reason returns the API server's reason why something is not allowed.
func reason(status *authorizationv1.SubjectAccessReviewStatus) string {
	switch {
	case status.EvaluationError == "":
		return status.Reason
	case status.Reason == "":
		return status.EvaluationError
	}
	return status.EvaluationError + ": " + status.Reason
}

// message returns the API server's own wording of the fact that caller lacks p.
func message(caller *impersonate.Identity, p permission, reason string) string {
	what := "the proxy's account"
	if caller != nil {
		what = fmt.Sprintf("User %q", caller.User)
	}
	var resource schema.GroupResource
	var name string
	if p.path != nil {
		what += fmt.Sprintf(" cannot %s path %q", clip.String(p.path.Verb), clip.String(p.path.Path))
	} else {
		resource, name = schema.GroupResource{Group: clip.String(p.resource.Group), Resource: clip.String(p.resource.Resource)}, clip.String(p.resource.Name)
		called := resource.Resource
		if p.resource.Subresource != "" {
			called += "/" + clip.String(p.resource.Subresource)
		}
		what += fmt.Sprintf(" cannot %s resource %q in API group %q", clip.String(p.resource.Verb), called, resource.Group)
		if p.resource.Namespace != "" {
			what += fmt.Sprintf(" in the namespace %q", clip.String(p.resource.Namespace))
		} else {
			what += " at the cluster scope"
		}
	}
	if reason != "" {
		what += ": " + reason
	}
	return apierrors.NewForbidden(resource, name, errors.New(what)).Error()
}
