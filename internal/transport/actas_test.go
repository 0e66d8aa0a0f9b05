// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// reviewingServer is an API server that answers subject access reviews.
type reviewingServer struct {
	*proxytest.APIServer

	mu sync.Mutex
	// allow are the verbs that it allows.
	allow []string
	// instead writes another answer, if not nil.
	instead func(http.ResponseWriter)
	asked   []*http.Request
	specs   []authorizationv1.SubjectAccessReviewSpec
}

func newReviewingServer(t *testing.T, allow ...string) *reviewingServer {
	t.Helper()
	s := &reviewingServer{allow: allow}
	s.APIServer = proxytest.NewAPIServer(t, func(server *httptest.Server) {
		other := server.Config.Handler
		server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasSuffix(r.URL.Path, "/subjectaccessreviews") {
				other.ServeHTTP(w, r)
				return
			}
			s.review(t, w, r)
		})
	})
	return s
}

func (s *reviewingServer) review(t *testing.T, w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var review authorizationv1.SubjectAccessReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		t.Errorf("reading a review: %v", err)
	}
	s.asked, s.specs = append(s.asked, r), append(s.specs, review.Spec)
	if s.instead != nil {
		s.instead(w)
		return
	}
	if review.Kind != "SubjectAccessReview" || review.APIVersion != "authorization.k8s.io/v1" {
		t.Errorf("got a %s of %s; want a review", review.Kind, review.APIVersion)
	}
	review.Status.Allowed = review.Spec.ResourceAttributes != nil && slices.Contains(s.allow, review.Spec.ResourceAttributes.Verb)
	w.WriteHeader(http.StatusCreated)
	if err := json.NewEncoder(w).Encode(review); err != nil {
		t.Error(err)
	}
}

// allows changes what the server allows.
func (s *reviewingServer) allows(verbs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.allow = verbs
}

// acting is alice, who asks to act as bob.
type acting struct {
	*impersonate.Identity
	mayStill impersonate.StillAllowed // nil until granted
}

func newActing() *acting {
	id := *alice
	a := &acting{Identity: &id}
	id.ActAs = &impersonate.ActAsRequest{
		Target:  &impersonate.Target{User: "bob", Groups: []string{"viewers"}},
		Granted: func(mayStill impersonate.StillAllowed) { a.mayStill = mayStill },
	}
	return a
}

// request returns a request of a's.
func (a *acting) request(s *reviewingServer, target string, headers ...string) *http.Request {
	r := newRequest(s.APIServer, target, headers...)
	return r.WithContext(impersonate.NewContext(r.Context(), a.Identity))
}

func TestActAs_AllowedIsSentAsTarget(t *testing.T) {
	s := newReviewingServer(t, "impersonate")
	tr := newTransport(t, kubeconfig{server: s.URL + "/clusters/a", cluster: map[string]any{"certificate-authority-data": s.CA()}, user: token})
	a := newActing()
	a.RequestID = "f00"
	r := a.request(s, "/api/v1/namespaces/default/pods", "Impersonate-User", "forged", "Impersonate-Uid", "forged")
	roundTrip(t, tr, r)

	want := http.Header{
		"Authorization":     {"Bearer proxy-token"},
		"Impersonate-User":  {"bob"},
		"Impersonate-Group": {"viewers"},
		"Impersonate-Extra-Tailscale-Impersonate.github.io%2frequest-Id":      {"f00"},
		"Impersonate-Extra-Tailscale-Impersonate.github.io%2foriginal-User":   {"alice@example.com"},
		"Impersonate-Extra-Tailscale-Impersonate.github.io%2foriginal-Groups": {"tailnet-readers", "b"},
	}
	got := s.One(t)
	if diff := cmp.Diff(want, protectedHeaders(got.Header)); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	if got.URL.Path != "/clusters/a/api/v1/namespaces/default/pods" {
		t.Errorf("sent to %s", got.URL.Path)
	}
	for _, asked := range s.asked {
		if asked.Method != http.MethodPost || asked.URL.Path != "/clusters/a/apis/authorization.k8s.io/v1/subjectaccessreviews" {
			t.Errorf("a review was sent as %s %s", asked.Method, asked.URL.Path)
		}
		if diff := cmp.Diff(http.Header{"Authorization": {"Bearer proxy-token"}}, protectedHeaders(asked.Header)); diff != "" {
			t.Errorf("headers of a review (-want +got):\n%s", diff)
		}
		if agent := asked.UserAgent(); agent != "caddy-tailscale-impersonate (request f00)" {
			t.Errorf("a review comes from %q; want it to name the request", agent)
		}
	}
	verbs := make([]string, 0, len(s.specs))
	for _, spec := range s.specs {
		verbs = append(verbs, spec.ResourceAttributes.Verb+" "+spec.ResourceAttributes.Resource)
		if spec.User != "alice@example.com" || !slices.Equal(spec.Groups, []string{"system:authenticated", "tailnet-readers", "b"}) {
			t.Errorf("a review is about %s in %q; want alice with all her groups", spec.User, spec.Groups)
		}
	}
	if want := []string{"impersonate-on:user-info:list pods", "impersonate users", "impersonate groups"}; !slices.Equal(verbs, want) {
		t.Errorf("asked about %q; want %q", verbs, want)
	}
	if a.ActAs == nil || a.User != "alice@example.com" {
		t.Errorf("the caller's identity was changed: %+v", a.Identity)
	}
}

