// SPDX-License-Identifier: Apache-2.0

package accessreview

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/filters/impersonation"
	"k8s.io/apiserver/pkg/endpoints/request"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/accessreview"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

var caller = &impersonate.Identity{User: "alice@example.com", Groups: []string{"readers"}, Node: "laptop.example.ts.net"}

// rights are a caller's rights. A right that has not been asked about before is
// decided at random.
type rights struct {
	random *rand.Rand
	likely float64
	known  map[string]bool
}

func (r *rights) allow(permission string) bool {
	allowed, ok := r.known[permission]
	if !ok {
		allowed = r.random.Float64() < r.likely
		r.known[permission] = allowed
	}
	return allowed
}

// authorizer returns them as an authorizer for the API server's code.
func (r *rights) authorizer(t *testing.T) authorizer.UnconditionalAuthorizer {
	return authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
		if a.GetUser().GetName() != caller.User {
			t.Errorf("the API server asks about %s", a.GetUser().GetName())
		}
		asked := fmt.Sprintf("%s path %s", a.GetVerb(), a.GetPath())
		if a.IsResourceRequest() {
			asked = fmt.Sprintf("%s %s/%s/%s/%s %s/%s", a.GetVerb(), a.GetAPIGroup(), a.GetAPIVersion(), a.GetResource(), a.GetSubresource(), a.GetNamespace(), a.GetName())
		}
		if r.allow(asked) {
			return authorizer.DecisionAllow, "", nil
		}
		return authorizer.DecisionNoOpinion, "no such binding", nil
	})
}

// ask returns them as answers to SubjectAccessReviews.
func (r *rights) ask(t *testing.T) accessreview.Ask {
	return func(_ context.Context, sar *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReviewStatus, error) {
		spec := sar.Spec
		if spec.User != caller.User || !slices.Equal(spec.Groups, []string{"system:authenticated", "readers"}) {
			t.Errorf("got a review of %s in %q", spec.User, spec.Groups)
		}
		var asked string
		if a := spec.ResourceAttributes; a != nil {
			asked = fmt.Sprintf("%s %s/%s/%s/%s %s/%s", a.Verb, a.Group, a.Version, a.Resource, a.Subresource, a.Namespace, a.Name)
		} else {
			asked = fmt.Sprintf("%s path %s", spec.NonResourceAttributes.Verb, spec.NonResourceAttributes.Path)
		}
		if r.allow(asked) {
			return &authorizationv1.SubjectAccessReviewStatus{Allowed: true}, nil
		}
		return &authorizationv1.SubjectAccessReviewStatus{Reason: "no such binding"}, nil
	}
}

var codecs = func() serializer.CodecFactory {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	return serializer.NewCodecFactory(scheme)
}()

var resolver = request.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")}

// filter returns the user that the API server sees for r, or the message with which
// it refuses r.
func filter(t *testing.T, r *http.Request, from user.Info, a authorizer.UnconditionalAuthorizer) (user.Info, string) {
	t.Helper()
	info, err := resolver.NewRequestInfo(r)
	if err != nil {
		t.Fatal(err)
	}
	var who user.Info
	handler := impersonation.WithConstrainedImpersonation(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		who, _ = request.UserFrom(r.Context())
	}), a, codecs)
	w := httptest.NewRecorder()
	ctx := request.WithRequestInfo(request.WithUser(r.Context(), from), info)
	handler.ServeHTTP(w, r.Clone(ctx))
	if who != nil {
		return who, ""
	}
	var status metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil {
		t.Fatalf("%v: %s", err, w.Body)
	}
	return nil, status.Message
}

// proxysRights let the proxy's account do what the examples let it do, and use all groups,
// UIDs and extra fields that callers ask for, all by the verb impersonate.
var proxysRights = authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	if a.GetVerb() == "impersonate" && !strings.HasPrefix(a.GetName(), "system:serviceaccounts") {
		return authorizer.DecisionAllow, "", nil
	}
	return authorizer.DecisionNoOpinion, "", nil
})

// info returns a user in comparable form.
func info(u user.Info) user.DefaultInfo {
	extra := maps.Clone(u.GetExtra())
	for key := range extra {
		if strings.HasPrefix(key, "tailscale-impersonate.github.io/") {
			delete(extra, key)
		}
	}
	if len(extra) == 0 {
		extra = nil
	}
	return user.DefaultInfo{Name: u.GetName(), UID: u.GetUID(), Groups: u.GetGroups(), Extra: extra}
}

