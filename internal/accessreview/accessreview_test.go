// SPDX-License-Identifier: Apache-2.0

// lab/accessreview compares the decisions with those of the API server's own code,
// lab/e2e with those of a running API server.
package accessreview_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

var alice = &impersonate.Identity{
	User: "alice@example.com", Groups: []string{"readers"}, UID: "42",
	Extra: map[string][]string{impersonate.ExtraTags: {"tag:a", "tag:b"}},
}

// asBob asks whether alice may act as bob in a GET of path.
func asBob(path string) accessreview.Question {
	return accessreview.Question{
		Caller:  alice,
		Target:  &impersonate.Target{User: "bob"},
		Request: requestinfo.Parse(httptest.NewRequest(http.MethodGet, path, nil)),
		Since:   time.Now(),
	}
}

func newReviewer(t *testing.T) *accessreview.Reviewer {
	t.Helper()
	r, err := accessreview.NewReviewer()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// answering returns an Ask that gives every review the same result, and the reviews that
// it has received.
func answering(status authorizationv1.SubjectAccessReviewStatus, err error) (accessreview.Ask, *[]authorizationv1.SubjectAccessReviewSpec) {
	asked := new([]authorizationv1.SubjectAccessReviewSpec)
	return func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		*asked = append(*asked, r.Spec)
		return &status, err
	}, asked
}

var allowed = authorizationv1.SubjectAccessReviewStatus{Allowed: true}

func TestAuthorize_ReviewsTheWholeCaller(t *testing.T) {
	ask, asked := answering(allowed, nil)
	id, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/pods/web/log"))
	if err != nil {
		t.Fatal(err)
	}
	if id.User != "bob" || id.Extra[impersonate.ExtraOriginalUser][0] != alice.User || id.ActAs != nil {
		t.Errorf("got %+v; want bob, and alice as the original user", id)
	}
	spec := func(a authorizationv1.ResourceAttributes) authorizationv1.SubjectAccessReviewSpec {
		return authorizationv1.SubjectAccessReviewSpec{
			ResourceAttributes: &a,
			User:               alice.User, UID: "42", Groups: []string{"system:authenticated", "readers"},
			Extra: map[string]authorizationv1.ExtraValue{impersonate.ExtraTags: {"tag:a", "tag:b"}},
		}
	}
	want := []authorizationv1.SubjectAccessReviewSpec{
		spec(authorizationv1.ResourceAttributes{Verb: "impersonate-on:user-info:get", Version: "v1", Resource: "pods", Subresource: "log", Namespace: "default", Name: "web"}),
		spec(authorizationv1.ResourceAttributes{Verb: "impersonate:user-info", Group: "authentication.k8s.io", Version: "v1", Resource: "users", Name: "bob"}),
	}
	if diff := cmp.Diff(want, *asked); diff != "" {
		t.Errorf("reviews (-want +got):\n%s", diff)
	}
}

func TestAuthorize_OnlyAnUnambiguousYesCounts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status authorizationv1.SubjectAccessReviewStatus
		err    error
		is     func(error) bool
		words  []string
	}{
		{"no", authorizationv1.SubjectAccessReviewStatus{}, nil, apierrors.IsForbidden, []string{
			`users "bob" is forbidden: User "alice@example.com" cannot impersonate resource "users" in API group "" at the cluster scope`,
			`User "alice@example.com" cannot impersonate-on:user-info:list resource "pods" in API group "" in the namespace "default"`,
		}},
		{"no, with a reason", authorizationv1.SubjectAccessReviewStatus{Reason: "no binding"}, nil, apierrors.IsForbidden, []string{"at the cluster scope: no binding"}},
		{"no, with an error", authorizationv1.SubjectAccessReviewStatus{EvaluationError: "role missing"}, nil, apierrors.IsForbidden, []string{"at the cluster scope: role missing"}},
		{"denied", authorizationv1.SubjectAccessReviewStatus{Denied: true, Reason: "a rule", EvaluationError: "and an error"}, nil, apierrors.IsForbidden, []string{"and an error: a rule"}},
		{"allowed and denied", authorizationv1.SubjectAccessReviewStatus{Allowed: true, Denied: true}, nil, apierrors.IsForbidden, []string{"both allows and denies"}},
		{"allowed with an error", authorizationv1.SubjectAccessReviewStatus{Allowed: true, EvaluationError: "webhook away"}, nil, apierrors.IsForbidden, []string{"webhook away"}},
		{"failed", authorizationv1.SubjectAccessReviewStatus{}, errors.New("connection refused"), apierrors.IsServiceUnavailable, []string{"alice@example.com", "bob"}},
		{"failed, with a result", allowed, errors.New("connection refused"), apierrors.IsServiceUnavailable, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ask, _ := answering(tt.status, tt.err)
			id, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/pods"))
			if id != nil {
				t.Errorf("got %+v; want no identity", id)
			}
			if err == nil || !tt.is(err) {
				t.Fatalf("got %v; want another kind of refusal", err)
			}
			if reason := apistatus.ReasonOf(err); reason != apistatus.Impersonation {
				t.Errorf("got reason %s; want %s", reason, apistatus.Impersonation)
			}
			if tt.err != nil && (!errors.Is(apistatus.Cause(err), tt.err) || strings.Contains(err.Error(), tt.err.Error())) {
				t.Errorf("got %q because of %v; want %v as its cause, and not in its message", err, apistatus.Cause(err), tt.err)
			}
			if strings.HasSuffix(err.Error(), ": ") || strings.Contains(err.Error(), ": ;") {
				t.Errorf("got %q; want no end without a reason", err)
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("got %q; want it to mention %q", err, word)
				}
			}
		})
	}
}