func TestActAs_RefusedIsNotSent(t *testing.T) {
	html := func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway); fmt.Fprint(w, "<html>") }
	for _, tt := range []struct {
		name    string
		allow   []string
		instead func(http.ResponseWriter)
		want    proxytest.Refusal
		words   []string
		cause   string
	}{
		{"no right", nil, nil, proxytest.Forbidden, []string{`User "alice@example.com" cannot impersonate resource "users" in API group "" at the cluster scope`}, ""},
		{"a part of each form", []string{"impersonate:user-info"}, nil, proxytest.Forbidden, []string{"impersonate-on:user-info:list", "pods"}, ""},
		{"the proxy may not ask", nil, func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(apierrors.NewForbidden(authorizationv1.Resource("subjectaccessreviews"), "", nil).ErrStatus)
		}, proxytest.Unavailable, []string{"alice@example.com", "bob"}, "subjectaccessreviews.authorization.k8s.io is forbidden"},
		{"another answer", nil, html, proxytest.Unavailable, nil, "502 Bad Gateway"},
		{"200, which a review never is", nil, func(w http.ResponseWriter) { fmt.Fprint(w, `{"status":{"allowed":true}}`) }, proxytest.Unavailable, nil, "200 OK"},
		{"nonsense", nil, func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated); fmt.Fprint(w, `{"status":`) }, proxytest.Unavailable, nil, "reading the API server's answer"},
		{"an empty answer", nil, func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated) }, proxytest.Unavailable, nil, "reading the API server's answer"},
		{"an answer without end", nil, func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, `{"status":{"allowed":true,"reason":"%s"}}`, strings.Repeat("x", maxReview))
		}, proxytest.Unavailable, nil, "reading the API server's answer"},
		{"an answer without a status", nil, func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated); fmt.Fprint(w, `{}`) }, proxytest.Forbidden, []string{"cannot impersonate"}, ""},
		{"no answer", nil, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, proxytest.Unavailable, nil, "does not answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newReviewingServer(t, tt.allow...)
			s.instead = tt.instead
			tr := newTransport(t, trusting(s.APIServer, token))
			logs := logOf(tr)
			a := newActing()
			proxytest.CheckRefused(t, roundTrip(t, tr, a.request(s, "/api/v1/namespaces/default/pods")), tt.want, tt.words...)
			checkCause(t, logs, tt.cause)
			s.CheckNone(t)
			if a.mayStill != nil {
				t.Error("Granted was called for a refused request")
			}
		})
	}
}

