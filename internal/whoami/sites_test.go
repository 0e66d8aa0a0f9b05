// SPDX-License-Identifier: Apache-2.0

package whoami_test

import (
	"crypto/x509"
	"encoding/json"
	"html"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// withSites returns facts of a caller that may use two more sites, one of them with a
// private authority.
func withSites(f *whoami.Facts) (_ *whoami.Facts, ca *x509.Certificate) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	ca = server.Certificate()
	elsewhere := &whoami.Facts{User: "alice", Groups: []whoami.Group{{Name: "readers"}}, HeldBack: []whoami.Group{{Name: "admins"}, {Name: "readers"}}, ReadOnly: "readers"}
	f.Sites = []whoami.Site{
		whoami.NewSite("https://a.example.ts.net/x%20y", ca, elsewhere),
		whoami.NewSite("https://b.example.ts.net:8443", nil, &whoami.Facts{User: "alice@b", Service: "k8s-api"}),
	}
	return f, ca
}

func TestPage_ListsSites(t *testing.T) {
	for name, f := range map[string]*whoami.Facts{"known": alice(), "refused": dave()} {
		f, _ := withSites(f)
		_, body := get(t, f, "GET", "/whoami", browser)
		for _, want := range []string{
			"a.example.ts.net/x%20y", `href="?kubeconfig&amp;site=a.example.ts.net%2fx%2520y"`, "as alice;", "b.example.ts.net:8443", "as alice@b, by the Tailscale Service k8s-api;",
			"server: https://a.example.ts.net/x%20y", "server: https://b.example.ts.net:8443",
		} {
			if !strings.Contains(body, want) {
				t.Errorf("%s: the page does not say %q:\n%s", name, want, body)
			}
		}
		if strings.Contains(body, "Not every site has answered") {
			t.Errorf("%s: the page says that sites are missing", name)
		}
		f.SitesIncomplete = true
		if _, body := get(t, f, "GET", "/whoami", browser); strings.Count(body, "Not every site has answered") != 2 { // and in the kubeconfig
			t.Errorf("%s: the page does not say that sites are missing:\n%s", name, body)
		}
	}
	if _, body := get(t, alice(), "GET", "/whoami", browser); strings.Contains(body, "only this one") {
		t.Error("the page lists sites where there are none")
	}
}

// The command is for a shell, which must not expand what a client writes.
func TestPage_ShowsCurlCommand(t *testing.T) {
	private, ca := withSites(alice())
	private.CA, private.Sites = ca, nil
	odd := alice()
	odd.Server = "https://a'$(rm)"
	below := alice()
	below.Server += "/cluster-a"
	for _, tt := range []struct {
		f    *whoami.Facts
		want string
	}{
		{alice(), "curl -fsS 'https://k8s.example.ts.net/whoami?kubeconfig' > k8s.example.ts.net.kubeconfig"},
		{below, "curl -fsS 'https://k8s.example.ts.net/cluster-a/whoami?kubeconfig' > k8s.example.ts.net-cluster-a.kubeconfig"},
		{private, "curl -fsS --cacert root.crt 'https://k8s.example.ts.net/whoami?kubeconfig' > k8s.example.ts.net.kubeconfig"},
		{odd, `curl -fsS 'https://a'\''$(rm)/whoami?kubeconfig' > a---rm-.kubeconfig`},
	} {
		if _, body := get(t, tt.f, "GET", "/whoami", browser); !strings.Contains(html.UnescapeString(body), ">"+tt.want+"</pre>") {
			t.Errorf("the page does not say %s:\n%s", tt.want, body)
		}
	}
}

func TestJSON_ListsSites(t *testing.T) {
	f, ca := withSites(alice())
	_, body := get(t, f, "GET", "/whoami", "application/json")
	var got whoami.Facts
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if err := got.ReadCertificates(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f.Sites, got.Sites); diff != "" || !got.Sites[0].CA.Equal(ca) {
		t.Errorf("sites (-want +got):\n%s", diff)
	}
}

func TestKubeconfig_OfOneSite(t *testing.T) {
	f, _ := withSites(alice())
	for target, want := range map[string]string{
		"?kubeconfig":                                      "k8s.example.ts.net.kubeconfig",
		"?kubeconfig&site=k8s.example.ts.net":              "k8s.example.ts.net.kubeconfig",
		"?site=a.example.ts.net%2Fx%2520y&kubeconfig":      "a.example.ts.net-x-y.kubeconfig",
		"?kubeconfig=&site=b.example.ts.net:8443":          "b.example.ts.net.kubeconfig",
		"?site=b.example.ts.net:8443&kubeconfig&site=none": "b.example.ts.net.kubeconfig",
	} {
		resp, body := get(t, f, "GET", "/whoami"+target, browser)
		if got := resp.Header.Get("Content-Disposition"); got != `attachment; filename="`+want+`"` {
			t.Errorf("%s: got Content-Disposition %s; want the file %s", target, got, want)
		}
		if got, all := strings.Count(body, "server: "), !strings.Contains(target, "site="); (got == 3) != all || (got == 1) == all {
			t.Errorf("%s: the kubeconfig has %d sites:\n%s", target, got, body)
		}
	}
	// On its own, site asks for nothing.
	if resp, body := get(t, f, "GET", "/whoami?site=none", browser); resp.StatusCode != http.StatusOK || !strings.Contains(body, "<!doctype html>") {
		t.Errorf("answered %s", resp.Status)
	}
}

// A site that refuses the caller is in its kubeconfig only if there is no other.
func TestKubeconfig_LeavesOutSiteThatRefuses(t *testing.T) {
	f, _ := withSites(dave())
	_, body := get(t, f, "GET", "/whoami?kubeconfig", browser)
	if strings.Contains(body, "server: https://k8s.example.ts.net\n") || !strings.Contains(body, "current-context: a.example.ts.net/x%20y\n") {
		t.Errorf("got %s", body)
	}
}

func TestKubeconfig_ReadOnlyContextOfSites(t *testing.T) {
	elsewhere := &whoami.Facts{User: "alice", Groups: []whoami.Group{{Name: "devs"}, {Name: "readers"}}, ReadOnly: "readers"}
	f := alice()
	f.Sites = []whoami.Site{whoami.NewSite("https://a.example.ts.net", nil, elsewhere)}
	_, body := get(t, f, "GET", "/whoami?kubeconfig&site=a.example.ts.net", browser)
	if !strings.Contains(body, "current-context: a.example.ts.net-read-only\n") {
		t.Errorf("got %s", body)
	}
}