// For any request and any rights, SubjectAccessReviews lead to the same decision as
// the API server's own filter: the same identity is sent, or the request is refused
// with the same message.
func TestReview_DecidesLikeAPIServer(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	some := func(most int, of ...string) []string {
		random.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
		return of[:random.IntN(min(most, len(of))+1)]
	}
	let, refused := 0, 0
	for range 20_000 {
		r := httptest.NewRequest(
			pick("GET", "POST", "DELETE", "PUT", "OPTIONS"),
			pick("/version", "/api", "/api/v1/pods", "/api/v1/namespaces/default/pods/web/exec", "/apis/apps/v1/namespaces/default/deployments/a", "/api/v1/namespaces/default/secrets?watch=true", "/api/v1/namespaces/default"), nil)
		r.Header.Set("Impersonate-User", pick("bob", "bob", "system:node:n1", "system:node:", "system:node:N_1", "system:serviceaccount:ns:sa", "system:serviceaccount:ns", "system:anonymous", "system:admin", "a b"))
		if random.IntN(2) == 0 {
			r.Header["Impersonate-Group"] = some(5, "g1", "g2", "g3", "g4", "g5", "system:authenticated", "system:unauthenticated", "system:masters")
		}
		if random.IntN(4) == 0 {
			r.Header.Set("Impersonate-Uid", pick("1", "2"))
		}
		if random.IntN(3) == 0 {
			for _, key := range some(2, "Scopes", "Example.com%2frole", "Example.com%2f%52ole", "Example.com%2fother", "A%2Fb") {
				if values := some(4, "v1", "v2", "v3", "v4"); len(values) > 0 {
					r.Header["Impersonate-Extra-"+key] = values
				}
			}
		}
		if len(r.Header["Impersonate-Group"]) == 0 {
			delete(r.Header, "Impersonate-Group")
		}
		rights := &rights{random: random, likely: []float64{0.5, 0.8, 0.95, 1}[random.IntN(4)], known: make(map[string]bool)}

		wantWho, wantMessage := filter(t, r, &user.DefaultInfo{Name: caller.User, Groups: append([]string{"system:authenticated"}, caller.Groups...)}, rights.authorizer(t))

		target, err := impersonate.ParseTarget(r.Header)
		if err != nil {
			t.Fatalf("%v: %v", r.Header, err)
		}
		reviewer, err := accessreview.NewReviewer()
		if err != nil {
			t.Fatal(err)
		}
		id, refusal := reviewer.Authorize(t.Context(), rights.ask(t), accessreview.Question{Caller: caller, Target: target, Request: requestinfo.Parse(r), Since: time.Now()})
		if (refusal == nil) != (wantWho != nil) {
			t.Fatalf("%s %s as %v with %v: got %v; the API server decides %v %q", r.Method, r.URL, r.Header, rights.known, refusal, wantWho, wantMessage)
		}
		if refusal != nil {
			refused++
			// The order in which extra fields are checked is random.
			if len(target.Extra) < 2 && !strings.Contains(refusal.Error(), wantMessage) {
				t.Fatalf("%s %s as %v: got %q; want %q", r.Method, r.URL, r.Header, refusal, wantMessage)
			}
			continue
		}
		let++
		sent := r.Clone(t.Context())
		impersonate.StripProtected(sent.Header)
		id.SetHeaders(sent.Header)
		gotWho, message := filter(t, sent, &user.DefaultInfo{Name: "proxy"}, proxysRights)
		if gotWho == nil {
			t.Fatalf("the API server refuses the request that was sent, %v: %s", sent.Header, message)
		}
		if diff := cmp.Diff(info(wantWho), info(gotWho)); diff != "" {
			t.Fatalf("%s %s as %v with %v (-API server +sent):\n%s", r.Method, r.URL, r.Header, rights.known, diff)
		}
		if got := gotWho.GetExtra()[impersonate.ExtraOriginalUser]; !slices.Equal(got, []string{caller.User}) {
			t.Fatalf("the original user is %q; want %s", got, caller.User)
		}
	}
	t.Logf("%d allowed, %d refused", let, refused)
	if let < 1000 || refused < 1000 {
		t.Errorf("%d allowed and %d refused; want more of both", let, refused)
	}
}
