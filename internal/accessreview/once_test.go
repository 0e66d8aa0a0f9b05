// SPDX-License-Identifier: Apache-2.0

package accessreview_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// slowly returns an Ask that takes a second to give every review the same result, and
// counts how often it received each.
func slowly(status authorizationv1.SubjectAccessReviewStatus) (accessreview.Ask, map[string]int) {
	var mu sync.Mutex
	asked := make(map[string]int)
	return func(ctx context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		mu.Lock()
		asked[r.Spec.String()]++
		mu.Unlock()
		time.Sleep(time.Second)
		return &status, ctx.Err()
	}, asked
}

// However many requests ask for the same, at once or one after another.
func TestAuthorize_EachReviewIsSentOnce(t *testing.T) {
	for name, status := range map[string]authorizationv1.SubjectAccessReviewStatus{"allowed": allowed, "denied": {Reason: "no binding"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReviewer(t)
				ask, asked := slowly(status)
				q := asBob("/api/v1/pods")
				authorize := func() {
					_, err := r.Authorize(t.Context(), ask, q)
					if apierrors.IsForbidden(err) == status.Allowed {
						t.Errorf("got error %v; want what the API server says", err)
					}
				}
				var all sync.WaitGroup
				for range 1000 {
					all.Go(authorize)
				}
				all.Wait()
				for range 10 {
					authorize()
				}
				if len(asked) != 2 {
					t.Errorf("the API server received %d reviews; want one of each form", len(asked))
				}
				for review, n := range asked {
					if n != 1 {
						t.Errorf("the API server received %d times %s", n, review)
					}
				}
			})
		})
	}
}

// A request that is gone before the result arrives fails no other.
func TestAuthorize_CancelledRequestFailsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		ask, asked := slowly(allowed)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := r.Authorize(ctx, ask, asBob("/api/v1/pods")); !apierrors.IsServiceUnavailable(err) {
				t.Errorf("who has gone got %v; want a 503", err)
			}
		})
		synctest.Wait()
		all.Go(func() {
			if _, err := r.Authorize(t.Context(), ask, asBob("/api/v1/pods")); err != nil {
				t.Errorf("who waits got %v", err)
			}
		})
		synctest.Wait()
		cancel()
		all.Wait()
		if len(asked) != 2 {
			t.Errorf("the API server received %d reviews; want 2", len(asked))
		}
	})
}

// Whoever was given permission has it as soon as the cached denial may not be used any
// longer, and is told how old that is.
func TestCache_DenialLastsUntilSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const ttl = time.Minute
		r := newReviewer(t)
		no, _ := answering(authorizationv1.SubjectAccessReviewStatus{}, nil)
		yes, _ := answering(allowed, nil)
		authorize := func(ask accessreview.Ask) error {
			q := asBob("/api/v1/pods")
			q.Since = time.Now().Add(-ttl)
			_, err := r.Authorize(t.Context(), ask, q)
			return err
		}
		first := authorize(no)
		if !apierrors.IsForbidden(first) || strings.Contains(first.Error(), "ago") {
			t.Errorf("got %v; want a refusal with the reason alone", first)
		}
		time.Sleep(5*time.Second - time.Nanosecond)
		if err := authorize(yes); err == nil || err.Error() != first.Error() {
			t.Errorf("a little later, got %v; want the same", err)
		}
		time.Sleep(30 * time.Second)
		if err := authorize(yes); err == nil || !strings.Contains(err.Error(), "; that was the answer 35s ago, and it counts for 1m0s (cache_ttl)") {
			t.Errorf("later, got %v; want how old the answer is", err)
		}
		time.Sleep(ttl)
		if err := authorize(yes); err != nil {
			t.Errorf("got %v; want the API server to be asked again", err)
		}
	})
}

// What the API server said last counts, also for requests that an earlier result would do
// for.
func TestCache_LaterResultReplacesEarlier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReviewer(t)
		early := asBob("/api/v1/pods")
		check := func(q accessreview.Question, status authorizationv1.SubjectAccessReviewStatus, want bool) {
			t.Helper()
			ask, _ := answering(status, nil)
			if _, err := r.Authorize(t.Context(), ask, q); (err == nil) != want {
				t.Errorf("got %v; want it allowed: %v", err, want)
			}
		}
		denied := authorizationv1.SubjectAccessReviewStatus{}
		check(early, allowed, true)
		for _, now := range []struct {
			status authorizationv1.SubjectAccessReviewStatus
			want   bool
		}{{denied, false}, {allowed, true}, {denied, false}} {
			time.Sleep(time.Millisecond)
			check(asBob("/api/v1/pods"), now.status, now.want)
			check(early, now.status, now.want)
		}
	})
}

// Callers who try what they may not do displace nothing that others may do.
func TestCache_DenialsDisplaceNoPermissions(t *testing.T) {
	r := newReviewer(t)
	yes, asked := answering(allowed, nil)
	no, _ := answering(authorizationv1.SubjectAccessReviewStatus{}, nil)
	q := asBob("/api/v1/pods")
	if _, err := r.Authorize(t.Context(), yes, q); err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		other := q
		other.Target = &impersonate.Target{User: fmt.Sprint("user-", i)}
		if _, err := r.Authorize(t.Context(), no, other); err == nil {
			t.Fatal("got no refusal")
		}
	}
	*asked = nil
	if _, err := r.Authorize(t.Context(), yes, q); err != nil || len(*asked) > 0 {
		t.Errorf("got %v after %d reviews; want the cached permission", err, len(*asked))
	}
}

// The client writes the path, the method, and the name in a field selector.
func TestAuthorize_LongRequestsAreNotReviewed(t *testing.T) {
	long := strings.Repeat("a", 450_000)
	for name, info := range map[string]requestinfo.Info{
		"path":      {Verb: "get", Path: "/" + long},
		"method":    {Verb: long, Path: "/version"},
		"namespace": {Verb: "get", IsResourceRequest: true, Namespace: long},
		"name":      {Verb: "get", IsResourceRequest: true, Name: long},
		"resource":  {Verb: "get", IsResourceRequest: true, Resource: long},
		"group":     {Verb: "get", IsResourceRequest: true, APIGroup: long},
	} {
		t.Run(name, func(t *testing.T) {
			ask, asked := answering(allowed, nil)
			q := asBob("/api")
			q.Request = info
			_, err := newReviewer(t).Authorize(t.Context(), ask, q)
			if !apierrors.IsBadRequest(err) || len(err.Error()) > 1000 {
				t.Errorf("got %.200v; want a short refusal", err)
			}
			if _, err := newReviewer(t).Missing(t.Context(), ask, q); err == nil {
				t.Error("Missing: got no error")
			}
			if len(*asked) > 0 {
				t.Errorf("the API server received %d reviews; want none", len(*asked))
			}
		})
	}
	// What comes behind a proxy subresource is not part of a review.
	ask, _ := answering(allowed, nil)
	if _, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/namespaces/default/services/web/proxy/"+long)); err != nil {
		t.Errorf("a long path to an application: %.200v", err)
	}
}

// An authorization webhook writes the reason.
func TestAuthorize_LongReasonIsCut(t *testing.T) {
	ask, _ := answering(authorizationv1.SubjectAccessReviewStatus{Reason: strings.Repeat("é", 1<<20)}, nil)
	_, err := newReviewer(t).Authorize(t.Context(), ask, asBob("/api/v1/pods"))
	if !apierrors.IsForbidden(err) || len(err.Error()) > 4096 || !strings.Contains(err.Error(), "éé") {
		t.Errorf("got %.200v; want a refusal with the beginning of the reason", err)
	}
}
