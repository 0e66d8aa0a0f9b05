// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// whoIsAlice returns a node that knows two grants of alice's. One gives a group that the
// limits of whoamiConfig remove.
func whoIsAlice() *tailnet.Node {
	return proxytest.NewNode(proxytest.WhoIs(proxytest.Readers, `{"impersonate":{"groups":["system:masters","tailnet-readers"]}}`), nil)
}

func whoamiConfig() caddyfile.Config {
	return caddyfile.Config{Whoami: "/whoami", Limits: impersonate.Limits{DenyGroups: []string{"system:*"}, GroupPrefix: "tailnet:"}}
}

// ask has h answer a request for JSON at its whoami path.
func ask(t *testing.T, h *Handler, r *http.Request) (*http.Response, whoami.Facts) {
	t.Helper()
	r.Header.Set("Accept", "application/json")
	resp, got := proxytest.Serve(t, h, r)
	if got != nil {
		t.Error("the next handler was called")
	}
	var facts whoami.Facts
	if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	return resp, facts
}

func TestWhoami_AgreesWithHandler(t *testing.T) {
	h := newHandler(t, whoamiConfig(), whoIsAlice())
	resp, facts := ask(t, h, proxytest.NewRequest("GET", "https://k8s.example.ts.net/whoami"))
	if resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
	_, got := proxytest.Serve(t, h, proxytest.NewRequest("GET", "https://k8s/api"))
	if got == nil {
		t.Fatal("the caller is refused")
	}
	var groups []string
	for _, g := range facts.Groups {
		groups = append(groups, g.Name)
	}
	if facts.User != got.Header.Get("Impersonate-User") || !slices.Equal(groups, got.Header["Impersonate-Group"]) {
		t.Errorf("the page says %s with %v; requests are sent as %v", facts.User, groups, got.Header)
	}
	if diff := cmp.Diff([]whoami.Group{{Name: "tailnet:tailnet-readers", Grants: []int{1, 2}}}, facts.Groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]whoami.Cut{{Name: "system:masters", Option: "deny_groups", Grants: []int{2}}}, facts.Cut); diff != "" {
		t.Errorf("removed groups (-want +got):\n%s", diff)
	}
	if facts.Device != "laptop.example.ts.net" || facts.Address != proxytest.AliceAddr || facts.Server != "https://k8s.example.ts.net" || facts.Proxy != "k8s" || facts.Capability != "tailscale.com/cap/kubernetes" {
		t.Errorf("got %+v", facts)
	}
}

func TestWhoami_TellsOfRecording(t *testing.T) {
	h := newHandler(t, caddyfile.Config{Whoami: "/whoami", Record: t.TempDir(), Events: caddyfile.LogEvents}, proxytest.AliceNode())
	_, facts := ask(t, h, proxytest.NewRequest(http.MethodGet, "https://k8s.example.ts.net/whoami", "Accept", "application/json"))
	if want := (whoami.Recording{Wanted: true, Files: true, Requests: true}); !cmp.Equal(facts.Recording, want) {
		t.Errorf("got %+v; want %+v", facts.Recording, want)
	}
}

