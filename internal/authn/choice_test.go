// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// engineer returns a node on which alice has two groups.
func engineer() *tailnet.Node {
	return proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["devs","admins"]}}`), nil)
}

const aliceLogin = "alice@example.com"

// asked returns the headers of a request of alice as user in groups.
func asked(user string, groups ...string) []string {
	headers := []string{"Impersonate-User", user}
	for _, group := range groups {
		headers = append(headers, "Impersonate-Group", group)
	}
	return headers
}

func TestChoice_IsTheCallersUnlessStripped(t *testing.T) {
	optional := impersonate.Limits{OptionalGroups: []string{"admins"}}
	for _, mode := range []ActAs{"", RejectActAs, AuthorizeActAs, StripActAs} {
		for _, tt := range []struct {
			name     string
			headers  []string
			want     []string // of all modes but strip
			stripped []string // the groups under strip
			refused  bool     // by all modes but strip
		}{
			{"nothing", nil, []string{"devs"}, []string{"devs"}, false},
			{"an optional group", asked(aliceLogin, "admins"), []string{"admins"}, []string{"devs"}, false},
			{"both", asked(aliceLogin, "admins", "devs"), []string{"devs", "admins"}, []string{"devs"}, false},
			{"none", asked(aliceLogin), nil, []string{"devs"}, false},
			{"a group that was not granted", asked(aliceLogin, "root"), nil, []string{"devs"}, true},
			{"a granted group, and one that was not", asked(aliceLogin, "admins", "root"), nil, []string{"devs"}, true},
			{"another user in own groups", asked("bob@example.com", "devs"), nil, []string{"devs"}, true},
			{"a UID", append(asked(aliceLogin, "devs"), "Impersonate-Uid", "7"), nil, []string{"devs"}, true},
			{"groups without a user", []string{"Impersonate-Group", "devs"}, nil, []string{"devs"}, true},
			{"a header that does not exist", append(asked(aliceLogin, "devs"), "Impersonate-Future", "a"), nil, []string{"devs"}, true},
		} {
			t.Run(string(mode)+"/"+tt.name, func(t *testing.T) {
				want, refused := tt.want, tt.refused
				if mode == StripActAs {
					want, refused = tt.stripped, false
				}
				resp, got := proxytest.Serve(t, newServer(t, Options{ActAs: mode, Limits: optional}, engineer()), proxytest.NewRequest("GET", "http://k8s/api", tt.headers...))
				if got == nil {
					if !refused {
						t.Errorf("got %s; want the groups %q", resp.Status, want)
					}
					return
				}
				if refused {
					// With authorize, the API server decides. Headers that can be sent must not arrive.
					if uid := got.Header["Impersonate-Uid"]; mode != AuthorizeActAs || len(uid) == 0 || uid[0] == "7" || got.Header["Impersonate-User"] != nil {
						t.Fatalf("it is sent with %v", proxytest.Protected(got.Header))
					}
					return
				}
				wantHeaders := http.Header{"Impersonate-User": {aliceLogin}}
				if want != nil {
					wantHeaders["Impersonate-Group"] = want
				}
				if diff := cmp.Diff(wantHeaders, proxytest.Protected(got.Header), cmpopts.IgnoreMapEntries(func(key string, _ []string) bool { return key == "Authorization" })); diff != "" {
					t.Errorf("headers (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestChoice_RefusalNamesTheGroupAndThoseThatAreGranted(t *testing.T) {
	since := proxytest.CountsSince(t, "group_choices_total")
	server := newServer(t, Options{Limits: impersonate.Limits{OptionalGroups: []string{"admins"}}}, engineer())
	resp, _ := proxytest.Serve(t, server, proxytest.NewRequest("GET", "http://k8s/api", asked(aliceLogin, "devs", "root")...))
	proxytest.CheckRefused(t, resp, proxytest.Forbidden, aliceLogin, `"root"`, "devs, admins")
	proxytest.Serve(t, server, proxytest.NewRequest("GET", "http://k8s/api", asked(aliceLogin, "admins")...))
	proxytest.WaitForCounts(t, since, map[string]float64{"group_choices_total refused": 1, "group_choices_total chosen": 1})
}

// A choice does not outlive its request: the caller is cached.
func TestChoice_IsPerRequest(t *testing.T) {
	server := newServer(t, Options{CacheTTL: 1e9}, engineer())
	for _, headers := range [][]string{asked(aliceLogin, "devs"), nil, asked(aliceLogin), nil} {
		_, got := proxytest.Serve(t, server, proxytest.NewRequest("GET", "http://k8s/api", headers...))
		want := []string{"devs", "admins"}
		if headers != nil {
			want = headers[2:]
			want = slices.DeleteFunc(slices.Clone(want), func(s string) bool { return s == "Impersonate-Group" })
		}
		if got == nil || !slices.Equal(got.Header["Impersonate-Group"], want) {
			t.Errorf("%v: got groups %q; want %q", headers, got.Header["Impersonate-Group"], want)
		}
	}
}

func TestChoice_RequireGroupsAppliesToIt(t *testing.T) {
	server := newServer(t, Options{Limits: impersonate.Limits{OptionalGroups: []string{"*"}, RequireGroups: true}}, engineer())
	for _, headers := range [][]string{nil, asked(aliceLogin)} {
		resp, got := proxytest.Serve(t, server, proxytest.NewRequest("GET", "http://k8s/api", headers...))
		if got != nil {
			t.Errorf("%v: sent without a group", headers)
		}
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, "require_groups", "kubectl --as=alice@example.com --as-group=devs or admins")
	}
	if _, got := proxytest.Serve(t, server, proxytest.NewRequest("GET", "http://k8s/api", asked(aliceLogin, "devs")...)); got == nil {
		t.Error("refused with a group")
	}
}

// A caller that acts as another user in a group that has to be recorded is recorded.
func TestMustRecord_FollowsGroupsOfRequest(t *testing.T) {
	a := newServer(t, Options{ActAs: AuthorizeActAs, Limits: impersonate.Limits{RecordGroups: []string{"admins", "system:serviceaccounts"}, GroupPrefix: "t:"}}, engineer())
	target := func(t *impersonate.Target) *impersonate.Identity {
		return &impersonate.Identity{User: aliceLogin, ActAs: &impersonate.ActAsRequest{Target: t}}
	}
	for _, tt := range []struct {
		name         string
		request, now *impersonate.Identity
		want         bool
	}{
		{"a group that is not named", &impersonate.Identity{Groups: []string{"t:devs"}}, &impersonate.Identity{}, false},
		{"a group that is named", &impersonate.Identity{Groups: []string{"t:devs", "t:admins"}}, &impersonate.Identity{}, true},
		{"a grant", &impersonate.Identity{}, &impersonate.Identity{Recording: impersonate.Recording{Enforce: true}}, true},
		{"another request's group", &impersonate.Identity{}, &impersonate.Identity{Recording: impersonate.Recording{Enforce: true, ByGroup: true}}, false},
		{"another user in a group that is named", target(&impersonate.Target{User: "bob", Groups: []string{"admins"}}), &impersonate.Identity{}, true},
		{"a service account", target(&impersonate.Target{User: "system:serviceaccount:a:b"}), &impersonate.Identity{}, true},
		{"another user", target(&impersonate.Target{User: "bob"}), &impersonate.Identity{}, false},
	} {
		if got := a.MustRecord(tt.request, tt.now); got != tt.want {
			t.Errorf("%s: got %t; want %t", tt.name, got, tt.want)
		}
	}
}

// What records sessions reads it from the identity that the request is forwarded with.
func TestAuthenticate_TargetInRecordedGroup(t *testing.T) {
	server := newServer(t, Options{ActAs: AuthorizeActAs, Limits: impersonate.Limits{RecordGroups: []string{"admins"}, OptionalGroups: []string{"admins"}}}, engineer())
	for _, tt := range []struct {
		headers []string
		want    bool
	}{
		{asked("bob@example.com", "admins"), true},
		{asked("bob@example.com", "devs"), false},
		{asked(aliceLogin, "admins"), true},
		{nil, false},
	} {
		r := proxytest.NewRequest("GET", "http://k8s/api", tt.headers...)
		caller, err := server.Authenticate(r, server.Strip(r))
		if err != nil {
			t.Fatal(err)
		}
		if got := caller.Identity.Recording.Enforce; got != tt.want {
			t.Errorf("%v: recording is enforced: %t; want %t", tt.headers, got, tt.want)
		}
	}
}
