// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

func TestActAs_InvalidRequestIsRefused(t *testing.T) {
	denying := impersonate.Limits{DenyGroups: []string{"system:masters"}}
	for _, tt := range []struct {
		name    string
		limits  impersonate.Limits
		headers []string
		want    proxytest.Refusal
		words   []string
	}{
		{"no user", impersonate.Limits{}, []string{"Impersonate-Group", "a"}, proxytest.BadRequest, []string{"without a user"}},
		{"a header that does not exist", impersonate.Limits{}, []string{"Impersonate-User", "bob", "Impersonate-Future", "a"}, proxytest.BadRequest, []string{"Impersonate-Future"}},
		{"an alias", impersonate.Limits{}, []string{"Impersonate_User", "bob"}, proxytest.BadRequest, []string{"Impersonate_user"}},
		{"a denied group", denying, []string{"Impersonate-User", "bob", "Impersonate-Group", "system:masters"}, proxytest.Forbidden, []string{"bob", "system:masters", "deny_groups"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := proxytest.NewRequest("GET", "http://k8s/api", tt.headers...)
			resp, got := proxytest.Serve(t, newServer(t, Options{ActAs: AuthorizeActAs, Limits: tt.limits}, proxytest.AliceNode()), r)
			if got != nil {
				t.Errorf("the next handler was called, with %v", got.Header)
			}
			proxytest.CheckRefused(t, resp, tt.want, tt.words...)
			if left := proxytest.Protected(r.Header); len(left) > 0 {
				t.Errorf("the refused request still holds %v", left)
			}
		})
	}
}

func TestActAs_NeedsIdentity(t *testing.T) {
	r := proxytest.NewRequest("GET", "http://k8s/api", "Impersonate-User", "bob")
	resp, got := proxytest.Serve(t, newServer(t, Options{ActAs: AuthorizeActAs}, proxytest.NewNode(nil, nil)), r)
	if got != nil {
		t.Errorf("the next handler was called, with %v", got.Header)
	}
	proxytest.CheckRefused(t, resp, proxytest.Forbidden, proxytest.AliceAddr)
}

// After an error or an unwanted answer, Caddy can pass the request to another route,
// without the headers that the first handler has removed and without its context. A
// caller that asked to act as another user must not be sent as itself then.
func TestActAs_IsRememberedInOtherRoutes(t *testing.T) {
	for _, first := range []ActAs{AuthorizeActAs, RejectActAs, ""} {
		for _, second := range []ActAs{AuthorizeActAs, RejectActAs, ""} {
			for _, headers := range [][]string{{"Impersonate-User", "bob"}, nil} {
				r := proxytest.NewRequest("GET", "http://k8s/api", headers...)
				r = r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, make(map[string]any)))
				proxytest.Serve(t, newServer(t, Options{ActAs: first}, proxytest.AliceNode()), r)
				resp, got := proxytest.Serve(t, newServer(t, Options{ActAs: second}, proxytest.AliceNode()), r)
				if headers == nil {
					if got == nil {
						t.Errorf("%s, then %s: a request that asks for nothing is answered %s", first, second, resp.Status)
					}
					continue
				}
				if got != nil {
					t.Errorf("%s, then %s: sent with %v", first, second, proxytest.Protected(got.Header))
				}
				proxytest.CheckRefused(t, resp, proxytest.Forbidden, "another tailscale_impersonate", "Impersonate-User")
			}
		}
	}
}

func TestCheckTarget_FollowsOptions(t *testing.T) {
	target := &impersonate.Target{User: "bob", Groups: []string{"a"}}
	for _, tt := range []struct {
		name    string
		options Options
		ok      bool
	}{
		{"authorize", Options{ActAs: AuthorizeActAs}, true},
		{"default", Options{}, false},
		{"reject", Options{ActAs: RejectActAs}, false},
		{"strip", Options{ActAs: StripActAs}, false},
		{"a group is denied", Options{ActAs: AuthorizeActAs, Limits: impersonate.Limits{DenyGroups: []string{"a"}}}, false},
	} {
		err := newServer(t, tt.options, proxytest.AliceNode()).CheckTarget(target)
		if (err == nil) != tt.ok || (err != nil && !apierrors.IsForbidden(err)) {
			t.Errorf("%s: got %v; want no error: %t", tt.name, err, tt.ok)
		}
	}
}