func TestAuthorize_OtherFormDoesNotMakeUpForAFailure(t *testing.T) {
	ask := func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		if strings.HasPrefix(r.Spec.ResourceAttributes.Verb, "impersonate-on:") {
			return nil, errors.New("timeout")
		}
		return &allowed, nil
	}
	if id, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods")); err == nil {
		t.Errorf("got %+v; want a refusal", id)
	}
}

func TestAuthorize_RefusesAfterTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := func(ctx context.Context, _ *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		began := time.Now()
		_, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods"))
		if !apierrors.IsServiceUnavailable(err) {
			t.Errorf("got %v; want a 503", err)
		}
		if took := time.Since(began); took != accessreview.Timeout {
			t.Errorf("it took %v; want %v", took, accessreview.Timeout)
		}
	})
}

// All reviews of a request together.
func TestAuthorize_ReviewsShareTheTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := func(context.Context, *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
			time.Sleep(accessreview.Timeout * 2 / 3)
			return new(authorizationv1.SubjectAccessReviewStatus), nil
		}
		began := time.Now()
		if _, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods")); !apierrors.IsServiceUnavailable(err) {
			t.Errorf("got %v; want a 503", err)
		}
		if took := time.Since(began); took != accessreview.Timeout {
			t.Errorf("it took %v; want %v", took, accessreview.Timeout)
		}
		time.Sleep(accessreview.Timeout) // for the review that nobody waits for
	})
}

func TestAuthorize_RefusesAmbiguousPathsWithoutReview(t *testing.T) {
	ask, asked := answering(allowed, nil)
	for _, path := range []string{"/api/v1/namespaces/default/pods%2Fweb", "/api/v1//pods", "/api/v1/./pods"} {
		if id, err := newReviewer(t).Authorize(t.Context(), ask, asBob(path)); err == nil {
			t.Errorf("%s: got %+v; want a refusal", path, id)
		}
	}
	if len(*asked) > 0 {
		t.Errorf("the API server received the reviews %v; want none", *asked)
	}
}

// What would make a review long cannot be cut, as the permission would be another one.
func TestAuthorize_RefusesLongPathsWithoutReview(t *testing.T) {
	ask, asked := answering(allowed, nil)
	long := strings.Repeat("a", 513)
	for _, path := range []string{
		"/" + long, "/api/v1/namespaces/default/pods/" + long, "/api/v1/namespaces/" + long + "/pods", "/api/v1/" + long,
		"/api/" + long + "/pods", "/apis/" + long + "/v1/pods", "/apis/a/" + long + "/pods", "/api/v1/namespaces/default/pods/a/" + long,
	} {
		_, err := newReviewer(t).Authorize(t.Context(), ask, asBob(path))
		if !apierrors.IsBadRequest(err) || apistatus.ReasonOf(err) != apistatus.Impersonation || len(err.Error()) > 400 {
			t.Errorf("%.50s: got %.400v; want a short 400", path, err)
		}
	}
	if len(*asked) > 0 {
		t.Errorf("%d reviews were sent", len(*asked))
	}
	if _, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/version")); err != nil {
		t.Errorf("a short path: %v", err)
	}
	// What a proxied application gets is not part of a permission.
	if _, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/services/a/proxy/"+long)); err != nil {
		t.Errorf("a long path of an application: %v", err)
	}
}

