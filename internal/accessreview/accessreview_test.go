// SPDX-License-Identifier: Apache-2.0

// That decisions are those of the API server's own code is tested in lab/review, and
// against a running one in lab/e2e.
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

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
)

var alice = &impersonate.Identity{
	User: "alice@example.com", Groups: []string{"readers"}, UID: "42",
	Extra: map[string][]string{impersonate.ExtraTags: {"tag:a", "tag:b"}},
}

// asBob returns the question whether alice may act as bob in a request.
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

// answering returns an API server that answers every review alike, and the reviews
// that it was asked for.
func answering(status authorizationv1.SubjectAccessReviewStatus, err error) (accessreview.Ask, *[]authorizationv1.SubjectAccessReviewSpec) {
	asked := new([]authorizationv1.SubjectAccessReviewSpec)
	return func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		*asked = append(*asked, r.Spec)
		return &status, err
	}, asked
}

var allowed = authorizationv1.SubjectAccessReviewStatus{Allowed: true}

func TestTheAPIServerIsAskedAboutTheWholeCaller(t *testing.T) {
	ask, asked := answering(allowed, nil)
	id, refused := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/pods/web/log"))
	if refused != nil {
		t.Fatal(refused)
	}
	if id.User != "bob" || id.Extra[impersonate.ExtraOriginalUser][0] != alice.User || id.ActAs != nil {
		t.Errorf("got %+v; want bob, who really is alice", id)
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

// A service account that is anything beside is none, to the newer form of the right.
func TestOnlyAServiceAccountAloneIsOne(t *testing.T) {
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
			if _, refused := newReviewer(t).Authorize(t.Context(), ask, q); refused != nil {
				t.Fatal(refused)
			}
			for _, spec := range *asked {
				if verb := spec.ResourceAttributes.Verb; (verb != "impersonate") != tt.alone {
					t.Errorf("the API server was asked about verb %s", verb)
				}
			}
		})
	}
}

// Anything but a plain yes is a no.
func TestNoPlainYesIsARefusal(t *testing.T) {
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
		{"failed", authorizationv1.SubjectAccessReviewStatus{}, errors.New("connection refused"), apierrors.IsServiceUnavailable, []string{"alice@example.com", "bob", "connection refused"}},
		{"failed, with an answer", allowed, errors.New("connection refused"), apierrors.IsServiceUnavailable, []string{"connection refused"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ask, _ := answering(tt.status, tt.err)
			id, refused := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/pods"))
			if id != nil {
				t.Errorf("got %+v; want nobody", id)
			}
			if refused == nil || !tt.is(refused) {
				t.Fatalf("got %v; want a refusal of its kind", refused)
			}
			for _, word := range tt.words {
				if !strings.Contains(refused.ErrStatus.Message, word) {
					t.Errorf("got %q; want it to mention %q", refused.ErrStatus.Message, word)
				}
			}
		})
	}
}

// A form that fails half-way does not make the other one count.
func TestAFailureIsNotMadeUpForByTheOtherForm(t *testing.T) {
	ask := func(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		if strings.HasPrefix(r.Spec.ResourceAttributes.Verb, "impersonate-on:") {
			return nil, errors.New("timeout")
		}
		return &allowed, nil
	}
	if id, refused := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods")); refused == nil {
		t.Errorf("got %+v; want a refusal", id)
	}
}

func TestAReviewThatTakesTooLongIsARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := func(ctx context.Context, _ *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		began := time.Now()
		_, refused := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods"))
		if refused == nil || !apierrors.IsServiceUnavailable(refused) {
			t.Errorf("got %v; want a refusal", refused)
		}
		if took := time.Since(began); took != accessreview.Timeout {
			t.Errorf("it took %v; want %v", took, accessreview.Timeout)
		}
	})
}

func TestAmbiguousPathsAreRefusedUnasked(t *testing.T) {
	ask, asked := answering(allowed, nil)
	for _, path := range []string{"/api/v1/namespaces/default/pods%2Fweb", "/api/v1//pods", "/api/v1/./pods"} {
		if id, refused := newReviewer(t).Authorize(t.Context(), ask, asBob(path)); refused == nil {
			t.Errorf("%s: got %+v; want a refusal", path, id)
		}
	}
	if len(*asked) > 0 {
		t.Errorf("the API server was asked %v", *asked)
	}
}

func TestWhatWasAllowedIsRememberedAsLongAsItMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		ask, asked := answering(allowed, nil)
		authorize := func(q accessreview.Question, want int) {
			t.Helper()
			*asked = nil
			if _, refused := r.Authorize(t.Context(), ask, q); refused != nil {
				t.Fatal(refused)
			}
			if len(*asked) != want {
				t.Errorf("the API server was asked %d times; want %d", len(*asked), want)
			}
		}
		q := asBob("/api/v1/pods")
		authorize(q, 2)
		time.Sleep(time.Second)
		authorize(q, 0)
		other := asBob("/api/v1/secrets")
		other.Since = q.Since
		authorize(other, 1) // what concerns the request is new
		carol := q
		carol.Caller = &impersonate.Identity{User: "carol@example.com"}
		authorize(carol, 2)
		fewer := q
		fewer.Caller = &impersonate.Identity{User: alice.User, UID: alice.UID, Extra: alice.Extra} // has lost her group
		authorize(fewer, 2)
		time.Sleep(time.Second)
		q.Since = time.Now()
		authorize(q, 2)
	})
}

// What the API server took long to answer may have been withdrawn meanwhile.
func TestAnAnswerIsAsOldAsItsQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		answer, asked := answering(allowed, nil)
		ask := func(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
			time.Sleep(time.Second)
			return answer(ctx, review)
		}
		q := asBob("/api/v1/pods")
		if _, refused := r.Authorize(t.Context(), ask, q); refused != nil {
			t.Fatal(refused)
		}
		first := (*asked)[0]
		*asked = nil
		q.Since = q.Since.Add(time.Second / 2) // while the first of two reviews was under way
		if _, refused := r.Authorize(t.Context(), ask, q); refused != nil {
			t.Fatal(refused)
		}
		if diff := cmp.Diff([]authorizationv1.SubjectAccessReviewSpec{first}, *asked); diff != "" {
			t.Errorf("reviews when it is asked for again (-want +got):\n%s", diff)
		}
	})
}

func TestWhatWasNotAllowedIsNotRemembered(t *testing.T) {
	r := newReviewer(t)
	q := asBob("/api/v1/pods")
	no, _ := answering(authorizationv1.SubjectAccessReviewStatus{}, nil)
	if _, refused := r.Authorize(t.Context(), no, q); refused == nil {
		t.Fatal("got no refusal")
	}
	yes, _ := answering(allowed, nil)
	if _, refused := r.Authorize(t.Context(), yes, q); refused != nil {
		t.Errorf("got %v after the right was given", refused)
	}
}
