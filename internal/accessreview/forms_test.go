// SPDX-License-Identifier: Apache-2.0

package accessreview_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// The newer form for service accounts does not apply to one with other attributes.
func TestForms_ServiceAccountWithMoreIsNone(t *testing.T) {
	const account = "system:serviceaccount:default:ci"
	for _, tt := range []struct {
		name   string
		target impersonate.Target
		alone  bool
	}{
		{"alone", impersonate.Target{User: account}, true},
		{"with a UID", impersonate.Target{User: account, UID: "1"}, false},
		{"with a group", impersonate.Target{User: account, Groups: []string{"a"}}, false},
		{"with an extra field", impersonate.Target{User: account, Extra: map[string][]string{"example.com/scopes": {"x"}}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ask, asked := answering(allowed, nil)
			q := asBob("/api/v1/pods")
			q.Target = &tt.target
			if _, err := newReviewer(t).Authorize(t.Context(), ask, q); err != nil {
				t.Fatal(err)
			}
			for _, spec := range *asked {
				if verb := spec.ResourceAttributes.Verb; (verb != "impersonate") != tt.alone {
					t.Errorf("the API server was asked about the verb %s", verb)
				}
			}
		})
	}
}

// The permission to act as a service account is for its namespace, in both forms.
func TestForms_ServiceAccountNamespace(t *testing.T) {
	const verbOn = "impersonate-on:"
	for _, form := range []string{"impersonate", "impersonate:serviceaccount"} {
		t.Run(form, func(t *testing.T) {
			var asked []authorizationv1.ResourceAttributes
			ask := func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
				a := *r.Spec.ResourceAttributes
				if a.Verb == form {
					asked = append(asked, a)
				}
				return &authorizationv1.SubjectAccessReviewStatus{Allowed: a.Verb == form || strings.HasPrefix(a.Verb, verbOn) && form != "impersonate"}, nil
			}
			q := asBob("/api/v1/namespaces/default/pods")
			q.Target = &impersonate.Target{User: "system:serviceaccount:build:ci"}
			if _, err := newReviewer(t).Authorize(t.Context(), ask, q); err != nil {
				t.Fatal(err)
			}
			if len(asked) != 1 || asked[0].Resource != "serviceaccounts" || asked[0].Namespace != "build" || asked[0].Name != "ci" {
				t.Errorf("got reviews of %+v; want one of the service account ci in the namespace build", asked)
			}
		})
	}
}

// With four groups, the newer form asks for all of them at once first.
func TestForms_FailedWildcardIsNoPermission(t *testing.T) {
	ask := func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		if r.Spec.ResourceAttributes.Name == "*" {
			return nil, errors.New("timeout")
		}
		return &allowed, nil
	}
	q := asBob("/api/v1/pods")
	q.Target = &impersonate.Target{User: "bob", Groups: []string{"a", "b", "c", "d"}}
	if id, err := newReviewer(t).Authorize(t.Context(), ask, q); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("got %+v, %v; want a 503", id, err)
	}
}