func TestWhoami_RefusedCaller(t *testing.T) {
	cfg := whoamiConfig()
	cfg.RequireGroups = true
	resp, facts := ask(t, newHandler(t, cfg, proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["system:masters"]}}`), nil)), proxytest.NewRequest("GET", "https://k8s/whoami"))
	if resp.StatusCode != http.StatusForbidden || facts.User != "" || len(facts.Groups) > 0 {
		t.Errorf("answered %s with user %q and groups %v; want 403 and none", resp.Status, facts.User, facts.Groups)
	}
	if facts.Login != "alice@example.com" || facts.Reason != "guard" || !strings.Contains(facts.Refused, "system:masters") {
		t.Errorf("got login %q, reason %q: %q", facts.Login, facts.Reason, facts.Refused)
	}
	if diff := cmp.Diff([]whoami.Cut{{Name: "system:masters", Option: "deny_groups", Grants: []int{1}}}, facts.Cut); diff != "" {
		t.Errorf("removed groups (-want +got):\n%s", diff)
	}
}

// The page is for callers only, and there is none without the option.
func TestWhoami_OnlyForCallers(t *testing.T) {
	http3 := proxytest.NewRequest("GET", "https://k8s/whoami")
	http3.Proto, http3.ProtoMajor, http3.ProtoMinor = "HTTP/3.0", 3, 0
	for _, tt := range []struct {
		name  string
		nodes []*tailnet.Node
		r     *http.Request
		want  proxytest.Refusal
	}{
		{"not from a tailnet", []*tailnet.Node{proxytest.SilentNode(t)}, httptest.NewRequest("GET", "https://k8s/whoami", nil), proxytest.Forbidden},
		{"unknown", []*tailnet.Node{proxytest.NewNode(nil, tailnet.ErrPeerNotFound)}, proxytest.NewRequest("GET", "https://k8s/whoami"), proxytest.Forbidden},
		{"no answer", []*tailnet.Node{proxytest.NewNode(nil, errors.New("gone"))}, proxytest.NewRequest("GET", "https://k8s/whoami"), proxytest.TryAgain},
		{"the node itself", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.FromPeer(httptest.NewRequest("GET", "https://k8s/whoami", nil), proxytest.NodeAddr), proxytest.Forbidden},
		{"another host", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "http://evil/whoami"), proxytest.Forbidden},
		{"a script of another site", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors", "Sec-Fetch-Dest", "empty"), proxytest.Forbidden},
		{"a frame of another site", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"), proxytest.Forbidden},
		{"a script of another site, as a document", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "document"), proxytest.Forbidden},
		{"with another origin", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "https://k8s/whoami", "Origin", "https://evil", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"), proxytest.Forbidden},
		{"over HTTP/3", []*tailnet.Node{proxytest.SilentNode(t)}, http3, proxytest.Misdirected},
		{"POST", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("POST", "https://k8s/whoami"), proxytest.MethodNotAllowed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := proxytest.Serve(t, newHandler(t, whoamiConfig(), tt.nodes...), tt.r)
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, tt.want)
		})
	}
	t.Run("a link on another site", func(t *testing.T) {
		r := proxytest.NewRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
		if resp, _ := ask(t, newHandler(t, whoamiConfig(), proxytest.AliceNode()), r); resp.StatusCode != http.StatusOK {
			t.Errorf("answered %s; want the page", resp.Status)
		}
	})
	for _, path := range []string{"/whoami/", "/whoami/x", "/WHOAMI", "/api/whoami"} {
		if _, got := proxytest.Serve(t, newHandler(t, whoamiConfig(), proxytest.AliceNode()), proxytest.NewRequest("GET", "https://k8s"+path)); got == nil {
			t.Errorf("%s is not passed on", path)
		}
	}
	if _, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, proxytest.AliceNode()), proxytest.NewRequest("GET", "https://k8s/whoami")); got == nil {
		t.Error("without the option, /whoami is not passed on")
	}
}

// The kubeconfig of a site below a path has that path, which handle_path removes.
func TestWhoami_ServerHasPathOfSite(t *testing.T) {
	const options = "{\nwhoami\n}\n"
	for _, tt := range []struct{ name, body, path, want string }{
		{"root", "tailscale_impersonate " + options, "/whoami", ""},
		{"handle_path", "handle_path /cluster-a/* {\ntailscale_impersonate " + options + "}", "/cluster-a/whoami", "/cluster-a"},
		{"nested", "handle_path /clusters/* {\nhandle_path /a/* {\ntailscale_impersonate " + options + "}\n}", "/clusters/a/whoami", "/clusters/a"},
		{"escaped", "handle_path /a%20b/* {\ntailscale_impersonate " + options + "}", "/a%20b/whoami", "/a%20b"},
		{"strip_prefix", "route {\nuri strip_prefix /cluster-a\ntailscale_impersonate " + options + "}", "/cluster-a/whoami", "/cluster-a"},
		{"rewrite", "route {\nrewrite /me /whoami\ntailscale_impersonate " + options + "}", "/me", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := proxytest.Config{API: proxytest.NewAPIServer(t), Body: tt.body, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
			resp := s.Get(t, tt.path, "Accept: application/json\r\n")
			var facts whoami.Facts
			if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
				t.Fatalf("%s: %v", resp.Status, err)
			}
			if want := "http://k8s" + tt.want; facts.Server != want || !strings.Contains(facts.Kubeconfig, "server: "+want+"\n") {
				t.Errorf("got server %s and kubeconfig\n%s\nwant %s", facts.Server, facts.Kubeconfig, want)
			}
		})
	}
}

// The page names the authority of the certificate that the site presents.
func TestWhoami_NamesPrivateCA(t *testing.T) {
	s := proxytest.Config{API: proxytest.NewAPIServer(t), Body: "tailscale_impersonate {\nwhoami\n}", TLS: true, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
	resp := s.Get(t, "/whoami", "Accept: application/json\r\n")
	var facts whoami.Facts
	if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	if facts.CAFingerprint == "" || !strings.Contains(facts.Kubeconfig, "certificate-authority-data: ") {
		t.Errorf("got fingerprint %q and kubeconfig\n%s\nwant those of the site's certificate, which signs itself", facts.CAFingerprint, facts.Kubeconfig)
	}
}