func TestReview_NeedsCredentials(t *testing.T) {
	s := newReviewingServer(t, "impersonate")
	tr := newTransport(t, trusting(s.APIServer, map[string]any{"tokenFile": writeFile(t, "token", "")}))
	proxytest.CheckRefused(t, roundTrip(t, tr, newActing().request(s, "/api/v1/pods")), proxytest.Unavailable, "no credentials")
	s.CheckNone(t)
	// Nor is one sent when the permission is checked again.
	review := &authorizationv1.SubjectAccessReview{TypeMeta: metav1.TypeMeta{APIVersion: authorizationv1.SchemeGroupVersion.String(), Kind: "SubjectAccessReview"}}
	if _, err := tr.cluster.review(t.Context(), s.Listener.Addr().String(), userAgent, review); err == nil {
		t.Error("got no error from a review without credentials")
	}
	if len(s.asked) > 0 {
		t.Error("a review was sent without credentials")
	}
}

// Several API servers may not be in the same state.
func TestActAs_AsksServerOfRequest(t *testing.T) {
	first, second := newReviewingServer(t), newReviewingServer(t, "impersonate")
	tr := newTransport(t, trusting(first.APIServer, token))
	roundTrip(t, tr, newActing().request(second, "/api/v1/pods"))
	second.One(t)
	if len(first.asked) > 0 || len(second.asked) == 0 {
		t.Errorf("the server at the cluster's own address received %d reviews, the one of the request %d; want only the latter to receive any", len(first.asked), len(second.asked))
	}
}

// Reviews are cached for as long as the caller's identity.
func TestActAs_CacheLastsMaxAge(t *testing.T) {
	s := newReviewingServer(t, "impersonate")
	tr := newTransport(t, trusting(s.APIServer, token))
	a := newActing()
	a.ActAs.MaxAge = time.Hour
	roundTrip(t, tr, a.request(s, "/api/v1/pods"))
	asked := len(s.asked)
	s.allows()
	a.ActAs.MaxAge = time.Hour
	roundTrip(t, tr, a.request(s, "/api/v1/pods"))
	// Reviews that were not allowed are not cached.
	if n := len(s.Take()); n != 2 || len(s.asked) >= 2*asked {
		t.Errorf("%d requests were sent, after %d and %d reviews; want both, and fewer reviews the second time", n, asked, len(s.asked)-asked)
	}
	a.ActAs.MaxAge = 0
	proxytest.CheckRefused(t, roundTrip(t, tr, a.request(s, "/api/v1/pods")), proxytest.Forbidden, "cannot impersonate")
	s.CheckNone(t)
}

// Granted receives a function that checks the permission again, with the caller's
// identity at that time.
func TestActAs_GrantedAsksAgain(t *testing.T) {
	s := newReviewingServer(t, "impersonate")
	tr := newTransport(t, trusting(s.APIServer, token))
	a := newActing()
	roundTrip(t, tr, a.request(s, "/api/v1/pods?watch=true"))
	if a.mayStill == nil {
		t.Fatal("Granted was not called")
	}
	if err := a.mayStill(t.Context(), alice, time.Now()); err != nil {
		t.Errorf("got %v while nothing has changed", err)
	}
	s.allows()
	if err := a.mayStill(t.Context(), alice, time.Now().Add(-time.Minute)); err != nil {
		t.Errorf("got %v; want the cached permission to count", err)
	}
	if err := a.mayStill(t.Context(), alice, time.Now()); !apierrors.IsForbidden(err) {
		t.Errorf("got %v after the permission was withdrawn; want forbidden", err)
	}
	s.allows("impersonate")
	other := &impersonate.Identity{User: "carol@example.com"}
	if err := a.mayStill(t.Context(), other, time.Now()); err != nil {
		t.Error(err)
	}
	if last := s.specs[len(s.specs)-1]; last.User != other.User {
		t.Errorf("the review is of %s; want the caller's identity at that time", last.User)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.mayStill(ctx, alice, time.Now()); err == nil || apierrors.IsForbidden(err) {
		t.Errorf("got %v when the check is impossible; want an error that is not forbidden", err)
	}
}