func TestCache_LastsUntilSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		ask, asked := answering(allowed, nil)
		authorize := func(q accessreview.Question, want int) {
			t.Helper()
			*asked = nil
			if _, err := r.Authorize(t.Context(), ask, q); err != nil {
				t.Fatal(err)
			}
			if len(*asked) != want {
				t.Errorf("the API server received %d reviews; want %d", len(*asked), want)
			}
		}
		q := asBob("/api/v1/pods")
		authorize(q, 2)
		time.Sleep(time.Second)
		authorize(q, 0)
		other := asBob("/api/v1/secrets")
		other.Since = q.Since
		authorize(other, 1) // the permission on the request is another
		time.Sleep(time.Second)
		q.Since = time.Now()
		authorize(q, 2)
	})
}

// A permission may be withdrawn while the API server takes its time to answer.
func TestCache_AgeCountsFromSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		answer, asked := answering(allowed, nil)
		ask := func(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
			time.Sleep(time.Second)
			return answer(ctx, review)
		}
		q := asBob("/api/v1/pods")
		if _, err := r.Authorize(t.Context(), ask, q); err != nil {
			t.Fatal(err)
		}
		first := (*asked)[0]
		*asked = nil
		q.Since = q.Since.Add(time.Second / 2) // while the first of two reviews was under way
		if _, err := r.Authorize(t.Context(), ask, q); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]authorizationv1.SubjectAccessReviewSpec{first}, *asked); diff != "" {
			t.Errorf("reviews the second time (-want +got):\n%s", diff)
		}
	})
}

// Callers that differ in any way do not share permissions.
func TestCache_KeyHasTheWholeCaller(t *testing.T) {
	for name, change := range map[string]func(*impersonate.Identity){
		"user":    func(id *impersonate.Identity) { id.User = "carol@example.com" },
		"UID":     func(id *impersonate.Identity) { id.UID = "43" },
		"groups":  func(id *impersonate.Identity) { id.Groups = nil },
		"extra":   func(id *impersonate.Identity) { id.Extra = map[string][]string{impersonate.ExtraTags: {"tag:a"}} },
		"nothing": func(*impersonate.Identity) {},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReviewer(t)
			ask, asked := answering(allowed, nil)
			q := asBob("/api/v1/pods")
			if _, err := r.Authorize(t.Context(), ask, q); err != nil {
				t.Fatal(err)
			}
			want := len(*asked)
			if name == "nothing" {
				want = 0
			}
			*asked = nil
			other := *alice
			change(&other)
			q.Caller = &other
			if _, err := r.Authorize(t.Context(), ask, q); err != nil {
				t.Fatal(err)
			}
			if len(*asked) != want {
				t.Errorf("the API server received %d reviews of the other caller; want %d", len(*asked), want)
			}
		})
	}
}

// Most operators grant the older form, and read the first part of a message.
func TestAuthorize_NamesTheOlderFormFirst(t *testing.T) {
	ask, _ := answering(authorizationv1.SubjectAccessReviewStatus{}, nil)
	_, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods"))
	if err == nil || !strings.Contains(err.Error(), `impersonate: users "bob" is forbidden: User "alice@example.com" cannot impersonate resource "users"`) {
		t.Errorf("got %v; want the older form first", err)
	}
}

func TestMissingForUsers_IsAskedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		denies, _ := answering(authorizationv1.SubjectAccessReviewStatus{}, nil)
		if missing, err := r.MissingForUsers(t.Context(), denies); missing == "" || err != nil {
			t.Errorf("got %q, %v; want what is missing", missing, err)
		}
		time.Sleep(time.Second)
		allows, _ := answering(allowed, nil)
		if missing, err := r.MissingForUsers(t.Context(), allows); missing != "" || err != nil {
			t.Errorf("got %q, %v; want nothing, as the permission was granted", missing, err)
		}
	})
}
